"""What operators, beat and tests ask of a deployment: plan, rehearse, start, stop, resume. No terminal, no broker."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any
from uuid import UUID

import sqlalchemy as sa

from worker import abreast, anchors, archive, audit, db, layouts, ledger, ledger_shards, params, privileges, registry
from worker.errors import Refused, Unheard
from worker.job import REHEARSAL, Job, Overdue
from worker.means import Means
from worker.nullstore import NullStore
from worker.plans import Plan, Tally, horizon_of
from worker.runner import Runner
from worker.states import ACTIVE, RESUMABLE, State
from worker.storage import S3Store

if TYPE_CHECKING:
    from worker.anchors import Anchor
    from worker.config import Settings
    from worker.ledger import Run


# Less is no age of a retention, and clocks that somebody looks after differ by less by far.
_AHEAD = timedelta(days=1)


class Operations:
    """One deployment, reached through its settings. Connections are made when first needed."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings

    @cached_property
    def engine(self) -> sa.Engine:
        return db.engine(self.settings)

    @cached_property
    def store(self) -> S3Store | None:
        return S3Store(self.settings) if self.settings.s3_bucket else None

    def close(self) -> None:
        """Close what connections there are; they are made again when needed."""
        if "engine" in self.__dict__:
            self.engine.dispose()

    def runner(self) -> Runner:
        """A worker's loop on this deployment."""
        return Runner(self.settings, self.engine, store=self.store)

    def transaction(self, *, scan: bool = False, read_only: bool = False, first: str | None = None) -> db.Transaction:
        """A transaction with the configured timeouts; `scan` allows the long reads of plan and verify."""
        seconds = self.settings.scan_timeout if scan else self.settings.statement_timeout
        return db.transaction(self.engine, lock=2, statement=seconds, read_only=read_only, first=first)

    def now(self) -> datetime:
        """The database's clock, by which rows have their ages; a worker's own may be wrong, and decides nothing."""
        with self.transaction(read_only=True) as connection:
            found: datetime = connection.execute(sa.select(sa.func.clock_timestamp())).scalar_one()
            return found

    def _require_clock(self) -> None:
        """Refused where the database's clock is far ahead of this machine's: what is not old yet would go."""
        if (ahead := self.now() - datetime.now(UTC)) > _AHEAD:
            raise Refused(
                f"the database's clock is {ahead.days} days ahead of this machine's; put right whichever is wrong, "
                "for rows and keys have their ages by the database's"
            )

    def _require_abreast(self) -> None:
        """Refused where the bucket has receipts that the ledger lacks: holds and policies may have gone with them."""
        abreast.require(partial(self.transaction, read_only=True), self.store)

    def require_ledger(self) -> UUID:
        """Which ledger the deployment has. Refused where it has none of this release, or not any more."""
        with self.transaction(read_only=True) as connection:
            return ledger.require(connection)

    def check_ready(self) -> None:
        """Raise what would fail every run: signing key, a database that takes no change, ledger, bucket.

        A deployment whose schedule archives nothing may do without a bucket.
        """
        from worker import timetable  # noqa: PLC0415 - it loads Celery, which commands can do without

        self.runner()
        with self.transaction() as connection:
            ledger.require(connection)
            layouts.detect(connection)
        if self.store is not None:
            self.store.check()
        elif archiving := [name for name, entry in timetable.of(self).enabled.items() if entry.job.archives]:
            raise Refused(
                f"PAPERCLIP_WORKER_S3_BUCKET is not set, and the schedule archives ({', '.join(archiving)}); "
                "set it, or give these archive = false in PAPERCLIP_WORKER_SCHEDULE_FILE"
            )

    def plan(self, job: Job, *, approved: str | None = None) -> Plan:
        """What a run of `job` would change now; with `approved`, refused when the world has drifted from it."""
        now = self.now() if approved is None else horizon_of(approved, now=self.now())
        with self._checked(job, now) as means:
            job.foresee(means)
            plan = job.plan(means)
        if approved is not None and plan.hash != approved:
            raise Refused("--plan: the world has drifted from that plan; make the plan again and approve it")
        return plan

    def overdue(self, job: Job) -> tuple[Overdue, ...]:
        """What a run of `job` would change now, per table."""
        with self._checked(job, self.now()) as means:
            return job.overdue(means)

    def overdue_alone(self, job: Job) -> tuple[Overdue, ...] | None:
        """The same; None while another asks like this."""
        with self._checked(job, self.now()) as means:
            return job.overdue(means) if db.try_advisory_lock(means.connection, "measure") else None

    def start(
        self,
        job: Job,
        *,
        actor: str,
        via: str,
        reason: str | None = None,
        now: datetime | None = None,
        approved: str | None = None,
    ) -> UUID:
        """Enter a run, ready to be worked on. Everything that can be refused is refused before the run exists."""
        # A key that cannot sign must be found before there is a run that could not settle.
        self.runner()
        if job.archives:
            if self.store is None:
                raise Refused("PAPERCLIP_WORKER_S3_BUCKET is not set; --without-archive does without it")
            self.store.check()
        now = now or self.now()
        self._require_clock()
        with self._checked(job, now) as means:
            privileges.require_on_ledger(means.connection)
            job.admit(means)
        self._require_abreast()
        try:
            with self._entering() as connection:
                ledger.require(connection)
                run = ledger.create(
                    connection,
                    job=job.name,
                    params=params.to_json(job),
                    exclusion=job.exclusion,
                    layout=layouts.detect(connection).name,
                    now=now,
                    actor=actor,
                    via=via,
                    reason=reason,
                    plan_hash=approved,
                )
        except Unheard as fault:
            raise Unheard(
                f"cut off in the midst of the commit by which run {run} is entered, which may be done; "
                f"`runs show {run}` says so once the database answers, and `runs stop` ends the run"
            ) from fault
        return run

    def require_free(self, job: Job) -> None:
        """Raise UnderWay when another run of the same exclusion is under way."""
        with self.transaction(read_only=True) as connection:
            ledger.require(connection)
            ledger.require_free(connection, job.exclusion)

    def rehearse(self, job: Job, *, limit: int = 1_000) -> Tally:
        """Run every batch for real and roll each back; archives go to a store that keeps nothing."""
        now, tally = self.now(), Tally()
        with self._checked(job, now) as means:
            # What is refused as a run is no run to rehearse.
            job.admit(means)
            shards = list(job.shards(means, job.plan(means)))
        for shard in shards:
            cursor: Any = None
            exhausted = False
            while not exhausted:
                with self._rolled_back() as connection:
                    means = replace(self._means(connection, now, run=REHEARSAL), store=NullStore(self.store))
                    batch = job.claim(means, shard, cursor, limit)
                    if batch is None:
                        break
                    batch, _ = job.preserve(means, batch)
                    tally += job.apply(means, batch)
                    cursor, exhausted = batch.after, batch.exhausted
        return tally

    def find(self, name: str) -> Run:
        """The run whose id starts with `name` (or `last`)."""
        with self.transaction(read_only=True) as connection:
            ledger.require(connection)
            return ledger.find(connection, name)

    def stop(self, name: str, *, told: Callable[[UUID], AbstractContextManager[Any]] = nullcontext) -> Run:
        """Ask a run to stop after the bites in flight; where none is, it is settled here and now, within `told`."""
        runner = self.runner()
        with self.transaction() as connection:
            ledger.require(connection)
            run = ledger.find(connection, name)
            held = ledger.get(connection, run.id, hold=True)
            if held is None:
                raise Refused(f"run {run.id} is being verified or settled this moment; look again")
            if held.state is not State.STOPPING:
                if held.state not in {State.QUEUED, State.RUNNING, State.VERIFYING}:
                    raise Refused(f"run {run.id} is {held.state}; only a run under way can be stopped")
                ledger.step(connection, held, State.STOPPING)
        with told(run.id):
            runner.work(run.id, seconds=0)
            return self.find(str(run.id))

    def resume(self, name: str) -> Run:
        """Make a stopped or failed run ready to go on at its cursors, its horizon unchanged.

        Raises ArchiveTampered when what it archived before is no longer what was written. A run under way is
        left as it is: it only needs to be taken up again.
        """
        self.runner()
        run = self.find(name)
        if run.state not in ACTIVE | RESUMABLE:
            raise Refused(f"run {run.id} is {run.state}; only a stopped or failed run can be resumed")
        self._require_abreast()
        if run.state in ACTIVE:
            return run
        job = params.from_json(registry.job(run.job), run.params)
        with self._checked(job, run.now, run=run.id) as means:
            objects = ledger_shards.objects(means.connection, run.id)
        if objects and self.store is None:
            raise Refused("PAPERCLIP_WORKER_S3_BUCKET is not set, and the run has an archive there")
        if objects and self.store is not None:
            archive.require_intact(self.store, objects)
        with self._entering() as connection:
            held = ledger.get(connection, run.id, hold=True)
            if held is None or held.state is not run.state:
                raise Refused(f"run {run.id} is being changed this moment; look again")
            # Again: to read the archive takes long, and a run that is laid out already is never checked later.
            self._means(connection, run.now, run=run.id).require_fit(job)
            ledger.reopen(connection, held)
            # Within: a database that goes afterwards must not make a refusal of it.
            return ledger.find(connection, str(run.id))

    def result(self, run: UUID) -> dict[str, Any]:
        """What `run --json` prints: the run, its tally, what is left, findings and the newest receipt."""
        with self.transaction(read_only=True) as connection:
            found = ledger.find(connection, str(run))
            tally = ledger_shards.tally(connection, run)
            receipts = audit.recent(connection, limit=1, run=run)
            _, bites = ledger_shards.progress(connection, run)
            stage = ledger_shards.stage(connection, run)
            anchored = anchors.of(connection, [one.seq for one in receipts])
        return {
            "run": str(found.id),
            "job": found.job,
            "params": dict(found.params),
            "layout": found.layout,
            "state": found.state.value,
            "stage": stage,
            "kept": found.state is State.KEPT,
            "horizon": found.now.isoformat(),
            "created_at": found.created_at.isoformat(),
            "settled_at": found.settled_at.isoformat() if found.settled_at else None,
            "planned": found.planned_rows,
            "rows": tally.total.rows,
            "bytes": tally.total.bytes,
            "bites": bites,
            "tally": tally.to_json(),
            "left": list(found.left_rows),
            "findings": list(found.findings),
            "waiting": found.waiting,
            "waits": dict(found.waits),
            "error": found.error,
            "actor": found.actor,
            "reason": found.reason,
            "receipt": receipts[0].to_json() if receipts else None,
            "anchor": next((one.to_json() for one in anchored.values()), None),
        }

    def anchor(self, *, every: bool = False) -> list[Anchor]:
        """Write pending receipts to the bucket, with `every` all of them again; those written.

        Refused, and nothing is written, where the bucket has others.
        """
        if self.store is None or self.settings.signing_key_file is None:
            raise Refused("PAPERCLIP_WORKER_S3_BUCKET and PAPERCLIP_WORKER_SIGNING_KEY_FILE must be set")
        with self.transaction(read_only=True) as connection:
            ledger.require(connection)
        signer = audit.Signer.load(self.settings.signing_key_file)
        self._require_abreast()
        return anchors.write(self.settings, self.engine, self.store, signer, every=every)

    def stalled(self) -> list[Run]:
        """Active runs nothing has moved for `rescue_after` seconds."""
        with self.transaction(read_only=True) as connection:
            ledger.require(connection)
            return ledger.stalled(connection, after=timedelta(seconds=self.settings.rescue_after))

    def count_rescue(self, run: Run) -> int | None:
        """Count that a stalled run is taken up again: how often since it went on. None: it has moved."""
        after = timedelta(seconds=self.settings.rescue_after)
        # Of several that count at the same time, the others see that the first has.
        with self.transaction(first="SET TRANSACTION ISOLATION LEVEL READ COMMITTED") as connection:
            return ledger.count_rescue(connection, run.id, after=after)

    @contextmanager
    def _checked(self, job: Job, now: datetime, *, run: UUID | None = None) -> Iterator[Means]:
        """A read-only scan of the live database, once the job is known to fit it."""
        with self.transaction(scan=True, read_only=True) as connection:
            means = self._means(connection, now, run=run)
            means.require_fit(job)
            yield means

    def _means(self, connection: sa.Connection, now: datetime, *, run: UUID | None = None) -> Means:
        layout = layouts.detect(connection)
        # Legal holds and policies are in the ledger: without it nobody can say what would go.
        ledger.require(connection)
        return Means(
            connection=connection,
            now=now,
            layout=layout,
            settings=self.settings,
            run=run,
            store=self.store,
        )

    @contextmanager
    def _entering(self) -> Iterator[sa.Connection]:
        """A transaction in which runs come under way, one after the other: it sees all that did before."""
        # With the snapshot of the moment it began to wait for the lock it would not.
        first = "SET TRANSACTION ISOLATION LEVEL READ COMMITTED"
        with db.transaction(self.engine, lock=30, statement=self.settings.scan_timeout, first=first) as connection:
            db.advisory_lock(connection, "runs")
            yield connection

    @contextmanager
    def _rolled_back(self) -> Iterator[sa.Connection]:
        with self.transaction(scan=True) as connection, connection.begin_nested() as savepoint:
            yield connection
            savepoint.rollback()
