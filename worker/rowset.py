"""The old rows of one log table as a set: counted, sliced, windowed, streamed out and deleted by statements.

One predicate (`eligible`) serves plan, claim and verify, so they cannot disagree. Access paths are those
measured in performance.md: block (TID) ranges where much goes, (company, age) index order where little does.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any
from uuid import UUID

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql

from worker.db import Tid
from worker.job import Amount, Batch, Left, Shard, Tally, Target
from worker.layouts.model import Keep, LogTable

# A window of blocks is the unit in which expired rows are located; about 2,500 rows of an activity log.
WINDOW_BLOCKS = 64
SHARD_ROWS = 100_000
MOST_SHARDS = 16
# Reading a table of this many blocks (512 MB) costs less than the random reads of index order.
SMALL_TABLE_BLOCKS = 65_536
# Above this share of expired rows one read of a larger table pays for itself.
LARGE_SHARE = 0.04
_WORD = (1 << 64) - 1
_CTID: sa.ColumnClause[Any] = sa.column("ctid", Tid())


@dataclass(frozen=True, kw_only=True)
class RowSet:
    """Rows of `log` older than `cutoff`, of `companies` (empty: all), but for those a keep holds back."""

    log: LogTable
    cutoff: datetime
    companies: tuple[UUID, ...]
    keeps: tuple[Keep, ...]

    # -- predicates -----------------------------------------------------------------------------------

    @property
    def old(self) -> sa.ColumnElement[bool]:
        """Old enough, and of a company asked for; some of these rows stay."""
        terms = [self.log.age < self.cutoff]
        if self.companies and self.log.company is not None:
            terms.append(self.log.company.in_(self.companies))
        return sa.and_(*terms)

    @property
    def eligible(self) -> sa.ColumnElement[bool]:
        """The rows that go."""
        return sa.and_(self.old, *(~keep.rows for keep in self.keeps))

    # -- counting -------------------------------------------------------------------------------------

    def count(self, connection: sa.Connection) -> tuple[tuple[Target, ...], tuple[Left, ...]]:
        """What goes and what stays, per company.

        All old rows less those each keep holds back: semi-joins that start at the few open issues and live runs,
        where one scan that asks every keep of every row takes three times as long.
        """
        goes = self._counts(connection)
        left = []
        for place, keep in enumerate(self.keeps):
            stays = self._counts(connection, keep.rows, *(~earlier.rows for earlier in self.keeps[:place]))
            for company, (rows, size, mixed) in stays.items():
                left.append(Left(table=self.log.name, company=company, reason=keep.reason, rows=rows))
                total = goes[company]
                goes[company] = (total[0] - rows, total[1] - size, total[2] ^ mixed)
        targets = (
            Target(table=self.log.name, company=company, rows=rows, bytes=size, digest=f"{mixed & _WORD:016x}")
            for company, (rows, size, mixed) in goes.items()
            if rows
        )
        return (
            tuple(sorted(targets, key=lambda one: one.company or "")),
            tuple(sorted(left, key=lambda one: (one.company or "", one.reason))),
        )

    def _counts(
        self, connection: sa.Connection, *terms: sa.ColumnElement[bool]
    ) -> dict[str | None, tuple[int, int, int]]:
        """Per company: rows, bytes and the XOR of the keys' hashes, which tells one set of rows from another."""
        company = sa.null() if self.log.company is None else self.log.company
        query = sa.select(
            company.label("company"),
            sa.func.count(),
            sa.func.sum(self._size()),
            sa.func.bit_xor(sa.func.hashtextextended(sa.cast(self.log.key, sa.Text), 0)),
        ).where(self.old, *terms)
        if self.log.company is not None:
            query = query.group_by(self.log.company)
        return {
            None if whose is None else str(whose): (rows, int(size), mixed)
            for whose, rows, size, mixed in connection.execute(query)
            if rows
        }

    def overdue(self, connection: sa.Connection) -> tuple[int, datetime | None]:
        """How many rows go, and the age column of the oldest of them."""
        query = sa.select(sa.func.count(), sa.func.min(self.log.age)).where(self.eligible)
        rows, oldest = connection.execute(query).one()
        return rows, oldest

    # -- slicing --------------------------------------------------------------------------------------

    def shards(self, connection: sa.Connection, targets: Sequence[Target], *, archive: bool) -> Iterator[Shard]:
        """Slices that together hold every eligible row, by the cheaper access path."""
        targets = [one for one in targets if one.rows]
        if not targets:
            return iter(())
        if self._by_blocks(connection, targets, archive=archive):
            return self._block_shards(connection)
        return self._company_shards(connection, targets)

    def _by_blocks(self, connection: sa.Connection, targets: Sequence[Target], *, archive: bool) -> bool:
        if not self.log.indexed or any(one.company is None for one in targets):
            return True
        blocks, tuples = self._extent(connection)
        rows = sum(one.rows for one in targets)
        if archive:
            # One object a bite, of one company, instead of one for each company whose rows share the blocks.
            return False
        return blocks <= SMALL_TABLE_BLOCKS or rows >= LARGE_SHARE * tuples

    def _extent(self, connection: sa.Connection) -> tuple[int, float]:
        """The table's blocks now, and its rows as the planner estimates them."""
        name = sa.cast(self._qualified(), postgresql.REGCLASS)
        blocks = sa.func.pg_relation_size(name) / sa.func.current_setting("block_size").cast(sa.BigInteger)
        tuples = (
            sa.select(sa.column("reltuples"))
            .select_from(sa.table("pg_class", schema="pg_catalog"))
            .where(sa.column("oid") == name)
            .scalar_subquery()
        )
        row = connection.execute(sa.select(blocks, tuples)).one()
        return int(row[0]), max(float(row[1]), 0.0)

    def _block_shards(self, connection: sa.Connection) -> Iterator[Shard]:
        # Where old rows are is enough here: what a keep holds back is few, and asking would cost a second plan.
        blocks, _ = self._extent(connection)
        first = sa.func.generate_series(0, max(blocks - 1, 0), WINDOW_BLOCKS).column_valued("first")
        inside = (
            sa.select(sa.func.count())
            .select_from(self.log.table)
            .where(_tid(first) <= _CTID, _tid(first + WINDOW_BLOCKS) > _CTID, self.old)
            .scalar_subquery()
        )
        counted = connection.execute(sa.select(first, inside))
        windows = sorted((int(block), int(rows)) for block, rows in counted if rows)
        total = sum(rows for _, rows in windows)
        number = min(MOST_SHARDS, max(1, total // SHARD_ROWS))
        share, held, rows_held = -(-total // number), [], 0
        for block, rows in windows:
            held.append([block, rows])
            rows_held += rows
            if rows_held >= share:
                yield _block_shard(held, rows_held)
                held, rows_held = [], 0
        if held:
            yield _block_shard(held, rows_held)

    def _company_shards(self, connection: sa.Connection, targets: Sequence[Target]) -> Iterator[Shard]:
        company = self._known_company()
        for target in targets:
            oldest = connection.execute(
                sa.select(sa.func.min(self.log.age)).where(company == sa.literal(target.company, sa.Uuid()), self.old)
            ).scalar_one()
            number = min(MOST_SHARDS, max(1, target.rows // SHARD_ROWS))
            step = (self.cutoff - oldest) / number
            for part in range(number):
                spec = {
                    "company": target.company,
                    "from": (oldest + step * part).isoformat(),
                    "to": self.cutoff.isoformat() if part == number - 1 else (oldest + step * (part + 1)).isoformat(),
                }
                yield Shard(key=f"{target.company}:{part}", rows=target.rows // number, spec=spec)

    # -- one batch ------------------------------------------------------------------------------------

    def claim(
        self,
        connection: sa.Connection,
        shard: Shard,
        after: Mapping[str, Any] | None,
        limit: int,
        *,
        contended: bool,
    ) -> Batch | None:
        """The next window of about `limit` old rows past the cursor; contended: just the rows nobody holds."""
        batch = (
            self._next_blocks(shard, after, limit)
            if "blocks" in shard.spec
            else self._next_in_index_order(connection, shard, after, limit)
        )
        if batch is None or not contended:
            return batch
        free = connection.scalars(
            sa.select(self.log.key)
            .where(batch.window, self.eligible)
            .with_for_update(of=self.log.table, skip_locked=True)
        ).all()
        window = sa.and_(batch.window, self.log.key == sa.any_(sa.literal(list(free), sa.ARRAY(self.log.key.type))))
        return Batch(after=batch.after, window=window, exhausted=batch.exhausted)

    def _next_blocks(self, shard: Shard, after: Mapping[str, Any] | None, limit: int) -> Batch | None:
        """Uses a TID range scan. Windows that follow each other are taken together, up to the limit."""
        begin, end, taken = -1, -1, 0
        cursor = after["block"] if after else 0
        windows = shard.spec["blocks"]
        for block, rows in windows:
            start, stop = max(block, cursor), block + WINDOW_BLOCKS
            if start >= stop:
                continue
            if begin < 0:
                begin = end = start
            if start != end or taken >= limit:
                break
            per_block = max(rows / WINDOW_BLOCKS, 1e-9)
            room = max(1, int((limit - taken) / per_block))
            end = min(stop, start + room)
            taken += max(1, round((end - start) * per_block))
        if begin < 0:
            return None
        return Batch(
            after={"block": end},
            window=sa.and_(_tid(sa.literal(begin)) <= _CTID, _tid(sa.literal(end)) > _CTID),
            exhausted=end >= windows[-1][0] + WINDOW_BLOCKS,
        )

    def _next_in_index_order(
        self, connection: sa.Connection, shard: Shard, after: Mapping[str, Any] | None, limit: int
    ) -> Batch | None:
        """Uses the index on (company, age); the key settles ties of age."""
        age, key = self.log.age, self.log.key
        spec = shard.spec
        inside = [
            self._known_company() == sa.literal(spec["company"], sa.Uuid(as_uuid=False)),
            age >= datetime.fromisoformat(spec["from"]),
            age < datetime.fromisoformat(spec["to"]),
        ]
        if after:
            # The plain bound on age lets the index start there; the pair alone would not.
            at = datetime.fromisoformat(after["age"])
            inside += [age >= at, sa.tuple_(age, key) > sa.tuple_(sa.literal(at), self._key(after["key"]))]
        last = connection.execute(
            sa.select(age, key).where(*inside).order_by(age, key).offset(limit - 1).limit(1)
        ).one_or_none()
        if last is None:
            return Batch(after=dict(after or {}), window=sa.and_(*inside), exhausted=True)
        window = [
            age <= last[0],
            sa.tuple_(age, key) <= sa.tuple_(sa.literal(last[0]), self._key(str(last[1]))),
        ]
        return Batch(
            after={"age": last[0].isoformat(), "key": str(last[1])},
            window=sa.and_(*inside, *window),
            exhausted=False,
        )

    def lines(self, batch: Batch) -> sa.Select[Any]:
        """Company, age, address and the whole row as JSON (every column, known to us or not) of a batch."""
        return sa.select(
            self._company(),
            sa.cast(self.log.age, sa.Text),
            _CTID,
            sa.func.row_to_json(self.log.table.table_valued()),
        ).where(self._rows(batch))

    def delete(self, connection: sa.Connection, batch: Batch) -> Tally:
        """Delete the batch's rows; the tally has them per company."""
        gone = (
            sa.delete(self.log.table)
            .where(self._rows(batch))
            .returning(self._company().label("company"), self._size().label("size"))
            .cte("gone")
        )
        query = sa.select(gone.c.company, sa.func.count(), sa.func.sum(gone.c.size)).group_by(gone.c.company)
        return Tally(
            {(self.log.name, company): Amount(rows, int(size)) for company, rows, size in connection.execute(query)}
        )

    def _rows(self, batch: Batch) -> sa.ColumnElement[bool]:
        return batch.window if batch.exact else sa.and_(batch.window, self.eligible)

    # -- parts ----------------------------------------------------------------------------------------

    def _company(self) -> sa.ColumnElement[Any]:
        return sa.null() if self.log.company is None else sa.cast(self.log.company, sa.Text)

    def _known_company(self) -> sa.Column[UUID]:
        if self.log.company is None:
            raise TypeError(f"{self.log.name} has no company")
        return self.log.company

    def _size(self) -> sa.ColumnElement[int]:
        return sa.func.pg_column_size(self.log.table.table_valued())

    def _key(self, text: str) -> sa.ColumnElement[Any]:
        return sa.cast(sa.literal(text), self.log.key.type)

    def _qualified(self) -> sa.ColumnElement[str]:
        quote = postgresql.dialect().identifier_preparer.format_table  # type: ignore[no-untyped-call]
        return sa.literal(quote(self.log.table))


def at(batch: Batch, addresses: str) -> Batch:
    """The batch as exactly the rows at these addresses (a tid[] as text). Good in the same snapshot only."""
    rows = sa.any_(sa.cast(sa.literal(addresses), sa.ARRAY(Tid()))) == _CTID
    return Batch(after=batch.after, window=rows, exhausted=batch.exhausted, exact=True)


def _tid(block: sa.ColumnElement[int]) -> sa.ColumnElement[str]:
    return sa.cast(sa.func.format("(%s,0)", block), Tid())


def _block_shard(windows: list[list[int]], rows: int) -> Shard:
    return Shard(key=f"blocks:{windows[0][0]}", rows=rows, spec={"blocks": windows})
