"""However many runs, shards and policies there were: what is read for those of now does not grow."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID, uuid4

import pytest
import sqlalchemy as sa

from tasks.prune_logs import PruneLogs
from tests.conftest import Deployment
from tests.contract.test_upgrade import _make as make_ledger
from tests.faults.evidence import begin, check_sums
from tests.promises import explained
from worker import ledger, ledger_shards, metrics, progress, retention, standing, sums, timetable
from worker.errors import Refused
from worker.job import Shard
from worker.metrics import LedgerCollector
from worker.plans import Tally
from worker.runner import Outcome
from worker.states import State

Act = Callable[[sa.Connection], Any]
# Blocks of 8 kB, or rows: some lookups in indexes.
FEW = 100


def _read(deployment: Deployment, act: Act) -> float:
    """The blocks, or where these are more the rows of runs and shards, that the statements of an act look at."""
    plans = _plans(deployment, act)
    blocks: float = sum(plan["Shared Hit Blocks"] + plan["Shared Read Blocks"] for plan in plans)
    of_ours = [
        node for plan in plans for node in explained.nodes(plan) if node.get("Relation Name") in {"runs", "shards"}
    ]
    rows: float = sum(
        (node["Actual Rows"] + node.get("Rows Removed by Filter", 0)) * node["Actual Loops"] for node in of_ours
    )
    return max(blocks, rows)


def _plans(deployment: Deployment, act: Act) -> list[dict[str, Any]]:
    """How the server carries out what an act asks of runs and shards."""
    found: list[tuple[str, Any]] = []

    def note(_connection: Any, _cursor: Any, statement: str, parameters: Any, *_: Any) -> None:
        if statement.startswith(("SELECT", "WITH")) and ("worker.runs" in statement or "worker.shards" in statement):
            found.append((statement, parameters))

    engine = deployment.operations.engine
    with deployment.operations.transaction() as connection:
        sa.event.listen(engine, "before_cursor_execute", note)
        try:
            act(connection)
        finally:
            sa.event.remove(engine, "before_cursor_execute", note)
        assert found
        return [explained.plan(connection, *one) for one in found]


def _settled(deployment: Deployment, *, more: str = ", in_sums", said: str = ", true") -> None:
    """A thousand runs of an entry, of forty shards each, all of which are over."""
    deployment.query(
        "INSERT INTO paperclip_worker.runs "
        f"(id, job, params, exclusion, layout, state, now, actor, via, waits, created_at, settled_at{more}) "
        "SELECT md5('r' || n)::uuid, 'prune-logs', '{}', 'x', 'paperclip', 'kept', now(), 'a', "
        f"'schedule:prune-activity-log', '{{\"replica_lag\": 2}}', at, at + interval '9 s'{said} "
        "FROM (SELECT n, now() - n * interval '1 hour' AS at FROM generate_series(1, 1000) n) made"
    )
    deployment.query(
        "INSERT INTO paperclip_worker.shards "
        "(run_id, sweep, number, key, planned_rows, spec, done, bites, rows, bytes, microseconds) "
        "SELECT id, 1, n, 'k:' || n, 9, '{}', true, 1, 9, 90, 900 "
        "FROM paperclip_worker.runs, generate_series(0, 39) n"
    )


def _laid_out(deployment: Deployment, number: int) -> UUID:
    """A run in two stages of so many shards, of which all but ten of each are done."""
    run = begin(deployment.operations, PruneLogs(archive=False))
    shards = [Shard(key=f"k:{at}", rows=1, spec={}, stage=at * 2 // number) for at in range(number)]
    with deployment.operations.transaction() as connection:
        held = ledger.get(connection, run, hold=True)
        assert held is not None
        ledger_shards.add_shards(connection, run, held.sweep, shards)
        ledger.step(connection, held, State.RUNNING)
    deployment.query(
        "UPDATE paperclip_worker.shards SET done = true WHERE run_id = %s AND number %% %s >= 10", run, number // 2
    )
    return run


def _tidied(deployment: Deployment) -> None:
    """As the server's own vacuum leaves it."""
    engine = deployment.operations.engine.execution_options(isolation_level="AUTOCOMMIT")
    with engine.connect() as connection:
        connection.exec_driver_sql("VACUUM (ANALYZE) paperclip_worker.runs, paperclip_worker.shards")


def _looks(deployment: Deployment, run: UUID) -> dict[str, Act]:
    def held(connection: sa.Connection) -> ledger.Run:
        found = ledger.get(connection, run)
        assert found is not None
        return found

    return {
        "take": lambda connection: ledger_shards.take_shard(connection, run),
        "unfinished": lambda connection: ledger_shards.unfinished(connection, held(connection)),
        "of a stage": lambda connection: ledger_shards.unfinished(connection, held(connection), stage=1),
        "earliest": lambda connection: ledger_shards.earliest(connection, held(connection)),
        "stage": lambda connection: ledger_shards.stage(connection, run),
        "settle": lambda connection: ledger_shards.no_bite_in_flight(connection, run),
    }


def test_the_shards_of_a_run_that_are_done_are_not_looked_at(released: Deployment) -> None:
    """Each bite looked at all of its run, and, where these were some of all there are, at those of every run."""
    _settled(released)
    run = _laid_out(released, 10_000)
    _tidied(released)
    read = {name: _read(released, look) for name, look in _looks(released, run).items()}
    assert max(read.values()) < FEW, read


def test_what_is_found_among_the_shards_that_are_left(released: Deployment) -> None:
    run = _laid_out(released, 100)
    with released.operations.transaction() as connection:
        found = {name: look(connection) for name, look in _looks(released, run).items()}
    assert (found["take"].number, found["take"].shard.stage) == (0, 0)
    del found["take"]
    expected = {"unfinished": 20, "of a stage": 10, "earliest": 0, "stage": "k", "settle": True}
    assert found == expected
    released.query("UPDATE paperclip_worker.shards SET done = true WHERE number < 50")
    with released.operations.transaction() as connection:
        taken = ledger_shards.take_shard(connection, run)
        assert taken is not None
        assert (taken.number, taken.shard.stage) == (50, 1)
        with released.operations.transaction() as beside:
            assert not ledger_shards.no_bite_in_flight(beside, run)
        ledger_shards.record_bite(connection, taken, cursor=None, tally=Tally(), done=True, objects=(), seconds=0)


def test_shards_are_numbered_in_the_order_of_their_stages(released: Deployment) -> None:
    """By the last of them is told whether a run has more than one."""
    run = begin(released.operations)
    with released.operations.transaction() as connection:
        shards = (Shard(key=f"{stage}:k", rows=0, spec={}, stage=stage) for stage in (1, 0, 2, 0))
        assert ledger_shards.add_shards(connection, run, 1, shards) == 4
        assert ledger_shards.stage(connection, run) == "0"
    numbered = "SELECT stage FROM paperclip_worker.shards ORDER BY number"
    assert released.query(numbered) == [(0,), (0,), (1,), (2,)]


def test_a_scrape_and_a_list_read_nothing_of_what_is_over(released: Deployment) -> None:
    """A scrape took a second where there had been a million shards."""
    _settled(released)
    run = begin(released.operations)
    times = timetable.load(released.operations.settings)
    _tidied(released)
    looks: dict[str, Act] = {
        "scrape": lambda _: metrics.text(LedgerCollector(released.operations, times)),
        "schedule list": lambda connection: standing.standings(connection, times, now=datetime.now(UTC)),
        "runs list": lambda connection: ledger.recent(connection, limit=20),
        "runs show": lambda _: released.operations.result(released.operations.find(str(run)[:8]).id),
        "follow": lambda _: progress._look(released.operations, run),
        "rescue": lambda connection: ledger.stalled(connection, after=timedelta(0)),
    }
    read = {name: _read(released, look) for name, look in looks.items()}
    assert max(read.values()) < FEW, read


def test_nor_does_a_scrape_after_an_upgrade(
    fresh_database: Callable[..., str], make_deployment: Callable[..., Deployment]
) -> None:
    """The server knows nothing yet of what is new, and may never look: few runs change in a day."""
    deployment = make_deployment(fresh_database(), "paperclip")
    make_ledger(deployment.operations.engine, "0006")
    _settled(deployment, more="", said="")
    _tidied(deployment)
    ledger.init(deployment.operations.engine)
    assert _read(deployment, sums.read) < FEW
    (plan,) = _plans(deployment, sums.read)
    assert max(node["Plan Rows"] for node in explained.nodes(plan) if node.get("Relation Name") == "runs") < FEW
    assert {one.amount for one in _sums(deployment) if one.kind == "runs"} == {1_000}


@pytest.mark.parametrize("name", ["0", "00000000-0000-4000-8000-00000000000", "ABCDEF", "abcdef01-2345"])
def test_a_run_is_found_by_the_start_of_its_id(released: Deployment, name: str) -> None:
    whole = name.lower() + "00000000-0000-4000-8000-000000000001"[len(name) :]
    insert = (
        "INSERT INTO paperclip_worker.runs (id, job, params, exclusion, layout, state, now, actor, via) "
        "SELECT id::uuid, 'j', '{}', 'x', 'paperclip', 'kept', now(), 'a', 'v' FROM unnest(%s::text[]) id"
    )
    released.query(insert, [whole, "fffffff0-0000-4000-8000-000000000000"])
    for start in (name, whole, whole.upper()):
        assert released.operations.find(start).id == UUID(whole)
    # What Python takes for an id is not how one starts.
    for other in (f"{{{whole}", whole.replace("-", ""), f"{whole}0", f"{name}_", f"{name}%", "urn:uuid:"):
        with pytest.raises(Refused, match="no run has an id that starts with"):
            released.operations.find(other)


def _sums(deployment: Deployment) -> list[sums.Sum]:
    with deployment.operations.transaction(read_only=True) as connection:
        return sums.read(connection)


def _counted(deployment: Deployment) -> dict[str, float]:
    """Every counter, however it is labelled."""
    found = _sums(deployment)
    counters = [*metrics._work(found), metrics._rests(found), metrics._run_seconds(found)]
    return {f"{one.name}{one.labels}": one.value for family in counters for one in family.samples}


def test_no_counter_goes_back_when_a_run_settles_or_is_taken_up_again(released: Deployment) -> None:
    operations = released.with_settings(bite_rows="50")
    before: dict[str, float] = {}

    def look(state: State) -> None:
        nonlocal before
        now = _counted(released)
        assert all(now[name] >= value for name, value in before.items())
        before = now
        check_sums(released)
        assert operations.find("last").state is state

    run = begin(operations, PruneLogs(archive=False))
    look(State.QUEUED)
    operations.stop(str(run))
    look(State.STOPPED)
    operations.resume(str(run))
    look(State.QUEUED)
    for _ in range(2):
        while not (done := operations.result(run)["bites"]) or done < 3:
            operations.runner().work(run, seconds=0)
        with operations.transaction() as connection:
            ledger.note_wait(connection, run, None, kind="replica_lag", seconds=3)
        look(State.RUNNING)
        operations.runner().give_up(run, "no luck")
        look(State.FAILED)
        operations.resume(str(run))
        look(State.RUNNING)
    assert operations.runner().work(run, seconds=60) is Outcome.SETTLED
    look(State.KEPT)
    assert before["paperclip_worker_rest_seconds_total{'job': 'prune-logs', 'reason': 'replica_lag'}"] == 6
    assert before["paperclip_worker_rows_total{'job': 'prune-logs'}"] == operations.result(run)["rows"]


def test_a_run_that_a_worker_of_an_earlier_release_settles_is_counted(released: Deployment) -> None:
    """One that was up while the ledger was brought to this release; and it can be taken up again."""
    run = begin(released.operations)
    with released.operations.transaction() as connection:
        ledger.note_wait(connection, run, None, kind="replica_lag", seconds=3)
    released.query("UPDATE paperclip_worker.runs SET state = 'stopped', settled_at = now() WHERE id = %s", run)
    before = _counted(released)
    assert before["paperclip_worker_rest_seconds_total{'job': 'prune-logs', 'reason': 'replica_lag'}"] == 3
    released.operations.resume(str(run))
    assert _counted(released) == before
    assert released.operations.runner().work(run, seconds=60) is Outcome.SETTLED
    assert _counted(released).items() >= before.items()
    check_sums(released)


def test_a_bite_reads_of_a_policy_what_counts(released: Deployment) -> None:
    """Versions that were replaced stay as evidence, and all were read by each bite."""
    now, company = datetime.now(UTC), uuid4()
    insert = (
        'INSERT INTO paperclip_worker.policies ("table", company, version, keep_seconds, reason, actor, created_at) '
        "SELECT 'activity_log', whose, %s, %s, 'r', 'a', %s FROM unnest(%s::uuid[]) whose"
    )
    for version, days in enumerate((40, 30, 20, -1, -2), 1):
        released.query(insert, version, version * 86400 * 100, now - timedelta(days=days), [None, company])
    released.query(insert, 9, 86400 * 100, now - timedelta(days=1), [UUID(int=0)])
    settings, default = released.operations.settings, timedelta(days=90)
    with released.operations.transaction(read_only=True) as connection:
        every = retention.versions(connection, table="activity_log")
        found = retention.counting(connection, "activity_log", now=now)
        assert retention.counting(connection, "plugin_logs", now=now) == []
    assert sorted(policy.version for policy in found) == [3, 3, 4, 4, 5, 5, 9]
    by_all, by_these = (
        (
            retention.cutoffs(some, settings, now=now, asked=None, default=default),
            retention.entered(some, now=now, asked=None, default=default),
        )
        for some in (every, found)
    )
    assert by_these == by_all
