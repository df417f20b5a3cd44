"""The Celery app: it carries run ids and nothing else. State lives in the ledger, job logic in `tasks/`."""

from __future__ import annotations

import multiprocessing
from functools import cached_property
from typing import TYPE_CHECKING, Any
from uuid import UUID

from celery import Celery, signals
from celery.schedules import crontab

import schedules
from worker import logs
from worker.errors import DatabaseGone, UnderWay, WorkerError
from worker.logs import log
from worker.operations import Operations
from worker.runner import Outcome, Runner

if TYPE_CHECKING:
    from worker.config import Settings

QUEUE = "paperclip-worker"
RESCUE_EVERY = 60.0
# A run that was rescued so often dies for a reason an operator must see.
MOST_RESCUES = 10
_WORK, _LAUNCH, _RESCUE = (f"paperclip_worker.{name}" for name in ("work", "launch", "rescue"))


class Site:
    """What one worker process holds: made when its first message comes, after the pool has forked."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings

    @cached_property
    def operations(self) -> Operations:
        return Operations(self.settings)

    @cached_property
    def runner(self) -> Runner:
        return self.operations.runner()


def make(settings: Settings) -> Celery:
    """The app for these settings. Refused when no broker is configured."""
    app = Celery("paperclip-worker", broker=settings.broker(), set_as_current=False)
    app.conf.update(_configuration(settings))
    # Set in the pool's parent and seen by its children: between two bites they hand their run back.
    draining = multiprocessing.Event()
    site = Site(settings)

    def enqueue(run: UUID, number: int = 1, *, after: float = 0) -> None:
        for _ in range(number):
            app.send_task(_WORK, (str(run),), countdown=after or None)

    @app.task(name=_WORK, acks_late=True, reject_on_worker_lost=True, ignore_result=True)
    def work(run: str) -> None:
        """Take bites of a run for a bounded time, then re-send itself."""
        run_id = UUID(run)
        try:
            outcome = site.runner.work(
                run_id,
                seconds=settings.slice_seconds,
                leave=draining.is_set,
                call_help=lambda number: enqueue(run_id, number),
            )
        except DatabaseGone:
            enqueue(run_id, after=15)
            return
        except WorkerError:
            # The run's row and receipt say what happened; a retry of the message would not help.
            return
        if outcome is Outcome.MORE:
            enqueue(run_id)

    @app.task(name=_LAUNCH, ignore_result=True)
    def launch(name: str) -> None:
        """Start the run of a schedule entry."""
        job = schedules.SCHEDULE[name].job
        try:
            enqueue(site.operations.start(job, actor="beat", via=f"schedule:{name}"))
        except UnderWay as error:
            log.warning("schedule entry skipped", entry=name, why=str(error))

    @app.task(name=_RESCUE, ignore_result=True)
    def rescue() -> None:
        """Send work for runs that nothing has moved for a while, and retire those that never move."""
        for run in site.operations.stalled():
            if run.rescues >= MOST_RESCUES:
                site.runner.give_up(run.id, f"stalled and taken up again {run.rescues} times without an end")
            else:
                log.warning("run taken up again", run=str(run.id), rescues=run.rescues + 1)
                enqueue(run.id)

    @signals.worker_shutting_down.connect(weak=False)
    def drain(**_: Any) -> None:
        draining.set()

    @signals.worker_ready.connect(weak=False)
    def look_for_stalled(**_: Any) -> None:
        rescue.delay()

    return app


def send_work(app: Celery, run: UUID) -> None:
    """Put a run before the workers."""
    app.send_task(_WORK, (str(run),))


def _configuration(settings: Settings) -> dict[str, Any]:
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
        "timezone": "UTC",
        "enable_utc": True,
        "beat_scheduler": "redbeat.RedBeatScheduler",
        "beat_max_loop_interval": 30,
        "redbeat_redis_url": settings.broker(),
        "redbeat_key_prefix": "paperclip-worker:beat:",
        "redbeat_lock_timeout": 150,
        "beat_schedule": beat_schedule(),
    }


def beat_schedule() -> dict[str, Any]:
    """Celery's form of `schedules.SCHEDULE`, and the rescue of stalled runs."""
    entries: dict[str, Any] = {
        name: {"task": _LAUNCH, "schedule": cron(entry.crontab), "args": (name,)}
        for name, entry in schedules.SCHEDULE.items()
    }
    entries["rescue"] = {"task": _RESCUE, "schedule": RESCUE_EVERY}
    return entries


def cron(text: str) -> crontab:
    """A five-field crontab as Celery's own."""
    minute, hour, day_of_month, month_of_year, day_of_week = text.split()
    return crontab(
        minute=minute,
        hour=hour,
        day_of_month=day_of_month,
        month_of_year=month_of_year,
        day_of_week=day_of_week,
    )


def run_worker(settings: Settings, *, concurrency: int) -> None:
    """Run a worker in this process until it is told to stop; SIGTERM lets the bites in flight finish."""
    logs.configure()
    settings_site = Site(settings)
    # Refuse at start what would fail every message: key, database, ledger.
    settings_site.operations.check_ready()
    app = make(settings)
    if settings.metrics_port is not None:
        from worker import metrics  # noqa: PLC0415 - only where a port is configured

        metrics.serve(settings_site.operations, settings.metrics_port)
    app.worker_main(
        ["worker", f"--concurrency={concurrency}", "--loglevel=INFO", "--without-gossip", "--without-mingle"]
    )


def run_beat(settings: Settings) -> None:
    """Run beat in this process until it is told to stop."""
    logs.configure()
    Operations(settings).check_ready()
    make(settings).Beat(loglevel="INFO").run()
