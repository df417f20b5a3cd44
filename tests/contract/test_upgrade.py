"""A ledger of the first release, brought to this one with what is in it."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime

import pytest
import sqlalchemy as sa
from alembic import command
from alembic.config import Config

from tests.cli.helpers import check_refusal
from tests.conftest import Deployment
from tests.faults.evidence import check_sums, wait
from worker import db, ledger, sums

_RUN = "00000000-0000-4000-8000-000000000001"
_FIRST = f"""
INSERT INTO paperclip_worker.runs (id, job, params, exclusion, layout, state, now, actor, via)
VALUES ('{_RUN}', 'j', '{{}}', 'x', 'paperclip', 'kept', now(), 'a', 'v');
INSERT INTO paperclip_worker.shards (run_id, sweep, number, key, planned_rows, spec)
VALUES ('{_RUN}', 1, 0, 'k', 0, '{{}}'), ('{_RUN}', 1, 1, 'k', 0, '{{}}');
INSERT INTO paperclip_worker.bites (run_id, sweep, shard, number, rows, bytes, microseconds)
VALUES ('{_RUN}', 1, 0, 1, 1, 1, 700), ('{_RUN}', 1, 0, 2, 1, 1, 50);
"""


def _make(engine: sa.Engine, version: str) -> None:
    """The ledger as an earlier release made it."""
    with engine.begin() as connection:
        connection.execute(sa.schema.CreateSchema(ledger.SCHEMA))
        config = Config()
        config.set_main_option("script_location", "worker:migrations")
        config.attributes["connection"] = connection
        command.upgrade(config, version)


def test_seconds_of_bites_are_kept_and_due_times_count_from_the_upgrade(
    fresh_database: Callable[..., str], make_deployment: Callable[..., Deployment]
) -> None:
    deployment = make_deployment(fresh_database(), "paperclip")
    engine = deployment.operations.engine
    _make(engine, "0001")
    deployment.query(_FIRST)
    before = datetime.now(UTC)
    ledger.init(engine)
    query = "SELECT number, microseconds FROM paperclip_worker.shards ORDER BY number"
    assert deployment.query(query) == [(0, 750), (1, 0)]
    ((born,),) = deployment.query("SELECT born FROM paperclip_worker.chain")
    assert before <= born <= datetime.now(UTC)


# Runs that are over, may be taken up again, and are under way, of two shards each.
_RUNS = """
INSERT INTO paperclip_worker.runs
    (id, job, params, exclusion, layout, state, now, actor, via, waits, created_at, settled_at)
SELECT md5(state)::uuid, 'j', '{}', state, 'paperclip', state, now(), 'a', 'v', '{"replica_lag": 3}', now(),
       CASE WHEN state <> 'running' THEN now() + interval '61.5 s' END
FROM unnest(ARRAY['kept', 'unkept', 'failed', 'stopped', 'running']) state;
INSERT INTO paperclip_worker.shards (run_id, sweep, number, key, planned_rows, spec, done, bites, rows, bytes)
SELECT id, 1, n, 'k', 0, '{}', n = 0, 2, 10, 100 FROM paperclip_worker.runs, generate_series(0, 1) n;
INSERT INTO paperclip_worker.bites (run_id, sweep, shard, number, rows, bytes, microseconds)
SELECT run_id, 1, number, n, 5, 50, 700 FROM paperclip_worker.shards, generate_series(1, 2) n;
"""


@pytest.mark.parametrize("version", ["0001", "0002", "0003", "0004", "0005", "0006"])
def test_counters_go_on_where_they_were(
    fresh_database: Callable[..., str], make_deployment: Callable[..., Deployment], version: str
) -> None:
    """What runs amount to that have settled is summed once, whichever release had the ledger."""
    deployment = make_deployment(fresh_database(), "paperclip")
    engine = deployment.operations.engine
    _make(engine, version)
    deployment.query(_RUNS)
    if version >= "0004":
        deployment.query("UPDATE paperclip_worker.shards SET microseconds = 1400")
    for _ in range(2):
        ledger.init(engine)
    check_sums(deployment)
    with engine.connect() as connection:
        found = sums.read(connection)
    per_state = {(one.state.value, one.kind, one.part): one.amount for one in found}
    for state in ("kept", "unkept", "failed", "stopped", "running"):
        work = [per_state[state, "work", part] for part in sums.WORK]
        assert (per_state[state, "runs", ""], work) == (1, [4, 20, 200, 2800])
        assert per_state[state, "rests", "replica_lag"] == 3
    for state in ("kept", "unkept"):
        within = [per_state[state, "within", str(bound)] for bound in sums.BUCKETS]
        assert (per_state[state, "took", "microseconds"], within) == (61_500_000, [0, 0, 0, 1, 1, 1, 1, 1])


@pytest.mark.parametrize("version", ["0005", "0006"])
def test_a_ledger_of_a_release_before_is_brought_to_this_one_first(
    fresh_database: Callable[..., str], make_deployment: Callable[..., Deployment], version: str
) -> None:
    """And from then on those releases refuse it: settlements of 0.5.1 remove manifests that our receipts name."""
    deployment = make_deployment(fresh_database(), "paperclip")
    engine = deployment.operations.engine
    _make(engine, version)
    check_refusal(deployment.cli("runs", "list", ok=False), says="of an older release; run .*db init", status=2)
    ledger.init(engine)
    assert deployment.query("SELECT version_num > %s FROM paperclip_worker.alembic_version", version) == [(True,)]
    deployment.cli("runs", "list")


def test_two_at_once_make_one_ledger(
    fresh_database: Callable[..., str], make_deployment: Callable[..., Deployment]
) -> None:
    deployment = make_deployment(fresh_database(), "paperclip")
    engine = deployment.operations.engine
    with ThreadPoolExecutor(2) as pool:
        with engine.connect() as held, held.begin():
            db.advisory_lock(held, "ledger")
            both = [pool.submit(ledger.init, engine) for _ in range(2)]
            waiting = "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND NOT granted"
            wait(lambda: deployment.query(waiting) == [(2,)])
        for one in both:
            one.result()
    with engine.connect() as connection:
        ledger.require(connection)


def test_a_ledger_without_its_version_is_not_made_again(
    fresh_database: Callable[..., str], make_deployment: Callable[..., Deployment]
) -> None:
    deployment = make_deployment(fresh_database(), "paperclip")
    ledger.init(deployment.operations.engine)
    deployment.query("DELETE FROM paperclip_worker.alembic_version")
    for words in (("db", "init"), ("runs", "list")):
        check_refusal(deployment.cli(*words, ok=False), says="has lost its version", status=2)
