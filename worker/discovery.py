"""Ciphertext of the master key where nobody looked for it: every text and JSON column of the database, in windows.

A column that is not of the catalogue's carriers and holds an envelope would be lost with the old key.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any
from uuid import UUID

import sqlalchemy as sa

from worker import ledger_shards
from worker.errors import Refused
from worker.job import Batch, Shard
from worker.livetable import PARTS
from worker.masterkeys import HORIZON
from worker.pgtypes import quoted

if TYPE_CHECKING:
    from worker.layouts.model import Layout

KEY = "discover"
# Blocks a bite reads, with what is TOASTed besides.
_WINDOW = 4_096
# Values a look at what was found reads at once; each may be large.
_FETCHED = 100

# Of the whole table: where only some columns may be read, its windows may not. Partitions are read as what they are,
# tables; what is ours, temporary or the server's own is not the host's.
_COLUMNS = sa.text(
    f"""
    SELECT space.nspname, relation.relname, attribute.attname,
           has_schema_privilege(space.oid, 'USAGE')
             AND has_table_privilege(relation.oid, 'SELECT') AS readable,
           pg_relation_size(relation.oid) / current_setting('block_size')::bigint AS blocks,
           relation.oid::bigint AS oid, pg_relation_filenode(relation.oid)::bigint AS file
    FROM pg_catalog.pg_class relation
    JOIN pg_catalog.pg_namespace space ON space.oid = relation.relnamespace
    JOIN pg_catalog.pg_attribute attribute
      ON attribute.attrelid = relation.oid AND attribute.attnum > 0 AND NOT attribute.attisdropped
    WHERE relation.relkind IN ('r', 'm') AND relation.relispopulated AND relation.relpersistence <> 't'
      AND pg_catalog.left(space.nspname::text, 3) <> 'pg_'
      AND space.nspname NOT IN ('information_schema', 'paperclip_worker')
      AND EXISTS ({PARTS.format(whole="attribute.atttypid")}
        WHERE type.typcategory = 'S' OR type.typname IN ('json', 'jsonb', 'xml', 'hstore'))
    ORDER BY 1, 2, attribute.attnum
    """
)


def shards(connection: sa.Connection, layout: Layout, allowed: Collection[str]) -> Iterator[Shard]:
    """Shards of tables with columns to look into. Refused, with one named, where a column may not be read."""
    held, blocks = list[dict[str, Any]](), 0
    for spec in tables(connection, layout, allowed):
        held.append(spec)
        blocks += spec["blocks"]
        if blocks >= _WINDOW:
            yield _shard(held)
            held, blocks = [], 0
    if held:
        yield _shard(held)


def tables(connection: sa.Connection, layout: Layout, allowed: Collection[str]) -> list[dict[str, Any]]:
    """The tables with columns to look into, as they are now. Refused as above."""
    known = {f"public.{one.name}" for one in layout.carriers} | set(map(whole, allowed))
    found: dict[int, dict[str, Any]] = {}
    for row in connection.execute(_COLUMNS):
        if f"{row.nspname}.{row.relname}.{row.attname}" in known:
            continue
        if row.readable is None or row.blocks is None:
            # Dropped, and still in the snapshot of this transaction.
            continue
        new = {"schema": row.nspname, "table": row.relname, "blocks": row.blocks, "oid": row.oid, "file": row.file}
        spec = found.setdefault(row.oid, {**new, "columns": [], "unreadable": []})
        spec["columns" if row.readable else "unreadable"].append(row.attname)
    _require_readable(found.values())
    return list(found.values())


def require_columns(connection: sa.Connection, allowed: Iterable[str]) -> None:
    """Refused when one of these names is that of no text or JSON column."""
    there = {f"{schema}.{table}.{column}" for schema, table, column, *_ in connection.execute(_COLUMNS)}
    if unknown := [name for name in allowed if whole(name) not in there]:
        raise Refused(f"--allow-column: {unknown[0]} is no text or JSON column of a table; give TABLE.COLUMN")


def whole(name: str) -> str:
    """The column's name with its schema."""
    return name if name.count(".") > 1 else f"public.{name}"


def _require_readable(tables: Iterable[Mapping[str, Any]]) -> None:
    unread = [f"{one['schema']}.{one['table']}.{column}" for one in tables for column in one["unreadable"]]
    if unread:
        raise Refused(
            f"{len(unread)} columns cannot be looked into, {unread[0]} among them; apply the SQL "
            "that `paperclip-worker db grants --job rotate-master-key` prints, or name them with --allow-column "
            "when the key is rotated"
        )


def _shard(tables: list[dict[str, Any]]) -> Shard:
    return Shard(key=f"{KEY}:{tables[0]['schema']}.{tables[0]['table']}", rows=0, spec={"tables": tables})


def claim(connection: sa.Connection, scheme: str, shard: Shard, after: Mapping[str, Any] | None) -> Batch:
    """Look into about a window of the shard's tables; the cursor carries how many rows hold an envelope."""
    tables = shard.spec["tables"]
    number, start = (after["table"], after["block"]) if after else (0, 0)
    found = dict(after["found"]) if after else {}
    # What transactions write that are not over when the shard is begun, is to be looked at again.
    horizon = after.get("horizon") if after else connection.scalar(sa.select(sa.cast(HORIZON, sa.Text)))
    room = _WINDOW
    while number < len(tables) and room > 0:
        spec = tables[number]
        # The last window of a table has no end: it may have grown.
        end = start + room if start + room < spec["blocks"] else None
        found |= look(connection, scheme, spec, found, start=start, end=end)
        room -= max(1, (end or spec["blocks"]) - start)
        number, start = (number, end) if end else (number + 1, 0)
    cursor = {"table": number, "block": start, "found": found, "horizon": horizon}
    return Batch(after=cursor, exhausted=number == len(tables))


def look(
    connection: sa.Connection,
    scheme: str,
    spec: Mapping[str, Any],
    before: Mapping[str, int],
    *,
    start: int,
    end: int | None,
    since: str | None = None,
) -> Iterator[tuple[str, int]]:
    """Columns of these blocks that hold envelopes, and in how many rows with those found before.

    `since`: only in rows that were written by transactions not over at that horizon.
    """
    name = f"{spec['schema']}.{spec['table']}"
    if _readable(connection, spec):
        row = connection.execute(_query(scheme, spec, start=start, end=end, since=since)).one()
        for column, number in zip(spec["columns"], row, strict=True):
            if number:
                yield f"{name}.{column}", number + before.get(f"{name}.{column}", 0)


def _readable(connection: sa.Connection, spec: Mapping[str, Any]) -> bool:
    """Whether there is a column to read, and the table still: a plugin may have been removed, with its schema."""
    if not spec["columns"]:
        return False
    name = f"{quoted(spec['schema'])}.{quoted(spec['table'])}"
    return connection.scalar(sa.select(sa.func.to_regclass(name).is_not(None))) is True


# Somebody may write of the scheme; an envelope has its other fields beside it.
_HOLDS = "{0}::text LIKE :scheme AND {0}::text LIKE '%ciphertext%'"


def _in_text(name: str) -> str:
    """A name in quotes for `text`, which takes a colon for a parameter."""
    return quoted(name).replace(":", "\\:")


def _query(scheme: str, spec: Mapping[str, Any], *, start: int, end: int | None, since: str | None) -> sa.TextClause:
    holds = f"count(*) FILTER (WHERE {_HOLDS})"
    columns = ", ".join(holds.format(_in_text(column)) for column in spec["columns"])
    table = f"{_in_text(spec['schema'])}.{_in_text(spec['table'])}"
    until = f" AND ctid < '({end},0)'::tid" if end is not None else ""
    # The age of a row is asked before its values are read.
    young = f" AND age(xmin) <= (SELECT age('{int(since)}'::xid8::xid))" if since is not None else ""
    query = f"SELECT {columns} FROM {table} WHERE ctid >= '({start},0)'::tid{until}{young}"
    return sa.text(query).bindparams(scheme=f"%{scheme}%")


def found(connection: sa.Connection, run: UUID, key: str = KEY) -> dict[str, int]:
    """What a run's shards found so far: rows by `schema.table.column`."""
    named: dict[str, int] = {}
    for _, cursor in ledger_shards.cursors(connection, run, f"{key}:"):
        named |= cursor.get("found", {})
    return named


def done(connection: sa.Connection, run: UUID) -> bool:
    """Whether a run looked anywhere at all: there is no database without a text column."""
    return bool(ledger_shards.cursors(connection, run, f"{KEY}:"))


def texts(
    connection: sa.Connection, layout: Layout, columns: Collection[str], allowed: Collection[str]
) -> Iterator[tuple[str, bytes]]:
    """Every value with an envelope, as it is now, in these columns but for those allowed; with the column."""
    for spec in tables(connection, layout, allowed):
        place = f"{_in_text(spec['schema'])}.{_in_text(spec['table'])}"
        for column in spec["columns"]:
            name = f"{spec['schema']}.{spec['table']}.{column}"
            if name in columns and _readable(connection, spec):
                cell = _in_text(column)
                query = f"SELECT {cell}::text FROM {place} WHERE {_HOLDS.format(cell)}"
                rows = connection.execute(
                    sa.text(query), {"scheme": f"%{layout.scheme}%"}, execution_options={"yield_per": _FETCHED}
                )
                yield from ((name, str(value).encode()) for value in rows.scalars())
