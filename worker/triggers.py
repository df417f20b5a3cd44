"""The host's own triggers that fire on what a job does to a table. The release has but one, on `UPDATE OF status`."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from worker import db

if TYPE_CHECKING:
    import sqlalchemy as sa

# Of an update only those that name none, or one of the columns that it sets.
_FIRING = """
SELECT t.tgname::text FROM pg_catalog.pg_trigger t
WHERE t.tgrelid = to_regclass(format('public.%%I', %s::text)) AND NOT t.tgisinternal AND t.tgenabled <> 'D'
  AND {kind} AND (cardinality(t.tgattr::int2[]) = 0 OR EXISTS (
    SELECT FROM pg_catalog.pg_attribute a
    WHERE a.attrelid = t.tgrelid AND a.attnum = ANY (t.tgattr::int2[]) AND a.attname = ANY (%s)))
ORDER BY t.tgname
"""
# Bits of tgtype: 2 before, 4 insert, 16 update.
_AFTER_INSERT = _FIRING.format(kind="t.tgtype & 6 = 4")
_ON_UPDATE = _FIRING.format(kind="t.tgtype & 16 = 16")


def after_insert(connection: sa.Connection, table: str) -> list[str]:
    """The triggers that fire once rows are inserted."""
    return _names(connection, _AFTER_INSERT, table, ())


def on_update(connection: sa.Connection, table: str, columns: Iterable[str]) -> list[str]:
    """The triggers that fire when these columns of a row are set."""
    return _names(connection, _ON_UPDATE, table, columns)


def _names(connection: sa.Connection, query: str, table: str, columns: Iterable[str]) -> list[str]:
    with db.translated():
        return [name for (name,) in db.driver(connection).execute(query.encode(), (table, list(columns)))]
