"""Sentences of the pages and of `--help` that nothing else holds to: each is made untrue where it can be."""

from __future__ import annotations

import hashlib
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import psycopg
import pytest
import redis
import sqlalchemy as sa
from psycopg import errors

from tests.cli.helpers import begin, check_refusal, complete, least
from tests.conftest import ROOT, Deployment
from tests.faults.evidence import wait
from tests.rotation import steps
from tests.rotation.conftest import equipped
from worker import audit, embedded
from worker.layouts import LAYOUTS, demo_schema

CLI = (sys.executable, str(ROOT / "cli.py"))
OPERATIONS = ROOT / "docs" / "operations.md"


def test_a_failed_run_is_shown_with_why_it_failed(released: Deployment) -> None:
    """operations.md: `error` has it. Whoever looks for it does not ask for JSON first."""
    run = begin(released)
    released.operations.runner().give_up(run, "the cause of it")
    assert "error: the cause of it" in released.cli("runs", "show", "last").stdout.splitlines()


def test_a_rotation_is_shown_with_its_stage(released: Deployment, tmp_path: Path) -> None:
    """rotate-master-key.md: `runs show RUN` says at which stage a run is."""
    vault = equipped(released, tmp_path / "secrets")
    vault.plant()
    run = steps.start(vault, generate=True)
    steps.work_until(vault, run, steps.CUT_OVER)
    assert "stage cut-over" in vault.deployment.cli("runs", "show", str(run)).stdout.splitlines()


def test_a_receipt_that_was_changed_is_left_out_of_the_list(released: Deployment) -> None:
    """`receipts list --help`: exit status 1 when one was changed, which is left out."""
    complete(released)
    complete(released)
    change = "UPDATE paperclip_worker.receipts SET body = replace(body, %s, %s) WHERE seq = 1"
    released.query(change, '"job":"prune-logs"', '"job":"prune-nothing"')
    done = released.cli("receipts", "list", "--json", ok=False)
    assert (done.returncode, [one["seq"] for one in json.loads(done.stdout)["receipts"]]) == (1, [2])
    shown = released.cli("receipts", "show", "1", "--json", ok=False)
    check_refusal(shown, says="receipt 1 is not what was signed", status=2)


def test_a_receipt_is_printed_byte_for_byte_whatever_the_terminal_takes(released: Deployment) -> None:
    """operations.md: `receipts show 1 | sha256sum` is the hash that is signed."""
    released.cli("run", "prune-logs", "--inline", "--yes", "--reason", "Tåresund")
    ((digest,),) = released.query("SELECT hash FROM paperclip_worker.receipts")
    done = subprocess.run(
        [*CLI, "receipts", "show", "1"],
        env={**released.process_environment(), "PYTHONIOENCODING": "latin-1"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, b"")
    assert hashlib.sha256(done.stdout).hexdigest() == digest


def test_ctrl_c_while_a_run_is_stopped_does_not_say_that_nothing_was_done(
    released: Deployment, servers: embedded.Embedded
) -> None:
    """Exit status 2 says that nothing was changed; the run was told to stop, and workers will see to it."""
    run = begin(released)
    servers.s3.freeze()
    try:
        with subprocess.Popen(
            [*CLI, "runs", "stop", str(run)],
            env=released.process_environment(),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        ) as process:
            wait(lambda: released.operations.find(str(run)).state.value == "stopping")
            process.send_signal(signal.SIGINT)
            out, err = process.communicate(timeout=60)
    finally:
        servers.s3.thaw()
    done = subprocess.CompletedProcess([], process.returncode, out, err.lstrip("\n"))
    check_refusal(done, says=rf"run {run} is told to stop; `runs stop {run}` again", status=1)
    assert released.json("runs", "stop", str(run))["state"] == "stopped"


def test_the_page_says_which_ciphertext_the_workers_role_may_read(deployment: Deployment) -> None:
    """Guards and holds look for tasks in columns that hold ciphertext too: who judges the grants has to know."""
    with least(deployment) as login, psycopg.connect(login["DATABASE_URL"]) as connection:
        carriers = [(one.table.name, one.column.name) for one in LAYOUTS[deployment.layout].carriers]
        readable = [
            f"{table}.{column}"
            for table, column in carriers
            if connection.execute(
                "SELECT has_column_privilege(%s, %s, 'SELECT')", (f"public.{table}", column)
            ).fetchone()
            == (True,)
        ]
    text = " ".join(OPERATIONS.read_text(encoding="utf-8").split())
    (said,) = re.findall(r"It cannot change or delete a receipt.*?Ciphertext(.*?)`--job` gives less", text)
    assert set(re.findall(r"`(\w+\.\w+)`", said)) >= set(readable)
    assert "paperclip_worker.rotations" in said


def test_an_owner_who_is_no_superuser_makes_the_ledger_and_gives_all_but_what_is_the_server_s(
    servers: embedded.Embedded, make_deployment: Any, fresh_database: Any
) -> None:
    """operations.md: as the owner. What an owner cannot give is named there, and the jobs run without it."""
    url = fresh_database()
    name = urlsplit(url).path.removeprefix("/")
    admin = make_deployment(url, "paperclip")
    owner, role = f"owner_of_{name}", f"role_of_{name}"
    admin.query(f"CREATE ROLE {owner} LOGIN PASSWORD 'pw'; CREATE ROLE {role} LOGIN PASSWORD 'pw'")
    admin.query(f"ALTER DATABASE {name} OWNER TO {owner}")
    host = urlsplit(url).netloc.rpartition("@")[2]
    plain = make_deployment(f"postgres://{owner}:pw@{host}/{name}", "paperclip")
    try:
        with plain.operations.engine.begin() as connection:
            demo_schema.create(connection, "paperclip")
            connection.execute(
                sa.text("INSERT INTO companies (id, name, issue_prefix) VALUES (gen_random_uuid(), 'C', 'C')")
            )
        plain.cli("db", "init")
        refused = []
        with psycopg.connect(plain.environment["DATABASE_URL"], autocommit=True) as connection:
            for statement in plain.json("db", "grants", "--role", role)["statements"]:
                try:
                    connection.execute(statement.encode())
                except errors.InsufficientPrivilege:
                    refused.append(statement)
        assert refused == [f"GRANT pg_read_all_stats TO {role};"]
        text = " ".join(OPERATIONS.read_text(encoding="utf-8").split())
        assert "`GRANT pg_read_all_stats`" in text
        humble = {"DATABASE_URL": f"postgres://{role}:pw@{host}/{name}"}
        plain.cli("run", "prune-logs", "--inline", "--yes", env=humble)
        done = plain.cli("db", "check", env=humble, ok=False)
        assert (done.returncode, "lacks pg_read_all_stats" in done.stderr) == (1, True)
    finally:
        plain.operations.close()
        admin.query(f"DROP OWNED BY {role}; DROP ROLE {role}")
        admin.query(f"ALTER DATABASE {name} OWNER TO CURRENT_USER; REASSIGN OWNED BY {owner} TO CURRENT_USER")
        admin.query(f"DROP OWNED BY {owner}; DROP ROLE {owner}")


def test_an_auditor_reads_the_database_and_no_more(released: Deployment, tmp_path: Path) -> None:
    """operations.md: an auditor needs only read access to the database and the public key."""
    complete(released)
    public = tmp_path / "auditor.pem"
    own = audit.public_pem(audit.Signer.load(Path(released.environment["PAPERCLIP_WORKER_SIGNING_KEY_FILE"])).public)
    url = urlsplit(released.environment["DATABASE_URL"])
    name = f"auditor_of_{url.path.removeprefix('/')}"
    released.query(f"CREATE ROLE {name} LOGIN PASSWORD 'pw' IN ROLE pg_read_all_data")
    try:
        env = {"DATABASE_URL": f"postgres://{name}:pw@{url.netloc.rpartition('@')[2]}{url.path}"}
        # As with the signing key's file, a second key is found behind the first.
        public.write_text(audit.public_pem(audit.keygen(tmp_path / "other.pem").public) + own)
        words = ("receipts", "verify", "--public-key", str(public))
        assert "chain intact" in released.cli(*words, env=env).stdout
        assert "the bucket agrees" in released.cli(*words, "--anchors", env=env).stdout
        released.cli("receipts", "list", env=env)
        released.cli("runs", "list", env=env)
    finally:
        released.query(f"DROP OWNED BY {name}; DROP ROLE {name}")


@pytest.mark.long
def test_the_demo_touches_nothing_that_is_configured(servers: embedded.Embedded, tmp_path: Path) -> None:
    """`demo --help` says so. Here is a deployment's environment, and a directory with a cli.py of somebody else."""
    (tmp_path / "cli.py").write_text("import pathlib\npathlib.Path('ran').touch()\n")
    (tmp_path / "url").write_text("postgres://someone:hunter2@127.0.0.1:1/db\n")
    broker = servers.environment()["PAPERCLIP_WORKER_BROKER_URL"].replace("/0", "/15")
    with redis.Redis.from_url(broker) as client:
        client.flushdb()
        configured = {
            "CELERY_BROKER_URL": broker,
            "DATABASE_URL_FILE": str(tmp_path / "url"),
            "PAPERCLIP_WORKER_RETENTION_FLOOR": "365d",
            "AWS_PROFILE": "nosuch",
            "AWS_SESSION_TOKEN": "another's",
        }
        base = {name: value for name, value in os.environ.items() if not name.startswith("AWS_")}
        done = subprocess.run(
            [*CLI, "demo", "--rows", "1000", "--json"],
            env={**base, **configured},
            cwd=tmp_path,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert client.keys() == []
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout)["kept"] is True
    assert not (tmp_path / "ran").exists()


def test_a_batch_that_does_not_fit_on_the_disk_is_taken_smaller(released: Deployment) -> None:
    """Rows of the size of a screenshot: the 250 that a run begins with are more than a container's /tmp has."""
    released.query(
        "UPDATE activity_log a SET details = jsonb_build_object('image', "
        "(SELECT string_agg(md5(random()::text), '') FROM generate_series(1, 3000) WHERE a.id IS NOT NULL)) "
        "WHERE id IN (SELECT id FROM activity_log WHERE company_id = (SELECT company_id FROM activity_log "
        "ORDER BY created_at LIMIT 1) ORDER BY created_at LIMIT 300)"
    )
    command = 'ulimit -f 18000; exec "$@"'
    done = subprocess.run(
        ["sh", "-c", command, "sh", *CLI, "run", "prune-logs", "--inline", "--yes", "--json"],
        env=released.process_environment(),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout)["kept"] is True


def test_a_company_is_found_by_its_name_whatever_letters_the_database_makes_small(released: Deployment) -> None:
    """holds.md, policies.md: id or name. A database of the locale C knows the capitals of ASCII alone."""
    released.query("INSERT INTO companies (id, name, issue_prefix) VALUES (gen_random_uuid(), 'Örebro AB', 'ORE')")
    for name in ("Örebro AB", "Örebro ab"):
        released.cli("holds", "add", "--company", name, "--reason", "case 7")


def test_a_dump_of_the_apps_own_keeps_what_receipts_prove(released: Deployment) -> None:
    """operations.md: back it up with the app, whose dumps without pg_dump cut times to milliseconds."""
    result = complete(released)
    for table, column in released.query(
        "SELECT table_name, column_name FROM information_schema.columns WHERE table_schema = 'paperclip_worker' "
        "AND data_type = 'timestamp with time zone' AND table_name <> 'resealed'"
    ):
        released.query(f"UPDATE paperclip_worker.{table} SET {column} = date_trunc('milliseconds', {column})")
    assert released.cli("receipts", "verify", "--anchors").stdout.startswith("1 receipts, chain intact")
    restored = released.json("run", "restore-logs", "--run", result["run"], "--inline")
    assert (restored["kept"], restored["rows"]) == (True, result["rows"])


def test_every_command_says_that_there_is_no_ledger(released: Deployment) -> None:
    """The Trouble table has the sentence; no other says what to do."""
    released.query("DROP SCHEMA paperclip_worker CASCADE")
    reason = ("--reason", "r")
    for words in (
        ("holds", "add", "--table", "activity_log", *reason),
        ("holds", "release", "a", *reason, "--yes"),
        ("holds", "list"),
        ("policy", "set", "--table", "activity_log", "--keep", "100d", *reason, "--yes"),
        ("policy", "list"),
        ("keys", "list"),
        ("keys", "switch", "last", "--yes"),
        ("runs", "stop", "last"),
        ("runs", "resume", "last", "--inline"),
        ("runs", "watch", "last"),
        ("receipts", "list"),
        ("receipts", "show", "1"),
        ("receipts", "anchor"),
        ("receipts", "verify", "--anchors"),
        ("run", "restore-logs", "--run", "last", "--inline"),
        ("plan", "archive-tasks"),
        ("rehearse", "archive-tasks"),
    ):
        check_refusal(released.cli(*words, ok=False), says="the ledger is not there", status=2)
