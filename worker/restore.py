"""Archived rows back into their table, byte for byte: what PostgreSQL says of a row afterwards is its line again.

A row that is there already, and is the same, counts as restored; one that is there and differs is never touched.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any
from uuid import UUID

import sqlalchemy as sa
from psycopg import sql

from worker import db, ledger, ledger_shards, lines, livetable, triggers, vouched
from worker.errors import Contended, Refused, UnderWay
from worker.fit import Fit
from worker.job import Shard
from worker.lines import Reader
from worker.plans import Amount, Tally, Target
from worker.states import ACTIVE

if TYPE_CHECKING:
    from worker.archive import ArchivedObject
    from worker.layouts.model import LogTable
    from worker.ledger import Run
    from worker.livetable import Column
    from worker.means import Means
    from worker.storage import Store

_SHOWN = 3
# So many rows are left out together while others hold what one of them waits for.
_LEFT_OUT = 500


def require_none(connection: sa.Connection, table: str) -> None:
    """Raise UnderWay, naming the run, while archived rows of a table are being put back."""
    runs, pruned = ledger.RUNS.alias("runs"), ledger.RUNS.alias("pruned")
    whose = sa.cast(pruned.c.id, sa.Text) == runs.c.params["run"].astext
    query = sa.select(runs.c.id).join_from(runs, pruned, whose)
    query = query.where(pruned.c.params["table"].astext == table, runs.c.state.in_(ACTIVE))
    if (busy := connection.scalar(query.limit(1))) is not None:
        raise UnderWay(f"rows of {table} are being put back by run {busy}; stop it, or wait for its end")


def require_not_restored(connection: sa.Connection, pruned: UUID) -> None:
    """Refused, naming the run, when another has put rows of this one back."""
    runs = ledger.RUNS.c
    put = sa.exists(ledger.SHARDS.c.run_id).where(ledger.SHARDS.c.run_id == runs.id, ledger.SHARDS.c.rows > 0)
    query = sa.select(runs.id).where(runs.params["run"].astext == str(pruned), put).limit(1)
    if (by := connection.scalar(query)) is not None:
        raise Refused(f"run {pruned} cannot go on: run {by} has put rows of it back; start a new run")


class Restore:
    """What a step can do to put the archive of one run back."""

    def __init__(self, means: Means, run: UUID | None, companies: tuple[UUID, ...]) -> None:
        if run is None:
            raise Refused("--run says whose rows are to be put back; see `runs list`")
        self._means = means
        self._connection = means.connection
        self._run = self._pruned(run)
        self._companies = {str(one) for one in companies}
        self._absent_rows: tuple[Target, ...] | None = None

    @property
    def log(self) -> LogTable:
        """The table the rows are of."""
        return self._means.layout.log(str(self._run.params["table"]))

    @cached_property
    def objects(self) -> list[ArchivedObject]:
        """The archive objects of the companies asked for. Refused when there are none."""
        found = ledger_shards.objects(self._connection, self._run.id)
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
        """Refused when the archive is not what was written, or when the table cannot take all of it as it is."""
        settings, companies = self._means.settings, self._companies
        vouched.require(self._connection, settings, self._store(), self._run, self.objects, companies=companies)
        self._absent_rows = self._look(Fit(self._connection, self.log, self._json_columns))

    def targets(self) -> tuple[Target, ...]:
        """The rows that are not in the table, per company. Refused when one is there that says otherwise."""
        if self._absent_rows is None:
            self._absent_rows = self._look(None)
        return self._absent_rows

    def _look(self, fit: Fit | None) -> tuple[Target, ...]:
        """Read every object once, whole, and compare each with its digest and its rows with the table."""
        found: dict[str | None, tuple[int, int, int]] = {}
        other: list[str] = []
        wait = partial(db.await_result, self._connection)
        with closing(lines.ahead(self._store(), self.objects, wait)) as readers:
            for one, reader in readers:
                rows, size, mixed = found.get(one.company, (0, 0, 0))
                for number, part in enumerate(reader.parts(one.rows)):
                    if fit and not number:
                        # The rows of an object are of one snapshot, and have the same columns.
                        fit.require_columns(self._columns_of(part))
                    absent, differing = self._compare(part)
                    other += differing
                    if fit:
                        fit.count(list(absent.values()))
                    rows, size = rows + len(absent), size + _size(absent.values())
                    for key in absent:
                        mixed ^= int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest())
                found[one.company] = (rows, size, mixed)
        if other:
            raise Refused(_others(self.log.name, other) + ("; nothing was put back" if fit else ""))
        if fit:
            fit.require()
        return self._per_company(found)

    def archived(self) -> tuple[Target, ...]:
        """The rows of the archive, in the table or not, per company."""
        found: dict[str | None, tuple[int, int, int]] = {}
        for one in self.objects:
            found[one.company] = (found.get(one.company, (0,))[0] + one.rows, 0, 0)
        return self._per_company(found)

    def _per_company(self, found: Mapping[str | None, tuple[int, int, int]]) -> tuple[Target, ...]:
        """Of each company: rows, bytes, digest."""
        return tuple(
            Target(table=self.log.name, company=company, rows=rows, bytes=size, digest=f"{mixed:016x}")
            for company, (rows, size, mixed) in sorted(found.items(), key=lambda item: item[0] or "")
            if rows
        )

    def shards(self) -> Iterator[Shard]:
        """One an object."""
        for one in self.objects:
            spec = {"company": one.company, "key": one.key, "sha256": one.sha256}
            yield Shard(key=one.key, rows=one.rows, spec=spec)

    def next(self, shard: Shard, after: Mapping[str, Any] | None, limit: int) -> dict[str, Any]:
        """Which lines of a shard's object come next, as the cursor behind them."""
        start = after["line"] if after else 0
        if self._means.contended:
            # Each conflict halves the limit: rows of a parent that is held for long would be left out one by one.
            limit = max(limit, _LEFT_OUT)
        found = self._reader(shard.spec, start).read(start, min(limit, shard.rows - start))
        return {**shard.spec, "from": start, "line": start + len(found)}

    def put(self, cursor: Mapping[str, Any]) -> Tally:
        """Insert the lines before a cursor. Refused, and rolled back, when a row does not come out as its line.

        Where others hold what was waited for before, its rows are left out: the second sweep comes back for them.
        """
        start, end = cursor["from"], cursor["line"]
        found = self._reader(cursor, start).read(start, end - start)
        absent = list(self._absent(found).values())
        if not self._means.contended:
            self._put(absent, cursor)
        else:
            try:
                with self._connection.begin_nested():
                    self._connection.exec_driver_sql("SET LOCAL lock_timeout = '100ms'")
                    self._put(absent, cursor)
            except Contended:
                absent = []
        return Tally({(self.log.name, cursor["company"]): Amount(len(absent), _size(absent))})

    def _put(self, absent: Sequence[str], cursor: Mapping[str, Any]) -> None:
        if not absent:
            return
        rows, same = self._insert(absent)
        if same and triggers.after_insert(self._connection, self.log.name):
            # What RETURNING says is what was before them, and some wait for the end of the transaction.
            self._connection.exec_driver_sql("SET CONSTRAINTS ALL IMMEDIATE")
            same = not any(self._compare(absent))
        if rows != len(absent) or not same:
            raise Refused(f"rows of {cursor['key']} do not come out of {self.log.name} as they are in the archive")

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

    def _reader(self, spec: Mapping[str, Any], start: int) -> Reader:
        read = partial(Reader.at, self._store(), spec["key"], spec["sha256"], start)
        return db.beside(self._connection, read)()

    # -- the table ------------------------------------------------------------------------------------

    def _absent(self, part: Sequence[str]) -> dict[str, str]:
        """The lines by key whose rows are not in the table. Refused when one is there that says otherwise."""
        absent, other = self._compare(part)
        if other:
            raise Refused(_others(self.log.name, other))
        return absent

    def _compare(self, part: Sequence[str]) -> tuple[dict[str, str], list[str]]:
        """The lines by key whose rows are not in the table, and the keys of those that are there and differ."""
        keyed = dict(zip(_keys(part, self.log.key.name), part, strict=True))
        query = sql.SQL("SELECT t.{key}::text, {line} FROM {table} t WHERE t.{key} = ANY ({given}::text[]::{kind}[])")
        names = self._names() | {"kind": sql.SQL(self.log.key.type.compile(self._connection.dialect))}
        statement = query.format(line=self._line_of("t", self._columns_of(part)), **names)
        there = lines.send(self._connection, self.log.name, statement, list(keyed))
        differing = [key for key, line in there if keyed[key] != line]
        present = {key for key, _ in there}
        return {key: line for key, line in keyed.items() if key not in present}, sorted(differing)

    def _insert(self, part: Sequence[str]) -> tuple[int, bool]:
        """How many rows were inserted, and whether each is its line again."""
        names = self._columns_of(part)
        computed = {one.name for one in self._columns if one.generated}
        given = [name for name in names if name not in computed]
        statement = sql.SQL(
            "WITH given AS (SELECT line FROM string_to_table({given}, E'\\n') AS l (line)), "
            # OFFSET 0: once a line, and not once a column; a join with the function takes longer.
            "made AS (SELECT line, json_populate_record(NULL::{table}, line::json) AS r FROM given OFFSET 0), "
            "put AS (INSERT INTO {table} ({columns}) OVERRIDING SYSTEM VALUE SELECT {values} FROM made "
            "ON CONFLICT ({key}) DO NOTHING "
            "RETURNING {line} AS line) "
            "SELECT (SELECT count(*) FROM put), "
            "(SELECT bit_xor(hashtextextended(line, 0)) FROM put) = "
            "(SELECT bit_xor(hashtextextended(line, 0)) FROM given)"
        ).format(
            columns=sql.SQL(", ").join(map(sql.Identifier, given)),
            values=lines.values_of("r", given, self._json_columns, nulls=lines.marked(part)),
            line=self._line_of(self.log.name, names),
            **self._names(),
        )
        (row,) = lines.send(self._connection, self.log.name, statement, "\n".join(part))
        return int(row[0]), bool(row[1])

    @cached_property
    def _json_columns(self) -> dict[str, str]:
        return livetable.of_json(self._columns)

    @cached_property
    def _columns(self) -> tuple[Column, ...]:
        return livetable.columns(self._connection, self.log.name)

    def _columns_of(self, part: Sequence[str]) -> list[str]:
        return lines.columns(self._connection, self.log.name, part[0])

    def _line_of(self, table: str, names: Sequence[str]) -> sql.Composable:
        return lines.line_of(table, names, self._json_columns)

    def _names(self) -> dict[str, sql.Composable]:
        return {
            "given": lines.GIVEN,
            "table": sql.Identifier("public", self.log.name),
            "key": sql.Identifier(self.log.key.name),
        }


def _others(table: str, keys: Sequence[str]) -> str:
    """Names rows that are there with other content."""
    more = f" and {len(keys) - _SHOWN} more" if len(keys) > _SHOWN else ""
    return f"{table} has rows with these ids and other content: {', '.join(keys[:_SHOWN])}{more}"


def _size(part: Iterable[str]) -> int:
    """Bytes of lines in an object."""
    return sum(len(line.encode()) + 1 for line in part)


def _keys(part: Iterable[str], column: str) -> Iterator[str]:
    # The key is the first column of every log; to parse the whole line takes ten times as long.
    first = re.compile(rf'{{"{column}":(?:"([^"\\]*)"|(-?[0-9]+))[,}}]').match
    for line in part:
        match = first(line)
        yield (match[1] or match[2]) if match else str(json.loads(line)[column])
