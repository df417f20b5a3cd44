"""Whether what was made ready is still what the tables hold, as far as its rows themselves cannot tell.

The table of it is unlogged, and a row's place means nothing once its table was written anew: after a crash of the
server it is empty, and after VACUUM FULL nothing in it would be swapped, with the key exchanged all the same.
"""

from __future__ import annotations

from typing import TYPE_CHECKING
from uuid import UUID

import sqlalchemy as sa

from worker.ciphertext import RESEALED, tid

if TYPE_CHECKING:
    from worker.layouts.model import Layout

# The name of a carrier that is none.
_MARK = ""
_OF_MARK = RESEALED.c.carrier == _MARK


def mark(connection: sa.Connection, layout: Layout, run: UUID) -> None:
    """Note that what is made ready from here on is of the tables as they are now."""
    connection.execute(sa.delete(RESEALED).where(RESEALED.c.run_id == run, _OF_MARK))
    values = {"run_id": run, "carrier": _MARK, "key": run, "place": tid(0), "version": "0", "rest": 0}
    connection.execute(sa.insert(RESEALED).values(**values, value=_files(connection, layout)))


def stands(connection: sa.Connection, layout: Layout, run: UUID) -> bool:
    """Whether all that was made ready since `mark` is there, and of the same tables."""
    found = connection.scalar(sa.select(RESEALED.c.value).where(RESEALED.c.run_id == run, _OF_MARK))
    return found == _files(connection, layout)


def _files(connection: sa.Connection, layout: Layout) -> dict[str, int]:
    """The file of each carrier's table: another one after its rows were written anew."""
    quote = connection.dialect.identifier_preparer.format_table
    names = {one.name: quote(one.table) for one in layout.carriers}
    query = sa.select(*(sa.func.pg_relation_filenode(name).label(one) for one, name in names.items()))
    return dict(connection.execute(query).one()._asdict())
