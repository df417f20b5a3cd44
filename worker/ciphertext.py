"""Ciphertext of the master key as it lies in the database: located, and read in streams."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, NamedTuple

import sqlalchemy as sa

from worker import blocks, copyout, db
from worker.blocks import CTID
from worker.pgtypes import Xid, Xid8, quoted
from worker.plans import Target

if TYPE_CHECKING:
    from worker.layouts.model import Carrier, Layout

_WINDOW_BYTES = 12 << 20
_WINDOW_BLOCKS = 1_024
_PART_BYTES = 4 << 20
_STEP = 4
# Of these kinds of types some have no hash (json, xml, tsvector, point, bit, what is made of them), and one of
# another kind has none; so they are hashed as text.
_MAYBE_HASHLESS = frozenset("UGAVCR")
_HASHED = frozenset({"uuid", "jsonb", "bytea", "_text", "_uuid"})
_HASHLESS = frozenset({"money"})


VERSION: sa.ColumnClause[Any] = sa.column("xmin", Xid())


class Part(NamedTuple):
    """Rows that may hold ciphertext, a column each; `rests` and `companies` are empty texts where nobody asked."""

    keys: list[bytes]
    places: list[bytes]
    versions: list[bytes]
    rests: list[bytes]
    companies: list[bytes]
    digests: list[bytes]
    texts: list[bytes]


class Ciphertext:
    """One carrier's rows in one transaction."""

    def __init__(self, connection: sa.Connection, carrier: Carrier, scheme: str) -> None:
        self.connection = connection
        self.carrier = carrier
        self._scheme = scheme

    def window(self, first: int, end: int | None, *, rest: bool = False, company: bool = False) -> Part:
        """The same rows of these blocks; read in one piece, which costs half of a stream."""
        query = self._query(blocks.within(first, end), rest=rest, company=company)
        # No cell has a line break, for JSON escapes its own. A column at a time, for millions of small lists would
        # keep the garbage collector busy.
        breaks: sa.ColumnElement[str] = sa.literal_column("E'\\n'")
        cells = [sa.func.string_agg(sa.func.coalesce(sa.cast(one, sa.Text), ""), breaks) for one in query.c]
        columns = self.connection.execute(sa.select(*cells).select_from(query)).one()
        return Part(*([] if one is None else one.encode().split(b"\n") for one in columns))

    def every(self) -> Iterator[Part]:
        """All rows that may hold ciphertext, with their companies, window by window."""
        # One window ahead: the server reads it while the one before is opened. Nobody else uses the connection then.
        with ThreadPoolExecutor(1) as ahead:
            waiting = deque[Future[Part]]()
            for first, end in windows(self.connection, self.carrier):
                waiting.append(ahead.submit(self.window, first, end, company=True))
                if len(waiting) > 1:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()

    def rows(
        self, where: sa.ColumnElement[bool], *, rest: bool = False, company: bool = False, most: int | None = None
    ) -> Iterator[Part]:
        """The rows that may hold ciphertext, some at a time, in a stream."""
        query = sa.select(self._query(where, rest=rest, company=company)).limit(most)
        statement, parameters = copyout.statement(copyout.compiled(query, self.connection.dialect))
        lines, size = list[list[bytes]](), 0
        with db.driver(self.connection).cursor() as cursor, cursor.copy(statement, parameters) as copy:
            for line in copy:
                lines.append(bytes(line)[:-1].split(b"\x02"))
                size += len(line)
                if size >= _PART_BYTES:
                    yield Part(*map(list, zip(*lines, strict=True)))
                    lines, size = [], 0
        if lines:
            yield Part(*map(list, zip(*lines, strict=True)))

    def held(self) -> list[Target]:
        """The rows that may hold ciphertext, by company."""
        carrier = self.carrier
        each = sa.select(carrier.owner.label("owner"), sa.func.pg_column_size(carrier.column).label("size"))
        # Where a value of another scheme may be instead, it is the whole value.
        ours = carrier.column["scheme"].astext == self._scheme if carrier.fresh else sa.true()
        held = each.where(self._holding(sa.true()), ours).subquery("held")
        source, company = carrier.whose(held, held.c.owner)
        sums = sa.select(company, sa.func.count(), sa.func.sum(held.c.size)).select_from(source).group_by(company)
        found = (
            # No digest: nobody compares these rows with others.
            Target(table=carrier.table.name, company=whose and str(whose), rows=rows, bytes=int(size), digest="")
            for whose, rows, size in self.connection.execute(sums)
        )
        return sorted(found, key=lambda one: one.company or "")

    def _query(self, where: sa.ColumnElement[bool], *, rest: bool, company: bool) -> sa.Subquery:
        carrier = self.carrier
        held = (
            sa.select(
                carrier.key.label("key"),
                CTID.label("place"),
                VERSION.label("version"),
                (self.rest() if rest else sa.null()).label("rest"),
                carrier.owner.label("owner"),
                _hex(carrier.digest).label("digest"),
                sa.cast(carrier.column, sa.Text).label("text"),
            )
            .where(self._holding(where))
            .subquery("held")
        )
        source, whose = carrier.whose(held, held.c.owner) if company else (held, sa.null())
        cells = (held.c.key, held.c.place, held.c.version, held.c.rest, whose, held.c.digest, held.c.text)
        labelled = [cell.label(name) for cell, name in zip(cells, Part._fields, strict=True)]
        return sa.select(*labelled).select_from(source).subquery("part")

    def _holding(self, where: sa.ColumnElement[bool]) -> sa.ColumnElement[bool]:
        """Of these rows those with ciphertext; where that is the whole value, whoever reads it sees as much."""
        column = self.carrier.column
        if self.carrier.fresh:
            return sa.and_(where, column.is_not(None))
        # After the other terms: it makes the whole value into text.
        holds = sa.cast(column, sa.Text).like(f"%{self._scheme}%")
        return sa.and_(where, sa.case((where, holds), else_=sa.false()))

    def rest(self, columns: list[list[str]] | None = None) -> sa.ColumnElement[Any]:
        """A digest of every other column of a row, or of every other of these."""
        table, terms = self.connection.dialect.identifier_preparer.format_table(self.carrier.table), []
        for name, kind, category in columns or self.columns():
            if name != self.carrier.column.name:
                cell = f"{table}.{quoted(name)}"
                hashless = kind in _HASHLESS or (category in _MAYBE_HASHLESS and kind not in _HASHED)
                terms.append(f"{cell}::text" if hashless else cell)
        return sa.literal_column(f"hash_record_extended(ROW({', '.join(terms)}), 0)")

    def columns(self) -> list[list[str]]:
        """Name, type and category of every column there is now that is not computed."""
        quoted = self.connection.dialect.identifier_preparer.format_table(self.carrier.table)
        return [list(row) for row in self.connection.execute(_COLUMNS, {"name": quoted})]


def carried(connection: sa.Connection, layout: Layout) -> Iterator[tuple[Carrier, Ciphertext]]:
    """Every carrier of a layout, with its rows."""
    for carrier in layout.carriers:
        yield carrier, Ciphertext(connection, carrier, layout.scheme)


def since(horizon: str, *, but: str | None = None) -> sa.ColumnElement[bool]:
    """The row states written by transactions that were not over at the horizon, without those by one of them.

    Compared by age: the numbers in a row wrap around, their distance from now does not within a run.
    """
    age = sa.func.age(xid(horizon))
    term = sa.func.age(VERSION) <= age
    return sa.and_(term, xid(but) != VERSION) if but else term


def xid(number: str) -> sa.ColumnElement[Any]:
    return sa.cast(sa.cast(sa.literal(number), Xid8()), Xid())


def _hex(digest: sa.ColumnElement[Any] | None) -> sa.ColumnElement[Any]:
    """A SHA-256 in hex as it is; of anything else, which may have a line break in it, only that it is none."""
    if digest is None:
        return sa.null()
    is_one = sa.or_(
        sa.func.coalesce(digest, "") == "", sa.and_(sa.func.length(digest) == 64, digest.op("!~")("[^0-9a-fA-F]"))
    )
    return sa.case((is_one, digest), else_="none")


_COLUMNS = sa.text(
    """
    SELECT attname, typname, typcategory::text
    FROM pg_catalog.pg_attribute JOIN pg_catalog.pg_type ON pg_type.oid = atttypid
    WHERE attrelid = CAST(:name AS regclass) AND attnum > 0 AND NOT attisdropped AND attgenerated = '' ORDER BY attnum
    """
)


def windows(
    connection: sa.Connection, carrier: Carrier, *, begin: int = 0, end: int | None = None
) -> list[tuple[int, int | None]]:
    """Ranges whose ciphertext fits in memory, of these blocks; without an end the last range has none either."""
    last = blocks.number(connection, carrier.table) if end is None else end
    if not blocks.toasted(connection, carrier.table):
        starts = range(begin, max(last, begin + 1), _WINDOW_BLOCKS)
        return [*((one, one + _WINDOW_BLOCKS) for one in starts[:-1]), (starts[-1], end)]
    # What TOASTed values take outside the table counts as well.
    first = blocks.first_of(_STEP, begin, last).label("first")
    size = sa.func.sum(sa.func.pg_column_size(carrier.column) * 2 + 64)
    query = sa.select(first, size).where(carrier.column.is_not(None), blocks.within(begin, end)).group_by(first)
    found, start, taken = list[tuple[int, int | None]](), begin, 0
    for place, held in connection.execute(query.order_by(first)):
        if taken and taken + held > _WINDOW_BYTES:
            found.append((start, int(place)))
            start, taken = int(place), 0
        taken += int(held)
    return [*found, (start, end)]
