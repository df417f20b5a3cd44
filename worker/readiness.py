"""Whether what was made ready for a rotation is still all there, and still about the tables as they are.

The table it is in is unlogged: a crash of PostgreSQL, or a standby that takes over, empties it. A rewrite of a
carrier's table (VACUUM FULL, CLUSTER, pg_repack) moves every row and makes none newer. Either would leave ciphertext
unswapped at the cut-over, and no later look at newer rows would find it. And digests of a row's other columns are
worth nothing where the columns have become others.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any
from uuid import UUID

import sqlalchemy as sa

from worker.aside import RESEALED
from worker.ciphertext import carried

if TYPE_CHECKING:
    from worker.layouts.model import Layout

# Beside what is ready lies one row of no carrier, which says in which files the tables were, and of which columns.
MARK = "marked"


def mark(connection: sa.Connection, layout: Layout, run: UUID) -> None:
    """Say that from here on what is ready is complete, once the tables have been read as they are now."""
    _write(connection, run, {"files": files(connection, layout), "columns": _columns(connection, layout)})


def mark_again(connection: sa.Connection, layout: Layout, run: UUID) -> None:
    """The same after the cut-over: what was swapped then had the columns of then."""
    columns = (_marked(connection, run) or {}).get("columns", _columns(connection, layout))
    _write(connection, run, {"files": files(connection, layout), "columns": columns})


def stands(connection: sa.Connection, layout: Layout, run: UUID) -> bool:
    """Whether nothing was lost or moved since the mark."""
    return bool((_marked(connection, run) or {}).get("files") == files(connection, layout))


def fits(connection: sa.Connection, layout: Layout, run: UUID) -> bool:
    """Whether the tables have the columns they had at the mark."""
    return bool((_marked(connection, run) or {}).get("columns") == _columns(connection, layout))


def kept(connection: sa.Connection, run: UUID) -> bool:
    """Whether what was written down since the run began was not emptied by a crash."""
    return _marked(connection, run) is not None


def columns(connection: sa.Connection, run: UUID) -> dict[str, list[list[str]]]:
    """The columns of each carrier's table at the mark; none where nobody can say."""
    found: dict[str, list[list[str]]] = (_marked(connection, run) or {}).get("columns", {})
    return found


def _write(connection: sa.Connection, run: UUID, value: dict[str, Any]) -> None:
    connection.execute(sa.delete(RESEALED).where(_mark_of(run)))
    values = {"place": "(0,0)", "version": "0", "rest": 0, "value": value}
    connection.execute(sa.insert(RESEALED).values(run_id=run, carrier=MARK, key=run, **values))


def _marked(connection: sa.Connection, run: UUID) -> dict[str, Any] | None:
    # What a release before 0.6 wrote has no columns in it: nor did that note what was so before.
    value = RESEALED.c.value
    return connection.scalar(sa.select(value).where(_mark_of(run), value.has_key("columns")))


def _mark_of(run: UUID) -> sa.ColumnElement[bool]:
    return sa.and_(RESEALED.c.run_id == run, RESEALED.c.carrier == MARK)


def files(connection: sa.Connection, layout: Layout) -> dict[str, int]:
    """The files that the carriers' tables are in: others, once a table was rewritten and its rows moved."""
    quote = connection.dialect.identifier_preparer.format_table
    query = sa.text("SELECT pg_relation_filenode(CAST(:name AS regclass))::bigint")
    return {one.name: connection.execute(query, {"name": quote(one.table)}).scalar_one() for one in layout.carriers}


def _columns(connection: sa.Connection, layout: Layout) -> dict[str, list[list[str]]]:
    return {one.name: ciphertext.columns() for one, ciphertext in carried(connection, layout)}
