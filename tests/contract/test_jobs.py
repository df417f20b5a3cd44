"""What every job promises, on every layout: style.md rule 21, a clause a test."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any
from uuid import UUID

import psycopg
import pytest

import schedules
from tasks.archive_tasks import ArchiveTasks
from tasks.prune_logs import PruneLogs
from tasks.restore_logs import RestoreLogs
from tests.conftest import Deployment
from worker import layouts, ledger, params, registry
from worker.errors import Contended, UnderWay, WorkerError
from worker.job import Batch, Job, Shard
from worker.means import Means
from worker.operations import Operations
from worker.params import RunId
from worker.plans import Tally
from worker.runner import Outcome
from worker.states import State

# A job's audit row is the one thing a run adds to the host's tables.
AUDIT = "activity_log"


def _archived(deployment: Deployment, job: Job) -> RunId:
    result = _complete(deployment.operations, job)
    assert result["kept"]
    return RunId(result["run"])


# How a job comes to have something to do where its default parameters do not suffice.
PREPARED: Mapping[str, Callable[[Deployment], Job]] = {
    "archive-tasks --undo": lambda deployment: ArchiveTasks(undo=_archived(deployment, ArchiveTasks())),
    "restore-logs": lambda deployment: RestoreLogs(run=_archived(deployment, PruneLogs())),
}
# They change many tables in one bite, or nothing when no key is due: tests/rotation/test_clauses.py, test_keys.py.
ELSEWHERE = {"rotate-master-key", "retire-master-key"}
CASES = sorted({*registry.jobs(), *PREPARED} - ELSEWHERE)
# Of these the rows are there while the run works, so that somebody may hold them.
LOCKABLE = [case for case in CASES if case != "restore-logs"]


def _prepare(case: str, deployment: Deployment) -> Job:
    return PREPARED[case](deployment) if case in PREPARED else registry.job(case)()


@pytest.fixture(params=CASES)
def job(request: pytest.FixtureRequest, deployment: Deployment) -> Job:
    """Each job on a deployment where it has something to do."""
    return _prepare(request.param, deployment)


@pytest.fixture
def small(deployment: Deployment, job: Job) -> Operations:
    """The deployment, with batches so small that every run has many."""
    rows = deployment.operations.plan(job).tally.total.rows
    return deployment.with_settings(bite_rows=str(max(2, rows // 20)))


def _start(operations: Operations, job: Job) -> UUID:
    return operations.start(job, actor="tester", via="test")


def _complete(operations: Operations, job: Job) -> dict[str, Any]:
    run = _start(operations, job)
    assert operations.runner().work(run, seconds=math.inf) is Outcome.SETTLED
    return operations.result(run)


def _table(deployment: Deployment, job: Job) -> str:
    """The one table whose rows the job changes."""
    (table,) = {one.table for one in deployment.operations.plan(job).targets}
    return table


def _rows(deployment: Deployment, table: str) -> dict[str, str]:
    """Every row of a table by id, as its hash; without the rows by which runs say what they did."""
    said = " WHERE action NOT LIKE 'maintenance.%'" if table == AUDIT else ""
    return dict(deployment.query(f'SELECT id::text, md5(t::text) FROM "{table}" t{said}'))


def _changed(before: Mapping[str, str], after: Mapping[str, str]) -> int:
    return len({one for one, _ in before.items() ^ after.items()})


def _begun(deployment: Deployment) -> bool:
    """Whether a run under way has changed rows."""
    query = (
        "SELECT coalesce(sum(s.rows), 0) > 0 FROM paperclip_worker.shards s JOIN paperclip_worker.runs r "
        "ON r.id = s.run_id WHERE r.settled_at IS NULL"
    )
    ((begun,),) = deployment.query(query)
    return bool(begun)


def _said(deployment: Deployment, job: Job) -> list[str]:
    """The companies that have an audit row of the job."""
    query = "SELECT company_id::text FROM activity_log WHERE action = %s AND actor_type = 'system' ORDER BY 1"
    return [row[0] for row in deployment.query(query, job.activity)]


def test_plan_and_rehearse_change_nothing(deployment: Deployment, job: Job) -> None:
    store = deployment.operations.store
    assert store is not None
    before, keys = deployment.digest(), store.keys("")
    plan = deployment.operations.plan(job)
    tally = deployment.operations.rehearse(job, limit=100)
    assert plan.tally.total.rows > 0
    assert tally == plan.tally
    assert deployment.digest() == before
    assert store.keys("") == keys


def test_a_run_does_what_was_planned_and_a_second_finds_nothing(deployment: Deployment, job: Job) -> None:
    plan = deployment.operations.plan(job)
    first = _complete(deployment.operations, job)
    assert first["kept"], first
    assert Tally.from_json(first["tally"]) == plan.tally
    assert first["left"] == [one.to_json() for one in plan.left]
    after = deployment.digest()
    if getattr(job, "undo", None):
        with pytest.raises(WorkerError, match="undone already"):
            _start(deployment.operations, job)
    else:
        second = _complete(deployment.operations, job)
        assert second["kept"]
        assert second["rows"] == 0
    assert deployment.digest() == after


def test_only_the_rows_of_the_tally_and_one_audit_row_a_company_differ(deployment: Deployment, job: Job) -> None:
    table = _table(deployment, job)
    before, rows = deployment.digest(without=(AUDIT, table)), _rows(deployment, table)
    others = _rows(deployment, AUDIT)
    result = _complete(deployment.operations, job)
    assert deployment.digest(without=(AUDIT, table)) == before
    assert _changed(rows, _rows(deployment, table)) == result["rows"] > 0
    assert table == AUDIT or _rows(deployment, AUDIT) == others
    assert _said(deployment, job) == sorted(one["company"] for one in result["tally"])


def test_interrupted_and_resumed_equals_uninterrupted(deployment: Deployment, job: Job, small: Operations) -> None:
    plan = deployment.operations.plan(job)
    run = _start(small, job)
    runner = small.runner()
    assert runner.work(run, seconds=math.inf, leave=lambda: _begun(deployment)) is Outcome.MORE
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
    assert _said(deployment, job) == sorted(one["company"] for one in result["tally"])


@pytest.mark.parametrize("step", ["claim", "preserve", "apply"])
def test_an_exception_at_any_step_leaves_the_tally_exact(
    deployment: Deployment, job: Job, small: Operations, step: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = _table(deployment, job)
    before = _rows(deployment, table)
    original = getattr(type(job), step)

    def fails(self: Job, *arguments: Any) -> Any:
        found = original(self, *arguments)
        if _begun(deployment):
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
    assert _changed(before, _rows(deployment, table)) == result["rows"]
    assert 0 < result["rows"] < (small.find(str(run)).planned_rows or 0)
    small.resume(str(run))
    assert small.runner().work(run, seconds=math.inf) is Outcome.SETTLED
    assert small.result(run)["kept"]


@pytest.mark.parametrize("case", LOCKABLE)
def test_a_row_that_somebody_holds_is_found_by_verify(deployment: Deployment, case: str) -> None:
    """Left alone while it is locked, so the promise is unkept and says so; a later run gets it."""
    job = _prepare(case, deployment)
    plan, table = deployment.operations.plan(job), _table(deployment, job)
    small = deployment.with_settings(lock_timeout="0.05")
    age = {"activity_log": "created_at" if deployment.layout == "paperclip" else '"timestamp"'}
    with psycopg.connect(deployment.environment["DATABASE_URL"]) as other:
        other.execute(
            f'SELECT id FROM "{table}" ORDER BY {age.get(table, "created_at")} LIMIT 40 FOR UPDATE'.encode()
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


@pytest.mark.parametrize("case", CASES)
def test_no_secret_and_no_row_content_in_ledger_and_receipt(deployment: Deployment, case: str) -> None:
    (needle,) = deployment.query("SELECT gen_random_uuid()::text")[0]
    details, tasks = ("details", "issues") if deployment.layout == "paperclip" else ("metadata", "tasks")
    deployment.query(f"UPDATE activity_log SET {details} = jsonb_build_object('secret', %s::text)", needle)
    deployment.query(f"UPDATE {tasks} SET title = %s", needle)
    _complete(deployment.operations, _prepare(case, deployment))
    password = deployment.environment["DATABASE_URL"].split(":")[2].split("@")[0]
    tables = deployment.query("SELECT tablename FROM pg_tables WHERE schemaname = 'paperclip_worker'")
    assert len(tables) >= 9
    for (table,) in tables:
        (found,) = deployment.query(
            f"SELECT count(*) FROM paperclip_worker.{table} t "
            "WHERE position(%s in t::text) + position(%s in t::text) > 0",
            needle,
            password,
        )
        assert found[0] == 0, table


def test_parameters_survive_the_ledger(job: Job) -> None:
    assert params.from_json(type(job), params.to_json(job)) == job


@pytest.mark.parametrize("name", sorted(registry.jobs()))
def test_help_says_the_promise(name: str) -> None:
    job = registry.job(name)
    text = (job.__doc__ or "").splitlines()[0]
    assert text.endswith(".")
    assert all(item.help for item in params.params_of(job))


def test_every_schedule_entry_names_a_job() -> None:
    assert schedules.SCHEDULE
    for entry in schedules.SCHEDULE.values():
        assert registry.job(entry.job.name) is type(entry.job)
        assert len(entry.crontab.split()) == 5


def test_a_missing_column_refuses_the_job_and_names_it(deployment: Deployment, job: Job) -> None:
    table = next(iter(job.needs(layouts.LAYOUTS[deployment.layout])))
    column = list(table.c)[-1].name
    deployment.query(f'ALTER TABLE "{table.name}" RENAME COLUMN "{column}" TO elsewhere')
    with pytest.raises(WorkerError, match=rf"{table.name}\.{column}"):
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

    before = _rows(released, AUDIT)
    run = _start(released.operations, job)
    monkeypatch.setattr(type(job), "preserve", loses_one)
    with pytest.raises(WorkerError, match="exactly the rows"):
        released.operations.runner().work(run, seconds=math.inf)
    assert _rows(released, AUDIT) == before


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
        means = Means(
            connection=connection,
            now=plan.now,
            layout=layout,
            settings=operations.settings,
            run=UUID(int=0),
            store=operations.store,
        )
        tally = sum((one for shard in job.shards(means, plan) for one in _walk(job, means, shard)), Tally())
        connection.rollback()
    assert tally == plan.tally


def test_an_outline_has_the_rows_of_the_plan(deployment: Deployment, job: Job) -> None:
    operations = deployment.operations
    plan = operations.plan(job)
    with operations.transaction(scan=True) as connection:
        layout = layouts.LAYOUTS[deployment.layout]
        store = operations.store
        means = Means(connection=connection, now=plan.now, layout=layout, settings=operations.settings, store=store)
        outline = job.outline(means)
    assert {place: amount.rows for place, amount in outline.tally.done.items()} == {
        place: amount.rows for place, amount in plan.tally.done.items()
    }
    assert outline.left == plan.left


def _walk(job: Job, means: Means, shard: Shard) -> Iterator[Tally]:
    cursor: Mapping[str, Any] | None = None
    while (batch := job.claim(means, shard, cursor, 2)) is not None:
        yield job.apply(means, batch)
        cursor = batch.after
        if batch.exhausted:
            return
