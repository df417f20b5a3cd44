"""Whether rows that are to come back still find the rows they refer to."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

import sqlalchemy as sa
from psycopg import sql

from worker import db, lines
from worker.errors import Refused

if TYPE_CHECKING:
    from worker.layouts.model import LogTable

# A table's foreign keys into other tables that this role may look into: where to, their columns and those meant.
# One that it may not look into is left to the insert.
_KEYS = """
SELECT n.nspname::text, p.relname::text,
       array_agg(a.attname::text ORDER BY k.i), array_agg(b.attname::text ORDER BY k.i)
FROM pg_catalog.pg_constraint f
JOIN pg_catalog.pg_class p ON p.oid = f.confrelid
JOIN pg_catalog.pg_namespace n ON n.oid = p.relnamespace
CROSS JOIN unnest(f.conkey, f.confkey) WITH ORDINALITY AS k (own, other, i)
JOIN pg_catalog.pg_attribute a ON a.attrelid = f.conrelid AND a.attnum = k.own
JOIN pg_catalog.pg_attribute b ON b.attrelid = f.confrelid AND b.attnum = k.other
WHERE f.contype = 'f' AND f.conrelid = to_regclass(format('public.%%I', %s::text)) AND f.confrelid <> f.conrelid
GROUP BY f.oid, n.nspname, p.relname
HAVING bool_and(has_column_privilege(p.oid, b.attnum, 'SELECT'))
ORDER BY 2, 3
"""


class Orphans:
    """Archived rows of a log whose parent is gone, counted by foreign key."""

    def __init__(self, connection: sa.Connection, log: LogTable) -> None:
        self._connection, self._log = connection, log.name
        with db.translated():
            self._keys = db.driver(connection).execute(_KEYS.encode(), (log.name,)).fetchall()
        self._found: Counter[str] = Counter()

    def count(self, part: Sequence[str]) -> None:
        """Count among the rows of these lines."""
        if not part or not self._keys:
            return
        counts = [
            sql.SQL("count(*) FILTER (WHERE {set} AND NOT EXISTS (SELECT FROM {parent} p WHERE {same}))").format(
                set=_all("r.{own} IS NOT NULL", own, other),
                parent=sql.Identifier(schema, parent),
                same=_all("p.{other} = r.{own}", own, other),
            )
            for schema, parent, own, other in self._keys
        ]
        statement = sql.SQL(
            "SELECT {counts} FROM string_to_table({given}, E'\\n') AS given (line), "
            "json_populate_record(NULL::{table}, given.line::json) AS r"
        ).format(counts=sql.SQL(", ").join(counts), given=lines.GIVEN, table=sql.Identifier("public", self._log))
        (found,) = lines.send(self._connection, self._log, statement, "\n".join(part))
        for (_, parent, own, _), rows in zip(self._keys, found, strict=True):
            self._found[f"of {parent} ({', '.join(own)})"] += rows

    def require_none(self) -> None:
        """Refused, naming each table and how many rows refer to what is gone from it."""
        if gone := [f"{rows} to rows {what}" for what, rows in self._found.items() if rows]:
            raise Refused(f"archived rows of {self._log} refer to others that are gone: {', '.join(gone)}")


def _all(term: str, own: Sequence[str], other: Sequence[str]) -> sql.Composable:
    return sql.SQL(" AND ").join(
        sql.SQL(term).format(own=sql.Identifier(one), other=sql.Identifier(two))
        for one, two in zip(own, other, strict=True)
    )
