"""A batch's rows on their way out: put together as lines by the server, and known again by where they lie."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import TYPE_CHECKING

import sqlalchemy as sa

from worker import copyout, lines, livetable
from worker.blocks import CTID
from worker.job import Batch
from worker.pgtypes import Tid, Tids

if TYPE_CHECKING:
    from worker.copyout import Query
    from worker.livetable import Column
    from worker.plans import Amount
    from worker.rowset import RowSet

# So many lines are put together, but for those of more bytes than this.
_TOGETHER = 256
_LARGE = 4_000


def query(
    rows: RowSet, columns: tuple[Column, ...], dialect: sa.Dialect, batch: Batch, *, unread: bool = False
) -> Query:
    """A batch's rows as lines, many at once: company, rows, bytes, first and last age, addresses, lines.

    Every column of a row, known to us or not. The server puts the lines together: one by one they cost both
    sides more than the JSON in them. `unread`: no row is looked into, and so some of these may have what a keep
    looks for.
    """
    return copyout.filled(_of_any(rows, columns, dialect, unread=unread), rows.window(batch), dialect)


@lru_cache(maxsize=8)
def _of_any(rows: RowSet, columns: tuple[Column, ...], dialect: sa.Dialect, *, unread: bool) -> Query:
    """The query of any batch: its bites differ in nothing but the window."""
    line = lines.archived(rows.what.name, livetable.of_json(columns)).as_string()
    company = sa.null() if rows.what.company is None else rows.what.company
    found = (
        sa.select(
            company.label("company"),
            rows.what.age.label("age"),
            CTID.label("address"),
            rows.size.label("size"),
            sa.literal_column(line, sa.Text).label("line"),
            sa.func.row_number().over().label("number"),
        )
        .where(copyout.HOLE, rows.unread if unread else rows.eligible)
        .subquery("found")
    )
    row = found.c
    # A large line stands alone, or those together would have no bound. By its own length: of what a row has in itself
    # the table may hold a hundredth, compressed.
    part = sa.case((sa.func.octet_length(row.line) > _LARGE, -row.number), else_=row.number // _TOGETHER)
    together = sa.select(
        sa.cast(row.company, sa.Text),
        sa.func.count(),
        sa.func.sum(row.size),
        sa.cast(sa.func.min(row.age), sa.Text),
        sa.cast(sa.func.max(row.age), sa.Text),
        sa.func.array_agg(row.address),
        sa.func.string_agg(row.line, "\n"),
    )
    return copyout.compiled(together.group_by(row.company, part), dialect)


def readable(rows: RowSet, columns: tuple[Column, ...]) -> bool:
    """Whether some keep looks into the rows' texts, and a look into their lines finds no less."""
    return bool(rows.needles) and livetable.readable(columns, (one.name for one in rows.what.texts))


def at(batch: Batch, addresses: Tids, amounts: Mapping[str | None, Amount]) -> Batch:
    """The batch as exactly the rows at these addresses, and how much that is; good in the same snapshot."""
    window = _placed(addresses)
    return Batch(after=batch.after, window=window, exhausted=batch.exhausted, exact=True, amounts=amounts)


def among(batch: Batch, addresses: Tids) -> Batch:
    """The rows of a batch that are at these addresses; which of them go is yet to be asked."""
    return Batch(after=batch.after, window=_placed(addresses), exhausted=batch.exhausted)


def _placed(addresses: Tids) -> sa.ColumnElement[bool]:
    """The rows at these addresses."""
    given = sa.bindparam("addresses", addresses, sa.types.NULLTYPE, unique=True)
    return sa.any_(sa.cast(given, sa.ARRAY(Tid()))) == CTID
