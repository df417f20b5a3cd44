"""Prometheus metrics, read from the ledger at each scrape: true whatever process did the work, and after restarts."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import sqlalchemy as sa
from prometheus_client import CollectorRegistry, start_http_server
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from worker import anchors
from worker.ledger import RUNS, SHARDS
from worker.states import State

if TYPE_CHECKING:
    from worker.operations import Operations


class LedgerCollector(Collector):
    """Runs by state, bites, rows and bytes per job, seconds rested by reason."""

    def __init__(self, operations: Operations) -> None:
        self._operations = operations

    def describe(self) -> Iterator[Metric]:
        """Nothing: a registry would otherwise scrape the database when the collector is registered."""
        return iter(())

    def collect(self) -> Iterator[Metric]:
        with self._operations.transaction(read_only=True) as connection:
            states = connection.execute(
                sa.select(RUNS.c.job, RUNS.c.state, sa.func.count()).group_by(RUNS.c.job, RUNS.c.state)
            ).all()
            work = connection.execute(
                sa.select(RUNS.c.job, *(sa.func.sum(SHARDS.c[name]) for name in ("bites", "rows", "bytes")))
                .join(SHARDS, SHARDS.c.run_id == RUNS.c.id)
                .group_by(RUNS.c.job)
            ).all()
            each = sa.func.jsonb_each_text(RUNS.c.waits).table_valued("key", "value")
            waits = connection.execute(
                sa.select(RUNS.c.job, each.c.key, sa.func.sum(sa.cast(each.c.value, sa.BigInteger)))
                .select_from(RUNS)
                .join(each, sa.true())
                .group_by(RUNS.c.job, each.c.key)
            ).all()
            pending = anchors.pending(connection)
        runs = GaugeMetricFamily("paperclip_worker_runs", "Runs in the ledger", labels=["job", "state"])
        seen = {(job, State(state)): number for job, state, number in states}
        for job in sorted({job for job, _ in seen}):
            for state in State:
                runs.add_metric([job, state.value], seen.get((job, state), 0))
        yield runs
        for place, (name, what) in enumerate(
            (("bites", "Transactions committed"), ("rows", "Rows changed"), ("bytes", "Bytes of the rows changed")), 1
        ):
            family = CounterMetricFamily(f"paperclip_worker_{name}", what, labels=["job"])
            for row in work:
                family.add_metric([row[0]], float(row[place]))
            yield family
        rests = CounterMetricFamily("paperclip_worker_rest_seconds", "Seconds rested", labels=["job", "reason"])
        for job, kind, seconds in waits:
            rests.add_metric([job, kind], float(seconds))
        yield rests
        yield GaugeMetricFamily("paperclip_worker_receipts_not_anchored", "Receipts not in the bucket", value=pending)


def serve(operations: Operations, port: int) -> None:
    """Answer scrapes on `port` in a thread of this process."""
    registry = CollectorRegistry()
    registry.register(LedgerCollector(operations))
    start_http_server(port, registry=registry)
