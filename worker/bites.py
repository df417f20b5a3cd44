"""One bite after another of a run, and the rests between them.

One bite is one transaction in which a shard's cursor and the effect it stands for commit together, so a kill at
any instant loses nothing and repeats nothing.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

from worker import archive, db, holds, ledger, ledger_shards, params, registry
from worker.logs import log
from worker.plans import Tally
from worker.throttle import Throttle

if TYPE_CHECKING:
    import sqlalchemy as sa

    from worker.archive import ArchivedObject
    from worker.config import Settings
    from worker.db import Transaction
    from worker.ledger import Run
    from worker.means import Means


class Bites:
    """Takes the bites of one worker, and knows between two of them how the last went."""

    def __init__(
        self, settings: Settings, *, transaction: Callable[..., Transaction], means: Callable[..., Means]
    ) -> None:
        self._settings = settings
        self._transaction = transaction
        self._means = means
        self._throttle = Throttle(settings)
        self._contended = False
        # The run whose bites are being taken, as it was when they began.
        self.running: Run | None = None
        # What the operator was last asked for; it stands until a bite went on.
        self._asked: str | None = None
        # Of the run whose bites are being taken, the stage they are of.
        self._stage: int | None = None

    def leave(self) -> None:
        """The next bite may be of another run."""
        self.running = self._stage = None

    def ask(self, what: str) -> None:
        """The run waits for its operator, who was asked for this."""
        self.running, self._asked = None, what

    def fail(self, *, contended: bool, large: bool = False) -> None:
        """The last bite was rolled back; `contended`: for what others hold, `large`: the disk did not take it."""
        self.running = None
        if contended or large:
            self._throttle.shrink()
        if contended:
            # First leave out what others hold; the second sweep comes back for it.
            self._contended = True

    def go_on(self, run: Run, call_help: Callable[[int], None]) -> bool:
        """Rest a moment or take a bite of a run; False when no shard of it is free."""
        self.running = run
        if (run.waiting or self._throttle.due()) and self._rest(run):
            return True
        if self._bite(run, call_help):
            return True
        self.running = None
        return False

    def call_help(self, shards: int, call_help: Callable[[int], None]) -> None:
        """Tell how many more workers could take part in so many shards."""
        if (helpers := min(shards, self._settings.parallel) - 1) > 0:
            call_help(helpers)

    def _rest(self, run: Run) -> bool:
        """Rest a moment when the server is under pressure, and say why where operators look."""
        asked = run.waiting is not None and run.waiting == self._asked
        with self._transaction() as connection:
            pressure = self._throttle.pressure(connection)
            if pressure and not ledger.goes_on(connection, run.id):
                # Stopped meanwhile, or ended by another: whoever goes on to rest would never hear of it.
                self.running = None
                return True
            if pressure and not self._may_rest(connection, run):
                pressure = None
            if pressure:
                ledger.note_wait(connection, run.id, pressure.text, kind=pressure.kind, seconds=1)
            elif run.waiting and not asked:
                ledger.note_wait(connection, run.id, None, kind="rested", seconds=0)
        left = run.waiting if asked else None
        self.running = replace(run, waiting=pressure.text if pressure else left)
        if pressure is None:
            return False
        log.info("run rests", run=str(run.id), kind=pressure.kind)
        time.sleep(1)
        return True

    @staticmethod
    def _may_rest(connection: sa.Connection, run: Run) -> bool:
        job = params.from_json(registry.job(run.job), run.params)
        return job.may_rest(ledger_shards.earliest(connection, run))

    def _bite(self, run: Run, call_help: Callable[[int], None]) -> bool:
        """Take one batch of one shard; False when no shard is free."""
        job = params.from_json(registry.job(run.job), run.params)
        asked = self._throttle.rows(contended=self._contended)
        began = time.monotonic()
        modes = [db.SEES_COMMITS] * job.read_committed
        # Whatever settles a run commits after its bites and does wait, and the log is written in order.
        lasting = not job.repeatable
        with self._transaction(first="; ".join([*modes, holds.SHARED]), lasting=lasting) as connection:
            held = ledger_shards.take_shard(connection, run.id)
            if held is None:
                return False
            if self._stage not in (None, held.shard.stage):
                # Who found nothing to do in the stage before has gone.
                self.call_help(ledger_shards.unfinished(connection, run, stage=held.shard.stage), call_help)
            self._stage = held.shard.stage
            means = self._means(connection, run, contended=self._contended)
            batch = job.claim(means, held.shard, held.cursor, asked)
            objects: tuple[ArchivedObject, ...] = ()
            tally, cursor = Tally(), held.cursor
            locked = time.monotonic()
            if batch is not None:
                batch, objects = job.preserve(means, batch)
                locked = time.monotonic() if not self._contended else locked
                tally, cursor = job.apply(means, batch), batch.after
                archive.require_exact(objects, tally)
            if not job.read_committed:
                means.require_as_seen(job)
            ledger_shards.record_bite(
                connection,
                held,
                cursor=cursor,
                tally=tally,
                done=batch is None or batch.exhausted,
                objects=objects,
                seconds=time.monotonic() - began,
            )
        seconds = time.monotonic() - locked
        self._asked = None
        if not self._contended:
            copied = sum(one.raw_bytes for one in objects)
            self._throttle.observe(asked=asked, seconds=seconds, copied=copied, objects=len(objects))
        self._contended = False
        log.debug("bite committed", run=str(run.id), shard=held.number, rows=tally.total.rows, seconds=seconds)
        return True
