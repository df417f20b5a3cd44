"""Beat: of those that run, the one that holds the lock writes the schedule to Redis and sends what is due.

Redbeat has the entries and the arithmetic. What is ours is who may write them, and when an entry is not due.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from datetime import UTC, datetime
from functools import partial
from typing import TYPE_CHECKING, Any

from redbeat.schedulers import RedBeatScheduler, RedBeatSchedulerEntry, get_redis  # type: ignore[import-untyped]
from redis.exceptions import LockError, RedisError
from redis.lock import Lock

from worker import app, brokers, standing
from worker.errors import WorkerError
from worker.liveness import BEAT_PREFIX
from worker.logs import log

if TYPE_CHECKING:
    from uuid import UUID

    from worker.config import Settings
    from worker.operations import Operations
    from worker.timetable import Timetable

# What the schedule in Redis was written from: its timezone, and a digest for those that wait.
WRITTEN = f"{BEAT_PREFIX}:written"


class Entry(RedBeatSchedulerEntry):  # type: ignore[misc]
    """Redbeat's entry, with its times in UTC.

    Redbeat adds hours to them as a clock on the wall would, and forgets which of two hours of one name it was.
    """

    def default_now(self) -> datetime:
        now: datetime = super().default_now()
        return now.astimezone(UTC)

    # Redbeat's name for it.
    _default_now = default_now


class Scheduler(RedBeatScheduler):  # type: ignore[misc]
    """Redbeat's scheduler, which writes nothing without the lock and outlasts a broker that is gone for a while.

    `own` is the deployment's ledger; `note` keeps in it since when the entries hold.
    """

    Entry = Entry

    def __init__(self, *, times: Timetable, own: UUID, note: Callable[[], None], **given: Any) -> None:
        # Lazy, or the schedule would be written here. Without a key redbeat takes no lock, which it does in a
        # signal handler, where Celery swallows what goes wrong.
        super().__init__(**{**given, "lazy": True})
        self.lock: Lock | None = None
        self._lock_name, self.lock_key = str(self.app.redbeat_conf.lock_key), None
        self._times = times
        self._own = str(own)
        self._note = note
        self._written = self._noted = False
        self._other: str | None = None

    def tick(self, **given: Any) -> float:
        """One round: keep the lock or try to take it, and with it send what is due. Seconds until the next."""
        try:
            if not self._leads():
                return float(self.max_interval)
            self._bring_back()
            return float(super().tick(**given))
        except RedisError as error:
            log.warning("beat cannot use the broker and tries again", error=type(error).__name__)
            self._disconnect()
            return float(self.max_interval)

    def update_from_dict(self, dict_: dict[str, Any]) -> None:
        """Write these entries. One that changed is first due at its next due time, as `schedule list` has it."""
        zone = get_redis(self.app).hget(WRITTEN, "timezone")
        for name, fields in dict_.items():
            entry, known = self.Entry(**fields, name=name, app=self.app), self._known(name)
            if known is not None:
                if known.schedule != entry.schedule or zone not in {None, self._times.timezone}:
                    known.reschedule()
                entry.last_run_at = known.last_run_at and known.last_run_at.astimezone(UTC)
            entry.save()

    def _disconnect(self) -> None:
        """Look the broker up anew: a server that a failover made a replica goes on to answer, and takes nothing."""
        get_redis(self.app).connection_pool.disconnect()
        # What Celery sends by; each is made again when it is asked for.
        sending = [self.__dict__.pop(name, None) for name in ("_maybe_due_kwargs", "producer", "connection")]
        with suppress(OSError, RedisError):
            if sending[-1] is not None:
                sending[-1].release()

    def close(self) -> None:
        """Free the lock, where the broker can be told; else it runs out."""
        with suppress(RedisError):
            super().close()

    def _leads(self) -> bool:
        """Whether this beat is the one at work; the schedule is then in Redis as its own file has it."""
        client = get_redis(self.app)
        if not self._owns(client):
            return False
        if self.lock is not None:
            try:
                self.lock.extend(self.lock_timeout, replace_ttl=True)
            except LockError:
                log.warning("beat lost its lock")
                self.lock = None
        if self.lock is None:
            lock = client.lock(self._lock_name, timeout=self.lock_timeout)
            if not lock.acquire(blocking=False):
                self._compare(client.hget(WRITTEN, "digest"))
                return False
            self.lock, self._written, self._noted = lock, False, False
            log.info("beat is at work")
        if self._written and not self._is_whole(client):
            log.error("the broker has lost some of the schedule; its maxmemory-policy must be noeviction")
            self._written = False
        if not self._written:
            self.setup_schedule()
            client.hset(WRITTEN, mapping={"timezone": self._times.timezone, "digest": self._times.digest})
            self._written = True
        if not self._noted:
            self._noted = self._take_note()
        return True

    def _owns(self, client: Any) -> bool:
        """Whether the broker is this deployment's. A claim that went with its data is made again."""
        owner = brokers.owner(client, self._own)
        if owner == self._own:
            return True
        log.error("another deployment has claimed the broker", ledger=owner)
        if self.lock is not None:
            with suppress(LockError):
                self.lock.release()
            self.lock = None
        return False

    def _is_whole(self, client: Any) -> bool:
        """Whether the broker has every entry still: one that is gone would never be sent, and nobody be told."""
        conf = self.app.redbeat_conf
        with client.pipeline() as pipe:
            pipe.exists(conf.statics_key)
            for name in conf.schedule:
                key = self.Entry.generate_key(self.app, name)
                pipe.hexists(key, "definition")
                pipe.zscore(conf.schedule_key, key)
            statics, *found = pipe.execute()
        return bool(statics) and all(found[::2]) and None not in found[1::2]

    def _compare(self, digest: str | None) -> None:
        """Say once that the beat at work has another schedule."""
        if digest not in {None, self._times.digest, self._other}:
            log.warning("the beat at work has another schedule; all beats and workers need one file and timezone")
        self._other = digest

    def _take_note(self) -> bool:
        try:
            self._note()
        except WorkerError as error:
            log.warning("the ledger does not know the entries yet", error=type(error).__name__)
            return False
        return True

    def _bring_back(self) -> None:
        """What ran while a clock was ahead would not be due before that time has come: it ran now."""
        now = self.app.now().astimezone(UTC)
        for name in self.app.conf.beat_schedule:
            entry = self._known(name)
            if entry is not None and entry.last_run_at and entry.last_run_at > now + standing.SKEW:
                log.warning("schedule entry was last sent in the future", entry=name, at=str(entry.last_run_at))
                entry.reschedule()

    def _known(self, name: str) -> Any:
        """The entry as Redis has it, or None."""
        with suppress(KeyError):
            return self.Entry.from_key(self.Entry.generate_key(self.app, name), app=self.app)
        return None


def run(settings: Settings) -> None:
    """Run beat in this process until it is told to stop. Refused when the broker does not answer, or is another's."""
    operations, times, own = app.begin(settings)
    celery = app.make(settings, times)
    brokers.require_own(celery, own)
    scheduler: Any = partial(Scheduler, times=times, own=own, note=partial(_note, operations, times))
    celery.Beat(loglevel="INFO", scheduler_cls=scheduler).run()


def _note(operations: Operations, times: Timetable) -> None:
    try:
        with operations.transaction() as connection:
            standing.note(connection, times)
    finally:
        # The next is after days.
        operations.close()
