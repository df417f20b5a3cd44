"""Every table and column of a layout, classed; what an operator adds; how the live database differs.

A column that nobody has classed is never ignored: `compare` names it, and jobs fail closed on it. An
operator's file may add facts and make them stricter, never loosen one.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from enum import StrEnum
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import BaseModel, ValidationError

from worker.errors import SettingsError

if TYPE_CHECKING:
    import sqlalchemy as sa

NOT_A_LOG = "not a log"

_FOLDER = Path(__file__).parent


class ColumnClass(StrEnum):
    """What may be in a column, from harmless to never to be shown; a later class is the stricter one."""

    # Ids, times, numbers, states: nothing about a person, nothing that opens a door.
    PLAIN = "plain"
    # Free text or JSON: may hold what a person wrote, a name, or a pasted credential. Search it, scrub it.
    CONTENT = "content"
    # Names a person or identifies one: user ids, e-mail, addresses; a reference that may be a user's.
    PERSONAL = "personal"
    # Opens a door, or lets one be guessed: keys, tokens, ciphertext, their unsalted digests. Never leaves.
    SECRET = "secret"  # noqa: S105

    def weaker_than(self, other: ColumnClass) -> bool:
        return tuple(ColumnClass).index(self) < tuple(ColumnClass).index(other)


_CLASSES = ", ".join(ColumnClass)
_COLUMN = re.compile(rf"(?P<type>[^;\s][^;]*?)(?P<required> not null)?(?:; (?P<kind>{'|'.join(ColumnClass)}))?", re.I)


class Scope(StrEnum):
    """Whose a row is: a company's, that of the company of the row it belongs to, or the instance's."""

    COMPANY = "company"
    PARENT = "parent"
    INSTANCE = "instance"


class Retention(StrEnum):
    """Whether old rows of a table may go."""

    PRUNABLE = "prunable"
    NEVER = "never"


@dataclass(frozen=True, kw_only=True)
class LiveColumn:
    """A column as the live database has it; `type` in format_type's spelling."""

    type: str
    nullable: bool

    def __str__(self) -> str:
        return self.type if self.nullable else f"{self.type} not null"


@dataclass(frozen=True, kw_only=True)
class ColumnFact(LiveColumn):
    """A column as the catalogue has it."""

    name: str
    kind: ColumnClass


@dataclass(frozen=True, kw_only=True)
class Parent:
    """The row another row belongs to: `column` holds the key of a row of `table`."""

    column: str
    table: str


@dataclass(frozen=True, kw_only=True)
class TableFact:
    """A table as the catalogue has it. `company` names the column of scope company, `parent` that of parent."""

    name: str
    schema: str
    scope: Scope
    company: str | None
    parent: Parent | None
    primary_key: tuple[str, ...]
    columns: Mapping[str, ColumnFact]
    retention: Retention
    reason: str | None


def table_key(schema: str, name: str) -> str:
    """How the catalogue calls a table: by its name, with the schema before it unless that is `public`."""
    return name if schema == "public" else f"{schema}.{name}"


@dataclass(frozen=True)
class Catalogue:
    """What is known of a layout's schema, by `table_key`."""

    layout: str
    tables: Mapping[str, TableFact]


# The live database's tables by the same keys.
Live = Mapping[str, Mapping[str, LiveColumn]]


@dataclass(frozen=True, kw_only=True)
class Drift:
    """How the live database differs from the catalogue: `table`, `table.column`, or `table.column: a -> b`."""

    missing: tuple[str, ...]
    unknown: tuple[str, ...]
    changed: tuple[str, ...]

    @property
    def clean(self) -> bool:
        return not (self.missing or self.unknown or self.changed)


def load(layout: str, extra: Path | None = None) -> Catalogue:
    """The layout's catalogue, with what the operator's file adds.

    SettingsError, one sentence with file and key, when a file is not TOML, has an unknown key or class, or
    when the operator's contradicts or loosens a fact of the layout.
    """
    known = _built_in(layout)
    if extra is None:
        return known
    tables = dict(known.tables)
    for key, entry in _read(extra, extra.name).items():
        place = f"{extra.name}: table.{key}"
        if found := tables.get(key):
            tables[key] = _extended(place, found, entry)
            continue
        if entry.retention is Retention.PRUNABLE:
            raise _wrong(place, "retention", "only a layout can say prunable: it knows which rows are still read")
        tables[key] = _table(place, key, entry)
    return _whole(extra.name, Catalogue(layout, tables))


def compare(catalogue: Catalogue, live: Live) -> Drift:
    """What the live database lacks, has besides, or has otherwise."""
    tables = catalogue.tables
    missing, unknown, changed = [*(tables.keys() - live.keys())], [*(live.keys() - tables.keys())], []
    for key in tables.keys() & live.keys():
        ours, theirs = tables[key].columns, live[key]
        missing += [f"{key}.{name}" for name in ours.keys() - theirs.keys()]
        unknown += [f"{key}.{name}" for name in theirs.keys() - ours.keys()]
        both = [(name, str(ours[name]), str(theirs[name])) for name in ours.keys() & theirs.keys()]
        changed += [f"{key}.{name}: {before} -> {now}" for name, before, now in both if before != now]
    return Drift(missing=tuple(sorted(missing)), unknown=tuple(sorted(unknown)), changed=tuple(sorted(changed)))


def live_schema(connection: sa.Connection) -> Live:
    """Every table the host keeps in this database, plugins' schemas too, whether we may read it or not."""
    live: dict[str, dict[str, LiveColumn]] = {}
    for schema, name, column, kind, required in connection.exec_driver_sql(_LIVE):
        columns = live.setdefault(table_key(schema, name), {})
        if column is not None:
            columns[column] = LiveColumn(type=kind, nullable=not required)
    return live


# pg_catalog and not information_schema, which hides what the role has no rights on. A partition's rows are
# its parent's. The migrator's own table may stand in any schema.
_LIVE = """
SELECT space.nspname, relation.relname, attribute.attname,
       pg_catalog.format_type(attribute.atttypid, attribute.atttypmod), attribute.attnotnull
FROM pg_catalog.pg_class relation
JOIN pg_catalog.pg_namespace space ON space.oid = relation.relnamespace
LEFT JOIN pg_catalog.pg_attribute attribute
       ON attribute.attrelid = relation.oid AND attribute.attnum > 0 AND NOT attribute.attisdropped
WHERE relation.relkind IN ('r', 'p') AND NOT relation.relispartition
  AND pg_catalog.left(space.nspname::text, 3) <> 'pg_'
  AND space.nspname NOT IN ('information_schema', 'paperclip_worker', 'drizzle')
  AND relation.relname <> '__drizzle_migrations'
ORDER BY space.nspname, relation.relname, attribute.attnum
"""


class _Entry(BaseModel, extra="forbid"):
    """A table as a file writes it; a column reads `TYPE`, `TYPE not null`, or either with `; CLASS` after it."""

    scope: Scope | None = None
    company: str | None = None
    parent: Parent | None = None
    key: list[str] | None = None
    retention: Retention | None = None
    reason: str | None = None
    columns: dict[str, str] = {}


class _File(BaseModel, extra="forbid"):
    table: dict[str, _Entry] = {}


@cache
def _built_in(layout: str) -> Catalogue:
    file = _FOLDER / layout / "catalogue.toml"
    label = f"{layout}/{file.name}"
    tables = {key: _table(f"{label}: table.{key}", key, entry) for key, entry in _read(file, label).items()}
    return _whole(label, Catalogue(layout, tables))


def _read(file: Path, label: str) -> dict[str, _Entry]:
    try:
        entries = _File.model_validate(tomllib.loads(file.read_text(encoding="utf-8"))).table
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        what = "is not a known key" if first["type"] == "extra_forbidden" else first["msg"]
        raise SettingsError(f"{label}: {'.'.join(map(str, first['loc']))}: {what}") from error
    except tomllib.TOMLDecodeError as error:
        raise SettingsError(f"{label}: is not TOML: {error}") from error
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsError(f"{label}: cannot be read: {type(error).__name__}") from error
    return {key.removeprefix("public."): entry for key, entry in entries.items()}


def _table(place: str, key: str, entry: _Entry) -> TableFact:
    schema, _, name = key.rpartition(".")
    columns = _columns(place, entry)
    if entry.scope is None or entry.key is None:
        raise _wrong(place, "scope" if entry.scope is None else "key", "is required for a table the layout lacks")
    company = entry.company or "company_id" if entry.scope is Scope.COMPANY else entry.company
    for owner, value in ((Scope.COMPANY, company), (Scope.PARENT, entry.parent)):
        if (value is not None) is not (entry.scope is owner):
            raise _wrong(place, owner, f"goes with scope {owner}, always and only; the scope here is {entry.scope}")
    owned_by = {"company": company, "parent": entry.parent.column if entry.parent else None}
    for what, column in (*(("key", one) for one in entry.key), *owned_by.items()):
        if column is not None and column not in columns:
            raise _wrong(place, what, f"names {column}, which is no column of the table")
    retention = entry.retention or Retention.NEVER
    return TableFact(
        name=name,
        schema=schema or "public",
        scope=entry.scope,
        company=company,
        parent=entry.parent,
        primary_key=tuple(entry.key),
        columns=columns,
        retention=retention,
        reason=entry.reason or (NOT_A_LOG if retention is Retention.NEVER else None),
    )


def _columns(place: str, entry: _Entry) -> dict[str, ColumnFact]:
    columns = {}
    for name, text in entry.columns.items():
        if not (match := _COLUMN.fullmatch(text)):
            raise _wrong(place, f"columns.{name}", f"must read TYPE[ not null][; CLASS]; classes: {_CLASSES}")
        kind = ColumnClass((match["kind"] or ColumnClass.PLAIN).lower())
        # As format_type writes it; a name in quotes is another in capitals.
        type_ = match["type"] if '"' in match["type"] else match["type"].lower()
        columns[name] = ColumnFact(name=name, type=type_, nullable=not match["required"], kind=kind)
    return columns


def _extended(place: str, table: TableFact, entry: _Entry) -> TableFact:
    """The layout's table with the operator's columns."""
    if settled := sorted(entry.model_fields_set - {"columns"}):
        raise _wrong(place, settled[0], "is settled by the layout; only columns can be added to its tables")
    columns = dict(table.columns)
    for name, column in _columns(place, entry).items():
        known = columns.get(name)
        if known and str(known) != str(column):
            raise _wrong(place, f"columns.{name}", f"says {column}, but the layout says {known}")
        if known and column.kind.weaker_than(known.kind):
            raise _wrong(place, f"columns.{name}", f"{column.kind} is weaker than the layout's {known.kind}")
        columns[name] = column
    return replace(table, columns=columns)


def _whole(label: str, catalogue: Catalogue) -> Catalogue:
    """The catalogue, every parent of which is a table of it."""
    for key, table in catalogue.tables.items():
        if table.parent and table.parent.table not in catalogue.tables:
            place = f"{label}: table.{key}"
            raise _wrong(place, "parent.table", f"names {table.parent.table}, which is no table known here")
    return catalogue


def _wrong(place: str, key: str, what: str) -> SettingsError:
    return SettingsError(f"{place}.{key}: {what}")
