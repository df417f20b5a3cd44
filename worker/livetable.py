"""What the live database has around a log beyond the catalogue, and what of it makes a prune unsafe.

A release to come, a plugin or the deployment's own hands may add columns, keys and types. What would be lost in
silence is refused by name; a prune that is refused has lost nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import sqlalchemy as sa

from worker import db
from worker.errors import Refused, SchemaError
from worker.layouts import catalogue

if TYPE_CHECKING:
    from worker.layouts.model import Layout, LogTable, Records

# Foreign keys into a table by which a delete changes other rows: table, columns.
_REFERENCES = """
SELECT c.relname::text, array_agg(a.attname::text ORDER BY a.attnum)
FROM pg_catalog.pg_constraint f
JOIN pg_catalog.pg_class c ON c.oid = f.conrelid
JOIN pg_catalog.pg_attribute a ON a.attrelid = f.conrelid AND a.attnum = ANY (f.conkey)
WHERE f.contype = 'f' AND f.confdeltype IN ('c', 'n', 'd')
  AND f.confrelid = to_regclass(format('public.%%I', %s::text))
GROUP BY f.oid, c.relname ORDER BY 1, 2
"""

# Whether a table's rows are not all its own, as `p`artitions or those of tables that inherit from it.
_SHARED = """
SELECT c.relkind = 'p' OR EXISTS (SELECT FROM pg_catalog.pg_inherits i WHERE i.inhparent = c.oid)
FROM pg_catalog.pg_class c WHERE c.oid = to_regclass(format('public.%%I', %s::text))
"""

# Columns whose value JSON does not give back: composite types, JSON in arrays and domains, and types with a cast to
# JSON of their own, by which row_to_json goes. Domains and arrays count as what they are made of.
_UNFAITHFUL = """
WITH RECURSIVE parts (name, type, nested) AS (
  SELECT a.attname::text, a.atttypid, false FROM pg_catalog.pg_attribute a
  WHERE a.attrelid = to_regclass(format('public.%%I', %s::text)) AND a.attnum > 0 AND NOT a.attisdropped
  UNION
  SELECT p.name, CASE t.typtype WHEN 'd' THEN t.typbasetype ELSE t.typelem END, true
  FROM parts p JOIN pg_catalog.pg_type t ON t.oid = p.type
  WHERE t.typtype = 'd' OR (t.typelem <> 0 AND t.typcategory = 'A'))
SELECT DISTINCT p.name FROM parts p JOIN pg_catalog.pg_type t ON t.oid = p.type
WHERE t.typtype = 'c' OR (p.nested AND t.oid IN ('json'::regtype, 'jsonb'::regtype))
   OR (t.oid >= 16384 AND EXISTS (
         SELECT FROM pg_catalog.pg_cast c WHERE c.castsource = t.oid AND c.casttarget = 'json'::regtype))
ORDER BY 1
"""

_COLUMNS = """
SELECT a.attname::text, format_type(a.atttypid, NULL) FROM pg_catalog.pg_attribute a
WHERE a.attrelid = to_regclass(format('public.%%I', %s::text)) AND a.attnum > 0 AND NOT a.attisdropped
"""


def require_prunable(connection: sa.Connection, log: LogTable, *, archive: bool) -> None:
    """Refused or SchemaError, naming what, when to delete rows of a log would lose more than these rows.

    `archive`: or when an archive of them would not give back what they are.
    """
    columns = dict(_ask(connection, _COLUMNS, log.name))
    age = str(getattr(log.age, "name", ""))
    if (kind := columns.get(age)) != "timestamp with time zone":
        raise SchemaError(
            f"{log.name}.{age} is {kind}, not timestamp with time zone; see `paperclip-worker db check`"
        )
    require_whole(connection, log.name)
    known = {(one.table.name, (one.name,)) for one in log.cited_by}
    for table, names in _ask(connection, _REFERENCES, log.name):
        if (table, tuple(names)) not in known:
            raise Refused(
                f"rows of {table} refer to {log.name} by {', '.join(names)} and would be changed or deleted with its "
                "rows; this release does not know them"
            )
    if archive:
        _require_faithful(connection, log)


def require_whole(connection: sa.Connection, table: str) -> None:
    """Refused when a table's rows lie in others: a place in one of them says nothing about a place in the next."""
    if any(shared for (shared,) in _ask(connection, _SHARED, table)):
        raise Refused(f"{table} is partitioned, or other tables inherit from it: this release cannot work on it")


def _require_faithful(connection: sa.Connection, log: LogTable) -> None:
    if found := [name for (name,) in _ask(connection, _UNFAITHFUL, log.name)]:
        raise Refused(f"{log.name}: an archive would not give back the values of {', '.join(found)} as they are")
    if connection.scalar(sa.select(sa.func.current_setting("server_encoding"))) == "SQL_ASCII":
        raise Refused("the database has no encoding (SQL_ASCII): an archive of its text could not be read")


def unknown(connection: sa.Connection, layout: Layout, records: Records) -> tuple[sa.ColumnClause[Any], ...]:
    """The columns a table has in the live database that the catalogue does not know, bound to the table."""
    known = catalogue.load(layout.name).tables[records.name].columns
    return tuple(
        # A look at a column of the table that its narrow description here does not have.
        sa.column(name, sa.Text(), _selectable=records.table)
        for name, _ in sorted(_ask(connection, _COLUMNS, records.name))
        if name not in known
    )


def _ask(connection: sa.Connection, query: str, table: str) -> list[tuple[Any, ...]]:
    with db.translated():
        return db.driver(connection).execute(query.encode(), (table,)).fetchall()
