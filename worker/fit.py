"""Whether a table takes archived rows as they are: asked of PostgreSQL before the first of them is put back.

The table may have got, lost and retyped columns since the rows were archived, also between two bites of one run.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import sqlalchemy as sa
from psycopg import sql

from worker import db, lines, livetable
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

# The columns that cannot be without a value, whether or not they have a default.
_FILLED = """
SELECT a.attname::text FROM pg_catalog.pg_attribute a
WHERE a.attrelid = to_regclass(format('public.%%I', %s::text)) AND a.attnum > 0 AND NOT a.attisdropped
  AND a.attnotnull AND a.attgenerated = '' ORDER BY a.attnum
"""

# Whether ON CONFLICT finds a unique index of the columns, and of these alone, that is asked at once.
_UNIQUE = """
SELECT FROM pg_catalog.pg_index i
JOIN pg_catalog.pg_attribute a ON a.attrelid = i.indrelid AND a.attnum = i.indkey[0]
WHERE i.indrelid = to_regclass(format('public.%%I', %s::text)) AND i.indisunique AND i.indimmediate AND i.indisvalid
  AND i.indnkeyatts = 1 AND i.indpred IS NULL AND a.attname = %s
"""


class Fit:
    """What of the rows of an archive its table would not take, counted over all of them."""

    def __init__(self, connection: sa.Connection, log: LogTable, json_columns: Mapping[str, str]) -> None:
        self._connection, self._log, self._json_columns = connection, log.name, json_columns
        self._columns = livetable.columns(connection, log.name)
        with db.translated():
            driver = db.driver(connection)
            self._keys = driver.execute(_KEYS.encode(), (log.name,)).fetchall()
            self._filled = [name for (name,) in driver.execute(_FILLED.encode(), (log.name,))]
            if driver.execute(_UNIQUE.encode(), (log.name, log.key.name)).fetchone() is None:
                raise Refused(
                    f"{log.name} has no unique key of {log.key.name} alone any more, by which an archived row is "
                    "found in it"
                )
        self._found: Counter[str] = Counter()

    def require_columns(self, names: Sequence[str]) -> None:
        """Refused when the table lacks one of these columns of some rows, or wants one that they do not have."""
        there = {one.name for one in self._columns}
        if lacks := [f"{self._log}.{name}" for name in names if name not in there]:
            raise Refused(
                f"the archive has {', '.join(lacks)}, which the table lacks; its rows would not come back whole"
            )
        if wants := [one.name for one in self._columns if one.required and one.name not in names]:
            raise Refused(
                f"{self._log} wants a value for {', '.join(wants)}, which the archive lacks; give it a default"
            )

    def count(self, part: Sequence[str]) -> None:
        """Count among the rows of these lines, which have the same columns. Refused when a value does not fit."""
        if not part:
            return
        names = lines.columns(self._connection, self._log, part[0])
        came, own = sql.Identifier("came"), sql.SQL("{line} IS DISTINCT FROM made.line")
        terms = [own.format(line=lines.line_of("came", names, self._json_columns))]
        says = [f"would not be as they were: {self._log} has another type for a column"]
        for name in self._filled:
            if name in names:
                terms.append(sql.SQL("{} IS NULL").format(sql.Identifier("came", name)))
                says.append(f"have no value for {name}, which {self._log} wants now")
        for schema, parent, columns, others in self._keys:
            terms.append(_orphan(schema, parent, columns, others))
            says.append(f"refer to rows of {parent} ({', '.join(columns)}) that are gone")
        statement = sql.SQL(
            "WITH made AS (SELECT line, json_populate_record(NULL::{table}, line::json) AS r "
            "FROM string_to_table({given}, E'\\n') AS given (line) OFFSET 0) "
            "SELECT {counts} FROM made CROSS JOIN LATERAL (SELECT {values}) AS {came} ({names})"
        ).format(
            table=sql.Identifier("public", self._log),
            given=lines.GIVEN,
            counts=sql.SQL(", ").join(sql.SQL("count(*) FILTER (WHERE {})").format(term) for term in terms),
            values=lines.values_of("r", names, self._json_columns, nulls=lines.marked(part)),
            came=came,
            names=sql.SQL(", ").join(map(sql.Identifier, names)),
        )
        (found,) = lines.send(self._connection, self._log, statement, "\n".join(part))
        self._found.update(dict(zip(says, found, strict=True)))

    def require(self) -> None:
        """Refused, naming what and how many, when some of the rows that were counted would not be taken."""
        if found := [f"{rows} {what}" for what, rows in self._found.items() if rows]:
            raise Refused(f"archived rows of {self._log} cannot come back as they are: {'; '.join(found)}")


def _orphan(schema: str, parent: str, own: Sequence[str], other: Sequence[str]) -> sql.Composed:
    """Whether a row refers to one that is not there."""
    return sql.SQL("{set} AND NOT EXISTS (SELECT FROM {parent} p WHERE {same})").format(
        set=_all("(made.r).{own} IS NOT NULL", own, other),
        parent=sql.Identifier(schema, parent),
        same=_all("p.{other} = (made.r).{own}", own, other),
    )


def _all(term: str, own: Sequence[str], other: Sequence[str]) -> sql.Composable:
    return sql.SQL(" AND ").join(
        sql.SQL(term).format(own=sql.Identifier(one), other=sql.Identifier(two))
        for one, two in zip(own, other, strict=True)
    )
