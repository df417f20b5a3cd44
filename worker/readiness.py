"""Whether what was made ready for a rotation is still all there, and still about the tables as they are.

The table it is in is unlogged: a crash of PostgreSQL, or a standby that takes over, empties it. A rewrite of a
carrier's table (VACUUM FULL, CLUSTER, pg_repack) moves every row and makes none newer. Either would leave ciphertext
unswapped at the cut-over, and no later look at newer rows would find it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING
from uuid import UUID

import sqlalchemy as sa

from worker.aside import RESEALED

if TYPE_CHECKING:
    from worker.layouts.model import Layout

# Beside what is ready lies one row of no carrier, which says in which files the tables were.
_MARK = "mark"


def mark(connection: sa.Connection, layout: Layout, run: UUID) -> None:
    """Say that from here on what is ready is complete, once the tables have been read as they are now."""
    connection.execute(sa.delete(RESEALED).where(_mark_of(run)))
    values = {"place": "(0,0)", "version": "0", "rest": 0, "value": _files(connection, layout)}
    connection.execute(sa.insert(RESEALED).values(run_id=run, carrier=_MARK, key=run, **values))


def stands(connection: sa.Connection, layout: Layout, run: UUID) -> bool:
    """Whether nothing was lost or moved since the mark."""
    found = connection.scalar(sa.select(RESEALED.c.value).where(_mark_of(run)))
    return bool(found == _files(connection, layout))


def _mark_of(run: UUID) -> sa.ColumnElement[bool]:
    return sa.and_(RESEALED.c.run_id == run, RESEALED.c.carrier == _MARK)


def _files(connection: sa.Connection, layout: Layout) -> dict[str, int]:
    quote = connection.dialect.identifier_preparer.format_table
    query = sa.text("SELECT pg_relation_filenode(CAST(:name AS regclass))::bigint")
    return {one.name: connection.execute(query, {"name": quote(one.table)}).scalar_one() for one in layout.carriers}
