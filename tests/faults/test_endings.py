"""A run ends, whatever has become of the deployment meanwhile: one that cannot would keep others from its table."""

from __future__ import annotations

import json
import re
import socket
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from uuid import UUID, uuid4

import pytest

from tasks.archive_tasks import ArchiveTasks
from tasks.prune_logs import PruneLogs
from tests.conftest import ROOT, Deployment
from tests.faults.evidence import wait
from worker import ledger, timetable
from worker.app import MOST_RESCUES, QUEUE, Site, make, send_work
from worker.errors import LedgerMissing, Refused
from worker.job import Job
from worker.means import Means
from worker.operations import Operations
from worker.runner import Outcome
from worker.states import State

pytestmark = pytest.mark.faults


@pytest.fixture
def small(released: Deployment) -> Operations:
    return released.with_settings(bite_rows="50")


def _under_way(small: Operations, job: Job | None = None, *, until: Callable[[UUID], bool] | None = None) -> UUID:
    """A run that has taken some bites."""
    run = small.start(job or PruneLogs(), actor="tester", via="test")
    while not (until(run) if until else small.result(run)["bites"]):
        small.runner().work(run, seconds=0)
    return run


def _short_lived(released: Deployment, small: Operations) -> tuple[UUID, UUID]:
    """A run that has taken rows of a company, and the company, which is gone as the app deletes one."""
    company = uuid4()
    released.query("INSERT INTO companies (id, name, issue_prefix) VALUES (%s, 'Short', 'SHORT')", company)
    released.query(
        "INSERT INTO activity_log (id, company_id, actor_type, actor_id, action, entity_type, entity_id, created_at) "
        "SELECT gen_random_uuid(), %s, 'user', 'u', 'a', 'x', 'y', now() - interval '200 days' "
        "FROM generate_series(1, 20)",
        company,
    )
    run = _under_way(small, until=lambda run: str(company) in [one["company"] for one in small.result(run)["tally"]])
    released.query("DELETE FROM activity_log WHERE company_id = %s", company)
    released.query("DELETE FROM companies WHERE id = %s", company)
    return run, company


def test_a_company_that_is_deleted_meanwhile(released: Deployment, small: Operations) -> None:
    run, company = _short_lived(released, small)
    assert small.runner().work(run, seconds=60) is Outcome.SETTLED
    result = small.result(run)
    assert result["kept"]
    assert result["receipt"]["evidence"]["activity_not_written"] == {str(company): "the company is gone"}
    others = {one["company"] for one in result["tally"]} - {str(company)}
    said = {
        whose
        for (whose,) in released.query(
            "SELECT company_id::text FROM activity_log WHERE action = %s", PruneLogs.action
        )
    }
    assert said == others


def test_a_run_of_such_a_company_can_be_stopped(released: Deployment, small: Operations) -> None:
    run, _ = _short_lived(released, small)
    assert small.stop(str(run)).state.value == "stopped"
    assert released.operations.start(PruneLogs(), actor="tester", via="test")


@pytest.mark.parametrize("job", [PruneLogs(), ArchiveTasks()], ids=lambda job: job.name)
def test_a_log_that_takes_no_row_of_ours(released: Deployment, small: Operations, job: Job) -> None:
    run = _under_way(small, job)
    released.query("ALTER TABLE activity_log ADD mood text NOT NULL DEFAULT 'calm'")
    released.query("ALTER TABLE activity_log ALTER mood DROP DEFAULT")
    assert small.runner().work(run, seconds=60) is Outcome.SETTLED
    result = small.result(run)
    assert result["kept"]
    missing = result["receipt"]["evidence"]["activity_not_written"]
    assert set(missing) == {one["company"] for one in result["tally"]}
    assert set(missing.values()) == {"the database refuses it (SQLSTATE 23502)"}
    assert json.loads(released.cli("receipts", "verify", "--json").stdout)["intact"]


def test_a_log_that_has_a_rule(released: Deployment, small: Operations) -> None:
    """PostgreSQL takes no row of ours then, by an error of another kind."""
    run = _under_way(small)
    released.query("CREATE TABLE copied (id uuid)")
    released.query("CREATE RULE twice AS ON INSERT TO activity_log DO ALSO INSERT INTO copied VALUES (NEW.id)")
    assert small.runner().work(run, seconds=60) is Outcome.SETTLED
    missing = small.result(run)["receipt"]["evidence"]["activity_not_written"]
    assert set(missing.values()) == {"the database refuses it (SQLSTATE 0A000)"}


def test_a_worker_without_the_bucket_fails_the_run(released: Deployment, small: Operations) -> None:
    run = _under_way(small)
    without = released.with_settings(s3_bucket="")
    with pytest.raises(Refused, match="PAPERCLIP_WORKER_S3_BUCKET is not set on this worker"):
        without.runner().work(run, seconds=60)
    failed = small.result(run)
    assert failed["state"] == "failed"
    assert failed["receipt"]["evidence"]["index"] == "not written: Refused"
    # With the bucket it goes on, and its archive is whole.
    small.resume(str(run))
    assert small.runner().work(run, seconds=60) is Outcome.SETTLED
    assert small.result(run)["kept"]


def test_an_index_that_cannot_be_written_does_not_keep_a_run_from_its_end(
    released: Deployment, small: Operations, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For whatever reason, one in the middle of a statement too."""
    run = _under_way(small)

    def broken(_: PruneLogs, means: Means) -> dict[str, str]:
        means.connection.exec_driver_sql("SELECT 1 / 0")
        return {}

    monkeypatch.setattr(PruneLogs, "index", broken)
    assert small.stop(str(run)).state.value == "stopped"
    assert small.result(run)["receipt"]["evidence"] == {"index": "not written: DataError"}
    monkeypatch.undo()
    small.resume(str(run))
    assert small.runner().work(run, seconds=60) is Outcome.SETTLED
    assert small.result(run)["kept"]


@pytest.mark.parametrize("change", ["params = params || '{\"later\": true}'", "job = 'of-a-later-release'"])
def test_a_run_that_this_release_does_not_know(released: Deployment, change: str) -> None:
    operations = released.operations
    first, second = (
        operations.start(PruneLogs(table=name), actor="t", via="test") for name in ("activity_log", "plugin_logs")
    )
    released.query(f"UPDATE paperclip_worker.runs SET {change}")
    with pytest.raises(Refused):
        operations.runner().work(first, seconds=60)
    operations.stop(str(second))
    assert [operations.result(run)["state"] for run in (first, second)] == ["failed", "stopped"]
    evidence = operations.result(first)["receipt"]["evidence"]
    assert evidence == {"index": "not written: the job is not known"}


# -- the rescue -----------------------------------------------------------------------------------------


class _Deaf(Site):
    """A worker's rescue whose messages are counted and go nowhere."""

    def __init__(self, deployment: Deployment) -> None:
        settings = deployment.operations.settings
        super().__init__(settings, timetable.load(settings), make(settings))
        self.sent: list[UUID] = []
        deployment.opened.append(self.operations)

    def enqueue(self, run: UUID, number: int = 1, *, after: float = 0) -> None:
        assert (number, after) == (1, 0)
        self.sent.append(run)


def _age(deployment: Deployment) -> None:
    """As if nothing had moved for a day."""
    for table in ("runs", "shards"):
        deployment.query(f"UPDATE paperclip_worker.{table} SET touched_at = now() - interval '1 day'")


def test_a_run_that_cannot_be_helped_keeps_no_help_from_others(
    released: Deployment, monkeypatch: pytest.MonkeyPatch
) -> None:
    bad = released.operations.start(PruneLogs(table="plugin_logs"), actor="t", via="test")
    good = released.operations.start(PruneLogs(), actor="t", via="test")
    released.query("UPDATE paperclip_worker.runs SET rescues = %s WHERE id = %s", MOST_RESCUES, bad)
    site, given_up = _Deaf(released), list[UUID]()

    def fails(run: UUID, _: str) -> None:
        given_up.append(run)
        raise RuntimeError

    monkeypatch.setattr(site.runner, "give_up", fails)
    for _ in range(2):
        _age(released)
        # Whichever comes first.
        site.rescue()
    assert given_up == [bad, bad]
    assert site.sent == [good, good]
    assert released.query("SELECT rescues FROM paperclip_worker.runs WHERE id = %s", good) == [(2,)]


def test_a_run_that_is_resumed_is_rescued_as_often_as_a_new_one(released: Deployment) -> None:
    run = released.operations.start(PruneLogs(), actor="t", via="test")
    site = _Deaf(released)
    for _ in range(MOST_RESCUES + 1):
        _age(released)
        site.rescue()
    assert released.operations.result(run)["state"] == "failed"
    released.operations.resume(str(run))
    _age(released)
    site.rescue()
    assert released.operations.result(run)["state"] == "queued"
    assert site.sent == [run] * (MOST_RESCUES + 1)


def _stall(deployment: Deployment, run: UUID, *, bite: str = "2 days") -> None:
    """As if the run had been touched a day ago, and a bite of it been taken so long ago."""
    update = "UPDATE paperclip_worker.{} SET touched_at = now() - %s::interval WHERE {} = %s"
    deployment.query(update.format("shards", "run_id"), bite, run)
    deployment.query(update.format("runs", "id"), "1 day", run)


@pytest.mark.parametrize("since", ["bite", "rest", "step"])
def test_a_run_that_went_on_since_it_was_last_rescued_is_rescued_as_often_as_a_new_one(
    released: Deployment, small: Operations, since: str
) -> None:
    """However it went on after its last bite: each touches the run too."""
    run = _under_way(small)
    site = _Deaf(released)
    released.query("UPDATE paperclip_worker.runs SET rescues = %s WHERE id = %s", MOST_RESCUES, run)
    _stall(released, run, bite="23 hours")
    if since != "bite":
        with small.transaction() as connection:
            found = ledger.get(connection, run)
            assert found is not None
            if since == "rest":
                ledger.note_wait(connection, run, "a replica is behind", kind="replica_lag", seconds=1)
            else:
                ledger.step(connection, found, State.VERIFYING)
        _stall(released, run)
    site.rescue()
    assert site.sent == [run]
    for number in range(2, MOST_RESCUES + 1):
        assert released.query("SELECT state, rescues FROM paperclip_worker.runs") != [("failed", number)]
        _stall(released, run)
        site.rescue()
    assert released.query("SELECT rescues FROM paperclip_worker.runs") == [(MOST_RESCUES,)]
    _stall(released, run)
    site.rescue()
    assert small.result(run)["state"] == "failed"


def test_of_rescues_at_the_same_time_one_counts_and_sends(released: Deployment) -> None:
    run = released.operations.start(PruneLogs(), actor="t", via="test")
    _age(released)
    sites = [_Deaf(released) for _ in range(4)]
    stalled = [site.operations.stalled() for site in sites]
    start = threading.Barrier(len(sites))

    def rescue(site: _Deaf, found: list[ledger.Run]) -> None:
        site.operations.stalled = lambda: found  # type: ignore[method-assign]
        start.wait()
        site.rescue()

    with ThreadPoolExecutor() as threads:
        list(threads.map(rescue, sites, stalled))
    assert [run for site in sites for run in site.sent] == [run]
    assert released.query("SELECT rescues FROM paperclip_worker.runs") == [(1,)]


def test_a_run_whose_message_waits_is_not_lost(released: Deployment) -> None:
    """Its workers are busy with others, for however long; but a message that came back has seen one die."""
    run = released.operations.start(PruneLogs(), actor="t", via="test")
    site = _Deaf(released)
    with make(released.operations.settings) as celery, celery.connection_for_write() as connection:
        send_work(celery, run)
        _stall(released, run)
        site.rescue()
        assert site.sent == []
        assert released.query("SELECT rescues FROM paperclip_worker.runs") == [(0,)]
        message = connection.SimpleQueue(QUEUE).get(timeout=5)
        message.requeue()
        site.rescue()
    assert site.sent == [run]


def test_the_rescue_comes_before_the_work_that_waits(released: Deployment) -> None:
    """One process and three runs that rest, each of which has a message waiting when it comes to the rescue."""
    released.query("SELECT pg_create_physical_replication_slot('busy', true)")
    try:
        with make(released.operations.settings) as celery:
            for table in ("activity_log", "heartbeat_run_events", "secret_access_events"):
                busy = released.operations.start(PruneLogs(table=table), actor="t", via="test")
                send_work(celery, busy)
            lost = released.operations.start(ArchiveTasks(), actor="t", via="test")
            _stall(released, lost)
            # Its slices are so long that they would take a minute all together.
            with released.worker(slice_seconds="20", max_retained_wal="1"):
                began = "SELECT count(*) FROM paperclip_worker.runs WHERE state <> 'queued' AND id <> %s"
                rescued = "SELECT rescues FROM paperclip_worker.runs WHERE id = %s"
                wait(lambda: released.query(rescued, lost) == [(1,)], seconds=60)
                assert released.query(began, lost)[0][0] <= 1
    finally:
        released.query("SELECT pg_drop_replication_slot('busy')")


_BREAKS = """
import sys
from celery import bootsteps
from worker import app, config

class Breaks(bootsteps.StartStopStep):
    def start(self, parent):
        raise RuntimeError

def made(*given, make=app.make):
    found = make(*given)
    found.steps["worker"].add(Breaks)
    return found

app.make = made
sys.exit(app.run_worker(config.load(), concurrency=1))
"""


_LEAKS = """
import sys
from worker import app, config, metrics
from worker.operations import Operations
from worker.runner import Runner

def leaks(*_, **__):
    raise ValueError("hunter2")

Runner._advance = Operations.start = Operations.stalled = app.backlog.measure = metrics.anchors.pending = leaks
sys.exit(app.run_worker(config.load(), concurrency=1))
"""


def test_an_unexpected_error_is_logged_by_its_kind_alone(released: Deployment, tmp_path: Path) -> None:
    """Its text may quote a row: neither our log nor Celery's has it, and no traceback. A scrape is answered."""
    log, tasks = tmp_path / "log", {"work", "launch", "rescue", "measure"}
    run = released.operations.start(PruneLogs(), actor="t", via="test")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    env = {name: value for name, value in released.process_environment().items() if name != "PYTHONWARNINGS"}
    env["PAPERCLIP_WORKER_METRICS_PORT"] = port
    with make(released.operations.settings) as celery, log.open("w") as stderr:
        for name, words in {"work": (str(run),), "launch": ("prune-activity-log",), "measure": ()}.items():
            celery.send_task(f"paperclip_worker.{name}", words)
        worker = subprocess.Popen([sys.executable, "-c", _LEAKS], cwd=ROOT, env=env, stderr=stderr)
        try:
            wait(lambda: set(re.findall(r"Task paperclip_worker\.(\w+)\[\S+ raised", log.read_text())) == tasks)
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
                assert b"paperclip_worker_ledger_up 0.0" in answer.read()
        finally:
            worker.terminate()
            worker.wait(30)
    said = log.read_text()
    assert said.count("internal error: ValueError") >= len(tasks)
    assert "hunter2" not in said
    assert "Traceback" not in said
    assert released.operations.result(run)["state"] == "failed"


def test_a_worker_that_breaks_down_ends_with_another_status_than_one_that_was_told_to_end(
    released: Deployment,
) -> None:
    """A supervisor goes by it."""
    env = {name: value for name, value in released.process_environment().items() if name != "PYTHONWARNINGS"}
    broken = subprocess.run(
        [sys.executable, "-c", _BREAKS], cwd=ROOT, env=env, capture_output=True, timeout=60, check=False
    )
    assert broken.returncode == 1
    with make(released.operations.settings) as celery, released.worker() as process:
        wait(lambda: celery.control.ping(timeout=0.3))
        process.terminate()
        assert process.wait(30) == 0


def test_a_worker_that_is_up_leaves_the_runs_of_a_ledger_that_was_upgraded_alone(released: Deployment) -> None:
    """They are for workers of that release, and go on with these as if nothing had been."""
    run = released.operations.start(PruneLogs(), actor="t", via="test")
    site = _Deaf(released)
    ((mine,),) = released.query("SELECT version_num FROM paperclip_worker.alembic_version")
    released.query("UPDATE paperclip_worker.alembic_version SET version_num = '9999'")
    with pytest.raises(LedgerMissing, match="newer release"):
        site.operations.require_ledger()
    site.work(run)
    assert released.query("SELECT state, touched_at = created_at FROM paperclip_worker.runs") == [("queued", True)]
    assert site.sent == []
    released.query("UPDATE paperclip_worker.alembic_version SET version_num = %s", mine)
    site.work(run)
    assert released.operations.result(run)["kept"]
