"""Rotations beside a world that went on: overtaken runs, permissions of yesterday, hosts that meddle, old seals."""

from __future__ import annotations

import json
import math
import os
import struct
from functools import partial
from pathlib import Path
from uuid import UUID

import psycopg
import pytest

from tests.faults.evidence import wait
from tests.rotation import steps
from tests.rotation.test_manual import _begin, _journal, _permit, _work, _work_until_it_waits, by_hand  # noqa: F401
from tests.rotation.test_writers import once
from tests.rotation.vault import Vault
from worker import cutover, keychain, keyfile, keyring, masterkeys
from worker.errors import Refused
from worker.keyring import MasterKey

ROTATE = ("run", "rotate-master-key", "--inline", "--yes")
RETIRE = ("run", "retire-master-key", "--inline", "--yes")


def _refused(vault: Vault, *words: str, says: str) -> None:
    done = vault.deployment.cli(*words, ok=False)
    assert (done.returncode, len(done.stderr.splitlines())) == (2, 1), done.stderr
    assert says in done.stderr, done.stderr


# -- runs that another has overtaken --------------------------------------------------------------------


def _overtaken(vault: Vault) -> tuple[UUID, str, MasterKey]:
    """A run that was stopped before its cut-over, the one that brought the same key since, and that key."""
    path, new = steps.key_file(vault)
    first = steps.start(vault, new_key_file=str(path))
    steps.work_until(vault, first, steps.CUT_OVER)
    vault.deployment.operations.stop(str(first))
    second = vault.run("--new-key-file", str(path))
    assert second["kept"]
    return first, second["run"], new


def test_a_run_does_not_go_on_once_another_has_exchanged_the_key(released_vault: Vault) -> None:
    """It would take the other's key in the file for its own unfinished cut-over, and put the old one back."""
    vault = released_vault
    first, second, new = _overtaken(vault)
    _refused(vault, "runs", "resume", str(first), "--inline", says=f"run {second} has exchanged the key since")
    assert vault.now == new
    assert vault.opened(new) == vault.held


def test_nor_does_a_rollback_that_another_has_done(released_vault: Vault) -> None:
    vault = released_vault
    done = vault.run("--generate")
    back = steps.start(vault, rollback=UUID(done["run"]))
    steps.work_until(vault, back, steps.CUT_OVER)
    vault.deployment.operations.stop(str(back))
    assert vault.run("--rollback", done["run"])["kept"]
    _refused(vault, "runs", "resume", str(back), "--inline", says="has exchanged the key since")
    assert vault.now == vault.key
    assert vault.opened(vault.key) == vault.held


def test_an_overtaken_run_that_is_under_way_all_the_same_puts_no_key_back(released_vault: Vault) -> None:
    """As a release without the guard left it: reopened."""
    vault = released_vault
    first, _, new = _overtaken(vault)
    vault.deployment.query(
        "UPDATE paperclip_worker.runs SET state = 'running', settled_at = NULL WHERE id = %s", first
    )
    with pytest.raises(Refused, match="has exchanged the key since"):
        steps.work(vault, first)
    assert vault.deployment.operations.find(str(first)).state.value == "failed"
    assert vault.now == new
    assert vault.opened(new) == vault.held


def test_a_permission_is_for_the_time_the_servers_are_stopped(by_hand: Vault) -> None:  # noqa: F811
    vault = by_hand
    run, _ = _begin(vault)
    _work_until_it_waits(vault, run, "keys switch")
    _permit(vault, run)
    vault.deployment.operations.stop(str(run))
    vault.deployment.operations.resume(str(run))
    _work_until_it_waits(vault, run, "keys switch")
    assert _journal(vault, run, "cut_over_at") is None
    assert vault.opened(vault.key) == vault.held
    _permit(vault, run)
    _work(vault, run, 3)
    assert _journal(vault, run, "cut_over_at") is not None


# -- hosts that meddle ----------------------------------------------------------------------------------


def test_a_row_that_moves_to_where_another_was_keeps_its_own_value(vault: Vault) -> None:
    """One transaction wrote all, so each is in the same version; the first are deleted and the table is rewritten."""
    run = steps.start(vault, generate=True)
    steps.work_until(vault, run, steps.CUT_OVER)
    with psycopg.connect(vault.deployment.environment["DATABASE_URL"], autocommit=True) as admin:
        gone = admin.execute(
            "DELETE FROM company_secret_versions WHERE id IN "
            "(SELECT id FROM company_secret_versions ORDER BY ctid LIMIT 20) RETURNING id::text"
        ).fetchall()
        admin.execute("VACUUM FULL company_secret_versions")
    for (row,) in gone:
        vault.held.pop(("company_secret_versions", row), None)
    assert steps.work(vault, run)["kept"]
    assert vault.opened(vault.now) == vault.held


def test_rows_that_were_dumped_and_restored_are_made_ready_again(released_vault: Vault) -> None:
    """In a server that has had fewer transactions none is young, and in a second one the files may be the same."""
    vault = released_vault
    run = steps.start(vault, generate=True)
    steps.work_until(vault, run, steps.CUT_OVER)
    vault.deployment.query("UPDATE paperclip_worker.rotations SET horizon = '1000000000'")
    for table in {table for table, _ in vault.held}:
        vault.deployment.query(f"UPDATE {table} SET id = id")
    assert steps.work(vault, run)["kept"]
    swapped = "SELECT key, rows::int FROM paperclip_worker.shards WHERE run_id = %s AND rows > 0"
    assert vault.deployment.query(swapped, run) == [("cut-over", len(vault.held))]
    assert vault.opened(vault.now) == vault.held


@pytest.mark.parametrize("returns", ["OLD", "NULL"])
def test_rows_that_do_not_take_new_ciphertext_stop_the_cut_over(released_vault: Vault, returns: str) -> None:
    vault = released_vault
    vault.deployment.query(
        f"CREATE FUNCTION keep() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN RETURN {returns}; END $$"
    )
    vault.deployment.query(
        "CREATE TRIGGER keep BEFORE UPDATE ON company_secret_proposals FOR EACH ROW EXECUTE FUNCTION keep()"
    )
    done = vault.deployment.cli(*ROTATE, "--generate", ok=False)
    assert done.returncode == 1
    assert "7 rows of company_secret_proposals do not take new ciphertext" in done.stderr
    assert vault.now == vault.key
    assert vault.opened(vault.key) == vault.held


@pytest.mark.parametrize("how", ["PARTITION BY HASH (id)", "INHERITS"])
def test_a_carrier_whose_rows_lie_in_other_tables_is_refused(released_vault: Vault, how: str) -> None:
    vault, table = released_vault, "company_secret_proposals"
    if how == "INHERITS":
        vault.deployment.query(f"CREATE TABLE more () INHERITS ({table})")
    else:
        for one in (
            f"ALTER TABLE {table} RENAME TO old_table",
            f"CREATE TABLE {table} (LIKE old_table INCLUDING DEFAULTS) {how}",
            f"CREATE TABLE part PARTITION OF {table} FOR VALUES WITH (MODULUS 1, REMAINDER 0)",
            f"INSERT INTO {table} SELECT * FROM old_table",
            "DROP TABLE old_table CASCADE",
        ):
            vault.deployment.query(one)
    _refused(vault, *ROTATE, "--generate", says=f"{table} is partitioned, or other tables inherit from it")
    assert vault.now == vault.key


@pytest.mark.parametrize(
    ("types", "column"),
    [
        (("CREATE DOMAIN inner_doc AS jsonb", "CREATE DOMAIN doc AS inner_doc"), "doc"),
        (("CREATE DOMAIN doc AS jsonb",), "doc[]"),
        (("CREATE TYPE doc AS (v jsonb)",), "doc"),
        ((), "MATERIALIZED"),
    ],
)
def test_ciphertext_within_other_types_is_found(released_vault: Vault, types: tuple[str, ...], column: str) -> None:
    vault = released_vault
    text = json.dumps(vault.seal("p"))
    for one in types:
        vault.deployment.query(one)
    made = {
        "doc": "(%s::jsonb)::doc" if "TYPE" not in str(types) else "ROW(%s::jsonb)::doc",
        "doc[]": "ARRAY[%s::jsonb::doc]",
    }
    if column == "MATERIALIZED":
        vault.deployment.query("CREATE MATERIALIZED VIEW mine AS SELECT material AS m FROM company_secret_versions")
    else:
        vault.deployment.query(f"CREATE TABLE mine (m {column})")
        vault.deployment.query(f"INSERT INTO mine SELECT {made[column]}", text)
    done = vault.deployment.cli(*ROTATE, "--generate", ok=False)
    assert "columns this release does not know may hold ciphertext: public.mine.m" in done.stderr
    assert vault.now == vault.key


def test_an_autovacuum_does_not_hold_up_the_cut_over(released_vault: Vault) -> None:
    """PostgreSQL ends it for whoever waits for its lock longer than deadlock_timeout, and for nobody else."""
    vault, table = released_vault, "company_secret_proposals"
    at_work = "SELECT count(*) > 0 FROM pg_stat_activity WHERE backend_type = 'autovacuum worker' AND query LIKE %s"
    with psycopg.connect(vault.deployment.environment["DATABASE_URL"], autocommit=True) as admin:
        others = admin.execute(
            "SELECT string_agg(quote_ident(attname), ', ') FROM pg_attribute WHERE attrelid = %s::regclass "
            "AND attnum > 0 AND attname NOT IN ('id', 'value_ciphertext')",
            (table,),
        ).fetchone()
        assert others is not None
        admin.execute(
            f"INSERT INTO {table} (id, {others[0]}) SELECT gen_random_uuid(), {others[0]} "
            f"FROM (SELECT * FROM {table} LIMIT 1) one, generate_series(1, 60000)".encode()
        )
        admin.execute(
            f"ALTER TABLE {table} SET (autovacuum_vacuum_threshold = 1, autovacuum_vacuum_scale_factor = 0, "
            "autovacuum_vacuum_cost_delay = 100, autovacuum_vacuum_cost_limit = 1)".encode()
        )
        admin.execute(f"DELETE FROM {table} WHERE value_ciphertext IS NULL".encode())
        admin.execute("ALTER SYSTEM SET autovacuum_naptime = 1")
        admin.execute("SELECT pg_reload_conf()")
        try:
            wait(lambda: admin.execute(at_work.encode(), (f"%{table}%",)).fetchone() == (True,))
            assert vault.run("--generate")["kept"]
        finally:
            admin.execute("ALTER SYSTEM RESET autovacuum_naptime")
            admin.execute("SELECT pg_reload_conf()")
    assert vault.opened(vault.now) == vault.held


def test_a_materialized_view_that_holds_nothing_yet_is_nothing_to_look_into(released_vault: Vault) -> None:
    vault = released_vault
    vault.deployment.query(
        "CREATE MATERIALIZED VIEW mine AS SELECT material AS m FROM company_secret_versions WITH NO DATA"
    )
    assert vault.run("--generate")["kept"]


# -- keys that must stay --------------------------------------------------------------------------------


def _end(vault: Vault, *runs: str) -> None:
    """The time of these runs' old keys is over."""
    ids = [UUID(run) for run in runs]
    query = "UPDATE paperclip_worker.rotations SET retire_after = now() - interval '1 minute' WHERE run_id = ANY(%s)"
    vault.deployment.query(query, ids)


def _sealed(vault: Vault) -> list[str]:
    return [
        key
        for (key,) in vault.deployment.query(
            "SELECT old_key FROM paperclip_worker.rotations WHERE sealed IS NOT NULL"
        )
    ]


def test_a_key_stays_until_the_last_of_its_seals_is_over(released_vault: Vault) -> None:
    vault = released_vault
    first = vault.run("--generate")
    back = vault.run("--rollback", first["run"])
    third = vault.run("--generate")
    _end(vault, first["run"], back["run"])
    assert vault.deployment.json(*RETIRE)["kept"]
    assert vault.key.fingerprint in _sealed(vault)
    _end(vault, third["run"])
    assert vault.deployment.json(*RETIRE)["kept"]
    assert _sealed(vault) == []


def test_the_seal_of_the_key_in_use_keeps_no_other(released_vault: Vault) -> None:
    """After a rollback: the key that was rolled back to lies under the one that goes."""
    vault = released_vault
    first = vault.run("--generate")
    gone = vault.now
    back = vault.run("--rollback", first["run"], "--retire-after", "1d")
    _end(vault, back["run"])
    assert vault.deployment.json(*RETIRE)["receipt"]["evidence"]["retired"] == [gone.fingerprint]
    assert vault.opened(vault.now) == vault.held


def test_a_key_under_which_another_still_lies_does_not_keep_the_sweep_from_its_work(released_vault: Vault) -> None:
    vault = released_vault
    first = vault.run("--generate")
    between = vault.now
    second = vault.run("--generate", "--retire-after", "1d")
    _end(vault, second["run"])
    with vault.connect() as connection:
        vault.add_version(connection, "late", key=between)
    assert vault.deployment.json(*RETIRE)["kept"]
    assert vault.opened(vault.now) == vault.held
    assert sorted(_sealed(vault)) == sorted([vault.key.fingerprint, between.fingerprint])
    _end(vault, first["run"])
    assert vault.deployment.json(*RETIRE)["kept"]
    assert _sealed(vault) == []


def _stopped_on_its_way_back(vault: Vault, how: str) -> UUID:
    """A run to the key that the last one replaced, stopped just before its cut-over."""
    first = vault.run("--generate")["run"]
    path, _ = steps.key_file(vault, key=vault.key)
    fields = {"rollback": UUID(first)} if how == "--rollback" else {"new_key_file": str(path)}
    run = steps.start(vault, **fields)
    steps.work_until(vault, run, steps.CUT_OVER)
    vault.deployment.operations.stop(str(run))
    _end(vault, first)
    return run


@pytest.mark.parametrize("how", ["--rollback", "--new-key-file"])
@pytest.mark.parametrize("words", [RETIRE, ("keys", "retire", "{key}", "--inline", "--yes")])
def test_a_key_that_a_stopped_run_may_still_bring_back_stays(
    released_vault: Vault, how: str, words: tuple[str, ...]
) -> None:
    vault = released_vault
    run, key = _stopped_on_its_way_back(vault, how), vault.key.fingerprint
    says = f"run {run} may still be resumed and brings back the key {key}; resume it"
    _refused(vault, *(word.format(key=key) for word in words), says=says)
    vault.deployment.cli("runs", "resume", str(run), "--inline")
    assert vault.now == vault.key
    assert vault.opened(vault.key) == vault.held


def test_once_another_key_is_in_use_a_stopped_run_keeps_none(released_vault: Vault) -> None:
    vault = released_vault
    _stopped_on_its_way_back(vault, "--rollback")
    assert vault.run("--generate")["kept"]
    assert vault.deployment.json("keys", "retire", vault.key.fingerprint, "--inline", "--yes")["kept"]
    assert vault.opened(vault.now) == vault.held


def _destroy(vault: Vault) -> None:
    """As a release did that retired a key whatever run was on its way to it."""
    with vault.deployment.operations.transaction() as connection:
        one = next(one for one in masterkeys.under_seal(connection) if one.old_key == vault.key.fingerprint)
        masterkeys.destroy(connection, one, by=one.run_id)


@pytest.mark.parametrize("how", ["--rollback", "--new-key-file"])
def test_no_run_goes_on_to_a_key_that_was_retired_since(released_vault: Vault, how: str) -> None:
    """The key in use would be left nowhere: its seal is gone with the key it lay under."""
    vault = released_vault
    run, second = _stopped_on_its_way_back(vault, how), vault.now
    _destroy(vault)
    says = f"the key {vault.key.fingerprint} was retired for good"
    _refused(vault, "runs", "resume", str(run), "--inline", says=says)
    assert vault.now == second
    assert vault.opened(second) == vault.held


def test_nor_when_that_happens_just_before_the_rename(released_vault: Vault, monkeypatch: pytest.MonkeyPatch) -> None:
    vault = released_vault
    run, second = _stopped_on_its_way_back(vault, "--rollback"), vault.now
    vault.deployment.operations.resume(str(run))
    # Of the old key's own journal alone: this run's is held by the bite.
    query = "UPDATE paperclip_worker.rotations SET sealed = NULL, retired_at = now() WHERE old_key = %s"
    key = vault.key.fingerprint

    def retire() -> None:
        vault.deployment.query(query, key)

    once(monkeypatch, cutover, "hold_off_writers", retire)
    with pytest.raises(Refused, match="was retired for good"):
        steps.work(vault, run)
    assert vault.now == second
    assert vault.opened(second) == vault.held


def test_a_run_whose_old_key_is_under_no_seal_any_more_does_not_cut_over(released_vault: Vault) -> None:
    vault = released_vault
    run = steps.start(vault, generate=True)
    steps.work_until(vault, run, steps.CUT_OVER)
    vault.deployment.query("UPDATE paperclip_worker.rotations SET sealed = NULL")
    with pytest.raises(Refused, match=f"the key {vault.key.fingerprint} is no longer under seal in run {run}"):
        steps.work(vault, run)
    assert vault.now == vault.key
    assert vault.opened(vault.key) == vault.held


@pytest.mark.parametrize(
    ("retired", "stays", "free"), [(0, "the key {1} is sealed under {0}; retire {1} first", False), (1, "", True)]
)
def test_a_key_that_lies_under_two_seals_is_not_lost_with_one(
    released_vault: Vault, retired: int, stays: str, free: bool
) -> None:
    """There and back and on to a third: each of the two lies under the other, and the first under the third too."""
    vault = released_vault
    first = vault.run("--generate")
    keys = [vault.key, vault.now]
    assert vault.run("--rollback", first["run"])["kept"]
    assert vault.run("--generate")["kept"]
    words = ("keys", "retire", keys[retired].fingerprint, "--inline", "--yes")
    if not free:
        _refused(vault, *words, says=stays.format(*(one.fingerprint for one in keys)))
        return
    assert vault.deployment.json(*words)["kept"]
    found = {vault.now.fingerprint: vault.now}
    with vault.deployment.operations.transaction(read_only=True) as connection:
        keychain.unseal(connection, found)
    assert list(found.values()) == [vault.now, keys[0]]
    assert vault.deployment.json("keys", "retire", keys[0].fingerprint, "--inline", "--yes")["kept"]


def test_a_key_whose_time_is_over_goes_though_one_that_stays_lies_under_it_as_well(released_vault: Vault) -> None:
    vault = released_vault
    first = vault.run("--generate")
    second = vault.now
    back = vault.run("--rollback", first["run"], "--retire-after", "1d")
    assert vault.run("--generate")["kept"]
    _end(vault, back["run"])
    assert vault.deployment.json(*RETIRE)["receipt"]["evidence"]["retired"] == [second.fingerprint]
    assert vault.opened(vault.now) == vault.held


def test_the_only_copy_of_a_key_is_not_removed_while_something_opens_with_none(released_vault: Vault) -> None:
    vault = released_vault
    first = steps.start(vault, generate=True)
    steps.work_until(vault, first, steps.CUT_OVER)
    (staged,) = (one for one in vault.file.parent.iterdir() if one.name != "master.key")
    lost = keyring.read(staged)
    with vault.connect() as connection:
        row = vault.add_version(connection, "sealed between a rename and a kill", key=lost)
    vault.deployment.operations.stop(str(first))
    assert vault.run("--generate", "--allow-undecryptable", "1")["kept"]
    assert keyring.read(staged) == lost
    vault.deployment.query("DELETE FROM company_secret_versions WHERE id = %s", row)
    assert vault.run("--generate")["kept"]
    assert not staged.exists()


def test_a_retirement_may_take_as_long_as_a_look_at_everything(released_vault: Vault) -> None:
    vault = released_vault
    assert vault.run("--generate")["kept"]
    _much(vault)
    vault.deployment.cli(*RETIRE, env={"PAPERCLIP_WORKER_STATEMENT_TIMEOUT": "0.25"})


def _much(vault: Vault) -> None:
    vault.deployment.query(
        "INSERT INTO heartbeat_runs (id, company_id, agent_id, status, context_snapshot) "
        "SELECT gen_random_uuid(), a.company_id, a.id, 'succeeded', jsonb_build_object('t', (SELECT "
        "string_agg(md5(g::text || '-' || k::text), '') FROM generate_series(1, 200) k), 'm', %s::jsonb) "
        "FROM generate_series(1, 6000) g, (SELECT * FROM agents LIMIT 1) a",
        json.dumps(vault.seal("x", vault.now)),
    )


def _done(vault: Vault, run: UUID, shard: str) -> bool:
    query = "SELECT done FROM paperclip_worker.shards WHERE run_id = %s AND key = %s ORDER BY stage LIMIT 1"
    return bool(vault.deployment.query(query, run, shard)[0][0])


def test_a_look_at_what_came_since_may_take_as_long_as_one_at_everything(released_vault: Vault) -> None:
    """A run that stood still for days has much to look at; a bite's time would not do, however often it is tried."""
    vault = released_vault
    slow = steps.with_environment(vault, PAPERCLIP_WORKER_STATEMENT_TIMEOUT="0.1")
    run = steps.start(vault, generate=True)
    for stage, shard in ((steps.CATCH_UP, "catch-up"), (steps.CUT_OVER, "cut-over"), (steps.SWEEP, "sweep")):
        steps.work_until(vault, run, stage)
        _much(vault)
        slow.deployment.operations.runner().work(run, seconds=math.inf, leave=partial(_done, vault, run, shard))
    assert steps.work(vault, run)["kept"] is True


# -- the key file ---------------------------------------------------------------------------------------


@pytest.fixture
def listed(tmp_path: Path) -> Path:
    """A key file that one other user may read by an access control list."""
    file = tmp_path / "master.key"
    file.write_text(keyring.generate().text)
    file.chmod(0o600)
    # Version 2; then tag, permissions and id: owner rw, user 1234 r, group nothing, mask r, others nothing.
    entries = ((1, 6, 0xFFFFFFFF), (2, 4, 1234), (4, 0, 0xFFFFFFFF), (16, 4, 0xFFFFFFFF), (32, 0, 0xFFFFFFFF))
    packed = struct.pack("<I", 2) + b"".join(struct.pack("<HHI", *one) for one in entries)
    try:
        os.setxattr(file, "system.posix_acl_access", packed)
    except (AttributeError, OSError):
        pytest.skip("no access control lists on this system or filesystem")
    return file


def test_who_may_read_the_key_file_by_a_list_still_may(listed: Path) -> None:
    before, mode = os.getxattr(listed, "system.posix_acl_access"), listed.stat().st_mode
    keyfile.swap(listed, keyfile.stage(listed, new := keyring.generate(), "next"), expected=keyring.read(listed))
    assert keyring.read(listed) == new
    assert (os.getxattr(listed, "system.posix_acl_access"), listed.stat().st_mode) == (before, mode)
