"""What a step of a job is given to work with: one transaction, the frozen horizon, the layout, the store."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any
from uuid import UUID

import sqlalchemy as sa

from worker import archive, copies, db, holds, layouts, ledger_shards, livetable, needles, retention, slices
from worker.errors import Refused
from worker.restore import Restore, require_none, require_not_restored
from worker.retirement import Retiring
from worker.rotation import Rotating
from worker.rowset import RowSet
from worker.tasksets import TaskSets

if TYPE_CHECKING:
    from tasks.retire_master_key import RetireMasterKey
    from tasks.rotate_master_key import RotateMasterKey
    from worker.archive import ArchivedObject
    from worker.config import Settings
    from worker.holds import Holds
    from worker.job import Batch, Job, Shard
    from worker.layouts.model import Keep, Layout, LogTable, Records
    from worker.livetable import Column
    from worker.plans import Plan
    from worker.retention import Cutoffs, Policy
    from worker.storage import Store


@dataclass(frozen=True)
class Rules:
    """Rules other than those in force, for a look at what they would do."""

    holds: Callable[[Holds], Holds] = lambda found: found
    policies: Callable[[list[Policy]], list[Policy]] = lambda found: found


IN_FORCE = Rules()


@dataclass(frozen=True, kw_only=True)
class Means:
    """The means of one step. `connection` is inside the step's transaction; `now` is the run's start."""

    connection: sa.Connection
    now: datetime
    layout: Layout
    settings: Settings
    run: UUID | None = None
    store: Store | None = None
    contended: bool = False
    rules: Rules = IN_FORCE

    @property
    def entered(self) -> UUID:
        """The run of this step. TypeError in a look before there is one."""
        if self.run is None:
            raise TypeError("this step has no run")
        return self.run

    @cached_property
    def holds(self) -> Holds:
        """The legal holds in force in this transaction."""
        return self.rules.holds(holds.in_force(self.connection))

    def cutoffs(self, table: str, *, asked: timedelta | None, default: timedelta) -> Cutoffs:
        """The moments before which rows of a table are old. Refused when a policy is not within the settings."""
        if asked is not None:
            retention.require_within(asked, self.settings, what="--older-than")
        found = self._policies_of(table)
        return retention.cutoffs(found, self.settings, now=self.now, asked=asked, default=default)

    def retained(self, table: str, *, asked: timedelta | None, default: timedelta) -> dict[str, Any]:
        """The cutoffs of a run for its receipt: those when it was entered and, where they differ, those now.

        Never refused: what a run did is attested also when it could not begin any more.
        """
        then = retention.entered(self._policies_of(table), now=self.now, asked=asked, default=default).to_json()
        try:
            now = self.cutoffs(table, asked=asked, default=default).to_json()
        except Refused as error:
            now = {"refused": str(error)}
        return then if now == then else {**then, "at_end": now}

    def _policies_of(self, table: str) -> list[Policy]:
        found = self._policies.get(table)
        if found is None:
            counting = retention.counting(self.connection, table, now=self.now)
            found = [one for one in self.rules.policies(counting) if one.table == table]
            self._policies[table] = found
        return found

    @cached_property
    def _policies(self) -> dict[str, list[Policy]]:
        return {}

    def rows(
        self, what: Records, *, cutoffs: Cutoffs, companies: tuple[UUID, ...], keeps: tuple[Keep, ...]
    ) -> RowSet:
        """The old rows of a table as a set, those left out that a legal hold or another keep holds back."""
        asked = what
        if self.holds.targets("user") or self.holds.targets("task"):
            # A column that nobody has classed may name or mention whomever a hold is about.
            more = livetable.unknown(self.columns(what), self.layout, what)
            asked = replace(what, texts=(*what.texts, *more))
        return RowSet(what=asked, cutoffs=cutoffs, companies=companies, keeps=(*keeps, *self.holds.keep(asked)))

    def columns(self, what: Records) -> tuple[Column, ...]:
        """The columns of a table as this step sees them; asked for once."""
        found = self._columns.get(what.name)
        if found is None:
            found = self._columns[what.name] = livetable.columns(self.connection, what.name)
        return found

    @cached_property
    def _columns(self) -> dict[str, tuple[Column, ...]]:
        return {}

    def once(self, job: Job, make: Callable[[Means], RowSet]) -> RowSet:
        """The rows of a job, made once a step: it asks for them several times, and each takes a millisecond."""
        found = self._made.get(job)
        if found is None:
            found = self._made[job] = make(self)
        return found

    @cached_property
    def _made(self) -> dict[Job, RowSet]:
        return {}

    @cached_property
    def tasks(self) -> TaskSets:
        """What can be done with the tasks' table."""
        return TaskSets(self)

    def rotating(self, job: RotateMasterKey) -> Rotating:
        """What can be done to rotate the master key."""
        found = self._rotations.get(job)
        if found is None:
            found = self._rotations[job] = Rotating.of(self, job)
        return found

    @cached_property
    def _rotations(self) -> dict[RotateMasterKey, Rotating]:
        return {}

    def retiring(self, job: RetireMasterKey) -> Retiring:
        """What can be done to retire old master keys."""
        return Retiring(self, job.key, job.allow_column)

    def restore(self, run: UUID | None, companies: tuple[UUID, ...]) -> Restore:
        """What can be done to put a run's archive back. Made once a step: it remembers what it read."""
        found = self._restores.get((run, companies))
        if found is None:
            found = self._restores[run, companies] = Restore(self, run, companies)
        return found

    @cached_property
    def _restores(self) -> dict[tuple[UUID | None, tuple[UUID, ...]], Restore]:
        return {}

    def require_no_restore(self, table: str) -> None:
        """Raise UnderWay while archived rows of a table are being put back: they would be taken again at once."""
        require_none(self.connection, table)

    def shards(self, rows: RowSet, plan: Plan, *, archive: bool = False) -> Iterator[Shard]:
        """The rows of a plan laid out as shards; `archive` where they are copied out as well."""
        return slices.shards(rows, self.connection, plan.targets, archive=archive)

    def archive(self, rows: RowSet, batch: Batch) -> tuple[Batch, tuple[ArchivedObject, ...]]:
        """Write a batch's rows to the store and read them back; the batch of just these rows, and the objects."""
        store, run = self._archive()
        columns = self.columns(rows.what)
        unread = copies.readable(rows, columns)
        query = partial(copies.query, rows, columns, self.connection.dialect)
        objects, addresses, amounts = archive.write(
            store,
            self.connection,
            query(batch, unread=unread),
            doubted=needles.of(rows.needles if unread else ()),
            again=lambda places: query(copies.among(batch, places)),
            table=rows.what.name,
            run=run,
        )
        return copies.at(batch, addresses, amounts), objects

    def archived(self) -> list[ArchivedObject]:
        """The objects of this run whose rows are gone from the database."""
        return ledger_shards.objects(self.connection, self._archive()[1])

    def checking(self) -> Callable[[], list[str]]:
        """Begin to read this run's archive objects beside what else is done; then, which are missing or changed."""
        return db.beside(self.connection, partial(archive.check, self._archive()[0], self.archived()))

    def index_archive(self, table: str, facts: dict[str, object]) -> dict[str, object]:
        """Write the manifest; what the receipt says of the archive."""
        store, run = self._archive()
        objects = self.archived()
        if not objects:
            return {"objects": 0}
        key, sha256 = archive.write_manifest(store, archive.root(table, run), facts, objects)
        return {
            "objects": len(objects),
            "rows": sum(one.rows for one in objects),
            "bytes": sum(one.bytes for one in objects),
            "manifest": key,
            "sha256": sha256,
        }

    def require_prunable(self, log: LogTable, *, archive: bool) -> None:
        """Refused or SchemaError when to delete, or to archive, rows of a log would lose more than it says."""
        livetable.require_prunable(self.connection, log, archive=archive)

    def require_known_references(self, log: LogTable) -> None:
        """Refused when rows elsewhere that nobody knows would go or change with rows of a log."""
        livetable.require_known_references(self.connection, log)

    def require_whole(self, what: Records) -> None:
        """Refused when a table's rows lie in others."""
        livetable.require_whole(self.connection, what.name)

    def require_kinds(self, what: Records) -> None:
        """SchemaError where a table's age, key or company has a type by which nothing could be told or noted."""
        livetable.require_kinds(self.connection, what, key=True)

    def require_as_seen(self, job: Job) -> None:
        """Raise Contended when a table that the job has read in this step only seemed to have no rows."""
        # What legal holds read is in the landmarks.
        tables = (*job.needs(self.layout), *self.layout.landmarks)
        livetable.require_as_seen(self.connection, {table.name for table in tables})

    def require_not_restored(self) -> None:
        """Refused when rows of this run were put back since: it would take them a second time."""
        require_not_restored(self.connection, self.entered)

    def require_fit(self, job: Job) -> None:
        """Raise Refused or SchemaError when the live database is not one this job can work on."""
        live = layouts.detect(self.connection)
        if live is not self.layout:
            raise Refused(f"the run was made for the {self.layout.name} layout, and the database has {live.name}")
        layouts.require(self.connection, job.needs(live), what=job.name)
        job.check(self)

    def require_companies(self, companies: Sequence[UUID]) -> None:
        """Raise Refused for a company that is not in this deployment, and when there is none at all."""
        column = self.layout.companies.c.id
        if companies:
            known = set(self.connection.scalars(sa.select(column).where(column.in_(companies))))
            if unknown := [str(one) for one in companies if one not in known]:
                raise Refused(f"--company: {', '.join(unknown)} is not a company of this deployment")
        elif self.connection.scalar(sa.select(column).limit(1)) is None:
            raise Refused("the deployment has no company: is DATABASE_URL the right database?")

    def _archive(self) -> tuple[Store, UUID]:
        if self.store is None:
            raise Refused("PAPERCLIP_WORKER_S3_BUCKET is not set on this worker, and the run has an archive there")
        return self.store, self.entered
