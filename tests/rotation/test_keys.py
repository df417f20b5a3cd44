"""keys list, switch and retire; and the job that retires old keys when their time is over."""

from __future__ import annotations

import json
from typing import Any
from uuid import UUID, uuid4

import psycopg
import pytest

from tasks.retire_master_key import RetireMasterKey
from tests.cli.helpers import refused
from tests.rotation import steps
from tests.rotation.test_writers import once
from tests.rotation.vault import Vault
from worker import cutover, keyring, masterkeys
from worker.errors import Refused
from worker.keyring import MasterKey
from worker.retirement import Retiring
from worker.runner import Outcome

RETIRE = ("run", "retire-master-key", "--inline", "--yes", "--json")


def rotated(vault: Vault) -> str:
    """A vault after a rotation; the old key's fingerprint."""
    assert vault.run("--generate")["kept"]
    return vault.key.fingerprint


def listed(vault: Vault) -> Any:
    return vault.deployment.json("keys", "list")


def test_the_list_tells_the_key_in_use_and_what_became_of_the_old(vault: Vault) -> None:
    assert listed(vault) == {
        "in_use": {"fingerprint": vault.key.fingerprint, "from": str(vault.file)},
        "rotations": [],
        "keys": [],
    }
    old = rotated(vault)
    found = listed(vault)
    assert found["in_use"]["fingerprint"] == vault.now.fingerprint
    (one,) = found["rotations"]
    assert (one["old"], one["new"], one["state"]) == (old, vault.now.fingerprint, "under seal")
    number = sum(sum(texts.values()) for texts in vault.held.values())
    counted = {key["fingerprint"]: (key["found"], key["current"]) for key in found["keys"]}
    assert counted == {old: (0, False), vault.now.fingerprint: (number, True)}
    text = vault.deployment.cli("keys", "list").stdout
    assert text.startswith(f"in use: {vault.now.fingerprint} (")
    assert "under seal" in text


def test_a_key_whose_time_is_not_over_stays(vault: Vault) -> None:
    rotated(vault)
    result = vault.deployment.json(*RETIRE[:-1])
    assert (result["kept"], result["rows"]) == (True, 0)
    assert listed(vault)["rotations"][0]["state"] == "under seal"


def test_stragglers_are_swept_long_before_the_time_of_their_key_is_over(vault: Vault) -> None:
    """A run that wrote back an old context would be unreadable until then."""
    old = rotated(vault)
    with vault.connect() as connection:
        vault.add_version(connection, "late", key=vault.key)
    plan = vault.deployment.json("plan", "retire-master-key")
    assert plan["rows"] == 1
    assert f"{old}: replaced by {vault.now.fingerprint}" in plan["notes"][0]
    assert "; kept until " in plan["notes"][0]
    result = vault.deployment.json(*RETIRE[:-1])
    assert (result["kept"], result["rows"]) == (True, 1)
    assert result["receipt"]["evidence"]["retired"] == []
    assert vault.opened(vault.now) == vault.held
    assert listed(vault)["rotations"][0]["state"] == "under seal"


def test_a_key_whose_time_is_over_goes_and_stragglers_are_swept(vault: Vault) -> None:
    old = rotated(vault)
    with vault.connect() as connection:
        vault.add_version(connection, "late", key=vault.key)
        connection.execute("UPDATE paperclip_worker.rotations SET retire_after = now() - interval '1 minute'")
    result = vault.deployment.json(*RETIRE[:-1])
    assert (result["kept"], result["rows"]) == (True, 1)
    assert result["receipt"]["evidence"]["retired"] == [old]
    assert vault.opened(vault.now) == vault.held
    assert listed(vault)["rotations"][0]["state"] == "retired"
    assert vault.deployment.query("SELECT sealed FROM paperclip_worker.rotations") == [(None,)]
    assert vault.deployment.query("SELECT count(*) FROM paperclip_worker.resealed") == [(0,)]


def test_keys_retire_ends_one_before_its_time(released_vault: Vault) -> None:
    vault = released_vault
    old = rotated(vault)
    assert vault.deployment.json("keys", "retire", old, "--inline", "--yes")["kept"] is True
    assert listed(vault)["rotations"][0]["state"] == "retired"
    refused(vault.deployment, "keys", "retire", old, "--inline", "--yes", says="no key .* is under seal")
    done = vault.deployment.json("runs", "list")
    run = next(one["run"] for one in done["runs"] if one["job"] == "rotate-master-key")
    words = ("run", "rotate-master-key", "--inline", "--yes", "--rollback", run)
    refused(vault.deployment, *words, says="retired for good")


def test_an_older_key_goes_before_the_one_it_is_sealed_under(released_vault: Vault) -> None:
    vault = released_vault
    first = rotated(vault)
    second = vault.now.fingerprint
    assert vault.run("--generate")["kept"]
    words = ("keys", "retire", second, "--inline", "--yes")
    refused(vault.deployment, *words, says=f"retire {first} first")
    for one in (first, second):
        assert vault.deployment.json("keys", "retire", one, "--inline", "--yes")["kept"] is True
    assert vault.opened(vault.now) == vault.held


@pytest.mark.parametrize(
    "words", [("keys", "retire", "0" * 12, "--inline", "--yes"), ("keys", "switch", "last", "--yes")]
)
def test_what_makes_no_sense_is_refused(released_vault: Vault, words: tuple[str, ...]) -> None:
    refused(released_vault.deployment, *words, says="no key|no run|is no rotation")


def test_a_key_nobody_can_open_is_said_so(released_vault: Vault) -> None:
    vault = released_vault
    rotated(vault)
    second = vault.now.fingerprint
    assert vault.run("--generate")["kept"]
    vault.deployment.query("UPDATE paperclip_worker.rotations SET sealed = NULL WHERE old_key = %s", second)
    found = vault.deployment.cli(*RETIRE[:-3], "--key", vault.key.fingerprint, "--inline", "--yes", ok=False)
    assert found.returncode != 0
    assert "cannot be opened with the one in use" in found.stderr
    assert {one["state"] for one in listed(vault)["rotations"]} == {"under seal"}


# -- what else holds a key that is to go -----------------------------------------------------------------


def test_no_file_beside_the_key_file_keeps_a_key_that_was_destroyed(released_vault: Vault) -> None:
    """What stopped and killed runs left there, whole or half; files of other keys and of others stay."""
    vault = released_vault
    old = rotated(vault)
    folder, run, text = vault.file.parent, f"master.key.paperclip-worker-{uuid4()}", vault.key.text
    gone = {
        run: text,
        f"{run}-old": text,
        f".{run}.paperclip-worker-part": text[:20],
        ".master.key.paperclip-worker-part": text,
    }
    stay = {
        f"master.key.paperclip-worker-{uuid4()}": keyring.generate().text,
        f".master.key.paperclip-worker-{uuid4()}.paperclip-worker-part": keyring.generate().text[:20],
        "backup.key": text,
    }
    for name, content in (gone | stay).items():
        (folder / name).write_text(content)
    result = vault.deployment.json("keys", "retire", old, "--inline", "--yes")
    assert result["receipt"]["evidence"]["files_removed"] == sorted(gone)
    assert {one.name for one in folder.iterdir()} == {"master.key", *stay}


def test_a_key_whose_file_cannot_be_looked_into_stays_under_seal(released_vault: Vault) -> None:
    vault = released_vault
    old = rotated(vault)
    file = vault.file.parent / f"master.key.paperclip-worker-{uuid4()}"
    file.mkdir()
    done = vault.deployment.cli("keys", "retire", old, "--inline", "--yes", ok=False)
    assert done.returncode == 1
    assert f"{file} is not a regular file" in done.stderr
    assert listed(vault)["rotations"][0]["state"] == "under seal"


# -- the key in use --------------------------------------------------------------------------------------


def test_a_worker_without_the_key_in_use_retires_nothing(vault: Vault) -> None:
    """Configuration management put the old key back, or the worker of a manual rotation never got the new one."""
    old = rotated(vault)
    new = vault.now
    vault.deployment.query("UPDATE paperclip_worker.rotations SET retire_after = now() - interval '1 minute'")
    vault.file.write_text(vault.key.text)
    says = f"this worker has the key {old}, not {new.fingerprint} which run .* brought"
    for words in (RETIRE[:-1], ("plan", "retire-master-key"), ("keys", "retire", old, "--inline", "--yes")):
        refused(vault.deployment, *words, says=says)
    refused(vault.deployment, *RETIRE[:-1], says=says, env={"PAPERCLIP_SECRETS_MASTER_KEY": vault.key.text})
    assert listed(vault)["rotations"][0]["state"] == "under seal"
    vault.deployment.cli(*RETIRE, env={"PAPERCLIP_SECRETS_MASTER_KEY": new.text})
    assert listed(vault)["rotations"][0]["state"] == "retired"


def test_nothing_is_sealed_anew_with_a_key_that_is_not_in_use(vault: Vault) -> None:
    """Put back while the run is under way: the servers could not read what was swept."""
    rotated(vault)
    second = vault.now
    assert vault.run("--generate")["kept"]
    third = vault.now
    with vault.connect() as connection:
        vault.add_version(connection, "late", key=vault.key)
    run = vault.deployment.operations.start(RetireMasterKey(), actor="tester", via="test")
    assert vault.deployment.operations.runner().work(run, seconds=0) is Outcome.MORE
    vault.file.write_text(second.text)
    with pytest.raises(Refused, match=f"this worker has the key {second.fingerprint}, not {third.fingerprint}"):
        steps.work(vault, run)
    assert vault.opened(third, vault.key) == vault.held
    vault.file.write_text(third.text)
    vault.deployment.operations.resume(str(run))
    assert steps.work(vault, run)["kept"] is True
    assert vault.opened(third) == vault.held


# -- what comes while a key goes, and what never ends ----------------------------------------------------


def test_what_is_written_after_the_last_look_is_not_lost(released_vault: Vault, monkeypatch: Any) -> None:
    vault = released_vault
    old = rotated(vault)
    run = vault.deployment.operations.start(RetireMasterKey(key=old), actor="tester", via="test")

    def write() -> None:
        with vault.connect() as connection:
            vault.add_version(connection, "written back by a long run", key=vault.key)

    once(monkeypatch, cutover, "hold_off_writers", write)
    with pytest.raises(Refused, match=f"1 ciphertexts came under {old} since they were looked for; resume the run"):
        steps.work(vault, run)
    assert listed(vault)["rotations"][0]["state"] == "under seal"
    vault.deployment.operations.resume(str(run))
    assert steps.work(vault, run)["kept"] is True
    assert vault.opened(vault.now) == vault.held
    assert listed(vault)["rotations"][0]["state"] == "retired"


def test_nobody_writes_between_the_last_look_and_the_end_of_a_key(released_vault: Vault, monkeypatch: Any) -> None:
    vault = released_vault
    old, waited = rotated(vault), list[bool]()

    def write() -> None:
        with vault.connect() as connection:
            connection.execute("SET lock_timeout = '100ms'")
            with pytest.raises(psycopg.errors.LockNotAvailable):
                connection.execute("UPDATE company_secret_versions SET version = version + 0")
            waited.append(True)

    once(monkeypatch, masterkeys, "destroy", write)
    run = vault.deployment.operations.start(RetireMasterKey(key=old), actor="tester", via="test")
    assert steps.work(vault, run)["kept"] is True
    assert waited == [True]


def test_rows_that_do_not_take_new_ciphertext_keep_their_key(released_vault: Vault) -> None:
    vault = released_vault
    old = rotated(vault)
    with vault.connect() as connection:
        vault.add_version(connection, "late", key=vault.key)
    for one in (
        "CREATE FUNCTION keep() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN RETURN NULL; END $$",
        "CREATE TRIGGER keep BEFORE UPDATE ON company_secret_versions FOR EACH ROW EXECUTE FUNCTION keep()",
    ):
        vault.deployment.query(one)
    run = vault.deployment.operations.start(RetireMasterKey(key=old), actor="tester", via="test")
    runner = vault.deployment.operations.runner()
    with pytest.raises(Refused, match="1 rows of company_secret_versions do not take new ciphertext"):
        runner.work(run, seconds=5)
    assert vault.deployment.operations.result(run)["state"] == "failed"
    assert vault.opened(vault.now, vault.key) == vault.held


def test_a_server_that_still_seals_with_an_old_key_is_a_finding(released_vault: Vault, monkeypatch: Any) -> None:
    vault = released_vault
    old = rotated(vault)
    original = Retiring.sweep

    def busy(retiring: Retiring, rotation: UUID) -> int:
        found = original(retiring, rotation)
        with vault.connect() as connection:
            vault.add_version(connection, "by a server", key=vault.key)
        return found

    monkeypatch.setattr(Retiring, "sweep", busy)
    run = vault.deployment.operations.start(RetireMasterKey(key=old), actor="tester", via="test")
    assert vault.deployment.operations.runner().work(run, seconds=20) is Outcome.SETTLED
    result = vault.deployment.operations.result(run)
    assert result["state"] == "unkept"
    assert result["findings"][0]["what"] == f"still under {old}"
    assert vault.opened(vault.now, vault.key) == vault.held
    assert listed(vault)["rotations"][0]["state"] == "under seal"


def test_a_rehearsal_ends_though_it_puts_nothing_right(released_vault: Vault) -> None:
    vault = released_vault
    rotated(vault)
    with vault.connect() as connection:
        vault.add_version(connection, "late", key=vault.key)
    assert vault.deployment.json("rehearse", "retire-master-key")["rows"] == 1
    assert vault.opened(vault.now, vault.key) == vault.held


# -- ciphertext where no carrier is ----------------------------------------------------------------------


def _note(vault: Vault, *keys: MasterKey, table: str = "notes") -> None:
    vault.deployment.query(f"CREATE TABLE public.{table} (id int, body jsonb)")
    for number, key in enumerate(keys):
        kept = json.dumps({"kept": vault.seal("hidden", key)})
        vault.deployment.query(f"INSERT INTO {table} VALUES (%s, %s)", number, kept)


def test_ciphertext_in_an_unknown_column_keeps_the_key(vault: Vault) -> None:
    old = rotated(vault)
    _note(vault, vault.key, vault.now)
    done = vault.deployment.cli("keys", "retire", old, "--inline", "--yes", ok=False)
    assert done.returncode == 1
    assert f"that are not under the key in use, {vault.now.fingerprint}: public.notes.body (1)" in done.stderr
    assert listed(vault)["rotations"][0]["state"] == "under seal"
    # Once they are put right the run goes on.
    vault.deployment.query("DELETE FROM notes WHERE id = 0")
    vault.deployment.cli("runs", "resume", "last", "--inline")
    assert listed(vault)["rotations"][0]["state"] == "retired"


@pytest.mark.parametrize("where", ["a new table", "a table that was looked into"])
def test_ciphertext_that_was_put_elsewhere_while_a_run_stood_still_keeps_the_key(
    released_vault: Vault, where: str
) -> None:
    """Put right by moving it: what the run looked into before it failed has none any more, and another column has."""
    vault = released_vault
    old = rotated(vault)
    _note(vault, vault.key)
    _note(vault, table="others")
    assert vault.deployment.cli("keys", "retire", old, "--inline", "--yes", ok=False).returncode == 1
    if where == "a new table":
        vault.deployment.query("DROP TABLE others")
        vault.deployment.query("CREATE TABLE others AS SELECT * FROM notes")
    else:
        vault.deployment.query("INSERT INTO others SELECT * FROM notes")
    vault.deployment.query("DELETE FROM notes")
    done = vault.deployment.cli("runs", "resume", "last", "--inline", ok=False)
    assert done.returncode == 1
    assert ": public.others.body (1);" in done.stderr
    assert listed(vault)["rotations"][0]["state"] == "under seal"


def test_a_column_that_its_rotation_allowed_does_not_keep_the_key(released_vault: Vault) -> None:
    vault = released_vault
    _note(vault, vault.key)
    assert vault.run("--generate", "--allow-column", "notes.body")["kept"]
    assert vault.deployment.json("keys", "retire", vault.key.fingerprint, "--inline", "--yes")["kept"]
    second = vault.now.fingerprint
    assert vault.run("--generate", "--allow-column", "public.notes.body")["kept"]
    _note(vault, table="others")
    vault.deployment.query("INSERT INTO others SELECT * FROM notes")
    done = vault.deployment.cli("keys", "retire", second, "--inline", "--yes", ok=False)
    assert ": public.others.body (1);" in done.stderr


def test_talk_about_ciphertext_does_not_keep_a_key_for_ever(released_vault: Vault) -> None:
    """Nobody can tell it from a damaged envelope, but its operator, who may say so when the key is to go."""
    vault = released_vault
    old = rotated(vault)
    vault.deployment.query("CREATE TABLE talk (body text)")
    vault.deployment.query("INSERT INTO talk VALUES (%s)", '"scheme": "local_encrypted_v1" has a "ciphertext"')
    retire = ("keys", "retire", old, "--inline", "--yes")
    done = vault.deployment.cli(*retire, ok=False)
    assert "public.talk.body (1)" in done.stderr
    assert "--allow-column" in done.stderr
    refused(vault.deployment, *retire, "--allow-column", "talk.bodies", says="talk.bodies is no text or JSON column")
    assert listed(vault)["rotations"][0]["state"] == "under seal"
    assert vault.deployment.json(*retire, "--allow-column", "talk.body")["kept"]
    assert listed(vault)["rotations"][0]["state"] == "retired"


def test_while_no_key_is_due_no_other_column_is_looked_into(released_vault: Vault) -> None:
    vault = released_vault
    rotated(vault)
    _note(vault, vault.key)
    result = vault.deployment.json(*RETIRE[:-1])
    assert result["kept"] is True
    query = "SELECT count(*) FROM paperclip_worker.shards WHERE run_id = %s AND key LIKE 'discover%%'"
    assert vault.deployment.query(query, UUID(result["run"])) == [(0,)]
