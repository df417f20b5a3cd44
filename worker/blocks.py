"""Rows by where they lie: places (ctid) and ranges of a table's blocks."""

from __future__ import annotations

from typing import Any

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql

from worker.pgtypes import Tid

CTID: sa.ColumnClause[Any] = sa.column("ctid", Tid())


def tid(block: int | sa.ColumnElement[int]) -> sa.ColumnElement[Any]:
    """The place before the first row of a block."""
    return sa.cast(sa.func.format("(%s,0)", block), Tid())


def within(first: int, end: int | None) -> sa.ColumnElement[bool]:
    """The rows in these blocks of the table; without an end, those added meanwhile as well."""
    start = tid(first) <= CTID
    return start if end is None else sa.and_(start, tid(end) > CTID)


def number(connection: sa.Connection, table: sa.Table) -> int:
    """How many blocks the table has now, without what is TOASTed."""
    size = sa.func.pg_relation_size(_regclass(table))
    return int(connection.execute(sa.select(size / sa.cast(_BLOCK_SIZE, sa.BigInteger))).scalar_one())


def toasted(connection: sa.Connection, table: sa.Table) -> bool:
    """Whether some values of the table are stored outside of it."""
    relation = sa.table("pg_class", sa.column("oid"), sa.column("reltoastrelid"), schema="pg_catalog")
    size = sa.func.pg_relation_size(relation.c.reltoastrelid)
    return bool(connection.execute(sa.select(size).where(relation.c.oid == _regclass(table))).scalar_one())


def estimated_rows(connection: sa.Connection, table: sa.Table) -> float:
    """How many rows the planner thinks the table has."""
    relation = sa.table("pg_class", sa.column("oid"), sa.column("reltuples"), schema="pg_catalog")
    query = sa.select(relation.c.reltuples).where(relation.c.oid == _regclass(table))
    return max(float(connection.execute(query).scalar_one()), 0.0)


def first_of(step: int, begin: int, end: int) -> sa.ColumnElement[int]:
    """For each row of the blocks from `begin` to `end` the first block of its range of `step` blocks.

    In one pass: a scan for each range leaves the planner to choose what it does again for each of them.
    """
    place = sa.func.generate_series(begin, max(end - 1, begin), step).column_valued("place")
    starts = sa.select(sa.func.array_agg(postgresql.aggregate_order_by(tid(place), place))).scalar_subquery()
    found: sa.ColumnElement[int] = (sa.func.width_bucket(CTID, starts) - 1) * step + begin
    return found


_BLOCK_SIZE = sa.func.current_setting("block_size")


def _regclass(table: sa.Table) -> sa.ColumnElement[Any]:
    quote = postgresql.dialect().identifier_preparer.format_table  # type: ignore[no-untyped-call]
    return sa.cast(sa.literal(quote(table)), postgresql.REGCLASS)
