"""What is due and not done: measured at intervals, because it reads the host's tables, and kept in the ledger."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from typing import TYPE_CHECKING, Any

import sqlalchemy as sa
from sqlalchemy.dialects.postgresql import insert

from worker.errors import WorkerError
from worker.ledger import SCHEMA

if TYPE_CHECKING:
    from worker.job import Overdue
    from worker.operations import Operations
    from worker.timetable import Timetable

BACKLOG = sa.Table(
    "backlog",
    sa.MetaData(schema=SCHEMA),
    *(sa.Column(name, sa.Text) for name in ("entry", "table")),
    sa.Column("rows", sa.BigInteger),
    *(sa.Column(name, sa.DateTime(timezone=True)) for name in ("oldest", "measured_at")),
)


def measure(operations: Operations, times: Timetable, *, alone: bool = False) -> Mapping[str, WorkerError]:
    """Measure each entry that is on and keep what was found; why, for those that could not be measured.

    `alone`: leave it, and what is still to be measured, to another that is at it.
    """
    faults: dict[str, WorkerError] = {}
    for name, entry in times.enabled.items():
        try:
            found = operations.overdue_alone(entry.job) if alone else operations.overdue(entry.job)
            if found is None:
                break
            with operations.transaction() as connection:
                _keep(connection, name, found)
        except WorkerError as error:
            faults[name] = error
    return faults


def _keep(connection: sa.Connection, entry: str, found: tuple[Overdue, ...]) -> None:
    # A table that is not named any more has nothing overdue.
    values: dict[str, Any] = {"rows": 0, "oldest": None, "measured_at": sa.func.clock_timestamp()}
    connection.execute(sa.update(BACKLOG).where(BACKLOG.c.entry == entry).values(values))
    for one in found:
        values |= {"rows": one.rows, "oldest": one.oldest}
        row = insert(BACKLOG).values(entry=entry, table=one.table, **values)
        connection.execute(row.on_conflict_do_update(index_elements=["entry", "table"], set_=values))


def measured(connection: sa.Connection) -> list[tuple[str, str, int, datetime | None, datetime]]:
    """Entry, table, overdue rows, age column of the oldest of them, and when that was measured."""
    rows = connection.execute(sa.select(BACKLOG).order_by(BACKLOG.c.entry, BACKLOG.c.table))
    return [(entry, table, number, oldest, at) for entry, table, number, oldest, at in rows]
