"""What every job promises, on every layout: style.md rule 21, a clause a test."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any
from uuid import UUID

import psycopg
import pytest

import schedules
from tests.conftest import Deployment
from worker import layouts, ledger, params, registry
from worker.errors import Contended, UnderWay, WorkerError
from worker.job import Batch, Job, Shard, Tally
from worker.means import Means
from worker.operations import Operations
from worker.runner import Outcome
from worker.states import State

JOBS = sorted(registry.jobs())
# A job's audit row is the one thing a run adds to the host's tables.
AUDIT = "activity_log"


@pytest.fixture(params=JOBS)
def job(request: pytest.FixtureRequest) -> Job:
    """Each job with its default parameters."""
    return registry.job(request.param)()


def _start(operations: Operations, job: Job) -> UUID:
    return operations.start(job, actor="tester", via="test")


def _complete(operations: Operations, job: Job) -> dict[str, Any]:
    run = _start(operations, job)
    assert operations.runner().work(run, seconds=math.inf) is Outcome.SETTLED
    return operations.result(run)


def _ids(deployment: Deployment, table: str = AUDIT) -> set[str]:
    return {row[0] for row in deployment.query(f"SELECT id::text FROM {table}")}


def test_plan_and_rehearse_change_nothing(deployment: Deployment, job: Job) -> None:
    before = deployment.digest()
    plan = deployment.operations.plan(job)
    tally = deployment.operations.rehearse(job, limit=100)
    assert plan.tally.total.rows > 0
    assert tally == plan.tally
    assert deployment.digest() == before
    store = deployment.operations.store
    assert store is not None
    assert store.keys("") == []


def test_a_run_does_what_was_planned_and_a_second_finds_nothing(deployment: Deployment, job: Job) -> None:
    plan = deployment.operations.plan(job)
    first = _complete(deployment.operations, job)
    assert first["kept"], first
    assert Tally.from_json(first["tally"]) == plan.tally
    assert first["left"] == [one.to_json() for one in plan.left]
    after = deployment.digest()
    second = _complete(deployment.operations, job)
    assert second["kept"]
    assert second["rows"] == 0
    assert deployment.digest() == after


def test_only_the_rows_of_the_tally_and_one_audit_row_a_company_differ(deployment: Deployment, job: Job) -> None:
    before, ids = deployment.digest(without=(AUDIT,)), _ids(deployment)
    result = _complete(deployment.operations, job)
    assert deployment.digest(without=(AUDIT,)) == before
    gone, new = ids - _ids(deployment), _ids(deployment) - ids
    assert len(gone) == result["rows"]
    companies = {one["company"] for one in result["tally"]}
    rows = deployment.query(
        "SELECT id::text, company_id::text, action, actor_type FROM activity_log WHERE id::text = ANY(%s)", list(new)
    )
    assert {row[1] for row in rows} == companies
    assert len(rows) == len(companies)
    assert {row[2:] for row in rows} == {(job.action, "system")}


def test_interrupted_and_resumed_equals_uninterrupted(deployment: Deployment, job: Job) -> None:
    plan = deployment.operations.plan(job)
    small = deployment.with_settings(bite_rows="50")
    run = _start(small, job)
    runner = small.runner()
    bites = iter(range(6))
    assert runner.work(run, seconds=math.inf, leave=lambda: next(bites, None) is None) is Outcome.MORE
    part = small.result(run)
    assert 0 < part["rows"] < plan.tally.total.rows
    stopped = small.stop(str(run))
    assert stopped.state is State.STOPPED
    assert small.result(run)["receipt"]["tally"] == part["tally"]
    resumed = small.resume(str(run))
    assert resumed.state is State.RUNNING
    assert resumed.now == stopped.now
    assert small.runner().work(run, seconds=math.inf) is Outcome.SETTLED
    result = small.result(run)
    assert result["kept"]
    assert Tally.from_json(result["tally"]) == plan.tally
    companies = len({one["company"] for one in result["tally"]})
    (audit_rows,) = deployment.query(f"SELECT count(*) FROM activity_log WHERE action = '{job.action}'")
    assert audit_rows[0] == companies


@pytest.mark.parametrize("step", ["claim", "preserve", "apply"])
def test_an_exception_at_any_step_leaves_the_tally_exact(
    deployment: Deployment, job: Job, step: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = deployment.with_settings(bite_rows="50")
    before = len(_ids(deployment))
    original, calls = getattr(type(job), step), iter(range(3))

    def fails(self: Job, *arguments: Any) -> Any:
        found = original(self, *arguments)
        if next(calls, None) is None:
            raise WorkerError("injected")
        return found

    run = _start(small, job)
    with monkeypatch.context() as patch:
        patch.setattr(type(job), step, fails)
        with pytest.raises(WorkerError, match="injected"):
            small.runner().work(run, seconds=math.inf)
    result = small.result(run)
    assert result["state"] == "failed"
    assert result["receipt"]["error"] == "injected"
    companies = len({one["company"] for one in result["tally"]})
    assert before - len(_ids(deployment)) + companies == result["rows"]
    assert 0 < result["rows"] < (small.find(str(run)).planned_rows or 0)
    small.resume(str(run))
    assert small.runner().work(run, seconds=math.inf) is Outcome.SETTLED
    assert small.result(run)["kept"]


def test_a_row_that_somebody_holds_is_found_by_verify(deployment: Deployment, job: Job) -> None:
    """Left alone while it is locked, so the promise is unkept and says so; a later run gets it."""
    plan = deployment.operations.plan(job)
    column = "created_at" if deployment.layout == "paperclip" else '"timestamp"'
    small = deployment.with_settings(lock_timeout="0.05")
    with psycopg.connect(deployment.environment["DATABASE_URL"]) as other:
        kept = [one.digest for one in plan.targets]
        assert kept
        other.execute(
            f"SELECT id FROM activity_log WHERE action NOT LIKE 'x%%' ORDER BY {column} LIMIT 40 FOR UPDATE".encode()
        )
        result = _complete(small, job)
        assert result["state"] == "unkept"
        assert result["findings"]
        held = sum(one["rows"] for one in result["findings"])
        assert 0 < held <= 40
        assert result["rows"] == plan.tally.total.rows - held
    again = _complete(small, job)
    assert again["kept"]
    assert again["rows"] == held


def test_one_run_of_a_job_at_a_time(deployment: Deployment, job: Job) -> None:
    _start(deployment.operations, job)
    with pytest.raises(UnderWay):
        _start(deployment.operations, job)


def test_no_secret_and_no_row_content_in_ledger_and_receipt(deployment: Deployment, job: Job) -> None:
    (needle,) = deployment.query("SELECT gen_random_uuid()::text")[0]
    details = "details" if deployment.layout == "paperclip" else "metadata"
    deployment.query(f"UPDATE activity_log SET {details} = jsonb_build_object('secret', %s::text)", needle)
    _complete(deployment.operations, job)
    password = deployment.environment["DATABASE_URL"].split(":")[2].split("@")[0]
    for table in ("runs", "shards", "bites", "objects", "receipts"):
        (found,) = deployment.query(
            f"SELECT count(*) FROM paperclip_worker.{table} t "
            "WHERE position(%s in t::text) + position(%s in t::text) > 0",
            needle,
            password,
        )
        assert found[0] == 0, table


def test_parameters_survive_the_ledger(job: Job) -> None:
    assert params.from_json(type(job), params.to_json(job)) == job


def test_help_says_the_promise(job: Job) -> None:
    text = (type(job).__doc__ or "").splitlines()[0]
    assert text.endswith(".")
    assert all(item.help for item in params.params_of(type(job)))


def test_every_schedule_entry_names_a_job() -> None:
    assert schedules.SCHEDULE
    for entry in schedules.SCHEDULE.values():
        assert registry.job(entry.job.name) is type(entry.job)
        assert len(entry.crontab.split()) == 5


def test_a_missing_column_refuses_the_job_and_names_it(deployment: Deployment, job: Job) -> None:
    table = next(iter(job.needs(layouts.LAYOUTS[deployment.layout])))
    deployment.query(f'ALTER TABLE "{table.name}" RENAME COLUMN action TO verb')
    with pytest.raises(WorkerError, match=r"action"):
        deployment.operations.plan(job)


def test_an_archive_that_misses_a_row_rolls_the_bite_back(
    released: Deployment, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The guard that nothing goes which is not in the archive."""
    job = registry.job("prune-logs")()
    original = type(job).preserve

    def loses_one(self: Job, means: Means, batch: Batch) -> Any:
        batch, (first, *rest) = original(self, means, batch)
        return batch, (replace(first, rows=first.rows - 1), *rest)

    before = _ids(released)
    run = _start(released.operations, job)
    monkeypatch.setattr(type(job), "preserve", loses_one)
    with pytest.raises(WorkerError, match="exactly the rows"):
        released.operations.runner().work(run, seconds=math.inf)
    assert _ids(released) == before


def test_conflicts_without_end_fail_the_run(released: Deployment, monkeypatch: pytest.MonkeyPatch) -> None:
    job = registry.job("prune-logs")()

    def conflicts(*_: Any) -> Any:
        raise Contended("somebody else's")

    monkeypatch.setattr("worker.runner._LONGEST_REST", 0.0)
    monkeypatch.setattr(type(job), "claim", conflicts)
    run = _start(released.operations, job)
    with pytest.raises(Contended):
        released.operations.runner().work(run, seconds=math.inf)
    assert released.operations.find(str(run)).state is State.FAILED


def test_a_step_the_table_does_not_have_is_an_error(released: Deployment) -> None:
    run = _start(released.operations, registry.job("prune-logs")())
    with released.operations.transaction() as connection:
        found = ledger.get(connection, run, hold=True)
        assert found is not None
        with pytest.raises(ValueError, match="queued to kept"):
            ledger.step(connection, found, State.KEPT)


def test_shards_hold_every_row_of_the_plan_in_batches_of_two(deployment: Deployment, job: Job) -> None:
    operations = deployment.operations
    plan = operations.plan(job)
    with operations.transaction(scan=True) as connection:
        layout = layouts.LAYOUTS[deployment.layout]
        means = Means(connection=connection, now=plan.now, layout=layout, run=UUID(int=0))
        tally = sum((one for shard in job.shards(means, plan) for one in _walk(job, means, shard)), Tally())
        connection.rollback()
    assert tally == plan.tally


def _walk(job: Job, means: Means, shard: Shard) -> Iterator[Tally]:
    cursor: Mapping[str, Any] | None = None
    while (batch := job.claim(means, shard, cursor, 2)) is not None:
        yield job.apply(means, batch)
        cursor = batch.after
        if batch.exhausted:
            return
