"""Archived rows back into their table, byte for byte: what PostgreSQL says of a row afterwards is its line again.

A row that is there already, and is the same, counts as restored; one that is there and differs is never touched.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import TYPE_CHECKING, Any, ClassVar
from uuid import UUID

import sqlalchemy as sa
import zstandard
from psycopg import sql

from worker import archive, audit, db, layouts, ledger
from worker.errors import ArchiveTampered, Refused, UnderWay
from worker.job import Amount, Shard, Tally, Target
from worker.states import ACTIVE
from worker.storage import read_digest

if TYPE_CHECKING:
    from worker.archive import ArchivedObject
    from worker.layouts.model import LogTable
    from worker.ledger import Run
    from worker.means import Means
    from worker.storage import Store

# So much text goes to the server at once.
_MOST_BYTES = 8 << 20
_SPOOL = 8 << 20
_SHOWN = 3


class Restore:
    """What a step can do to put the archive of one run back."""

    def __init__(self, means: Means, run: UUID | None, companies: tuple[UUID, ...]) -> None:
        if run is None:
            raise Refused("--run says whose rows are to be put back; see `runs list`")
        self._means = means
        self._connection = means.connection
        self._run = self._pruned(run)
        self._companies = {str(one) for one in companies}

    @property
    def log(self) -> LogTable:
        """The table the rows are of."""
        return self._means.layout.log(str(self._run.params["table"]))

    @property
    def objects(self) -> list[ArchivedObject]:
        """The archive objects of the companies asked for. Refused when there are none."""
        found = ledger.objects(self._connection, self._run.id)
        found = [one for one in found if not self._companies or one.company in self._companies]
        if not found:
            raise Refused(f"--run: run {self._run.id} archived no row" + (" of --company" if self._companies else ""))
        return found

    def check(self) -> None:
        """Raise UnderWay while rows of the table are being pruned."""
        runs = ledger.RUNS.c
        same = sa.and_(runs.job == self._run.job, runs.params["table"].astext == self.log.name)
        busy = self._connection.scalar(sa.select(runs.id).where(same, runs.state.in_(ACTIVE)).limit(1))
        if busy is not None:
            raise UnderWay(f"{self.log.name} is being pruned by run {busy}; stop it, or wait for its end")

    def foresee(self) -> None:
        """Refused when an object or the manifest is not what was written, or when the table has other rows."""
        store, objects = self._store(), self.objects
        archive.require_intact(store, objects)
        self._require_manifest(store)
        self._require_columns(objects[0])
        for one in objects:
            for lines in self._lines_of(one):
                self._absent(lines)

    def targets(self) -> tuple[Target, ...]:
        """The rows that are not in the table, per company."""
        found: dict[str | None, tuple[int, int, int]] = {}
        for one in self.objects:
            rows, size, mixed = found.get(one.company, (0, 0, 0))
            for lines in self._lines_of(one):
                absent = self._absent(lines)
                rows, size = rows + len(absent), size + _size(absent.values())
                for key in absent:
                    mixed ^= int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest())
            found[one.company] = (rows, size, mixed)
        name = self.log.name
        return tuple(
            Target(table=name, company=company, rows=rows, bytes=size, digest=f"{mixed:016x}")
            for company, (rows, size, mixed) in sorted(found.items(), key=lambda item: item[0] or "")
            if rows
        )

    def shards(self) -> Iterator[Shard]:
        """One an object."""
        for one in self.objects:
            spec = {"company": one.company, "key": one.key, "sha256": one.sha256, "rows": one.rows}
            yield Shard(key=one.key, rows=one.rows, spec={**spec, "raw_bytes": one.raw_bytes})

    def next(self, shard: Shard, after: Mapping[str, Any] | None, limit: int) -> dict[str, Any]:
        """Which lines of a shard's object come next, as the cursor behind them."""
        spec, start = shard.spec, after["line"] if after else 0
        size = max(1, spec["raw_bytes"] // spec["rows"])
        end = min(spec["rows"], start + max(1, min(limit, _MOST_BYTES // size)))
        return {"key": spec["key"], "sha256": spec["sha256"], "company": spec["company"], "from": start, "line": end}

    def put(self, cursor: Mapping[str, Any]) -> Tally:
        """Insert the lines before a cursor. Refused, and rolled back, when a row does not come out as its line."""
        start, end = cursor["from"], cursor["line"]
        lines = _read(self._store(), cursor["key"], cursor["sha256"], start, end)
        absent = list(self._absent(lines).values())
        if absent:
            rows, same = self._insert(absent)
            if rows != len(absent) or not same:
                raise Refused(
                    f"rows of {cursor['key']} do not come out of {self.log.name} as they are in the archive"
                )
        return Tally({(self.log.name, cursor["company"]): Amount(len(absent), _size(absent))})

    # -- the archive ----------------------------------------------------------------------------------

    def _pruned(self, run: UUID) -> Run:
        found = ledger.get(self._connection, run)
        if found is None or not {"table", "archive"} <= set(found.params):
            raise Refused(f"--run: run {run} is not a run that archives rows of a log")
        if found.state in ACTIVE:
            raise UnderWay(f"--run: run {run} is under way ({found.state}); stop it first")
        return found

    def _store(self) -> Store:
        if self._means.store is None:
            raise Refused("PAPERCLIP_WORKER_S3_BUCKET is not set, and the archive is in the bucket")
        return self._means.store

    def _lines_of(self, one: ArchivedObject) -> Iterator[list[str]]:
        """An object's lines, some megabytes at a time."""
        step = max(1, _MOST_BYTES // max(1, one.raw_bytes // one.rows))
        for start in range(0, one.rows, step):
            yield _read(self._store(), one.key, one.sha256, start, min(one.rows, start + step))

    def _require_manifest(self, store: Store) -> None:
        """The signed receipt names the manifest by its digest; a run whose store failed has none."""
        receipts = audit.recent(self._connection, limit=1, run=self._run.id)
        evidence = receipts[0].to_json()["evidence"].get("archive", {}) if receipts else {}
        if "manifest" in evidence and read_digest(store, evidence["manifest"]) != evidence["sha256"]:
            raise ArchiveTampered(f"{evidence['manifest']} is missing or is not the manifest that the receipt names")

    def _require_columns(self, one: ArchivedObject) -> None:
        columns = json.loads(_read(self._store(), one.key, one.sha256, 0, 1)[0])
        table = sa.Table(self.log.name, sa.MetaData(schema="public"), *(sa.Column(name) for name in columns))
        if lacks := layouts.missing(self._connection, [table]):
            raise Refused(
                f"the archive has {', '.join(lacks)}, which the table lacks; its rows would not come back whole"
            )

    # -- the table ------------------------------------------------------------------------------------

    def _absent(self, lines: Sequence[str]) -> dict[str, str]:
        """The lines by key whose rows are not in the table. Refused when one is there that says otherwise."""
        keyed = {_key(line, self.log.key.name): line for line in lines}
        kind = sa.ARRAY(self.log.key.type)
        there = sa.cast(self.log.key, sa.Text)
        wanted = sa.any_(sa.cast(sa.literal(list(keyed), sa.ARRAY(sa.Text)), kind))
        present = set(self._connection.scalars(sa.select(there).where(self.log.key == wanted)))
        if present:
            self._require_same([keyed[key] for key in sorted(present)])
        return {key: line for key, line in keyed.items() if key not in present}

    def _require_same(self, lines: Sequence[str]) -> None:
        statement = sql.SQL(
            "SELECT t.{key}::text FROM string_to_table(%s, E'\\n') AS given (line) "
            "JOIN {table} t ON t.{key} = (json_populate_record(NULL::{table}, given.line::json)).{key} "
            "WHERE {line}::text <> given.line ORDER BY 1"
        ).format(line=self._as_line(lines[0], "t"), **self._names())
        other = [row[0] for row in self._execute(statement, lines)]
        if other:
            shown = ", ".join(other[:_SHOWN]) + (f" and {len(other) - _SHOWN} more" if len(other) > _SHOWN else "")
            raise Refused(
                f"{self.log.name} has rows with these ids and other content, and nothing was put back: {shown}"
            )

    def _insert(self, lines: Sequence[str]) -> tuple[int, bool]:
        """How many rows were inserted, and whether each is its line again."""
        columns = sql.SQL(", ").join(map(sql.Identifier, json.loads(lines[0])))
        statement = sql.SQL(
            "WITH given AS (SELECT line FROM string_to_table(%s, E'\\n') AS l (line)), "
            "put AS (INSERT INTO {table} ({columns}) SELECT {columns} FROM given, "
            "json_populate_record(NULL::{table}, given.line::json) ON CONFLICT DO NOTHING "
            "RETURNING {line}::text AS line) "
            "SELECT (SELECT count(*) FROM put), "
            "(SELECT bit_xor(hashtextextended(line, 0)) FROM put) = "
            "(SELECT bit_xor(hashtextextended(line, 0)) FROM given)"
        ).format(columns=columns, line=self._as_line(lines[0], self.log.name), **self._names())
        (row,) = self._execute(statement, lines)
        return int(row[0]), bool(row[1])

    def _as_line(self, line: str, table: str) -> sql.Composable:
        """A row as the archive has it: its columns in their order, without any the table has got since."""
        columns = (sql.SQL("{}.{}").format(sql.Identifier(table), sql.Identifier(name)) for name in json.loads(line))
        query = "row_to_json((SELECT archived_row FROM (SELECT {}) AS archived_row))"
        return sql.SQL(query).format(sql.SQL(", ").join(columns))

    def _names(self) -> dict[str, sql.Composable]:
        return {"table": sql.Identifier("public", self.log.name), "key": sql.Identifier(self.log.key.name)}

    def _execute(self, statement: sql.Composed, lines: Sequence[str]) -> list[tuple[Any, ...]]:
        with db.translated():
            rows: list[tuple[Any, ...]] = (
                db.driver(self._connection).execute(statement, ("\n".join(lines),)).fetchall()
            )
        return rows


def _size(lines: Iterable[str]) -> int:
    """Bytes of lines in an object."""
    return sum(len(line.encode()) + 1 for line in lines)


def _key(line: str, column: str) -> str:
    # The key is the first column of every log; to parse the whole line takes ten times as long.
    match = re.match(rf'{{"{column}":(?:"([^"\\]*)"|([0-9]+))[,}}]', line)
    return (match[1] or match[2]) if match else str(json.loads(line)[column])


class _Reader:
    """One object at one line. Bites of a shard follow each other, so the last one is kept for the next."""

    last: ClassVar[_Reader | None] = None

    def __init__(self, store: Store, key: str, sha256: str) -> None:
        self.of, self.line = (key, sha256), 0
        body = tempfile.SpooledTemporaryFile(max_size=_SPOOL)  # noqa: SIM115 - closed with its stream
        digest = hashlib.sha256()
        for chunk in store.read(key):
            digest.update(chunk)
            body.write(chunk)
        if digest.hexdigest() != sha256:
            raise ArchiveTampered(f"archive object {key} has other bytes than were written")
        body.seek(0)
        stream = zstandard.ZstdDecompressor().stream_reader(body, closefd=True)
        self.lines = io.TextIOWrapper(io.BufferedReader(stream), encoding="utf-8", newline="\n")


def _read(store: Store, key: str, sha256: str, start: int, end: int) -> list[str]:
    """Lines of an object, from `start` on and before `end`. ArchiveTampered when it is not what was written."""
    reader = _Reader.last
    if reader is None or reader.of != (key, sha256) or reader.line > start:
        reader = _Reader.last = _Reader(store, key, sha256)
    lines = [line.removesuffix("\n") for line in islice(reader.lines, start - reader.line, end - reader.line)]
    reader.line = end
    if len(lines) != end - start:
        raise ArchiveTampered(f"archive object {key} has fewer rows than were written")
    return lines
