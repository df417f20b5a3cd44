"""A table as the live database has it now, and what of it, beyond the catalogue, makes a job unsafe.

A release to come, a plugin or the deployment's own hands may add columns, keys and types. What would be lost in
silence is refused by name; a prune that is refused has lost nothing.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import sqlalchemy as sa
from sqlalchemy.sql import visitors

from worker import db
from worker.errors import Contended, Refused, SchemaError
from worker.layouts import catalogue
from worker.pgtypes import of

if TYPE_CHECKING:
    from worker.layouts.model import Layout, LogTable, Records

# Foreign keys into a table: schema, table, columns, and whether a delete changes rows there; else they forbid it.
_REFERENCES = """
SELECT n.nspname::text, c.relname::text, array_agg(a.attname::text ORDER BY a.attnum),
  f.confdeltype IN ('c', 'n', 'd')
FROM to_regclass(format('public.%%I', %s::text)) AS given (log)
-- By their triggers, for there is an index on the tables of these, and each bite asks.
JOIN pg_catalog.pg_constraint f ON f.confrelid = given.log AND f.contype = 'f'
  AND f.oid = ANY (ARRAY(SELECT t.tgconstraint FROM pg_catalog.pg_trigger t WHERE t.tgrelid = given.log))
JOIN pg_catalog.pg_class c ON c.oid = f.conrelid
JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
JOIN pg_catalog.pg_attribute a ON a.attrelid = f.conrelid AND a.attnum = ANY (f.conkey)
GROUP BY f.oid, n.nspname, c.relname ORDER BY 1, 2, 3
"""

# Whether a table's rows are not all its own, as `p`artitions or those of tables that inherit from it.
_SHARED = """
SELECT c.relkind = 'p' OR EXISTS (SELECT FROM pg_catalog.pg_inherits i WHERE i.inhparent = c.oid)
FROM pg_catalog.pg_class c WHERE c.oid = to_regclass(format('public.%%I', %s::text))
"""

# The type `whole` of a query around it, and whatever a domain, an array or a composite type is made of.
PARTS = """
WITH RECURSIVE parts (type) AS (
  SELECT {whole}
  UNION
  SELECT part.type FROM parts JOIN pg_catalog.pg_type made ON made.oid = parts.type CROSS JOIN LATERAL (
    SELECT made.typbasetype WHERE made.typtype = 'd'
    UNION ALL SELECT made.typelem WHERE made.typelem <> 0 AND made.typcategory = 'A'
    UNION ALL SELECT field.atttypid FROM pg_catalog.pg_attribute field
      WHERE made.typtype = 'c' AND field.attrelid = made.typrelid AND field.attnum > 0 AND NOT field.attisdropped
  ) AS part (type))
SELECT FROM parts JOIN pg_catalog.pg_type type ON type.oid = parts.type
"""

_COLUMNS = """
SELECT a.attname::text, format_type(a.atttypid, NULL), a.attnotnull AND NOT a.atthasdef AND a.attidentity = '',
  a.attgenerated <> ''
FROM pg_catalog.pg_attribute a
WHERE a.attrelid = to_regclass(format('public.%%I', %s::text)) AND a.attnum > 0 AND NOT a.attisdropped
ORDER BY a.attnum
"""

# Columns whose values JSON does not give back: of composite types, with JSON in arrays and domains, and of types with
# a cast to JSON of their own, by which row_to_json goes. Not part of _COLUMNS, which each bite asks: it takes longer.
_LOSSY = f"""
SELECT a.attname::text FROM pg_catalog.pg_attribute a
WHERE a.attrelid = to_regclass(format('public.%%I', %s::text)) AND a.attnum > 0 AND NOT a.attisdropped
  AND EXISTS ({PARTS.format(whole="a.atttypid")} WHERE type.typtype = 'c'
    OR (type.oid <> a.atttypid AND type.oid IN ('json'::regtype, 'jsonb'::regtype))
    OR (type.oid >= 16384 AND EXISTS (
          SELECT FROM pg_catalog.pg_cast c WHERE c.castsource = type.oid AND c.casttarget = 'json'::regtype)))
ORDER BY a.attnum
"""

# Of some tables those that have other files now than this transaction sees, or are others of the name. A catalogue is
# read as of the transaction's snapshot like any table, and by a function as it is now.
_REWRITTEN = """
SELECT name FROM unnest(%s::text[]) AS given (name), to_regclass(format('public.%%I', name)) AS now (relation)
LEFT JOIN pg_catalog.pg_class seen ON seen.oid = relation
WHERE nullif(seen.relfilenode, 0) IS DISTINCT FROM pg_relation_filenode(relation) ORDER BY name
"""


@dataclass(frozen=True)
class Column:
    """A column as it is now: its type, whether a new row must name it, whether the server computes its value."""

    name: str
    kind: str
    required: bool
    generated: bool


def columns(connection: sa.Connection, table: str) -> tuple[Column, ...]:
    """The columns of a table in their order; none where it is not there."""
    return tuple(Column(*row) for row in _ask(connection, _COLUMNS, table))


def of_json(found: Iterable[Column]) -> dict[str, str]:
    """Those of some columns that hold JSON, and the type of each (`json`, `jsonb`)."""
    return {one.name: one.kind for one in found if one.kind in {"json", "jsonb"}}


def readable(found: Iterable[Column], names: Iterable[str]) -> bool:
    """Whether a row's line has in it whatever those columns of these names have when they are made into text."""
    plain = {"text", "character varying", "json", "jsonb"}
    return set(names) <= {one.name for one in found if one.kind in plain}


def require_prunable(connection: sa.Connection, log: LogTable, *, archive: bool) -> None:
    """Refused or SchemaError, naming what, when to delete rows of a log would lose more than these rows.

    `archive`: or when an archive of them would not give back what they are.
    """
    # An archive of rows whose key is another could be written, and never be put back.
    require_kinds(connection, log, key=archive)
    require_whole(connection, log.name)
    require_known_references(connection, log)
    if archive:
        if lossy := [name for (name,) in _ask(connection, _LOSSY, log.name)]:
            raise Refused(f"{log.name}: an archive would not give back the values of {', '.join(lossy)} as they are")
        if connection.scalar(sa.select(sa.func.current_setting("server_encoding"))) == "SQL_ASCII":
            raise Refused("the database has no encoding (SQL_ASCII): an archive of its text could not be read")


def require_kinds(connection: sa.Connection, records: Records, *, key: bool) -> None:
    """SchemaError where a table's age has no timezone, or, if its `key` counts, that or the company another type."""
    kinds = {one.name: one.kind for one in columns(connection, records.name)}
    ages = (one.name for one in visitors.iterate(records.age) if isinstance(one, sa.Column))
    wanted = dict.fromkeys(ages, "timestamp with time zone")
    for one in (records.key, records.company) if key else ():
        if one is not None:
            wanted[one.name] = one.type.compile(dialect=connection.dialect).lower()
    for name, kind in wanted.items():
        if kinds.get(name) != kind:
            raise SchemaError(
                f"{records.name}.{name} is {kinds.get(name)}, not {kind}; see `paperclip-worker db check`"
            )


def require_known_references(connection: sa.Connection, log: LogTable) -> None:
    """Refused, naming them, when rows elsewhere that the catalogue does not know hang on rows of a log."""
    known = {(one.table.schema, one.table.name, (one.name,)) for one in log.cited_by}
    for schema, name, names, changed in _ask(connection, _REFERENCES, log.name):
        if (schema, name, tuple(names)) not in known:
            table = name if schema == "public" else f"{schema}.{name}"
            harm = "would be changed or deleted with its rows" if changed else "forbid that its rows are deleted"
            raise Refused(
                f"rows of {table} refer to {log.name} by {', '.join(names)} and {harm}; this release does not know "
                "them, so drop that foreign key first"
            )


def require_whole(connection: sa.Connection, table: str) -> None:
    """Refused when a table's rows lie in others: a place in one of them says nothing about a place in the next."""
    if any(shared for (shared,) in _ask(connection, _SHARED, table)):
        raise Refused(f"{table} is partitioned, or other tables inherit from it: this release cannot work on it")


def unknown(found: Iterable[Column], layout: Layout, records: Records) -> tuple[sa.ColumnClause[Any], ...]:
    """Those of a table's columns that the catalogue does not know, bound to the table."""
    known = catalogue.load(layout.name).tables[records.name].columns
    return tuple(_unknown(records.table, one.name) for one in found if one.name not in known)


@lru_cache(maxsize=256)
def _unknown(table: sa.Table, name: str) -> sa.ColumnClause[Any]:
    # The same object each time, or no statement with it is known again.
    return of(table, sa.column(name, sa.Text()))


def require_as_seen(connection: sa.Connection, tables: Iterable[str]) -> None:
    """Raise Contended when a table was rewritten after this transaction's snapshot, in which it then has no row.

    To be asked after whatever reads the tables: from then on they stay as they are until the transaction ends.
    """
    with db.translated():
        found = db.driver(connection).execute(_REWRITTEN.encode(), (sorted(tables),)).fetchall()
    if found:
        raise Contended(f"{', '.join(name for (name,) in found)}: the app has just rewritten the table")


def _ask(connection: sa.Connection, query: str, table: str) -> list[tuple[Any, ...]]:
    with db.translated():
        return db.driver(connection).execute(query.encode(), (table,)).fetchall()
