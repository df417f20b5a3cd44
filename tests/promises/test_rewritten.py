"""A migration of the app's that writes a table anew: to whoever began before its commit the table has no rows."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from uuid import UUID

import psycopg
import pytest

from tasks.archive_tasks import ArchiveTasks
from tasks.prune_logs import PruneLogs
from tests.conftest import Deployment
from tests.faults.evidence import begin, wait
from worker.operations import Operations

_REWRITE = "ALTER TABLE {} ADD of_a_release uuid DEFAULT gen_random_uuid()"


@contextmanager
def _migrated(deployment: Deployment, table: str) -> Iterator[Callable[[], None]]:
    """A migration under way; what is called lets it commit once a session of ours waits for its table."""
    with psycopg.connect(deployment.environment["DATABASE_URL"]) as app:
        app.execute(_REWRITE.format(table).encode())

        def commit() -> None:
            waits = "SELECT count(*) > 0 FROM pg_locks WHERE relation = %s::regclass AND NOT granted"
            wait(lambda: deployment.query(waits, table)[0][0])
            app.commit()

        yield commit


def _beside(operations: Operations, run: UUID, commit: Callable[[], None]) -> None:
    """Take the next step of a run while the migration commits, and then all others."""
    worker = threading.Thread(target=lambda: operations.runner().work(run, seconds=0))
    worker.start()
    commit()
    worker.join(30)
    operations.runner().work(run, seconds=math.inf)


@pytest.mark.parametrize(("table", "archive"), [("issues", True), ("heartbeat_runs", False)])
def test_what_says_that_rows_stay_is_not_taken_for_empty(released: Deployment, table: str, archive: bool) -> None:
    released.query(f"UPDATE {table} SET status = 'running'")
    job = PruneLogs(archive=archive)
    patient = released.with_settings(lock_timeout="20")
    planned = patient.plan(job)
    run = begin(patient, job)
    patient.runner().work(run, seconds=0)
    with _migrated(released, table) as commit:
        _beside(patient, run, commit)
    result = patient.result(run)
    assert result["kept"]
    assert result["left"] == [one.to_json() for one in planned.left]
    assert result["rows"] == planned.tally.total.rows


def test_a_log_is_not_taken_for_empty(released: Deployment) -> None:
    """By whoever looks at the end whether something is left."""
    patient = released.with_settings(lock_timeout="20")
    planned = patient.plan(PruneLogs()).tally.total.rows
    run = begin(patient)
    patient.runner().work(run, seconds=0)
    released.query("UPDATE paperclip_worker.shards SET done = true")
    patient.runner().work(run, seconds=0)
    assert patient.result(run)["state"] == "verifying"
    with _migrated(released, "activity_log") as commit:
        _beside(patient, run, commit)
    result = patient.result(run)
    assert result["kept"]
    assert result["rows"] == planned


def test_tasks_with_live_runs_stay_in_sight(released: Deployment) -> None:
    patient = released.with_settings(lock_timeout="20")
    planned = patient.plan(ArchiveTasks())
    run = begin(patient, ArchiveTasks())
    patient.runner().work(run, seconds=0)
    with _migrated(released, "heartbeat_runs") as commit:
        _beside(patient, run, commit)
    result = patient.result(run)
    assert (result["kept"], result["left"]) == (True, [one.to_json() for one in planned.left])


def test_a_company_is_not_taken_for_gone(released: Deployment) -> None:
    patient = released.with_settings(lock_timeout="20")
    run = begin(patient)
    patient.runner().work(run, seconds=math.inf, leave=lambda: patient.result(run)["state"] == "finishing")
    with _migrated(released, "companies") as commit:
        _beside(patient, run, commit)
    result = patient.result(run)
    assert result["kept"]
    assert "activity_not_written" not in result["receipt"]["evidence"]
