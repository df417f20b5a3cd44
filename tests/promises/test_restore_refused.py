"""What restore-logs refuses: in one line that says so, before anything is changed, without any row's content."""

from __future__ import annotations

import hashlib
import io
import math
import re
from collections.abc import Callable
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
import zstandard
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from tasks.archive_tasks import ArchiveTasks
from tasks.prune_logs import PruneLogs
from tasks.restore_logs import RestoreLogs
from tests.cli.helpers import INLINE, keys, refused, world
from tests.conftest import Deployment
from tests.faults.evidence import check_manifests
from tests.promises.archived import complete, content, half, objects_of, prune, restore, store_of
from tests.promises.test_policies import _set as set_policy
from worker import archive, audit
from worker.errors import Refused, StorageFault, UnderWay
from worker.params import RunId
from worker.states import State

UNKNOWN = "00000000-0000-4000-8000-000000000000"


def _demand(
    deployment: Deployment, *words: str, says: str, status: int = 2, env: dict[str, str] | None = None
) -> str:
    """The line by which it is refused; nothing has changed, in the ledger neither."""
    before = (world(deployment), keys(deployment))
    line = refused(deployment, "run", "restore-logs", "--inline", *words, says=says, status=status, env=env)
    assert (world(deployment), keys(deployment)) == before
    return line


def _body(deployment: Deployment, key: str) -> bytes:
    return b"".join(store_of(deployment).read(key))


def _write(deployment: Deployment, key: str, body: bytes) -> str:
    sha256 = hashlib.sha256(body).hexdigest()
    store_of(deployment).put(key, io.BytesIO(body), sha256=sha256)
    return sha256


def _changed(body: bytes) -> bytes:
    """The object with one letter of one row changed, packed anew."""
    plain = zstandard.ZstdDecompressor().stream_reader(body).read()
    return zstandard.compress(plain.replace(b"agent", b"tneag", 1))


def _flip(deployment: Deployment, key: str) -> None:
    body = bytearray(_body(deployment, key))
    body[len(body) // 2] ^= 1
    _write(deployment, key, bytes(body))


def _swap(deployment: Deployment, key: str) -> None:
    """With the ledger made to say the same, so that the manifest alone tells."""
    sha256 = _write(deployment, key, _changed(_body(deployment, key)))
    deployment.query("UPDATE paperclip_worker.objects SET sha256 = %s WHERE key = %s", sha256, key)


def _manifest(deployment: Deployment, key: str) -> str:
    (run,) = re.findall("/run=([^/]+)/", key)
    return check_manifests(deployment, UUID(run))[-1]


def _all_the_way(deployment: Deployment, key: str) -> None:
    """Object, ledger, manifest and the receipt's body made to agree: only what was signed tells."""
    ((old,),) = deployment.query("SELECT sha256 FROM paperclip_worker.objects WHERE key = %s", key)
    _swap(deployment, key)
    ((new,),) = deployment.query("SELECT sha256 FROM paperclip_worker.objects WHERE key = %s", key)
    manifest = _manifest(deployment, key)
    body = _body(deployment, manifest)
    named = _write(deployment, manifest, body.replace(old.encode(), new.encode()))
    change = "UPDATE paperclip_worker.receipts SET body = replace(body, %s, %s)"
    deployment.query(change, hashlib.sha256(body).hexdigest(), named)


def _with_its_hash(deployment: Deployment, key: str) -> None:
    _all_the_way(deployment, key)
    deployment.query("UPDATE paperclip_worker.receipts SET hash = encode(sha256(body::bytea), 'hex')")


def _signed_by_another(deployment: Deployment, key: str) -> None:
    _all_the_way(deployment, key)
    other = audit.Signer(Ed25519PrivateKey.generate())
    change = "UPDATE paperclip_worker.receipts SET body = replace(body, signer, %s), signer = %s"
    deployment.query(change, other.fingerprint, other.fingerprint)
    ((body,),) = deployment.query("SELECT body FROM paperclip_worker.receipts")
    digest = hashlib.sha256(body.encode()).hexdigest()
    deployment.query("UPDATE paperclip_worker.receipts SET hash = %s, signature = %s", digest, other.sign(digest))


_HARM: dict[str, tuple[Callable[[Deployment, str], object], str]] = {
    "other bytes": (_flip, "archive object .* has other bytes than were written"),
    "other rows": (
        lambda deployment, key: _write(deployment, key, _changed(_body(deployment, key))),
        "archive object .* has other bytes than were written",
    ),
    "cut": (
        lambda deployment, key: _write(deployment, key, _body(deployment, key)[:-9]),
        "archive object .* has other bytes than were written",
    ),
    "gone": (lambda deployment, key: store_of(deployment).delete([key]), "archive object .* is missing"),
    "other rows, the ledger too": (_swap, "archive object .* is not the one that the manifest names"),
    "forgotten by the ledger": (
        lambda deployment, key: deployment.query("DELETE FROM paperclip_worker.objects WHERE key = %s", key),
        "the ledger lacks archive object .*, which the manifest of run .* names",
    ),
    "all of it, and the receipt": (_all_the_way, "receipt 1 of run .* the body was changed"),
    "all of it, and the receipt with its hash": (_with_its_hash, "receipt 1 of run .* the signature does not fit"),
    "all of it, signed by another": (
        _signed_by_another,
        "signed by .*, a key that is not trusted; .* its public key",
    ),
    "no receipt": (
        lambda deployment, _: deployment.query("DELETE FROM paperclip_worker.receipts"),
        "run .* has no receipt of how it ended",
    ),
    "manifest gone": (
        lambda deployment, key: store_of(deployment).delete([_manifest(deployment, key)]),
        "manifest-[0-9a-f]{16}.json is missing or is not the manifest that the receipt names",
    ),
    "manifest changed": (
        lambda deployment, key: _write(
            deployment, _manifest(deployment, key), _body(deployment, _manifest(deployment, key)) + b" "
        ),
        "manifest-[0-9a-f]{16}.json is missing or is not the manifest that the receipt names",
    ),
}


@pytest.mark.parametrize("harm", _HARM)
def test_a_harmed_archive(released: Deployment, harm: str) -> None:
    run = prune(released)
    act, says = _HARM[harm]
    act(released, objects_of(released, run)[-1])
    _demand(released, "--run", str(run), says=says)


def test_the_archive_of_an_earlier_signing_key(released: Deployment, signing_key: Path, tmp_path: Path) -> None:
    """It comes back once the earlier public key is beside the new key; what that signed is trusted to verify, too."""
    run = prune(released)
    path = tmp_path / "later.pem"
    audit.keygen(path)
    later = {"PAPERCLIP_WORKER_SIGNING_KEY_FILE": str(path)}
    _demand(released, "--run", str(run), "--yes", says="signed by .*, a key that is not trusted", env=later)
    assert released.cli("receipts", "verify", ok=False, env=later).returncode == 1
    with path.open("a") as file:
        file.write(audit.public_pem(audit.Signer.load(signing_key).public))
    released.cli("run", "restore-logs", "--run", str(run), "--inline", "--yes", env=later)
    assert released.cli("receipts", "verify", env=later).stdout == "2 receipts, chain intact\n"
    assert released.cli("receipts", "verify", "--anchors", env=later).stdout.endswith("the bucket agrees\n")


def _forge(deployment: Deployment, run: RunId) -> None:
    _swap(deployment, objects_of(deployment, run)[-1])


def test_the_manifest_is_written_whatever_the_settings_say_by_then(released: Deployment) -> None:
    """A floor that was raised meanwhile ends the run; what it took is attested all the same."""
    set_policy(released, timedelta(days=30))
    before = content(released, "activity_log")
    run = half(released, settings={"retention_floor": "60d"})
    evidence = released.operations.result(run)["receipt"]["evidence"]
    assert "under the floor of 60d" in evidence["retention"]["at_end"]["refused"]
    keys_now = [_manifest(released, key) for key in objects_of(released, run)]
    assert evidence["archive"]["manifest"] in keys_now
    restore(released, run)
    assert content(released, "activity_log") == before
    _forge(released, run)
    _demand(released, "--run", str(run), says="is not the one that the manifest names")


def test_the_receipt_has_the_cutoffs_of_the_beginning_and_of_the_end(released: Deployment) -> None:
    """A policy that was made longer meanwhile is not what the rows went by that were gone already."""
    run = half(released, meanwhile=lambda: set_policy(released, timedelta(days=300)))
    retained = released.operations.result(run)["receipt"]["evidence"]["retention"]
    began, ended = (datetime.fromisoformat(one["cutoff"]) for one in (retained, retained["at_end"]))
    ((youngest,),) = released.query("SELECT max(last::timestamptz) FROM paperclip_worker.objects")
    assert ended < youngest < began
    assert began - ended == timedelta(days=210)


def test_an_archive_without_a_manifest(released: Deployment, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where none could be written nothing vouches for what the ledger says; the run is resumed, and one is."""
    before = content(released, "activity_log")

    def fail(*_: Any) -> str:
        raise StorageFault("bucket: cannot be reached")

    with monkeypatch.context() as patch:
        patch.setattr(archive, "write_manifest", fail)
        run = half(released)
    evidence = released.operations.result(run)["receipt"]["evidence"]
    assert evidence == {"index": "not written: StorageFault"}
    _demand(released, "--run", str(run), says=f"no receipt of run {run} names the manifest")
    released.operations.resume(str(run))
    released.operations.stop(str(run))
    with monkeypatch.context() as patch:
        patch.setattr(archive, "write_manifest", fail)
        released.operations.resume(str(run))
        released.operations.stop(str(run))
    restore(released, run)
    assert content(released, "activity_log") == before


def test_what_was_archived_after_the_last_manifest_is_not_called_tampered_with(
    released: Deployment, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run went on, and its next manifest could not be written: nothing vouches for the rest yet."""
    run = half(released)
    small = released.with_settings(bite_rows="50")
    small.resume(str(run))
    bites = iter(range(2))
    small.runner().work(run, seconds=math.inf, leave=lambda: next(bites, None) is None)

    def fail(*_: Any) -> str:
        raise StorageFault("bucket: cannot be reached")

    with monkeypatch.context() as patch:
        patch.setattr(archive, "write_manifest", fail)
        small.stop(str(run))
    _demand(released, "--run", str(run), says=f"no receipt of run {run} names the manifest")
    small.resume(str(run))
    small.stop(str(run))
    restore(released, run)


def test_what_is_refused_as_a_run_is_refused_as_a_rehearsal(released: Deployment) -> None:
    run = prune(released)
    act, says = _HARM["manifest gone"]
    act(released, objects_of(released, run)[0])
    refused(released, "rehearse", "restore-logs", "--run", str(run), says=says)


@pytest.mark.parametrize("harm", ["other bytes", "gone"])
def test_an_archive_harmed_while_the_run_waits(released: Deployment, harm: str) -> None:
    """What was whole when the run was entered is compared again when it is read."""
    pruned = prune(released)
    before = content(released, "activity_log")
    run = released.operations.start(RestoreLogs(run=pruned), actor="tester", via="test")
    _HARM[harm][0](released, objects_of(released, pruned)[0])
    with pytest.raises(Refused, match="archive object"):
        released.operations.runner().work(run, seconds=math.inf)
    assert released.operations.result(run)["state"] == "failed"
    assert content(released, "activity_log") == before


@pytest.mark.parametrize(("rows", "tail"), [(2, "$"), (5, " and 2 more; nothing was put back$")])
def test_rows_that_are_there_with_other_content(released: Deployment, rows: int, tail: str) -> None:
    """Also where the ids are spread over objects: three are named, the rest counted, and no content is said."""
    run = prune(released, bite_rows="50")
    gone = content(released, "activity_log")
    restore(released, run)
    back = sorted(content(released, "activity_log").keys() - gone.keys())
    other = back[:: len(back) // rows][:rows]
    released.query("UPDATE activity_log SET action = 'hunter2' WHERE id::text = ANY(%s)", other)
    line = _demand(released, "--run", str(run), says=f"rows with these ids and other content.*{tail}")
    named = [one for one in back if one in line]
    assert len(named) == min(rows, 3)
    assert set(named) <= set(other)
    assert "hunter2" not in line


def test_json_null_and_null_are_not_the_same_content(released: Deployment) -> None:
    released.query("UPDATE activity_log SET details = 'null'")
    run = prune(released)
    gone = content(released, "activity_log")
    restore(released, run)
    back = sorted(content(released, "activity_log").keys() - gone.keys())
    released.query("UPDATE activity_log SET details = NULL WHERE id::text = %s", back[0])
    _demand(released, "--run", str(run), says=f"other content: {back[0]}; nothing")


def test_a_run_that_has_no_archive(released: Deployment) -> None:
    without = prune(released, archive=False)
    _demand(released, "--run", str(without), says=f"--run: run {without} archived no row")
    tokens = RunId(complete(released, PruneLogs(table="session"))["run"])
    _demand(released, "--run", str(tokens), says=f"--run: run {tokens} archived no row")
    tasks = RunId(complete(released, ArchiveTasks())["run"])
    _demand(released, "--run", str(tasks), says=f"--run: run {tasks} is not a run that archives rows of a log")
    with pytest.raises(Refused, match="is not a run that archives"):
        released.operations.start(RestoreLogs(run=RunId(UNKNOWN)), actor="tester", via="test")


def test_words_that_name_nothing(released: Deployment) -> None:
    run = prune(released)
    _demand(released, says="--run says whose rows")
    _demand(released, "--run", UNKNOWN, says="no run has an id that starts with")
    _demand(released, "--run", "", says="an empty text names no run")
    _demand(released, "--run", str(run), "--company", UNKNOWN, says=f"--company: {UNKNOWN} is not a company")
    released.query("INSERT INTO companies (id, name, issue_prefix) VALUES (%s, 'New', 'NEW')", UNKNOWN)
    _demand(released, "--run", str(run), "--company", UNKNOWN, says="archived no row of --company")


def test_without_a_bucket(released: Deployment) -> None:
    run = prune(released)
    none = {"PAPERCLIP_WORKER_S3_BUCKET": ""}
    line = _demand(released, "--run", str(run), says="PAPERCLIP_WORKER_S3_BUCKET is not set", env=none)
    assert "--without-archive" not in line
    plan = refused(released, "plan", "restore-logs", "--run", str(run), says="S3_BUCKET is not set", env=none)
    assert "--without-archive" not in plan


def test_a_column_that_the_table_lacks_now(released: Deployment) -> None:
    released.query("ALTER TABLE activity_log ADD COLUMN mood text DEFAULT 'calm'")
    run = prune(released)
    released.query("ALTER TABLE activity_log DROP COLUMN mood")
    _demand(released, "--run", str(run), says=r"the archive has activity_log\.mood, which the table lacks")


def test_a_column_that_the_table_wants_now(released: Deployment) -> None:
    run = prune(released)
    released.query("ALTER TABLE activity_log ADD COLUMN mood text NOT NULL DEFAULT 'calm'")
    released.query("ALTER TABLE activity_log ALTER COLUMN mood DROP DEFAULT")
    _demand(released, "--run", str(run), says="activity_log wants a value for mood, which the archive lacks")


_CHANGED: dict[str, tuple[str, str, str]] = {
    "a value is wanted now": (
        "ADD mood text",
        "ALTER mood SET DEFAULT 'calm', ALTER mood SET NOT NULL",
        r"plugin_logs cannot come back as they are: \d+ have no value for mood, which plugin_logs wants now",
    ),
    "another type": (
        "ADD mood int DEFAULT 5",
        "ALTER mood DROP DEFAULT, ALTER mood TYPE text",
        r"plugin_logs cannot come back as they are: \d+ would not be as they were: .* another type for a column",
    ),
    "a type that it does not fit": (
        "ADD mood text DEFAULT 'calm'",
        "ALTER mood DROP DEFAULT, ALTER mood TYPE int USING 1",
        "plugin_logs does not take an archived row: a value does not fit its column",
    ),
    "another key": (
        "ADD mood text",
        "DROP CONSTRAINT plugin_logs_pkey, ADD PRIMARY KEY (id, created_at)",
        "plugin_logs has no unique key of id alone any more",
    ),
}


@pytest.mark.parametrize("change", _CHANGED)
def test_a_table_that_was_changed_since(released: Deployment, change: str) -> None:
    """Found in rows anywhere in the archive, before the first is put back."""
    made, later, says = _CHANGED[change]
    released.query(f"ALTER TABLE plugin_logs {made}")
    run = prune(released, "plugin_logs", bite_rows="50")
    if change == "a value is wanted now":
        released.query("UPDATE plugin_logs SET mood = 'calm'")
    released.query(f"ALTER TABLE plugin_logs {later}")
    _demand(released, "--run", str(run), says=says)


def test_a_column_that_only_the_first_objects_lack(released: Deployment) -> None:
    small = released.with_settings(bite_rows="50")
    run = small.start(PruneLogs(), actor="tester", via="test")
    bites = iter(range(3))
    small.runner().work(run, seconds=math.inf, leave=lambda: next(bites, None) is None)
    released.query("ALTER TABLE activity_log ADD mood text DEFAULT 'calm'")
    small.runner().work(run, seconds=math.inf)
    released.query("ALTER TABLE activity_log ALTER mood SET NOT NULL, ALTER mood DROP DEFAULT")
    _demand(released, "--run", str(run), says="activity_log wants a value for mood, which the archive lacks")


def test_a_row_whose_parent_is_gone(deployment: Deployment) -> None:
    """A plugin, run or company that was removed since: said before the first row is put back."""
    if deployment.layout == "guide":
        table, parent, key = "activity_log", "companies", "company_id"
        deployment.query("INSERT INTO companies (id, name) VALUES (%s, 'Old')", UNKNOWN)
        deployment.query(
            "UPDATE activity_log SET company_id = %s "
            'WHERE id IN (SELECT id FROM activity_log ORDER BY "timestamp" LIMIT 3)',
            UNKNOWN,
        )
    else:
        table, parent, key = "plugin_logs", "plugins", "plugin_id"
        deployment.query(
            "INSERT INTO plugins (id, plugin_key, package_name, version, manifest_json, installed_at, updated_at) "
            "VALUES (%s, 'old', 'old', '1', '{}', now(), now())",
            UNKNOWN,
        )
        deployment.query(
            "UPDATE plugin_logs SET plugin_id = %s "
            "WHERE id IN (SELECT id FROM plugin_logs ORDER BY created_at LIMIT 3)",
            UNKNOWN,
        )
    run = prune(deployment, table)
    deployment.query("DELETE FROM activity_log WHERE company_id = %s", UNKNOWN)
    deployment.query(f"DELETE FROM {parent} WHERE id = %s", UNKNOWN)
    _demand(
        deployment, "--run", str(run), says=f"{table} cannot .* are: 3 refer to rows of {parent} .{key}. .* gone$"
    )


def test_a_parent_that_goes_while_the_run_waits(released: Deployment) -> None:
    """The bite that finds out is rolled back, and the receipt has what is back."""
    pruned = prune(released, "plugin_logs")
    run = released.operations.start(RestoreLogs(run=pruned), actor="tester", via="test")
    released.query("DELETE FROM plugins")
    with pytest.raises(Refused, match="plugin_logs_plugin_id_fkey forbids it") as caught:
        released.operations.runner().work(run, seconds=math.inf)
    result = released.operations.result(run)
    assert result["state"] == "failed"
    assert result["receipt"]["error"] == str(caught.value)
    assert result["rows"] == len(content(released, "plugin_logs")) == 0


def test_a_place_that_another_row_has_taken(released: Deployment) -> None:
    """A key that is not the table's own: no row is left out without a word."""
    pruned = prune(released, "heartbeat_run_events")
    first = released.query("SELECT id FROM heartbeat_run_events LIMIT 1")[0][0]
    restore(released, pruned)
    (taken,) = released.query("SELECT run_id, seq, id FROM heartbeat_run_events ORDER BY created_at LIMIT 1")
    released.query("DELETE FROM heartbeat_run_events WHERE id = %s", taken[2])
    released.query("UPDATE heartbeat_run_events SET run_id = %s, seq = %s WHERE id = %s", taken[0], taken[1], first)
    before = content(released, "heartbeat_run_events")
    run = released.operations.start(RestoreLogs(run=pruned), actor="tester", via="test")
    with pytest.raises(Refused, match="heartbeat_run_events_run_seq_uq forbids it"):
        released.operations.runner().work(run, seconds=math.inf)
    assert content(released, "heartbeat_run_events") == before


_MEDDLING = {
    "before": (
        "NEW.level := upper(NEW.level); RETURN NEW;",
        "TRIGGER louder BEFORE INSERT ON plugin_logs FOR EACH ROW",
    ),
    "after": (
        "UPDATE plugin_logs SET level = upper(level) WHERE id = NEW.id; RETURN NULL;",
        "TRIGGER louder AFTER INSERT ON plugin_logs FOR EACH ROW",
    ),
    "at the end": (
        "UPDATE plugin_logs SET level = upper(level) WHERE id = NEW.id; RETURN NULL;",
        "CONSTRAINT TRIGGER louder AFTER INSERT ON plugin_logs DEFERRABLE INITIALLY DEFERRED FOR EACH ROW",
    ),
}


@pytest.mark.parametrize("when", _MEDDLING)
def test_a_row_that_comes_out_otherwise(released: Deployment, when: str) -> None:
    """A trigger of the host's that changes what is inserted, whenever it does."""
    pruned = prune(released, "plugin_logs")
    body, trigger = _MEDDLING[when]
    released.query(
        f"CREATE FUNCTION louder() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN {body} END $$;"
        f"CREATE {trigger} EXECUTE FUNCTION louder()"
    )
    before = content(released, "plugin_logs")
    run = released.operations.start(RestoreLogs(run=pruned), actor="tester", via="test")
    with pytest.raises(Refused, match="do not come out of plugin_logs as they are in the archive"):
        released.operations.runner().work(run, seconds=math.inf)
    assert content(released, "plugin_logs") == before
    released.query("CREATE OR REPLACE FUNCTION louder() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN NEW; END'")
    assert restore(released, pruned)["rows"] > 0


def test_a_value_that_no_column_can_have(released: Deployment) -> None:
    """PostgreSQL keeps an escaped NUL in plain json, and can take it out of none; its own sentence would quote it."""
    released.query("""ALTER TABLE plugin_logs ADD plain json DEFAULT '{"hunter2": "\\u0000"}'""")
    run = prune(released, "plugin_logs")
    line = _demand(
        released, "--run", str(run), says="plugin_logs does not take an archived row: a value does not fit"
    )
    assert "hunter2" not in line


def test_while_rows_of_the_table_are_being_pruned(released: Deployment) -> None:
    run = prune(released)
    other = released.operations.start(PruneLogs(), actor="tester", via="test")
    _demand(released, "--run", str(run), says=f"activity_log is being pruned by run {other}", status=3)
    _demand(released, "--run", str(other), says=f"run {other} is under way", status=3)
    logs = prune(released, "plugin_logs")
    assert restore(released, logs)["rows"] > 0


def test_while_rows_are_put_back_their_table_is_not_pruned(released: Deployment) -> None:
    """What comes back is as old as it was: a prune beside it would take it again, and neither keep its promise."""
    pruned = prune(released)
    stopped = released.operations.start(PruneLogs(), actor="tester", via="test")
    released.operations.stop(str(stopped))
    run = released.operations.start(RestoreLogs(run=pruned), actor="tester", via="test")
    before = (world(released), keys(released))
    says = f"rows of activity_log are being put back by run {run}"
    refused(released, *INLINE, says=says, status=3)
    refused(released, "runs", "resume", str(stopped), "--inline", says=says, status=3)
    assert (world(released), keys(released)) == before
    # To look is no harm, and other logs are nobody's business.
    assert released.json("plan", "prune-logs")["job"] == "prune-logs"
    assert prune(released, "plugin_logs")


def test_a_prune_that_is_entered_in_the_same_instant(released: Deployment) -> None:
    pruned = prune(released)
    other = released.operations.start(PruneLogs(), actor="tester", via="test")
    released.operations.stop(str(other))
    run = released.operations.start(RestoreLogs(run=pruned), actor="tester", via="test")
    before = content(released, "activity_log")
    released.query("UPDATE paperclip_worker.runs SET state = 'queued' WHERE id = %s", other)
    for one, says in ((run, "is being pruned by run"), (other, "are being put back by run")):
        with pytest.raises(UnderWay, match=says):
            released.operations.runner().work(one, seconds=math.inf)
        assert content(released, "activity_log") == before
        released.query("UPDATE paperclip_worker.runs SET state = 'queued' WHERE id = %s", run)


@pytest.mark.parametrize(
    ("whose", "to_the_end", "says"),
    [("its own", True, "has put rows of it back"), ("another's", False, "are being put back by run")],
)
def test_a_resume_that_a_restore_overtakes(
    released: Deployment, monkeypatch: pytest.MonkeyPatch, whose: str, to_the_end: bool, says: str
) -> None:
    """To read the archive of the run that is resumed takes long; what has begun meanwhile is asked again."""
    first = prune(released, older_than=timedelta(days=120))
    stopped = half(released)
    other = RestoreLogs(run=stopped if whose == "its own" else first)
    begun = list[UUID]()
    intact = archive.require_intact

    def overtaken(*given: Any) -> None:
        intact(*given)
        monkeypatch.setattr(archive, "require_intact", intact)
        begun.append(released.operations.start(other, actor="tester", via="test"))
        bites = iter(range(2))
        released.operations.runner().work(
            begun[0], seconds=math.inf, leave=lambda: not to_the_end and next(bites, None) is None
        )

    monkeypatch.setattr(archive, "require_intact", overtaken)
    with pytest.raises((Refused, UnderWay), match=says):
        released.operations.resume(str(stopped))
    assert released.operations.find(str(stopped)).state is State.STOPPED
    assert released.operations.find(str(begun[0])).state is (State.KEPT if to_the_end else State.RUNNING)


def test_an_unfinished_prune_can_be_put_back(released: Deployment) -> None:
    """A run that was stopped half-way has an archive of what it took."""
    before = content(released, "activity_log")
    run = half(released)
    assert len(before) - len(content(released, "activity_log")) > 0
    restore(released, run)
    assert content(released, "activity_log") == before
