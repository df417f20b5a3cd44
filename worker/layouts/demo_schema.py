"""A stand-in for a deployment's database: the catalogue's tables, and rows like those of a living deployment.

For `demo` and the tests only. `create` needs an empty database; `seed` fills it, and the released schema as well.
"""

from __future__ import annotations

from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

from worker.layouts.catalogue import load

if TYPE_CHECKING:
    import sqlalchemy as sa

_FOLDER = Path(__file__).parent
# What stands before it in a demo.sql is schema, what stands after it is rows.
_ROWS_BELOW = "-- rows ----"
# What the rows of a demo.sql stand on, in a schema that is gone when they are there.
_BEFORE = """
    CREATE SCHEMA demo;
    CREATE TABLE demo.ask (
        rows integer, now timestamptz, companies bigint, start timestamptz, span interval,
        -- Of everything else there is in proportion.
        issues_each integer GENERATED ALWAYS AS (greatest(40, rows / 50 / companies)) STORED,
        runs_each integer GENERATED ALWAYS AS (greatest(40, rows / 20 / companies)) STORED,
        events_each integer
            GENERATED ALWAYS AS (rows / 4 / (greatest(40, rows / 20 / companies) * companies) + 1) STORED,
        events integer GENERATED ALWAYS AS (greatest(60, rows / 50)) STORED
    );
    -- Each is plain enough to be inlined; `kind || n` without the cast is not, and takes five times as long.
    CREATE FUNCTION demo.id(kind text, n bigint) RETURNS uuid IMMUTABLE LANGUAGE sql
        RETURN md5(kind || n::text)::uuid;
    CREATE FUNCTION demo.text_id(kind text, n bigint) RETURNS text IMMUTABLE LANGUAGE sql
        RETURN md5(kind || ' text ' || n::text);
    CREATE FUNCTION demo.dice(n bigint, salt bigint) RETURNS bigint IMMUTABLE LANGUAGE sql
        RETURN hashint8extended(n, salt) & 9223372036854775807;
    CREATE FUNCTION demo.pick(among text[], n bigint) RETURNS text IMMUTABLE LANGUAGE sql
        RETURN among[1 + n % cardinality(among)];
    CREATE FUNCTION demo.words(n bigint, length bigint) RETURNS text IMMUTABLE LANGUAGE sql
        RETURN substr(repeat('Überprüfe die Lieferung für Łódź — naïve façade, 顧客からの返信を待つ; ship it ✓ then '
                             'ask Zoë about the größte invoice, “quoted”, and don''t forget Ångström. ', 4),
                      (1 + n % 140)::integer, length::integer);
"""
_ASK = """
    INSERT INTO demo.ask (rows, now, companies, start, span)
    VALUES (%(rows)s, %(now)s, %(companies)s, %(now)s::timestamptz - %(span)s::interval, %(span)s)
"""
_AFTER = "DROP SCHEMA demo CASCADE"


def create(connection: sa.Connection, layout: str) -> None:
    """Build the layout's schema in an empty database: every table, with the keys and indexes that matter.

    The caller commits. Raises the driver's error when a table is already there.
    """
    quote = connection.dialect.identifier_preparer.quote_identifier
    statements = []
    for table in load(layout).tables.values():
        lines = [f"{quote(column.name)} {column}" for column in table.columns.values()]
        lines += [f"PRIMARY KEY ({', '.join(map(quote, table.primary_key))})"] if table.primary_key else []
        statements.append(f"CREATE TABLE {quote(table.schema)}.{quote(table.name)} ({', '.join(lines)});")
    schema, _ = _script(layout)
    _run(connection, "\n".join(statements))
    _run(connection, schema)


def seed(
    connection: sa.Connection, layout: str, *, rows: int, now: datetime, companies: int = 3, days: int = 200
) -> None:
    """Fill the empty tables: `rows` rows of activity over `days` days before `now`, the rest in proportion.

    The same arguments make the same rows, but for ids that a sequence gives. The caller commits.
    """
    if now.tzinfo is None:
        raise ValueError("now must have a time zone")
    if rows < 1 or companies < 1 or days < 1:
        raise ValueError("rows, companies and days must be above zero")
    _, fill = _script(layout)
    _run(connection, _BEFORE)
    # Hours, because a day of a session's time zone need not have 24.
    ask = {"rows": rows, "now": now, "companies": companies, "span": f"{days * 24} hours"}
    connection.exec_driver_sql(_ASK, ask)
    _run(connection, fill)
    _run(connection, _AFTER)


def _script(layout: str) -> tuple[str, str]:
    """The two parts of the layout's demo.sql: schema and rows."""
    schema, _, fill = (_FOLDER / layout / "demo.sql").read_text(encoding="utf-8").partition(_ROWS_BELOW)
    return schema, fill


def _run(connection: sa.Connection, script: str) -> None:
    # Without parameters the driver takes many statements at once, and a % for what it is.
    connection.exec_driver_sql(script, execution_options={"no_parameters": True})
