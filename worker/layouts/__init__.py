"""Which schema the live database has, and what it lacks for a job."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache
from typing import TYPE_CHECKING, Any

import sqlalchemy as sa

from worker.errors import Refused, SchemaError
from worker.layouts.guide import GUIDE
from worker.layouts.paperclip import PAPERCLIP

if TYPE_CHECKING:
    from worker.layouts.model import Layout

LAYOUTS: dict[str, Layout] = {layout.name: layout for layout in (PAPERCLIP, GUIDE)}


def detect(connection: sa.Connection) -> Layout:
    """The layout of the live database. Raises SchemaError saying what is missing when none fits."""
    lacks = {name: missing(connection, layout.landmarks) for name, layout in LAYOUTS.items()}
    fitting = [name for name, absent in lacks.items() if not absent]
    if len(fitting) == 1:
        return LAYOUTS[fitting[0]]
    if fitting:
        raise SchemaError(f"the database fits more than one layout: {', '.join(fitting)}")
    nearest = min(lacks, key=lambda name: len(lacks[name]))
    raise SchemaError(
        "the database has neither the paperclip nor the guide layout; "
        f"nearest is {nearest}, which lacks {', '.join(lacks[nearest])}"
    )


def require(connection: sa.Connection, tables: Iterable[sa.Table], *, what: str) -> None:
    """Raise SchemaError naming every table and column that `what` needs and the database lacks.

    Refused when a policy of theirs keeps rows from this role: what is not seen would not be heeded.
    """
    tables = tuple(tables)
    if absent := missing(connection, tables):
        raise SchemaError(f"{what} needs {', '.join(absent)}, which this database lacks; see `db check`")
    names = sorted({f'"{one.schema or "public"}"."{one.name}"' for one in tables})
    each = sa.func.unnest(sa.literal(names, sa.ARRAY(sa.Text))).column_valued("name")
    hidden = connection.scalars(sa.select(each).where(sa.func.row_security_active(each))).all()
    if hidden:
        raise Refused(
            f"row level security keeps rows of {', '.join(hidden)} from this role, and {what} must see all of them; "
            "ALTER ROLE ... BYPASSRLS lets it"
        )


def missing(connection: sa.Connection, tables: Iterable[sa.Table]) -> list[str]:
    """`table` or `table.column` for everything of `tables` that the live database lacks."""
    needed: dict[tuple[str, str], set[str]] = {}
    for table in tables:
        needed.setdefault((table.schema or "public", table.name), set()).update(table.c.keys())
    live: dict[tuple[str, str], set[str]] = {place: set() for place in needed}
    rows = connection.execute(_live_columns(), {"names": [name for _, name in needed]})
    for schema, name, column in rows:
        live.setdefault((schema, name), set()).add(column)
    absent = []
    for (schema, name), columns in sorted(needed.items()):
        found = live[schema, name]
        absent += [name] if not found else sorted(f"{name}.{column}" for column in columns - found)
    return absent


@cache
def _live_columns() -> sa.Select[Any]:
    # pg_catalog and not information_schema, which hides what the role has no rights on.
    space = sa.table("pg_namespace", sa.column("oid"), sa.column("nspname"), schema="pg_catalog")
    relation = sa.table(
        "pg_class", *map(sa.column, ("oid", "relname", "relnamespace", "relkind")), schema="pg_catalog"
    )
    attribute = sa.table(
        "pg_attribute",
        *map(sa.column, ("attrelid", "attname", "attnum", "attisdropped")),
        schema="pg_catalog",
    )
    return (
        sa.select(space.c.nspname, relation.c.relname, attribute.c.attname)
        .join(relation, relation.c.relnamespace == space.c.oid)
        .join(attribute, attribute.c.attrelid == relation.c.oid)
        .where(
            relation.c.relkind.in_(["r", "p"]),
            attribute.c.attnum > 0,
            ~attribute.c.attisdropped,
            relation.c.relname == sa.any_(sa.bindparam("names", type_=sa.ARRAY(sa.Text))),
        )
    )
