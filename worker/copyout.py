"""Queries as text, and their rows streamed out by COPY."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa

from worker import db

# Where a term goes that a query is filled with. No name in PostgreSQL can hold it.
_HOLE = "\0"
HOLE: sa.ColumnElement[bool] = sa.literal_column(_HOLE, sa.Boolean)


@dataclass(frozen=True, kw_only=True)
class Query:
    """A query as text with its parameters by name, and how many columns its rows have."""

    text: str
    parameters: Mapping[str, Any]
    columns: int


def compiled(query: sa.Select[Any], dialect: sa.Dialect) -> Query:
    """A query as text. To make it takes milliseconds: for what is asked again, keep it with a HOLE, and fill that."""
    found = _text(query, dialect)
    return Query(text=found.string, parameters=found.params, columns=len(query.selected_columns))


def filled(query: Query, term: sa.ColumnElement[bool], dialect: sa.Dialect) -> Query:
    """The query with this term in place of its HOLE."""
    found = _text(term, dialect)
    # Both texts count their parameters from one.
    names = {name: f"filled_{name}" for name in found.params}
    text = found.string.replace("%%", "%%%%") % {name: f"%({other})s" for name, other in names.items()}
    own = {names[name]: value for name, value in found.params.items()}
    return Query(
        text=query.text.replace(_HOLE, f"({text})"), parameters={**query.parameters, **own}, columns=query.columns
    )


def _text(element: sa.ClauseElement, dialect: sa.Dialect) -> sa.Compiled:
    return element.compile(dialect=dialect, compile_kwargs={"render_postcompile": True})


def statement(query: Query) -> tuple[bytes, Mapping[str, Any]]:
    """`COPY (query) TO STDOUT` in a CSV that never escapes JSON, with its parameters.

    The delimiter and quote are control characters, which JSON text cannot contain unescaped.
    """
    return _copy(query, "FORMAT csv, DELIMITER E'\\x02', QUOTE E'\\x01'"), query.parameters


def rows(connection: sa.Connection, query: Query) -> Iterator[tuple[Any, ...]]:
    """Stream a query's rows, each value as the bytes of its binary form or None; nothing is escaped or parsed."""
    copy = _copy(query, "FORMAT binary")
    with db.driver(connection).cursor() as cursor, cursor.copy(copy, query.parameters) as stream:
        stream.set_types(["bytea"] * query.columns)
        yield from stream.rows()


def _copy(query: Query, form: str) -> bytes:
    return f"COPY ({query.text}) TO STDOUT WITH ({form})".encode()
