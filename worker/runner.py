"""The only loop: take a bite, commit, look again; then verify, finish, settle.

Any number of workers may run `work` for one run.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from enum import Enum
from functools import partial
from typing import TYPE_CHECKING
from uuid import UUID

from worker import (
    abreast,
    anchors,
    audit,
    db,
    layouts,
    ledger,
    ledger_shards,
    leftovers,
    params,
    registry,
    settle,
)
from worker.bites import Bites
from worker.errors import Contended, DatabaseGone, NoRoom, Refused, Transient, Waits, WorkerError
from worker.logs import log
from worker.means import Means
from worker.states import ACTIVE, SETTLED, State

if TYPE_CHECKING:
    import sqlalchemy as sa

    from worker.config import Settings
    from worker.job import Job
    from worker.ledger import Run
    from worker.storage import S3Store

# So many faults in a row, with rests up to _LONGEST_REST between them (about half a minute), fail a run.
MOST_FAULTS = 10
_LONGEST_REST = 5.0
# A settlement waits for the bucket no longer than for so many receipts; the next, or the rescue, has the rest.
MOST_ANCHORED = 200
# What changes rows, or leads there. A run that was told to stop ends whatever the bucket has.
_GOING_ON = ACTIVE - {State.STOPPING}


class Outcome(Enum):
    """Why `work` came back."""

    MORE = "more"  # the slice of time is over, the run is not
    IDLE = "idle"  # nothing here that another worker does not already hold
    SETTLED = "settled"  # the run has its receipt


class Runner:
    """Works on runs of one deployment. Not shared between threads."""

    def __init__(self, settings: Settings, engine: sa.Engine, *, store: S3Store | None) -> None:
        if settings.signing_key_file is None:
            raise Refused("PAPERCLIP_WORKER_SIGNING_KEY_FILE is not set")
        self._settings = settings
        self._engine = engine
        self._store = store
        self._signer = audit.Signer.load(settings.signing_key_file)
        self._bites = Bites(settings, transaction=self._transaction, means=self._means)
        self._abreast = False
        self._faulty: UUID | None = None
        self._faults = 0

    def work(
        self,
        run: UUID,
        *,
        seconds: float,
        leave: Callable[[], bool] = lambda: False,
        call_help: Callable[[int], None] = lambda _: None,
    ) -> Outcome:
        """Advance a run for about so long, or until `leave` says so between two bites.

        `call_help` is told how many more workers could take part once the run is laid out. Faults that pass are
        retried; any other ends the run as failed, with a receipt, and is raised.
        """
        until = time.monotonic() + seconds
        self._bites.leave()
        self._abreast = False
        if self._faulty != run:
            self._faulty, self._faults = run, 0
        while True:
            try:
                outcome = self._advance(run, call_help)
                self._faults = 0
            except Waits as wait:
                outcome = None
                self._note_wait(run, str(wait))
            except Transient as fault:
                # Counted beyond this slice: a store that hangs outlasts one.
                self._faults, outcome = self._faults + 1, None
                # The database may be another one now.
                self._abreast = False
                self._after_fault(run, fault, self._faults)
            except WorkerError as error:
                self.give_up(run, str(error))
                raise
            except Exception as error:
                # The runner's edge: record that it failed (never the text, which may quote a row), and raise.
                self.give_up(run, f"internal error: {type(error).__name__}")
                raise
            if outcome is Outcome.SETTLED:
                # Also when this message came back after a kill between the commit and the bucket.
                self._tidy(run)
            if outcome is not None:
                return outcome
            if time.monotonic() >= until or leave():
                return Outcome.MORE

    def _advance(self, run_id: UUID, call_help: Callable[[int], None]) -> Outcome | None:
        """One step of the run, whatever it needs next; None to be called again."""
        running = self._bites.running
        if running and running.id == run_id:
            # `take_shard` looks at the state itself, so between bites the run need not be read again.
            return self._bite(running, call_help)
        with self._transaction() as connection:
            run = ledger.get(connection, run_id)
        if run is None:
            raise Refused(f"there is no run {run_id}")
        if run.state in _GOING_ON and not self._abreast:
            # Not at each bite: it asks the bucket.
            abreast.require(self._transaction, self._store)
            self._abreast = True
        if run.state is State.QUEUED:
            return self._open(run_id, call_help)
        if run.state is State.RUNNING:
            return self._bite(run, call_help)
        steps = {State.VERIFYING: self._verify, State.FINISHING: self._finish, State.STOPPING: self._stop}
        return steps[run.state](run_id) if run.state in steps else Outcome.SETTLED

    def _bite(self, run: Run, call_help: Callable[[int], None]) -> Outcome | None:
        return None if self._bites.go_on(run, call_help) else self._close_sweep(run)

    # -- the steps around the bites ---------------------------------------------------------------------

    def _open(self, run_id: UUID, call_help: Callable[[int], None]) -> Outcome | None:
        with self._transaction(scan=True) as connection:
            run = ledger.get(connection, run_id, hold=True)
            if run is None or run.state is not State.QUEUED:
                return Outcome.IDLE if run is None else None
            job = params.from_json(registry.job(run.job), run.params)
            means = self._means(connection, run)
            means.require_fit(job)
            plan = job.plan(means) if run.plan_hash else job.outline(means)
            if run.plan_hash and run.plan_hash != plan.hash:
                raise Refused("the world has drifted from the plan that was approved; make the plan again")
            ledger.record_plan(connection, run.id, plan)
            number = ledger_shards.add_shards(connection, run.id, run.sweep, job.shards(means, plan))
            ledger.step(connection, run, State.RUNNING)
        log.info("run laid out", run=str(run_id), job=run.job, shards=number, rows=plan.tally.total.rows)
        self._bites.call_help(number, call_help)
        return None

    def _close_sweep(self, run: Run) -> Outcome | None:
        with self._transaction() as connection:
            held = ledger.get(connection, run.id, hold=True)
            if held is None or (held.state is State.RUNNING and ledger_shards.unfinished(connection, held)):
                return Outcome.IDLE
            if held.state is State.RUNNING:
                ledger.step(connection, held, State.VERIFYING)
        return None

    def _verify(self, run_id: UUID) -> Outcome | None:
        return self._judge(run_id, State.VERIFYING, settle.verify)

    def _finish(self, run_id: UUID) -> Outcome | None:
        return self._judge(run_id, State.FINISHING, partial(settle.finish, signer=self._signer))

    def _judge(self, run_id: UUID, expected: State, judge: Callable[[Means, Job, Run], State]) -> Outcome | None:
        """Hold a run in the expected state and take the step that leads out of it."""
        with self._transaction(scan=True) as connection:
            run = ledger.get(connection, run_id, hold=True)
            if run is None:
                return Outcome.IDLE
            if run.state is expected:
                job = params.from_json(registry.job(run.job), run.params)
                state = judge(self._means(connection, run), job, run)
            else:
                return None
        log.info("run judged", run=str(run_id), state=state.value)
        return Outcome.SETTLED if state in SETTLED else None

    def _stop(self, run_id: UUID) -> Outcome | None:
        """The worker that finds no bite in flight settles; the others go home."""
        return self._end(run_id, State.STOPPING, State.STOPPED, error=None)

    def _end(self, run_id: UUID, expected: State | None, to: State, *, error: str | None) -> Outcome | None:
        with self._transaction() as connection:
            run = ledger.get(connection, run_id, hold=True)
            if run is None or not ledger_shards.no_bite_in_flight(connection, run_id):
                return Outcome.IDLE
            if run.state is expected or (expected is None and run.state in ACTIVE):
                try:
                    job = params.from_json(registry.job(run.job), run.params)
                except Refused:
                    job = None
                settle.end_early(self._means(connection, run), job, run, to, self._signer, error=error)
            else:
                return None
        return Outcome.SETTLED

    # -- faults ---------------------------------------------------------------------------------------

    def _after_fault(self, run: UUID, fault: Transient, faults: int) -> None:
        log.warning("bite rolled back", run=str(run), fault=type(fault).__name__, faults=faults)
        self._bites.fail(contended=isinstance(fault, Contended), large=isinstance(fault, NoRoom))
        if faults >= MOST_FAULTS:
            self._faults = 0
            if not isinstance(fault, DatabaseGone):
                self.give_up(run, str(fault))
            raise fault
        time.sleep(min(_LONGEST_REST, 0.05 * 2**faults))

    def _note_wait(self, run: UUID, what: str) -> None:
        """Say what a run waits for, a moment long; it is no fault however long it takes."""
        with self._transaction() as connection:
            ledger.note_wait(connection, run, what, kind="operator", seconds=1)
        self._bites.ask(what)
        time.sleep(1)

    def give_up(self, run_id: UUID, error: str) -> None:
        """Settle a run as failed, unless another worker has a bite of it in flight."""
        log.error("run failed", run=str(run_id), error=error)
        for pause in (0.1, 0.5, 2.0):
            try:
                self._end(run_id, None, State.FAILED, error=error)
            except Transient:
                # The fault that led here is what the caller raises; a rescue takes the run up again.
                time.sleep(pause)
            else:
                self._tidy(run_id)
                return

    def _tidy(self, run_id: UUID) -> None:
        """What is left to do in the bucket once a settlement has committed. A fault is logged, never raised."""
        self.anchor()
        if self._store is None:
            return
        try:
            swept = leftovers.sweep(self._store, run_id, self._transaction)
        except WorkerError as fault:
            log.warning("leftovers not swept", run=str(run_id), fault=type(fault).__name__, why=str(fault))
        else:
            log.debug("leftovers swept", run=str(run_id), objects=swept)

    def anchor(self) -> None:
        """Write what receipts the bucket lacks to it. A fault leaves them pending: it is logged, never raised."""
        if self._store is None:
            return
        try:
            # A copy of the database, in a drill as well, must not take the names that the first has yet to give.
            abreast.require(self._transaction, self._store)
            anchors.write(self._settings, self._engine, self._store, self._signer, most=MOST_ANCHORED)
        except WorkerError as fault:
            log.warning("receipts not anchored", fault=type(fault).__name__, why=str(fault))

    # -- parts ----------------------------------------------------------------------------------------

    def _transaction(self, *, scan: bool = False, first: str | None = None, lasting: bool = True) -> db.Transaction:
        lock, statement = self._settings.lock_timeout, self._settings.statement_timeout
        statement = self._settings.scan_timeout if scan else statement
        return db.transaction(self._engine, lock=lock, statement=statement, first=first, lasting=lasting)

    def _means(self, connection: sa.Connection, run: Run, *, contended: bool = False) -> Means:
        return Means(
            connection=connection,
            now=run.now,
            layout=layouts.LAYOUTS[run.layout],
            settings=self._settings,
            run=run.id,
            store=self._store,
            contended=contended,
        )
