"""Print a layout's catalogue.toml as the database says it, keeping the hand-made facts of the present one.

    DATABASE_URL=... python .ci/catalogue.py paperclip > new.toml

Names, types and primary keys come from the database; scopes, parents, classes and retention notes from the
file. What nobody has classed yet is printed as `unclassed`, which the worker refuses to load, and named on
stderr; the exit status is then 1. To be run after a release of Paperclip whose migrations were applied.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import psycopg
import sqlalchemy as sa

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from worker.layouts.catalogue import (
    NOT_A_LOG,
    Catalogue,
    ColumnClass,
    Live,
    LiveColumn,
    Scope,
    TableFact,
    live_schema,
    load,
    table_key,
)

UNCLASSED = "unclassed"
# Of these types nothing can name a person or open a door; of any other a human decides.
HARMLESS = frozenset({"boolean", "integer", "bigint", "date", "timestamp with time zone"})

_KEYS = sa.text("""
    SELECT space.nspname, relation.relname, array_agg(attribute.attname::text ORDER BY part.place)
    FROM pg_constraint key
    JOIN pg_class relation ON relation.oid = key.conrelid
    JOIN pg_namespace space ON space.oid = relation.relnamespace
    CROSS JOIN unnest(key.conkey) WITH ORDINALITY AS part (number, place)
    JOIN pg_attribute attribute ON attribute.attrelid = relation.oid AND attribute.attnum = part.number
    WHERE key.contype = 'p'
    GROUP BY space.nspname, relation.relname
""")


def primary_keys(connection: sa.Connection) -> dict[str, list[str]]:
    """The columns of each table's primary key, by the catalogue's keys."""
    rows = connection.execute(_KEYS)
    return {table_key(schema, name): columns for schema, name, columns in rows}


def render(live: Live, keys: Mapping[str, Sequence[str]], known: Mapping[str, TableFact]) -> Iterator[str]:
    """The file's lines, one a column, in the order of the names and of the table's own columns."""
    for table in sorted(live):
        fact = known.get(table)
        yield from ("", f"[table.{_bare(table)}]", *_ownership(live[table], fact))
        yield f"key = [{', '.join(map(_quoted, keys.get(table, ())))}]"
        if fact and fact.reason not in {None, NOT_A_LOG}:
            yield f"retention = {_quoted(fact.retention)}"
            yield f"reason = {_quoted(str(fact.reason))}"
        elif fact and fact.reason is None:
            yield f"retention = {_quoted(fact.retention)}"
        yield f"[table.{_bare(table)}.columns]"
        for name, column in live[table].items():
            kind = _class(column, fact.columns[name].kind if fact and name in fact.columns else None)
            suffix = "" if kind == ColumnClass.PLAIN else f"; {kind}"
            yield f"{_bare(name)} = {_quoted(f'{column}{suffix}')}"


def unclassed(lines: Sequence[str]) -> list[str]:
    """The tables and columns among the lines that a human has still to class."""
    found, table = [], ""
    for line in lines:
        if line.startswith("["):
            table = line.strip("[]").removeprefix("table.").removesuffix(".columns")
        elif UNCLASSED in line:
            found.append(f"{table}.{line.partition(' = ')[0]}")
    return found


def _ownership(columns: Mapping[str, LiveColumn], fact: TableFact | None) -> Iterator[str]:
    if fact is None:
        yield f"scope = {_quoted(Scope.COMPANY if 'company_id' in columns else UNCLASSED)}"
        return
    yield f"scope = {_quoted(fact.scope)}"
    if fact.company not in {None, "company_id"}:
        yield f"company = {_quoted(str(fact.company))}"
    if fact.parent:
        parent = fact.parent
        yield f"parent = {{ column = {_quoted(parent.column)}, table = {_quoted(parent.table)} }}"


def _class(column: LiveColumn, known: ColumnClass | None) -> str:
    if known is not None:
        return known
    return ColumnClass.PLAIN if column.type in HARMLESS else UNCLASSED


def _bare(key: str) -> str:
    return key if re.fullmatch(r"[A-Za-z0-9_-]+", key) else _quoted(key)


def _quoted(text: str) -> str:
    escaped = text.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'


def _header(layout: str) -> str:
    return (
        f"# Every table and column of the {layout} layout. Written by .ci/catalogue.py out of a real database;\n"
        "# scope, parent, class and retention are decided by hand and kept. A column reads\n"
        "# `TYPE[ not null][; CLASS]`, plain where no class is given; see worker/layouts/catalogue.py."
    )


def main() -> int:
    """Print the catalogue; 1 when something in it is still to be classed."""
    (layout,) = sys.argv[1:]
    known: Catalogue = load(layout)
    url = os.environ["DATABASE_URL"]
    engine = sa.create_engine("postgresql+psycopg://", creator=lambda: psycopg.connect(url))
    with engine.connect() as connection:
        lines = list(render(live_schema(connection), primary_keys(connection), known.tables))
    engine.dispose()
    print(_header(layout), *lines, sep="\n")  # noqa: T201 - its product
    for place in (open_points := unclassed(lines)):
        print(f"class by hand: {place}", file=sys.stderr)  # noqa: T201 - a tool for a terminal
    return 1 if open_points else 0


if __name__ == "__main__":
    sys.exit(main())
