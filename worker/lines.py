"""A row as a line of an archive, in one place for both ways: JSON that gives back the very row.

`row_to_json` says null for a column that is NULL and for one that holds the JSON value null. A row that has the
latter names these columns in one more field of its line, the last.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import IO, TYPE_CHECKING, Any, ClassVar

import psycopg
import sqlalchemy as sa
import zstandard
from psycopg import sql

from worker import db
from worker.errors import ArchiveTampered, Refused
from worker.spool import Spool
from worker.storage import Missing

if TYPE_CHECKING:
    from worker.archive import ArchivedObject
    from worker.storage import Store

JSON_NULLS = "$json_null"
# So much text of an object is held and sent to the server at once, but for a row that is larger.
MOST_BYTES = 8 << 20
# So many objects are fetched at the same time: a request waits more than it works.
_AHEAD = 4
# A jsonb beyond this size is not null, and need not be unpacked to tell.
_NULL_BYTES = 16


# -- in SQL -------------------------------------------------------------------------------------------


def nulls(table: str, columns: Mapping[str, str]) -> sql.Composable:
    """The names of a row's columns that hold the JSON value null, as `,"a","b"`: NULL but for few rows."""
    parts = [
        sql.SQL("CASE WHEN {} THEN {} END").format(_null(table, name, kind), sql.Literal("," + json.dumps(name)))
        for name, kind in columns.items()
    ]
    return sql.SQL("nullif(concat({}), '')").format(sql.SQL(", ").join([sql.Literal(""), *parts]))


def archived(table: str, columns: Mapping[str, str]) -> sql.Composable:
    """A row of the table as its line in an archive, all its columns, of which `columns` hold JSON."""
    line = sql.SQL("row_to_json({}.*)::text").format(sql.Identifier(table))
    if "json" in columns.values():
        # The white space between tokens of a `json` column may hold a line break.
        line = sql.SQL("translate({}, E'\\r\\n', '  ')").format(line)
    if not columns:
        return line
    return sql.SQL("CASE WHEN {any} THEN {marked} ELSE {line} END").format(
        any=sql.SQL(" OR ").join(_null(table, name, kind) for name, kind in columns.items()),
        marked=_marked(line, nulls(table, columns)),
        line=line,
    )


def _marked(line: sql.Composable, names: sql.Composable) -> sql.Composable:
    """A line with one more field, the last: `names` as `nulls` gives them."""
    mark = sql.Literal(f',"{JSON_NULLS}":[')
    return sql.SQL("left({}, -1) || {} || substr({}, 2) || ']}}'").format(line, mark, names)


def _null(table: str, column: str, kind: str) -> sql.Composable:
    test = {
        "json": "json_typeof({column}) = 'null'",
        "jsonb": f"pg_column_size({{column}}) <= {_NULL_BYTES} AND jsonb_typeof({{column}}) = 'null'",
    }[kind]
    return sql.SQL(test).format(column=sql.Identifier(table, column))


def marked(lines: Iterable[str]) -> bool:
    """Whether a line may name JSON nulls."""
    return any(line.endswith("]}") and JSON_NULLS in line for line in lines)


def line_of(table: str, names: Iterable[str], json_columns: Mapping[str, str]) -> sql.Composable:
    """A row as its line has it: these columns in this order, without any that the table has got since."""
    names = list(names)
    of_json = {name: kind for name, kind in json_columns.items() if name in names}
    query = (
        "(SELECT CASE WHEN n IS NULL THEN j ELSE {marked} END "
        "FROM (SELECT row_to_json(archived.*)::text AS j, {nulls} AS n FROM (SELECT {row}) AS archived) AS lined)"
    )
    return sql.SQL(query).format(
        marked=_marked(sql.SQL("j"), sql.SQL("n")),
        nulls=nulls("archived", of_json),
        row=sql.SQL(", ").join(sql.Identifier(table, name) for name in names),
    )


def values_of(record: str, names: Iterable[str], json_columns: Mapping[str, str], *, nulls: bool) -> sql.Composable:
    """The values of a record that json_populate_record made; `nulls` when some line names JSON nulls."""
    kept = "CASE WHEN line::jsonb -> {mark} ? {name} THEN 'null' ELSE ({record}).{column} END"
    return sql.SQL(", ").join(
        sql.SQL(kept if nulls and name in json_columns else "({record}).{column}").format(
            record=sql.Identifier(record),
            column=sql.Identifier(name),
            name=sql.Literal(name),
            mark=sql.Literal(JSON_NULLS),
        )
        for name in names
    )


# Where the parameter goes in a statement for `send`. No name in PostgreSQL can hold it.
GIVEN = sql.SQL("\0")


def send(
    connection: sa.Connection, table: str, statement: sql.Composed, given: str | list[str]
) -> list[tuple[Any, ...]]:
    """The rows of a statement with one parameter. Refused when the table cannot take a line."""
    # A column's name may hold a %, which the driver would take for a parameter.
    text = statement.as_string().replace("%", "%%").replace(GIVEN.as_string(), "%s").encode()
    with db.translated():
        try:
            rows: list[tuple[Any, ...]] = db.driver(connection).execute(text, (given,)).fetchall()
        except (psycopg.IntegrityError, psycopg.DataError, psycopg.errors.GeneratedAlways) as error:
            # The server's own sentence quotes the row.
            found = error.diag.constraint_name or error.diag.column_name
            reason = f"{found} forbids it" if found else "a value does not fit its column"
            raise Refused(f"{table} does not take an archived row: {reason} (SQLSTATE {error.sqlstate})") from error
    return rows


def columns(connection: sa.Connection, table: str, line: str) -> list[str]:
    """The columns of a line's row. The server reads it: numbers may be longer and lists deeper than Python takes."""
    statement = sql.SQL("SELECT json_object_keys({given}::json)").format(given=GIVEN)
    return [name for (name,) in send(connection, table, statement, line) if name != JSON_NULLS]


# -- in an object -------------------------------------------------------------------------------------


class Reader:
    """One object at one line. Bites of a shard follow each other, so the last one is kept for the next."""

    last: ClassVar[Reader | None] = None

    def __init__(self, store: Store, key: str, sha256: str) -> None:
        self.of = (key, sha256)
        self._key, self._line, self._held = key, 0, list[str]()
        body = Spool()
        try:
            _fetch(store, key, sha256, body)
        except BaseException:
            body.close()
            raise
        stream = zstandard.ZstdDecompressor().stream_reader(body, closefd=True)
        self._lines = io.TextIOWrapper(io.BufferedReader(stream), encoding="utf-8", newline="\n")

    @classmethod
    def at(cls, store: Store, key: str, sha256: str, start: int) -> Reader:
        """A reader of the object that can read on from a line. ArchiveTampered when it is not what was written."""
        last = cls.last
        if last is None or last.of != (key, sha256) or last.first > start:
            if last is not None:
                last.close()
            cls.last = None
            last = cls.last = cls(store, key, sha256)
        return last

    @property
    def first(self) -> int:
        """The first line that can still be had."""
        return self._line - len(self._held)

    def close(self) -> None:
        self._lines.close()

    def parts(self, rows: int) -> Iterator[list[str]]:
        """All so many lines, some megabytes at a time."""
        start = 0
        while start < rows:
            part = self.read(start, rows - start)
            yield part
            start += len(part)

    def read(self, start: int, rows: int) -> list[str]:
        """Lines from `start` on: at most so many, and no more than fit into MOST_BYTES, but at least one."""
        if start < self._line:
            held = start - self.first
            return self._held[held : held + rows]
        self._held = []
        for _ in islice(self._lines, start - self._line):
            self._line += 1
        size = 0
        while len(self._held) < rows and size < MOST_BYTES:
            line = self._lines.readline()
            if not line:
                raise ArchiveTampered(f"archive object {self._key} has fewer rows than were written")
            self._held.append(line.removesuffix("\n"))
            self._line += 1
            size += len(line)
        return self._held


def ahead(
    store: Store, objects: Sequence[ArchivedObject], wait: Callable[[Future[Reader]], Reader]
) -> Generator[tuple[ArchivedObject, Reader], None, None]:
    """A reader of each object in turn, while the next ones are fetched; `wait` is how to wait for one.

    ArchiveTampered for the first that is not what was written.
    """
    pool, fetched = ThreadPoolExecutor(_AHEAD), deque[Future[Reader]]()
    coming = iter(objects)

    def fetch(number: int) -> None:
        for one in islice(coming, number):
            fetched.append(pool.submit(Reader, store, one.key, one.sha256))

    try:
        fetch(_AHEAD)
        for one in objects:
            reader = wait(fetched[0])
            fetched.popleft()
            fetch(1)
            try:
                yield one, reader
            finally:
                reader.close()
    finally:
        for future in fetched:
            future.add_done_callback(_drop)
        pool.shutdown(wait=False, cancel_futures=True)


def _drop(future: Future[Reader]) -> None:
    if not future.cancelled() and future.exception() is None:
        future.result().close()


def _fetch(store: Store, key: str, sha256: str, body: IO[bytes]) -> None:
    digest = hashlib.sha256()
    try:
        for chunk in store.read(key):
            digest.update(chunk)
            body.write(chunk)
    except Missing as error:
        raise ArchiveTampered(f"archive object {key} is missing") from error
    if digest.hexdigest() != sha256:
        raise ArchiveTampered(f"archive object {key} has other bytes than were written")
    body.seek(0)
