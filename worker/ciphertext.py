"""Ciphertext of the master key as it lies in the database: read in streams, made ready beside, swapped by statements.

A row's place and version (ctid, xmin) name exactly one state of it: what was made ready for that state is swapped in
only while it lasts. Whoever changes a row makes it another, which is looked at again.
"""

from __future__ import annotations

import tempfile
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import IO, TYPE_CHECKING, Any
from uuid import UUID

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql

from worker import db
from worker.db import Tid
from worker.job import Amount, Tally
from worker.ledger import SCHEMA

if TYPE_CHECKING:
    from worker.layouts.model import Carrier, Layout
    from worker.reseal import Resealer

_SPOOL = 16 << 20
_WINDOW_BYTES = 12 << 20
_STEP = 16
# Of these kinds of types some have no hash (json, xml, tsvector, point), so they are hashed as text.
_MAYBE_HASHLESS = frozenset("UGA")
_HASHED = frozenset({"uuid", "jsonb", "bytea", "_text", "_uuid"})


class _Xid(sa.types.UserDefinedType[str]):
    cache_ok = True

    def get_col_spec(self, **_: Any) -> str:
        return "xid"


class Xid8(sa.types.UserDefinedType[str]):
    """A transaction's number that never wraps around."""

    cache_ok = True

    def get_col_spec(self, **_: Any) -> str:
        return "xid8"


RESEALED = sa.Table(
    "resealed",
    sa.MetaData(schema=SCHEMA),
    sa.Column("run_id", sa.Uuid),
    sa.Column("carrier", sa.Text),
    sa.Column("key", sa.Uuid),
    sa.Column("place", Tid()),
    sa.Column("version", _Xid()),
    sa.Column("rest", sa.BigInteger),
    sa.Column("value", postgresql.JSONB),
)
_COPY_IN = f"COPY {SCHEMA}.resealed FROM STDIN WITH (FORMAT csv, DELIMITER E'\\x02', QUOTE E'\\x01')".encode()
_PLACE: sa.ColumnClause[Any] = sa.column("ctid", Tid())
_VERSION: sa.ColumnClause[Any] = sa.column("xmin", _Xid())


@dataclass(frozen=True, kw_only=True)
class Taken:
    """What a look found: rows made ready, and the keys of rows all under the new key."""

    ready: int
    done: tuple[str, ...]


class Ciphertext:
    """One carrier's rows in one transaction."""

    def __init__(self, connection: sa.Connection, carrier: Carrier, scheme: str) -> None:
        self._connection = connection
        self._carrier = carrier
        self._scheme = scheme

    # -- which rows ---------------------------------------------------------------------------------

    @staticmethod
    def within(first: int, end: int | None) -> sa.ColumnElement[bool]:
        """The rows in these blocks of the table."""
        start = tid(first) <= _PLACE
        return start if end is None else sa.and_(start, tid(end) > _PLACE)

    @staticmethod
    def since(horizon: str, *, but: str | None = None) -> sa.ColumnElement[bool]:
        """The row states written by transactions that were not over at the horizon, without those by one of them.

        Compared by age: the numbers in a row wrap around, their distance from now does not within a run.
        """
        age = sa.func.age(_xid(horizon))
        term = sa.func.age(_VERSION) <= age
        return sa.and_(term, _xid(but) != _VERSION) if but else term

    # -- looking ------------------------------------------------------------------------------------

    def window(self, first: int, end: int | None, *, rest: bool = False, company: bool = False) -> list[list[bytes]]:
        """The same as `rows`, of these blocks; read in one piece, which costs half of a stream."""
        cells = self._cells(rest=rest, company=company)
        parts: list[sa.ColumnElement[Any]] = []
        for cell in cells:
            parts += [sa.literal_column("E'\\x02'"), sa.cast(cell, sa.Text)]
        # `concat` takes NULL for nothing; no cell has a line break, for JSON escapes its own.
        line = sa.func.concat(*parts[1:])
        where = self._holding(self.within(first, end))
        query = sa.select(sa.func.string_agg(line, sa.literal_column("E'\\n'"))).select_from(self._carrier.table)
        found = self._connection.execute(query.where(where)).scalar_one()
        return [one.split(b"\x02") for one in found.encode().split(b"\n")] if found else []

    def every(self, *, company: bool = False) -> Iterator[list[bytes]]:
        """All rows that may hold ciphertext, window by window."""
        # One window ahead: the server reads it while the one before is opened. Nobody else uses the connection then.
        with ThreadPoolExecutor(1) as ahead:
            waiting = deque[Future[list[list[bytes]]]]()
            for first, end in windows(self._connection, self._carrier):
                waiting.append(ahead.submit(self.window, first, end, company=company))
                if len(waiting) > 1:
                    yield from waiting.popleft().result()
            while waiting:
                yield from waiting.popleft().result()

    def rows(
        self, where: sa.ColumnElement[bool], *, rest: bool = False, most: int | None = None
    ) -> Iterator[list[bytes]]:
        """(key, place, version, rest, company, digest, text) of rows that may hold ciphertext, in a stream."""
        query = sa.select(*self._cells(rest=rest, company=False)).select_from(self._carrier.table)
        query = query.where(self._holding(where)).limit(most)
        statement, parameters = db.copy_statement(self._connection, query)
        with db.driver(self._connection).cursor() as cursor, cursor.copy(statement, parameters) as copy:
            for line in copy:
                yield bytes(line)[:-1].split(b"\x02")

    def _cells(self, *, rest: bool, company: bool) -> list[sa.ColumnElement[Any]]:
        carrier = self._carrier
        return [
            carrier.key,
            _PLACE,
            _VERSION,
            self._rest() if rest else sa.null(),
            carrier.company if company else sa.null(),
            carrier.digest if carrier.digest is not None else sa.null(),
            sa.cast(carrier.column, sa.Text),
        ]

    def _holding(self, where: sa.ColumnElement[bool]) -> sa.ColumnElement[bool]:
        """Of these rows those with ciphertext; where that is the whole value, whoever reads it sees as much."""
        column = self._carrier.column
        if self._carrier.fresh:
            return sa.and_(where, column.is_not(None))
        # After the other terms: it makes the whole value into text.
        holds = sa.cast(column, sa.Text).like(f"%{self._scheme}%")
        return sa.and_(where, sa.case((where, holds), else_=sa.false()))

    def _rest(self) -> sa.ColumnElement[Any]:
        """A digest of every other column of a row."""
        prepare = self._connection.dialect.identifier_preparer
        table, terms = prepare.format_table(self._carrier.table), []
        for name, kind, category in _columns(self._connection, self._carrier.table):
            if name != self._carrier.column.name:
                cell = f"{table}.{prepare.quote(name)}"
                terms.append(f"{cell}::text" if category in _MAYBE_HASHLESS and kind not in _HASHED else cell)
        return sa.literal_column(f"hash_record_extended(ROW({', '.join(terms)}), 0)")

    # -- making ready -------------------------------------------------------------------------------

    def take_window(self, run: UUID, first: int, end: int | None, resealer: Resealer) -> int:
        """Seal anew, beside the table, what the old key opens in these blocks; how many rows. Nobody waits for it."""
        ready, _ = self._take(run, self.window(first, end, rest=True), resealer, again=False)
        return ready

    def take(self, run: UUID, where: sa.ColumnElement[bool], resealer: Resealer) -> Taken:
        """The same for rows that may have been made ready before, in another state."""
        ready, done = self._take(run, self.rows(where, rest=True), resealer, again=True)
        return Taken(ready=ready, done=tuple(done))

    def _take(
        self, run: UUID, rows: Iterable[list[bytes]], resealer: Resealer, *, again: bool
    ) -> tuple[int, list[str]]:
        ready, done, taken = 0, list[str](), list[str]()
        prefix = f"{run}\x02{self._carrier.name}\x02".encode()
        with tempfile.SpooledTemporaryFile(max_size=_SPOOL) as spool:
            for key, place, version, rest, _, _, text in rows:
                value, one = resealer.reseal(text)
                if value is not None:
                    ready += 1
                    spool.write(b"%b%b\x02%b\x02%b\x02%b\x02%b\n" % (prefix, key, place, version, rest, value))
                if again and value is not None:
                    taken.append(key.decode())
                elif again and one.new and not one.lost:
                    done.append(key.decode())
            self._forget(run, taken)
            spool.seek(0)
            self._put(spool)
        return ready, done

    def _forget(self, run: UUID, keys: list[str]) -> None:
        """Drop what was made ready of these rows in a state they are no longer in."""
        if keys:
            of_carrier = sa.and_(RESEALED.c.run_id == run, RESEALED.c.carrier == self._carrier.name)
            which = sa.any_(sa.literal(keys, sa.ARRAY(sa.Uuid(as_uuid=False))))
            self._connection.execute(sa.delete(RESEALED).where(of_carrier, RESEALED.c.key == which))

    def _put(self, lines: IO[bytes]) -> None:
        with db.driver(self._connection).cursor() as cursor, cursor.copy(_COPY_IN) as copy:
            while chunk := lines.read(1 << 20):
                copy.write(chunk)

    # -- swapping -----------------------------------------------------------------------------------

    def swap(self, run: UUID) -> Tally:
        """Put what was made ready in its place, wherever the row is still in that state."""
        carrier = self._carrier
        done = (
            sa.update(carrier.table)
            .values({carrier.column: RESEALED.c.value})
            .where(
                RESEALED.c.run_id == run,
                RESEALED.c.carrier == carrier.name,
                _of(carrier.table, _PLACE) == RESEALED.c.place,
                _of(carrier.table, _VERSION) == RESEALED.c.version,
            )
            .returning(
                sa.cast(carrier.company, sa.Text).label("company"),
                sa.func.pg_column_size(carrier.column).label("size"),
            )
            .cte("done")
        )
        query = sa.select(done.c.company, sa.func.count(), sa.func.sum(done.c.size)).group_by(done.c.company)
        name = carrier.table.name
        return Tally({(name, row[0]): Amount(row[1], int(row[2])) for row in self._connection.execute(query)})

    def clear(self, run: UUID) -> None:
        """Forget what a run made ready."""
        self._connection.execute(sa.delete(RESEALED).where(RESEALED.c.run_id == run))

    def altered(self, run: UUID, by: str) -> int:
        """Rows swapped by a transaction and untouched since whose other columns are not what they were."""
        carrier = self._carrier
        query = (
            sa.select(sa.func.count())
            .select_from(carrier.table)
            .join(RESEALED, RESEALED.c.key == carrier.key)
            .where(
                RESEALED.c.run_id == run,
                RESEALED.c.carrier == carrier.name,
                _of(carrier.table, _VERSION) == _xid(by),
                RESEALED.c.rest != self._rest(),
            )
        )
        return self._connection.execute(query).scalar_one()


def carried(connection: sa.Connection, layout: Layout) -> Iterator[tuple[Carrier, Ciphertext]]:
    """Every carrier of a layout, with its rows."""
    for carrier in layout.carriers:
        yield carrier, Ciphertext(connection, carrier, layout.scheme)


def tid(block: int) -> sa.ColumnElement[Any]:
    """The place before the first row of a block."""
    return sa.cast(sa.literal(f"({block},0)"), Tid())


def _xid(number: str) -> sa.ColumnElement[Any]:
    return sa.cast(sa.cast(sa.literal(number), Xid8()), _Xid())


def _of(table: sa.Table, column: sa.ColumnClause[Any]) -> sa.ColumnElement[Any]:
    """A system column of this table, where another has one of that name too."""
    found: sa.ColumnElement[Any] = sa.column(column.name, column.type, _selectable=table)
    return found


_COLUMNS = sa.text(
    """
    SELECT attname, typname, typcategory::text
    FROM pg_catalog.pg_attribute JOIN pg_catalog.pg_type ON pg_type.oid = atttypid
    WHERE attrelid = CAST(:name AS regclass) AND attnum > 0 AND NOT attisdropped ORDER BY attnum
    """
)


def _columns(connection: sa.Connection, table: sa.Table) -> list[tuple[str, str, str]]:
    quoted = connection.dialect.identifier_preparer.format_table(table)
    return [(row[0], row[1], row[2]) for row in connection.execute(_COLUMNS, {"name": quoted})]


def windows(connection: sa.Connection, carrier: Carrier) -> list[tuple[int, int | None]]:
    """Ranges of the table's blocks whose ciphertext fits in memory; the last has no end."""
    quoted = connection.dialect.identifier_preparer.format_table(carrier.table)
    column = connection.dialect.identifier_preparer.quote(carrier.column.name)
    # TOASTed values count with what they take outside the table, so the blocks' own number says too little.
    query = sa.text(
        f"""
        SELECT place, sum(pg_column_size({column}) * 2 + 64)
        FROM (SELECT (ctid::text::point)[0]::bigint / {_STEP} * {_STEP} AS place, {column} FROM {quoted}
              WHERE {column} IS NOT NULL) held
        GROUP BY place ORDER BY place
        """
    )
    found, start, size = list[tuple[int, int | None]](), 0, 0
    for place, held in connection.execute(query):
        if size and size + held > _WINDOW_BYTES:
            found.append((start, int(place)))
            start, size = int(place), 0
        size += int(held)
    return [*found, (start, None)]
