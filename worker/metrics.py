"""Prometheus metrics, read from the ledger at each scrape: true whatever process did the work, and after restarts.

Labels are jobs, states, schedule entries, tables and kinds of rest, never runs or companies: their number is bounded.
"""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import sqlalchemy as sa
from prometheus_client import CollectorRegistry, generate_latest, start_http_server
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
    SummaryMetricFamily,
)
from prometheus_client.registry import Collector

from worker import anchors, backlog, ledger, registry, standing, sums
from worker.errors import Refused
from worker.logs import log
from worker.masterkeys import MASTER_KEYS
from worker.states import State
from worker.sums import Sum

if TYPE_CHECKING:
    from worker.operations import Operations
    from worker.timetable import Timetable

_PREFIX = "paperclip_worker_"


class LedgerCollector(Collector):
    """Runs, work and rests per job; the schedule's standing; the backlog as it was last measured."""

    def __init__(self, operations: Operations, times: Timetable) -> None:
        self._operations = operations
        self._times = times

    def describe(self) -> Iterator[Metric]:
        """Nothing: a registry would otherwise scrape the database when the collector is registered."""
        return iter(())

    def collect(self) -> Iterator[Metric]:
        """Every family, of one snapshot of the ledger. Raises what the ledger raises."""
        now = datetime.now(UTC)
        with self._operations.transaction(read_only=True) as connection:
            ledger.require(connection)
            found = sums.read(connection)
            yield from [
                _up(read=True),
                _runs(found),
                _run_seconds(found),
                *_work(found),
                _rests(found),
                *_master_keys(connection),
                GaugeMetricFamily(
                    "paperclip_worker_receipts_not_anchored",
                    "Receipts not in the bucket",
                    value=anchors.pending(connection),
                ),
                *_schedule(standing.standings(connection, self._times, now=now)),
                *_backlog(connection, self._times, now),
            ]


class _Answering(Collector):
    """The collector's families, or just that the ledger could not be read: a scrape never fails."""

    def __init__(self, collector: LedgerCollector) -> None:
        self._collector = collector

    def describe(self) -> Iterator[Metric]:
        return iter(())

    def collect(self) -> Iterator[Metric]:
        try:
            families = list(self._collector.collect())
        except Exception as error:  # noqa: BLE001 - the server would answer 500 and print a text that may quote a row
            log.warning("scrape without the ledger", error=type(error).__name__)
            families = [_up(read=False)]
        yield from families


def _up(*, read: bool) -> Metric:
    return GaugeMetricFamily(
        _PREFIX + "ledger_up", "Whether the ledger could be read for this scrape", value=float(read)
    )


def _runs(found: list[Sum]) -> Metric:
    family = GaugeMetricFamily(_PREFIX + "runs", "Runs in the ledger", labels=["job", "state"])
    seen = {(one.job, one.state): one.amount for one in found if one.kind == "runs"}
    # Also of jobs that never ran: an alert sees a number grow only where there was one before.
    for job in sorted({job for job, _ in seen} | set(registry.jobs())):
        for state in State:
            family.add_metric([job, state.value], seen.get((job, state), 0))
    return family


def _per_job(found: list[Sum], kind: str) -> dict[str, dict[str, int]]:
    """By job and part what there is of a kind, whatever the state of the runs."""
    amounts: dict[str, dict[str, int]] = {}
    for one in found:
        if one.kind == kind:
            of_job = amounts.setdefault(one.job, {})
            of_job[one.part] = of_job.get(one.part, 0) + one.amount
    return amounts


def _run_seconds(found: list[Sum]) -> Metric:
    """A run's duration is that from its entering to its settlement: waits for a worker and rests are in it."""
    family = HistogramMetricFamily(
        _PREFIX + "run_seconds", "Seconds from entering to settlement of kept and unkept runs", labels=["job"]
    )
    within = _per_job(found, "within")
    for job, took in _per_job(found, "took").items():
        buckets = [(str(float(bucket)), within[job][str(bucket)]) for bucket in sums.BUCKETS]
        family.add_metric([job], [*buckets, ("+Inf", took["runs"])], took["microseconds"] / 1e6)
    return family


def _work(found: list[Sum]) -> Iterator[Metric]:
    work = _per_job(found, "work")
    kinds = {"bites": "Transactions committed", "rows": "Rows changed", "bytes": "Bytes of the rows changed"}
    for name, what in kinds.items():
        family = CounterMetricFamily(_PREFIX + name, what, labels=["job"])
        for job, amounts in work.items():
            family.add_metric([job], amounts[name])
        yield family
    seconds = SummaryMetricFamily(_PREFIX + "bite_seconds", "Seconds of the transactions committed", labels=["job"])
    for job, amounts in work.items():
        seconds.add_metric([job], count_value=amounts["bites"], sum_value=amounts["microseconds"] / 1e6)
    yield seconds


def _rests(found: list[Sum]) -> Metric:
    family = CounterMetricFamily(_PREFIX + "rest_seconds", "Seconds rested", labels=["job", "reason"])
    for job, reasons in _per_job(found, "rests").items():
        for reason, seconds in reasons.items():
            family.add_metric([job, reason], seconds)
    return family


def _master_keys(connection: sa.Connection) -> Iterator[Metric]:
    """Of the keys that rotations have seen: how old each is, how much was sealed with it (NIST SP 800-38D, 8.3)."""
    labels = ["key", "in_use"]
    since = GaugeMetricFamily(_PREFIX + "master_key_seen_timestamp_seconds", "First seen", labels=labels)
    found = GaugeMetricFamily(_PREFIX + "master_key_ciphertexts", "Ciphertexts at the last count", labels=labels)
    sealed = CounterMetricFamily(_PREFIX + "master_key_sealed", "Ciphertexts sealed by rotations", labels=labels)
    for one in connection.execute(sa.select(MASTER_KEYS).order_by(MASTER_KEYS.c.fingerprint)):
        place = [one.fingerprint, "yes" if one.current else "no"]
        since.add_metric(place, one.first_seen.timestamp())
        sealed.add_metric(place, one.sealed)
        if one.found is not None:
            found.add_metric(place, one.found)
    yield from (since, found, sealed)


def _schedule(found: list[standing.Standing]) -> Iterator[Metric]:
    """Of the entries that are on."""
    labels = ["entry", "job"]
    last = GaugeMetricFamily(_PREFIX + "schedule_last_run_timestamp_seconds", "Newest run; 0: never", labels=labels)
    due = GaugeMetricFamily(_PREFIX + "schedule_next_due_timestamp_seconds", "When it is next due", labels=labels)
    missed = GaugeMetricFamily(_PREFIX + "schedule_missed", "Due times without a run since the newest", labels=labels)
    for one in found:
        if one.next is None or one.missed is None:
            continue
        place = [one.name, one.entry.job.name]
        last.add_metric(place, one.last.at.timestamp() if one.last else 0)
        due.add_metric(place, one.next.timestamp())
        missed.add_metric(place, one.missed)
    yield from (last, due, missed)


def _backlog(connection: sa.Connection, times: Timetable, now: datetime) -> Iterator[Metric]:
    """Of the entries that are on. The age is that of the row, which grows until a run takes it."""
    labels = ["entry", "job", "table"]
    rows = GaugeMetricFamily(_PREFIX + "backlog_rows", "Rows that are due to be changed", labels=labels)
    age = GaugeMetricFamily(
        _PREFIX + "backlog_oldest_age_seconds", "Age of the oldest row that is due", labels=labels
    )
    when = GaugeMetricFamily(
        _PREFIX + "backlog_measured_timestamp_seconds", "When the backlog was measured", labels=labels
    )
    for name, table, number, oldest, measured_at in backlog.measured(connection):
        if name not in times.enabled:
            continue
        place = [name, times.entries[name].job.name, table]
        rows.add_metric(place, number)
        when.add_metric(place, measured_at.timestamp())
        if number == 0 or oldest is not None:
            age.add_metric(place, (now - oldest).total_seconds() if oldest else 0)
    yield from (rows, age, when)


def text(collector: Collector) -> str:
    """The collector's families in the text format. Raises what the collector raises."""
    registry = CollectorRegistry()
    registry.register(collector)
    return generate_latest(registry).decode()


def samples(collector: Collector) -> list[dict[str, Any]]:
    """The same as JSON: name, labels and value of every sample."""
    return [
        {"name": one.name, "labels": dict(one.labels), "value": one.value}
        for family in collector.collect()
        for one in family.samples
    ]


def serve(operations: Operations, times: Timetable, port: int) -> None:
    """Answer scrapes on `port` in a thread of this process. Refused when the port cannot be had."""
    registry = CollectorRegistry()
    registry.register(_Answering(LedgerCollector(operations, times)))
    try:
        start_http_server(port, registry=registry)
    except OSError as error:
        raise Refused(f"PAPERCLIP_WORKER_METRICS_PORT: {port} cannot be served on ({error.strerror})") from error
