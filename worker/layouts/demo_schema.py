"""A stand-in for a deployment's database: the catalogue's tables, and rows like those of a living deployment.

For `demo` and the tests only. `create` needs an empty database; `seed` fills it, and the released schema as well.
"""

from __future__ import annotations

from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

from worker.layouts.catalogue import TableFact, load

if TYPE_CHECKING:
    import sqlalchemy as sa

_FOLDER = Path(__file__).parent
# What stands before it in a demo.sql is schema, what stands after it is rows.
_ROWS_BELOW = "-- rows ----"
_ASK = """
    INSERT INTO pg_temp.demo_ask (rows, now, companies, days)
    VALUES (%(rows)s, %(now)s, %(companies)s, %(days)s)
"""


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
    _run(connection, _PARAMETERS)
    connection.exec_driver_sql(_ASK, {"rows": rows, "now": now, "companies": companies, "days": days})
    _run(connection, fill)
    _run(connection, "DROP TABLE pg_temp.demo_ask")
