"""What an operator's script can rely on: help, JSON, exit statuses, the evidence and the way round a run."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import shlex
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit

import psycopg
import pytest
from psycopg import errors

import schedules
from tests.cli.helpers import (
    INLINE,
    PRUNE,
    begin,
    check_refusal,
    commands,
    complete,
    find_command,
    full_broker,
    keys,
    refused,
    start,
    world,
)
from tests.conftest import ROOT, Deployment
from worker import (
    app,
    audit,
    brokers,
    canonical,
    chains,
    config,
    grants,
    params,
    privileges,
    registry,
    standing,
    timetable,
)
from worker.layouts import LAYOUTS
from worker.operations import Operations

HEAVY = ("boto3", "botocore", "celery", "kombu", "redis", "sqlalchemy", "psycopg", "pydantic", "cryptography")
_ASK = """
import runpy, sys
sys.argv = ["paperclip-worker", *sys.argv[1:]]
try:
    runpy.run_path("cli.py", run_name="__main__")
finally:
    print(*sorted({name.partition(".")[0] for name in sys.modules}), file=sys.stderr)
"""
RESULT = {"run", "job", "state", "kept", "tally", "left", "findings", "receipt", "rows", "bytes", "horizon"}


@pytest.mark.parametrize("path", list(commands()), ids=" ".join)
def test_help_explains_and_loads_nothing_it_does_not_need(path: tuple[str, ...]) -> None:
    done = subprocess.run(
        [sys.executable, "-c", _ASK, *path, "--help"],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
        # No setting at all: help is for those who have not configured anything yet.
        env={"PATH": os.environ["PATH"], "PYTHONWARNINGS": "error"},
    )
    assert done.returncode == 0, done.stderr
    usage, _, rest = done.stdout.partition("\n\n")
    assert usage.startswith("Usage: ")
    assert " ".join(path) in usage
    sentence = rest.strip().splitlines()[0]
    assert len(sentence) > 15
    assert sentence[0].isupper()
    options = [line for line in done.stdout.splitlines() if line.startswith("  -")]
    assert options
    loaded = set(done.stderr.split())
    assert "click" in loaded
    assert not loaded & set(HEAVY)


def test_every_option_says_what_it_does() -> None:
    for path in commands():
        command, _ = find_command(path)
        for option in command.params:
            if option.param_type_name == "option" and "--layout" not in option.opts:
                assert getattr(option, "help", None), (path, option.name)


def test_run_inline_prints_one_object_that_says_it_all(deployment: Deployment) -> None:
    planned = deployment.json("plan", "prune-logs")
    done = deployment.cli(*INLINE, "--json", "--reason", "retention policy 7", "--actor", "kim")
    result = json.loads(done.stdout)
    assert done.stderr == ""
    assert set(result) >= RESULT
    assert result["kept"] is True
    assert result["state"] == "kept"
    assert result["job"] == "prune-logs"
    assert result["tally"] == planned["tally"]
    assert result["left"] == planned["left"]
    assert (result["rows"], result["bytes"]) == (planned["rows"], planned["bytes"])
    assert result["findings"] == []
    receipt = result["receipt"]
    assert (receipt["actor"], receipt["reason"], receipt["via"]) == ("kim", "retention policy 7", "cli")
    assert receipt["tally"] == result["tally"]
    evidence = receipt["evidence"]["archive"]
    assert evidence["rows"] == result["rows"]
    assert evidence["manifest"] in keys(deployment)
    assert len([one for one in keys(deployment) if one.startswith("archive/")]) == evidence["objects"] + 1
    assert result["anchor"]["key"] in keys(deployment)
    assert deployment.cli("receipts", "verify").stdout == "1 receipts, chain intact\n"
    again = deployment.json(*INLINE)
    assert again["kept"]
    assert again["rows"] == 0


def test_run_for_eyes_says_the_same(released: Deployment) -> None:
    planned = released.json("plan", "prune-logs")
    done = released.cli(*INLINE)
    assert done.stderr == ""
    assert f"rows {planned['rows']:,} of {planned['rows']:,} planned" in done.stdout
    assert "receipt 1" in done.stdout
    for one in planned["tally"]:
        assert f"{one['table']}\t{one['company']}\t{one['rows']}\t{one['bytes']}" in done.stdout


def test_through_a_worker_process(released: Deployment) -> None:
    """run, and detach followed by show and watch, with real workers behind a real broker."""
    planned = released.json("plan", "prune-logs")
    other = ("--table", "heartbeat_run_events")
    with released.worker():
        result = released.json(*PRUNE, "--yes")
        assert set(result) >= RESULT
        assert result["kept"] is True
        assert result["tally"] == planned["tally"]
        assert result["receipt"]["state"] == "kept"
        events = released.json("plan", "prune-logs", *other)
        detached = released.cli(*PRUNE, *other, "--yes", "--detach")
        run = detached.stdout.strip()
        assert detached.stdout == f"{run}\n"
        watched = released.json("runs", "watch", run)
        assert watched["run"] == run
        assert watched["tally"] == events["tally"]
        assert released.json("runs", "show", run[:8]) == watched
        assert released.json("runs", "show", "last") == watched
    assert released.json("receipts", "verify") == {
        "receipts": 2,
        "intact": True,
        "flaws": [],
        "not_anchored": 0,
        "ledger": str(released.operations.require_ledger()),
    }


def test_plan_counts_what_a_run_does_and_changes_nothing(released: Deployment) -> None:
    before = world(released)
    planned = released.json("plan", "prune-logs", "--older-than", "30d")
    assert set(planned) >= {"hash", "rows", "bytes", "tally", "left", "notes", "horizon", "params", "layout"}
    assert planned["params"]["older_than"] == "30d"
    assert sum(one["rows"] for one in planned["tally"]) == planned["rows"] > 0
    text = released.cli("plan", "prune-logs", "--older-than", "30d").stdout
    assert f"would change {planned['rows']:,} rows" in text
    rehearsed = released.json("rehearse", "prune-logs", "--older-than", "30d")
    assert rehearsed["rehearsed"] is True
    assert rehearsed["tally"] == planned["tally"]
    assert world(released) == before
    assert keys(released) == []


def test_an_approved_plan_runs_and_needs_no_further_word(released: Deployment) -> None:
    planned = released.json("plan", "prune-logs")
    result = released.json(*PRUNE, "--inline", "--plan", planned["hash"])
    assert result["tally"] == planned["tally"]
    assert result["horizon"] == planned["horizon"]
    assert result["receipt"]["plan"] == planned["hash"]


@pytest.mark.parametrize("drift", ["a row less", "other parameters"])
def test_a_plan_the_world_has_drifted_from_is_refused(released: Deployment, drift: str) -> None:
    planned = released.json("plan", "prune-logs")
    words: tuple[str, ...] = (*PRUNE, "--inline", "--plan", planned["hash"])
    if drift == "a row less":
        # In its place comes one like it, so that no count tells the two worlds apart.
        released.query(
            "UPDATE activity_log SET id = gen_random_uuid() WHERE id = (SELECT a.id FROM activity_log a "
            "WHERE a.created_at < now() - interval '91 days' AND a.run_id IS NULL AND a.entity_type <> 'issue' "
            "AND NOT EXISTS (SELECT FROM decision_effect_executions WHERE activity_log_id = a.id) LIMIT 1)"
        )
    else:
        words += ("--older-than", "80d")
    before = world(released)
    check_refusal(released.cli(*words, ok=False), says="drifted", status=2)
    assert world(released) == before
    assert keys(released) == []


def test_a_detached_run_is_listed_stopped_and_resumed(released: Deployment) -> None:
    """No worker is up: the run waits, and is worked on inline in the end."""
    planned = released.json("plan", "prune-logs")
    run = released.cli(*PRUNE, "--yes", "--detach").stdout.strip()
    assert released.json("runs", "show", run)["state"] == "queued"
    (listed,) = released.json("runs", "list")["runs"]
    assert (listed["run"], listed["state"], listed["via"]) == (run, "queued", "cli")
    assert released.json("runs", "list", "--state", "kept") == {"runs": []}
    header, line = released.cli("runs", "list", "--limit", "1").stdout.splitlines()
    assert header.split("\t")[:3] == ["run", "job", "state"]
    assert line.split("\t")[:3] == [run, "prune-logs", "queued"]
    assert released.json("runs", "stop", run) == {"run": run, "state": "stopped"}
    stopped = released.cli("runs", "watch", run, ok=False)
    assert stopped.returncode == 1
    assert len(stopped.stderr.splitlines()) == 1
    result = released.json("runs", "resume", run, "--inline")
    assert result["kept"]
    assert result["tally"] == planned["tally"]
    assert [one["state"] for one in released.json("receipts", "list")["receipts"]] == ["kept", "stopped"]


def test_a_run_whose_message_the_broker_does_not_take_is_named(released: Deployment) -> None:
    """It is entered, and will be carried out: whoever asked for it must hear of it."""
    says = r"run \S+ is entered, but the broker took no message of it \(is it full\?\)"
    brokers.require_own(app.make(released.operations.settings), released.operations.require_ledger())
    with full_broker(released):
        for words in ((*PRUNE, "--yes", "--detach"), ("runs", "resume", "last", "--detach")):
            line = check_refusal(released.cli(*words, ok=False), says=says, status=1)
            ((run, state),) = released.query("SELECT id::text, state FROM paperclip_worker.runs")
            assert (line.count(run), state) == (2, "queued")
        assert released.json("runs", "stop", run) == {"run": run, "state": "stopped"}


def test_a_broker_that_takes_nothing_at_all(released: Deployment) -> None:
    """As long as nobody has claimed it, a full one is found before there is a run."""
    with full_broker(released):
        check_refusal(released.cli(*PRUNE, "--yes", ok=False), says="broker takes no message; is it full", status=2)
    assert released.query("SELECT count(*) FROM paperclip_worker.runs") == [(0,)]


def test_a_run_stopped_midway_resumes_to_the_exact_totals(released: Deployment) -> None:
    planned = released.json("plan", "prune-logs")
    run = str(begin(released))
    assert released.json("runs", "stop", run)["state"] == "stopped"
    part = released.json("runs", "show", run)
    assert part["kept"] is False
    assert 0 < part["rows"] < planned["rows"]
    assert part["receipt"]["tally"] == part["tally"]
    result = released.json("runs", "resume", run, "--inline")
    assert result["kept"]
    assert result["tally"] == planned["tally"]
    assert result["receipt"]["evidence"]["archive"]["rows"] == planned["rows"]
    assert released.json("receipts", "verify")["intact"]


def test_a_run_left_stopping_is_ended_by_another_stop(released: Deployment) -> None:
    """The worker that had its last bite in flight is gone, and no other is up."""
    run = str(begin(released))
    with psycopg.connect(released.environment["DATABASE_URL"]) as bite:
        bite.execute("SELECT FROM paperclip_worker.shards FOR UPDATE")
        assert released.json("runs", "stop", run)["state"] == "stopping"
    assert released.json("runs", "stop", run)["state"] == "stopped"
    refused(released, "runs", "stop", run, says="is stopped; only a run under way can be stopped")


def test_a_run_resumed_through_a_worker(released: Deployment) -> None:
    planned = released.json("plan", "prune-logs")
    run = str(begin(released))
    released.cli("runs", "stop", run)
    with released.worker():
        result = released.json("runs", "resume", run)
    assert result["kept"]
    assert result["tally"] == planned["tally"]


def test_json_of_a_detached_resume_is_json(released: Deployment) -> None:
    run = str(start(released.operations))
    released.cli("runs", "stop", run)
    assert released.json("runs", "resume", run, "--detach")["run"] == run


# -- receipts -----------------------------------------------------------------------------------------


@pytest.fixture
def chain(released: Deployment) -> Deployment:
    """A deployment with the receipts of three runs."""
    for (company,) in released.query("SELECT id FROM companies ORDER BY id LIMIT 3"):
        complete(released, company=(company,))
    return released


def test_receipts_are_listed_and_shown(chain: Deployment) -> None:
    listed = chain.json("receipts", "list")["receipts"]
    assert [one["seq"] for one in listed] == [3, 2, 1]
    assert len(chain.json("receipts", "list", "--limit", "2")["receipts"]) == 2
    shown = chain.json("receipts", "show", "2")
    assert shown == listed[1]
    body = chain.cli("receipts", "show", "2").stdout
    assert hashlib.sha256(body.encode()).hexdigest() == shown["hash"]
    assert json.loads(body)["prev"] == listed[2]["hash"]


def test_an_auditor_verifies_with_the_public_key_alone(chain: Deployment, tmp_path: Path) -> None:
    key = Path(chain.environment["PAPERCLIP_WORKER_SIGNING_KEY_FILE"])
    public = tmp_path / "auditor.pem"
    public.write_text(audit.public_pem(audit.Signer.load(key).public))
    auditor = Deployment(
        layout=chain.layout,
        environment={"DATABASE_URL": chain.environment["DATABASE_URL"]},
        operations=chain.operations,
        opened=[],
    )
    assert auditor.json("receipts", "verify", "--public-key", str(public))["intact"] is True
    other = tmp_path / "other.pem"
    other.write_text(audit.public_pem(audit.keygen(tmp_path / "other-key.pem").public))
    assert auditor.cli("receipts", "verify", "--public-key", str(other), ok=False).returncode == 1
    assert auditor.cli("receipts", "verify", "--public-key", str(other), "--public-key", str(public)).stderr == ""


def _change_body(rows: list[dict[str, Any]]) -> None:
    rows[1]["body"] = rows[1]["body"].replace('"actor":"tester"', '"actor":"nobody"')


def _change_body_and_hash(rows: list[dict[str, Any]]) -> None:
    _change_body(rows)
    rows[1]["hash"] = hashlib.sha256(rows[1]["body"].encode()).hexdigest()


def _delete_middle(rows: list[dict[str, Any]]) -> None:
    del rows[1]


def _delete_last(rows: list[dict[str, Any]]) -> None:
    del rows[2]


def _swap(rows: list[dict[str, Any]]) -> None:
    rows[0]["seq"], rows[1]["seq"] = rows[1]["seq"], rows[0]["seq"]


def _forge_signature(rows: list[dict[str, Any]]) -> None:
    signature = rows[2]["signature"]
    rows[2]["signature"] = ("0" if signature[0] != "0" else "1") + signature[1:]


def _no_signature(rows: list[dict[str, Any]]) -> None:
    rows[2]["signature"] = "not hexadecimal"


_TAMPERS = {
    "changed body": (_change_body, "was changed"),
    "changed body and hash": (_change_body_and_hash, "signature|follow"),
    "deleted middle": (_delete_middle, "receipt 2 is missing"),
    "deleted last": (_delete_last, "does not end where"),
    "swapped": (_swap, "another place"),
    "forged signature": (_forge_signature, "signature does not fit"),
    "no signature": (_no_signature, "signature does not fit"),
}


def test_verify_finds_every_way_to_tamper(chain: Deployment, tmp_path: Path) -> None:
    names = "seq, run_id, body, hash, signer, signature, at"
    receipts = [dict(zip(names.split(", "), row, strict=True)) for row in _receipts(chain, names)]
    for what, (tamper, says) in _TAMPERS.items():
        rows = [dict(row) for row in receipts]
        tamper(rows)
        assert rows != receipts, what
        _replace(chain, rows)
        _broken(chain, says)
        flaws = chain.json("receipts", "verify", ok=False)
        assert flaws["intact"] is False, what
        assert flaws["flaws"], what
    for body in ("no JSON", "[]"):
        _replace(chain, [row | {"body": body} if row["seq"] == 2 else row for row in receipts])
        refused = chain.cli("receipts", "show", "2", "--json", ok=False)
        check_refusal(refused, says="receipt 2 is not what was signed", status=2)
    # Whoever holds the database but not the key can make a chain that is whole, and not one that is trusted.
    _replace(chain, _forged(receipts, audit.keygen(tmp_path / "forger.pem")))
    _broken(chain, "not trusted")
    # A last receipt that is cut off with its trace in the head is missed by its run.
    _replace(chain, receipts[:2])
    chain.query("UPDATE paperclip_worker.chain SET seq = 2, hash = %s", receipts[1]["hash"])
    _broken(chain, "settled and has no receipt")
    _replace(chain, receipts)
    chain.query("UPDATE paperclip_worker.chain SET seq = 3, hash = %s", receipts[2]["hash"])
    assert chain.cli("receipts", "verify").stdout == "3 receipts, chain intact\n"


def test_one_receipt_that_was_changed_hides_no_other(chain: Deployment) -> None:
    """Nor does a time that no clock shows, which is not signed."""
    ((body,),) = chain.query("SELECT body FROM paperclip_worker.receipts WHERE seq = 2")
    change = "UPDATE paperclip_worker.receipts SET body = %s WHERE seq = 2"
    for changed in ("[]", "[" * 100_000, "{}"):
        chain.query(change, changed)
        check_refusal(chain.cli("receipts", "show", "2", "--json", ok=False), says="receipt 2 is not what", status=2)
        done = chain.cli("receipts", "list", "--json", ok=False)
        assert (done.returncode, [one["seq"] for one in json.loads(done.stdout)["receipts"]]) == (1, [3, 1])
        assert done.stderr.startswith("paperclip-worker: receipt 2 is not what was signed")
        assert len(done.stderr.splitlines()) == 1
        assert len(chain.cli("receipts", "list", ok=False).stdout.splitlines()) == 3
    chain.query(change, body)
    for time in ("infinity", "-infinity", "0044-03-15 BC", "20000-01-01"):
        chain.query("UPDATE paperclip_worker.receipts SET at = %s WHERE seq = 2", time)
        _broken(chain, "receipt 2: it has a time in the database that none can have")
        assert len(chain.json("receipts", "list")["receipts"]) == 3


def _receipts(chain: Deployment, names: str) -> list[tuple[Any, ...]]:
    return chain.query(f"SELECT {names} FROM paperclip_worker.receipts ORDER BY seq")


def _broken(chain: Deployment, says: str) -> None:
    check_refusal(chain.cli("receipts", "verify", ok=False), says=says, status=1)


def _replace(chain: Deployment, rows: list[dict[str, Any]]) -> None:
    with psycopg.connect(chain.environment["DATABASE_URL"]) as connection:
        connection.execute("DELETE FROM paperclip_worker.receipts")
        for row in rows:
            connection.execute(
                "INSERT INTO paperclip_worker.receipts (seq, run_id, body, hash, signer, signature, at) VALUES "
                "(%(seq)s, %(run_id)s, %(body)s, %(hash)s, %(signer)s, %(signature)s, %(at)s)",
                row,
            )


def _forged(receipts: list[dict[str, Any]], forger: audit.Signer) -> list[dict[str, Any]]:
    """The chain again, with another's name in it, whole in itself and signed by somebody else."""
    made, previous = [], chains.GENESIS
    for row in receipts:
        facts = {**json.loads(row["body"]), "prev": previous, "actor": "nobody", "signer": forger.fingerprint}
        body = canonical.encode(facts).decode()
        previous = hashlib.sha256(body.encode()).hexdigest()
        signed = {"hash": previous, "signer": forger.fingerprint, "signature": forger.sign(previous)}
        made.append({**row, "body": body, **signed})
    return made


# -- the rest -----------------------------------------------------------------------------------------


def test_schedule_list(standing: Deployment) -> None:
    entries = standing.json("schedule", "list")["schedule"]
    assert {one["entry"]: one["crontab"] for one in entries} == {
        name: entry.crontab for name, entry in schedules.SCHEDULE.items()
    }
    jobs = {name: entry.job for name, entry in schedules.SCHEDULE.items()}
    assert {one["entry"]: one["params"] for one in entries} == {
        name: params.to_json(job) for name, job in jobs.items()
    }
    assert all(name in standing.cli("schedule", "list").stdout for name in schedules.SCHEDULE)


def test_a_key_that_does_not_fit_on_the_disk_leaves_nothing_behind(standing: Deployment, tmp_path: Path) -> None:
    """A file without its key would keep the next attempt from making one."""
    path = tmp_path / "signing.pem"
    command = f"ulimit -f 0; exec {shlex.join([sys.executable, str(ROOT / 'cli.py'), 'keygen', str(path)])}"
    done = subprocess.run(
        ["sh", "-c", command], capture_output=True, text=True, env=standing.process_environment(), check=False
    )
    check_refusal(done, says="signing.pem cannot be written: File too large", status=2)
    assert list(tmp_path.iterdir()) == []
    standing.cli("keygen", str(path))


def test_keygen_makes_a_private_file_once(standing: Deployment, tmp_path: Path) -> None:
    path = tmp_path / "signing.pem"
    made = standing.json("keygen", str(path))
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert made["public_key"].startswith("-----BEGIN PUBLIC KEY-----")
    assert "PRIVATE" not in json.dumps(made)
    before = path.read_bytes()
    check_refusal(standing.cli("keygen", str(path), ok=False), says="never overwritten", status=2)
    assert path.read_bytes() == before
    public = standing.cli("keygen", str(tmp_path / "second.pem"))
    assert public.stdout.startswith("-----BEGIN PUBLIC KEY-----")
    assert public.stderr == ""


def test_db_init_twice(
    fresh_database: Callable[..., str], make_deployment: Callable[..., Deployment], released: Deployment
) -> None:
    empty = make_deployment(fresh_database(), "paperclip")
    assert empty.json("db", "init") == empty.json("db", "init")
    assert "at version" in empty.cli("db", "init").stdout
    complete(released)
    before = world(released)
    released.cli("db", "init")
    assert world(released) == before


def test_db_check_finds_nothing_wrong_and_then_what_is(deployment: Deployment) -> None:
    found = deployment.json("db", "check")
    assert found["layout"] == deployment.layout
    assert (found["missing"], found["changed"], found["unknown"]) == ([], [], [])
    assert found["jobs"] == {name: [] for name in registry.jobs()}
    deployment.query("CREATE TABLE plugin_of_ours (id int)")
    deployment.query("ALTER TABLE companies ADD COLUMN extra text")
    found = deployment.json("db", "check")
    assert len(found["unknown"]) == 2
    assert (found["missing"], found["changed"]) == ([], [])
    deployment.query("ALTER TABLE agents RENAME COLUMN name TO called")
    done = deployment.cli("db", "check", ok=False)
    assert done.returncode == 1
    assert len(done.stderr.splitlines()) == 1
    assert "missing\tagents.name" in done.stdout


def test_a_role_without_rights_is_told_what_it_lacks(deployment: Deployment) -> None:
    name = f"bare_{deployment.environment['DATABASE_URL'].rpartition('/')[2]}"
    deployment.query(f"CREATE ROLE {name} LOGIN PASSWORD 'pw'")
    url = urlsplit(deployment.environment["DATABASE_URL"])
    bare = {"DATABASE_URL": f"postgres://{name}:pw@{url.netloc.rpartition('@')[2]}{url.path}"}
    refused(deployment, "db", "init", says="may not make the ledger; run `db init` as the database's owner", env=bare)
    done = deployment.cli("db", "check", "--json", ok=False, env=bare)
    found = json.loads(done.stdout)["jobs"]
    assert done.returncode == 1
    assert done.stderr.startswith("paperclip-worker: what the schedule starts would be refused: archive-tasks lacks ")
    assert len(done.stderr.splitlines()) == 1
    assert set(found) == set(registry.jobs())
    assert all(lacks[0] == "USAGE on schema paperclip_worker" for lacks in found.values())
    assert {"DELETE on activity_log", "SELECT on activity_log"} <= set(found["prune-logs"])
    assert not any("on issues" in one for one in found["retire-master-key"])
    deployment.query(deployment.cli("db", "grants", "--role", name).stdout)
    found = json.loads(deployment.cli("db", "check", "--json", env=bare).stdout)["jobs"]
    # What handles the master key is granted only when it is named.
    assert {job for job, lacks in found.items() if lacks} == {"rotate-master-key", "retire-master-key"}


@pytest.mark.parametrize("name", ["prune-logs", "restore-logs", "archive-tasks", "rotate-master-key"])
def test_a_job_lacks_something_until_the_last_of_its_grants(released: Deployment, name: str) -> None:
    role = f"bare_{released.environment['DATABASE_URL'].rpartition('/')[2]}"
    url = urlsplit(released.environment["DATABASE_URL"])
    released.query(f"CREATE ROLE {role} LOGIN PASSWORD 'pw'")
    bare = {"DATABASE_URL": f"postgres://{role}:pw@{url.netloc.rpartition('@')[2]}{url.path}"}
    humble = Operations(config.load({**released.environment, **bare}))
    released.opened.append(humble)
    layout, job = LAYOUTS[released.layout], registry.job(name)
    for statement in grants.statements(layout, role, [job]):
        with humble.transaction(read_only=True) as connection:
            assert privileges.lacking(connection, job, layout), statement
        released.query(statement)
    with humble.transaction(read_only=True) as connection:
        assert privileges.lacking(connection, job, layout) == []


def test_no_run_begins_that_could_not_be_entered_into_the_ledger_to_its_end(deployment: Deployment) -> None:
    """After an upgrade without `db grants`: it would delete, and never settle."""
    name = f"late_{deployment.environment['DATABASE_URL'].rpartition('/')[2]}"
    url = urlsplit(deployment.environment["DATABASE_URL"])
    deployment.query(f"CREATE ROLE {name} LOGIN PASSWORD 'pw'")
    deployment.query(deployment.cli("db", "grants", "--role", name).stdout)
    deployment.query(f"REVOKE INSERT, UPDATE ON paperclip_worker.sums FROM {name}")
    late = {"DATABASE_URL": f"postgres://{name}:pw@{url.netloc.rpartition('@')[2]}{url.path}"}
    before = world(deployment)
    says = (
        "lacks INSERT on paperclip_worker.sums, UPDATE on paperclip_worker.sums; have the owner run what `db grants`"
    )
    refused(deployment, *INLINE, says=says, env=late)
    assert world(deployment) == before
    deployment.query(f"GRANT INSERT, UPDATE ON paperclip_worker.sums TO {name}")
    assert json.loads(deployment.cli(*INLINE, "--json", env=late).stdout)["kept"]


def test_a_database_without_its_ledger_has_no_job_that_is_ready(released: Deployment) -> None:
    released.query("DROP SCHEMA paperclip_worker CASCADE")
    done = released.cli("db", "check", "--json", ok=False)
    assert done.returncode == 1
    assert all(
        lacks == ["the ledger of this release (`db init`)"] for lacks in json.loads(done.stdout)["jobs"].values()
    )


def test_the_printed_grants_are_enough_and_no_more(deployment: Deployment) -> None:
    role = f"worker%of {deployment.environment['DATABASE_URL'].rpartition('/')[2]}"
    url = urlsplit(deployment.environment["DATABASE_URL"])
    deployment.query(f"CREATE ROLE \"{role}\" LOGIN PASSWORD 'pw'")
    printed = deployment.cli("db", "grants", "--role", role).stdout
    assert deployment.cli("db", "grants", "--role", role, "--layout", deployment.layout).stdout == printed
    told = deployment.json("db", "grants", "--role", role)
    assert (told["layout"], told["role"]) == (deployment.layout, role)
    assert "\n".join(told["statements"]) + "\n" == printed
    for _ in range(2):
        deployment.query(printed)
    login = f"postgres://{quote(role)}:pw@{url.netloc.rpartition('@')[2]}{url.path}"
    least = {"DATABASE_URL": login}
    logs = LAYOUTS[deployment.layout].logs
    planned = deployment.json("plan", "prune-logs")
    done = deployment.cli(*INLINE, "--json", env=least)
    assert json.loads(done.stdout)["tally"] == planned["tally"]
    for table in logs:
        done = deployment.cli(*INLINE, "--without-archive", "--older-than", "20d", "--table", table, env=least)
        assert done.stderr == ""
    # It is on the schedule of every deployment, and without a rotation there is nothing for it to read.
    deployment.cli("run", "retire-master-key", "--inline", "--yes", env=least)
    run = deployment.cli(*PRUNE, "--yes", "--detach", env=least).stdout.strip()
    deployment.cli("runs", "stop", run, env=least)
    deployment.cli("runs", "resume", run, "--inline", env=least)
    deployment.cli("db", "check", env=least)
    deployment.cli("schedule", "list", env=least)
    deployment.cli("metrics", "--measure", env=least)
    times = timetable.load(deployment.operations.settings)
    humble = Operations(config.load({**deployment.environment, **least}))
    deployment.opened.append(humble)
    with humble.transaction() as connection:
        standing.note(connection, times)
    assert deployment.cli("receipts", "verify", env=least).stdout.endswith("chain intact\n")
    assert deployment.json("receipts", "verify", "--anchors")["not_anchored"] == 0
    deployment.cli("receipts", "anchor", "--all", env=least)
    deployment.cli("receipts", "verify", "--anchors", env=least)
    with psycopg.connect(login, autocommit=True) as connection:
        for statement in (
            "DELETE FROM companies",
            "UPDATE companies SET id = id",
            "DELETE FROM paperclip_worker.receipts",
            "UPDATE paperclip_worker.receipts SET body = body",
            "UPDATE paperclip_worker.anchors SET key = key",
            "DELETE FROM paperclip_worker.anchors",
            "TRUNCATE paperclip_worker.receipts",
            "DELETE FROM paperclip_worker.runs",
            "UPDATE paperclip_worker.alembic_version SET version_num = version_num",
            "UPDATE paperclip_worker.rotations SET permitted_at = now()",
            "UPDATE paperclip_worker.master_keys SET current = false",
            "INSERT INTO paperclip_worker.chain (seq) VALUES (9)",
            "SELECT FROM paperclip_worker.resealed",
            "UPDATE activity_log SET action = action",
            "CREATE TABLE paperclip_worker.mine (id int)",
            "DELETE FROM company_secret_versions",
        ):
            with pytest.raises(errors.InsufficientPrivilege):
                connection.execute(statement.encode())


def test_version(standing: Deployment) -> None:
    assert importlib.metadata.version("paperclip-worker") in standing.cli("--version").stdout


def test_no_command_shows_the_help(standing: Deployment) -> None:
    bare = standing.cli(ok=False)
    assert bare.returncode == 2
    assert "Usage:" in bare.stdout
