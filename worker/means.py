"""What a step of a job is given to work with: one transaction, the frozen horizon, the layout, the store."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING
from uuid import UUID

from worker import archive, ledger
from worker.errors import Refused

if TYPE_CHECKING:
    from collections.abc import Sequence

    import sqlalchemy as sa

    from worker.archive import ArchivedObject
    from worker.job import Batch
    from worker.layouts.model import Keep, Layout, LogTable
    from worker.rowset import RowSet
    from worker.storage import Store


@dataclass(frozen=True, kw_only=True)
class Means:
    """The means of one step. `connection` is inside the step's transaction; `now` is the run's start."""

    connection: sa.Connection
    now: datetime
    layout: Layout
    run: UUID | None = None
    store: Store | None = None
    contended: bool = False

    def rows(
        self, log: LogTable, *, cutoff: datetime, companies: tuple[UUID, ...], keeps: tuple[Keep, ...]
    ) -> RowSet:
        """The old rows of a log as a set."""
        from worker.rowset import RowSet  # noqa: PLC0415 - a cycle otherwise: rowset speaks of jobs

        return RowSet(log=log, cutoff=cutoff, companies=companies, keeps=keeps)

    def archive(self, rows: RowSet, batch: Batch) -> tuple[Batch, tuple[ArchivedObject, ...]]:
        """Write a batch's rows to the store and read them back; the batch of just these rows, and the objects."""
        from worker.rowset import at  # noqa: PLC0415 - a cycle otherwise: rowset speaks of jobs

        store, run = self._archive()
        query = rows.lines(batch)
        objects, addresses = archive.write(store, self.connection, query, table=rows.log.name, run=run)
        return at(batch, addresses), objects

    def archived(self) -> list[ArchivedObject]:
        """The objects of this run whose rows are gone from the database."""
        return ledger.objects(self.connection, self._archive()[1])

    def damaged(self) -> list[str]:
        """Keys of this run's archive objects that are missing or changed in the store."""
        return archive.check(self._archive()[0], self.archived())

    def index_archive(self, table: str, facts: dict[str, object]) -> dict[str, object]:
        """Write the manifest, sweep leftovers; what the receipt says of the archive."""
        store, run = self._archive()
        objects = self.archived()
        if not objects:
            # A bite that was killed may still have written one.
            return {"objects": 0, "leftovers": archive.sweep_leftovers(store, table, run, set())}
        key = archive.root(table, run) + "manifest.json"
        sha256 = archive.write_manifest(store, key, facts, objects)
        stayed = archive.sweep_leftovers(store, table, run, {key, *(one.key for one in objects)})
        return {
            "objects": len(objects),
            "rows": sum(one.rows for one in objects),
            "bytes": sum(one.bytes for one in objects),
            "manifest": key,
            "sha256": sha256,
            "leftovers": stayed,
        }

    def require_companies(self, companies: Sequence[UUID]) -> None:
        """Raise Refused for a company that is not in this deployment, and when there is none at all."""
        import sqlalchemy as sa  # noqa: PLC0415

        column = self.layout.companies.c.id
        if companies:
            known = set(self.connection.scalars(sa.select(column).where(column.in_(companies))))
            if unknown := [str(one) for one in companies if one not in known]:
                raise Refused(f"--company: {', '.join(unknown)} is not a company of this deployment")
        elif self.connection.scalar(sa.select(column).limit(1)) is None:
            raise Refused("the deployment has no company: is DATABASE_URL the right database?")

    def _archive(self) -> tuple[Store, UUID]:
        if self.store is None or self.run is None:
            raise TypeError("this step has no archive")
        return self.store, self.run
