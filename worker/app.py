"""The Celery app: it carries run ids and nothing else. State lives in the ledger, job logic in `tasks/`."""

from __future__ import annotations

import logging
import multiprocessing
from collections.abc import Callable
from datetime import UTC, datetime
from functools import cached_property, wraps
from typing import TYPE_CHECKING, Any, ParamSpec
from uuid import UUID

from celery import Celery, signals

from worker import backlog, brokers, liveness, logs, standing, timetable
from worker.errors import DatabaseGone, LedgerMissing, Transient, UnderWay, WorkerError
from worker.logs import log
from worker.operations import Operations
from worker.runner import Outcome, Runner
from worker.sparing import Sparing

if TYPE_CHECKING:
    from worker.config import Settings
    from worker.ledger import Run
    from worker.timetable import Timetable

P = ParamSpec("P")
QUEUE = "paperclip-worker"
RESCUE_EVERY = 60.0
# A run that was rescued so often without going on dies for a reason an operator must see.
MOST_RESCUES = 10
# A launch that met a fault which may pass is tried again so often, so far apart: for an hour.
MOST_LAUNCHES, LAUNCH_AGAIN = 120, 30.0
# Whatever else there is to do comes before the next slice of a run, however many runs wait for theirs.
_LAST = 9
_WORK, _LAUNCH, _RESCUE, _MEASURE = (
    f"paperclip_worker.{name}" for name in ("work", "launch", timetable.RESCUE, timetable.MEASURE)
)


class TaskFailed(Exception):
    """What Celery hears, and logs, of an error that nobody expected: its kind."""


def _by_kind(task: Callable[P, None]) -> Callable[P, None]:
    """A task that fails with TaskFailed in place of an unexpected error, whose own text may quote a row."""

    @wraps(task)
    def wrapper(*given: P.args, **named: P.kwargs) -> None:
        kind = None
        try:
            task(*given, **named)
        except Exception as error:  # noqa: BLE001 - an edge
            kind = type(error).__name__
        if kind is not None:
            # Outside of the clause: the first error would be its context, text and all.
            raise TaskFailed(f"internal error: {kind}")

    return wrapper


class Site:
    """What one worker process holds: made when its first message comes, after the pool has forked."""

    def __init__(self, settings: Settings, times: Timetable, app: Celery) -> None:
        self.settings = settings
        self._times = times
        self._app = app
        # Set in the pool's parent and seen by its children: between two bites they hand their run back.
        self.draining = multiprocessing.Event()
        self.measure = Sparing(self._measure)
        self._anchor = Sparing(self._write_pending)

    @cached_property
    def operations(self) -> Operations:
        return Operations(self.settings)

    @cached_property
    def runner(self) -> Runner:
        return self.operations.runner()

    def enqueue(self, run: UUID, number: int = 1, *, after: float = 0) -> None:
        """Send so many `work` messages for a run."""
        for _ in range(number):
            send_work(self._app, run, after=after)

    def work(self, run: UUID) -> None:
        """Take bites of a run for a bounded time, then re-send the message."""
        try:
            # It may have been brought to another release since this worker came up: its runs are for those of that.
            self.operations.require_ledger()
            outcome = self.runner.work(
                run,
                seconds=self.settings.slice_seconds,
                leave=self.draining.is_set,
                call_help=lambda number: self.enqueue(run, number),
            )
        except DatabaseGone:
            self.enqueue(run, after=15)
            return
        except WorkerError as error:
            # The run's row and receipt say what happened; a retry of the message would not help.
            log.error("work ended", run=str(run), error=type(error).__name__)
            return
        if outcome is Outcome.MORE:
            self.enqueue(run)

    def launch(self, name: str, tries: int = 0, since: str = "") -> None:
        """Start the run of a schedule entry, unless its like is under way; after a fault that may pass, later.

        So often has it been tried already, the first time at `since`: a run of the entry that was entered after
        that, perhaps by a try whose end nobody heard of, is this due time's.
        """
        since = since or datetime.now(UTC).isoformat()
        try:
            job = self._times.entry(name).job
            if tries and self._has_run(name, datetime.fromisoformat(since)):
                log.info("schedule entry was started meanwhile", entry=name)
                return
            self.enqueue(self.operations.start(job, actor="beat", via=standing.origin(name)))
        except UnderWay as error:
            log.warning("schedule entry skipped", entry=name, why=str(error))
        except WorkerError as error:
            # Between two releases another worker may be of the ledger's.
            if isinstance(error, Transient | LedgerMissing) and tries < MOST_LAUNCHES:
                log.warning("schedule entry is tried again", entry=name, why=str(error))
                self._app.send_task(_LAUNCH, (name, tries + 1, since), countdown=LAUNCH_AGAIN)
                return
            # No run tells of it: the entry's missed due times do.
            log.error("schedule entry not started", entry=name, error=str(error))

    def _has_run(self, name: str, since: datetime) -> bool:
        with self.operations.transaction(read_only=True) as connection:
            return standing.has_run(connection, name, since=since)

    def _measure(self) -> None:
        """Measure the backlog of every schedule entry, for the metrics.

        One worker at a time: where it takes longer than until the next is due, all would measure and none would work.
        """
        for name, error in backlog.measure(self.operations, self._times, alone=True).items():
            log.warning("backlog not measured", entry=name, error=str(error))

    def rescue(self) -> None:
        """Send work for runs that nothing has moved for a while, retire those that never do, and anchor receipts."""
        waiting = liveness.waiting(self._app, QUEUE, _LAST)
        for run in self.operations.stalled():
            if str(run.id) in waiting:
                # It is not lost, the workers are busy with others.
                continue
            try:
                self._rescue(run)
            except Exception as error:  # noqa: BLE001 - one run that cannot be helped must not keep help from others
                log.error("run not rescued", run=str(run.id), error=type(error).__name__)
        # Last: a store that hangs must not keep runs waiting.
        self._anchor()

    def _write_pending(self) -> None:
        # The signing key is read by the process that works, and not where the pool forks.
        self.runner.anchor()

    def _rescue(self, run: Run) -> None:
        rescues = self.operations.count_rescue(run)
        if rescues is None:
            # Another worker was first, or it has gone on meanwhile.
            return
        if rescues > MOST_RESCUES:
            self.runner.give_up(run.id, f"stalled and taken up again {rescues - 1} times and never went on")
        else:
            log.warning("run taken up again", run=str(run.id), rescues=rescues)
            self.enqueue(run.id)


def make(settings: Settings, times: Timetable | None = None) -> Celery:
    """The app for these settings, with their schedule. Refused when no broker is configured."""
    times = times or timetable.load(settings)
    app = Celery("paperclip-worker", broker=settings.broker(), set_as_current=False)
    app.conf.update(_configuration(settings, times))
    site = Site(settings, times, app)

    @app.task(name=_WORK, shared=False, acks_late=True, reject_on_worker_lost=True, ignore_result=True)
    @_by_kind
    def work(run: str) -> None:
        site.work(UUID(run))

    @app.task(name=_LAUNCH, shared=False, ignore_result=True)
    @_by_kind
    def launch(name: str, tries: int = 0, since: str = "") -> None:
        site.launch(name, tries, since)

    # Acknowledged late, or the worker would have taken a run's message out of the queue meanwhile.
    @app.task(name=_RESCUE, shared=False, acks_late=True, ignore_result=True)
    @_by_kind
    def rescue() -> None:
        site.rescue()

    @app.task(name=_MEASURE, shared=False, ignore_result=True)
    @_by_kind
    def measure() -> None:
        site.measure()

    @signals.worker_shutting_down.connect(weak=False)
    def drain(**_: Any) -> None:
        site.draining.set()

    @signals.worker_ready.connect(weak=False)
    def look_for_stalled(**_: Any) -> None:
        app.send_task(_RESCUE)

    return app


def send_work(app: Celery, run: UUID, *, after: float = 0) -> None:
    """Put a run before the workers. OperationalError or RedisError when the broker does not take the message."""
    app.send_task(_WORK, (str(run),), countdown=after or None, priority=_LAST)


def _configuration(settings: Settings, times: Timetable) -> dict[str, Any]:
    transport = {
        # Longer than any slice with its last bite, so that a message is not handed out twice while in work.
        "visibility_timeout": settings.slice_seconds * 2 + 60,
        # Celery sweeps messages of dead workers every 10 x 10 s by default, whatever the timeout above.
        "unacked_restore_interval": 1,
        "unacked_restore_throttle": 1,
        "socket_timeout": 10,
        "socket_connect_timeout": 5,
        "health_check_interval": 5,
    }
    return {
        "task_default_queue": QUEUE,
        "task_serializer": "json",
        "accept_content": ["json"],
        "task_ignore_result": True,
        # Or beat adds an entry of its own to clean up results, which there are none of.
        "result_expires": None,
        "task_create_missing_queues": True,
        "task_publish_retry_policy": {
            "max_retries": 8,
            "interval_start": 0.2,
            "interval_step": 0.5,
            "interval_max": 4,
        },
        "worker_prefetch_multiplier": 1,
        "worker_hijack_root_logger": False,
        "worker_cancel_long_running_tasks_on_connection_loss": False,
        "broker_connection_retry_on_startup": True,
        "broker_connection_max_retries": None,
        "broker_transport_options": transport,
        "timezone": times.timezone,
        "enable_utc": True,
        "beat_max_loop_interval": settings.beat_seconds,
        "redbeat_redis_url": settings.broker(),
        "redbeat_redis_options": {"socket_timeout": 10, "socket_connect_timeout": 5},
        "redbeat_key_prefix": liveness.BEAT_PREFIX,
        # How long after a beat was killed the other takes over.
        "redbeat_lock_timeout": settings.beat_seconds * 5,
        "beat_schedule": beat_schedule(settings, times),
    }


def beat_schedule(settings: Settings, times: Timetable) -> dict[str, Any]:
    """Celery's form of the entries that are on, of the rescue of stalled runs and of the backlog's measurement."""
    entries: dict[str, Any] = {
        name: {"task": _LAUNCH, "schedule": timetable.cron(entry.crontab), "args": (name,)}
        for name, entry in times.enabled.items()
    }
    # While no worker is up these would pile up. But a rescue must outlast a slice, and clocks that differ by minutes.
    every = {timetable.RESCUE: (_RESCUE, RESCUE_EVERY, 10 * RESCUE_EVERY)}
    if often := float(settings.backlog_every):
        every[timetable.MEASURE] = (_MEASURE, often, often)
    for name, (task, seconds, expires) in every.items():
        entries[name] = {"task": task, "schedule": seconds, "options": {"expires": expires}}
    return entries


def begin(settings: Settings) -> tuple[Operations, Timetable, UUID]:
    """What a service begins with, and its ledger's id.

    Refused where a key, database, ledger or bucket would fail every message.
    """
    speak()
    operations = Operations(settings)
    try:
        operations.check_ready()
        return operations, timetable.of(operations), operations.require_ledger()
    finally:
        # A worker's pool forks: a connection made here must not be shared with its children.
        operations.close()


def run_worker(settings: Settings, *, concurrency: int) -> int:
    """Run a worker in this process until it is told to stop; SIGTERM lets the bites in flight finish.

    Returns the exit status that Celery has for its end.
    """
    operations, times, own = begin(settings)
    app = make(settings, times)
    try:
        brokers.require_own(app, own)
    except brokers.Silent as silent:
        # Celery goes on looking for it.
        log.warning("the worker waits for its broker", why=str(silent))
        signals.worker_ready.connect(lambda **_: brokers.leave_another_s(app, own), weak=False)
    if settings.metrics_port is not None:
        from worker import metrics  # noqa: PLC0415 - only where a port is configured

        metrics.serve(operations, times, settings.metrics_port)
    begun: list[Any] = []
    # Celery's command knows how its worker ended, and keeps it to itself.
    signals.worker_init.connect(lambda sender, **_: begun.append(sender), weak=False)
    app.worker_main(
        ["worker", f"--concurrency={concurrency}", "--loglevel=INFO", "--without-gossip", "--without-mingle"]
    )
    return int(begun[-1].exitcode or 0)


def speak() -> None:
    """Log as a service does."""
    logs.configure()
    # Its news of every client is noise beside ours.
    logging.getLogger("botocore").setLevel(logging.WARNING)
