"""The old rows of one table as a set: counted, windowed, streamed out and deleted by statements.

One predicate (`eligible`) serves plan, claim and verify, so they cannot disagree. worker/slices.py lays them out.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any
from uuid import UUID

import sqlalchemy as sa

from worker.blocks import within
from worker.errors import WorkerError
from worker.job import Batch, Shard
from worker.layouts.model import Keep, Records
from worker.plans import Amount, Left, Tally, Target
from worker.retention import Cutoffs

# A window of blocks is the unit in which expired rows are located; about 2,500 rows of an activity log.
WINDOW_BLOCKS = 64
_WORD = (1 << 64) - 1
# A day from where there is room for every timezone.
_FIRST_DAY = datetime(1, 1, 2, tzinfo=UTC)


@dataclass(frozen=True, kw_only=True)
class RowSet:
    """Old rows of a table, of `companies` (empty: all), but for those a keep holds back."""

    what: Records
    cutoffs: Cutoffs
    companies: tuple[UUID, ...]
    keeps: tuple[Keep, ...]

    # -- predicates -----------------------------------------------------------------------------------

    @property
    def old(self) -> sa.ColumnElement[bool]:
        """Old enough, and of a company asked for; some of these rows stay."""
        terms = [self.cutoffs.old(self.what.age, self.what.company)]
        if self.what.among is not None:
            terms.append(self.what.among)
        if self.companies and self.what.company is not None:
            terms.append(self.what.company.in_(self.companies))
        return sa.and_(*terms)

    @property
    def eligible(self) -> sa.ColumnElement[bool]:
        """The rows that go."""
        return sa.and_(self.old, *(~keep.rows for keep in self.keeps))

    @property
    def unread(self) -> sa.ColumnElement[bool]:
        """The rows that go as far as can be told without a look into their texts."""
        kept = (keep.rows if keep.unread is None else keep.unread for keep in self.keeps)
        return sa.and_(self.old, *(~one for one in kept))

    @property
    def needles(self) -> tuple[str, ...]:
        """What the keeps look for in the texts of every row."""
        return tuple(one for keep in self.keeps for one in keep.needles)

    # -- counting -------------------------------------------------------------------------------------

    def count(self, connection: sa.Connection, *, exact: bool = True) -> tuple[tuple[Target, ...], tuple[Left, ...]]:
        """What goes and what stays, per company.

        Unless `exact`, without a look at every row: without sizes and digests, and with those among the rows that go
        that only a keep which looks into texts holds back.
        All old rows less those each keep holds back: semi-joins that start at the few open issues and live runs.
        """
        goes = self._counts(connection, measured=exact)
        left, earlier = [], list[sa.ColumnElement[bool]]()
        for keep in self.keeps:
            if keep.needles and not exact:
                continue
            stays = self._counts(connection, keep.rows, *earlier, measured=exact)
            if stays:
                earlier.append(~keep.rows)
            for company, (rows, size, mixed) in stays.items():
                left.append(Left(table=self.what.name, company=company, reason=keep.reason, rows=rows))
                total = goes[company]
                goes[company] = (total[0] - rows, total[1] - size, total[2] ^ mixed)
        return self._found(goes, left)

    def remaining(self, connection: sa.Connection) -> tuple[tuple[Target, ...], tuple[Left, ...]]:
        """The same as `count`, without sizes and digests, where most old rows are gone.

        One scan that asks each keep of the few that are there: to step over what is gone once a keep takes longer.
        """
        company = sa.null() if self.what.company is None else self.what.company
        asked = [(keep.rows, sa.literal(number, sa.Integer)) for number, keep in enumerate(self.keeps)]
        kept = sa.case(*asked, else_=sa.null()) if asked else sa.null()
        query = sa.select(company, kept, sa.func.count()).where(self.old).group_by(sa.text("1, 2"))
        goes, left = dict[str | None, tuple[int, int, int]](), list[Left]()
        for of, number, rows in connection.execute(query):
            whose = None if of is None else str(of)
            if number is None:
                goes[whose] = (rows, 0, 0)
            else:
                left.append(Left(table=self.what.name, company=whose, reason=self.keeps[number].reason, rows=rows))
        return self._found(goes, left)

    def _found(
        self, goes: Mapping[str | None, tuple[int, int, int]], left: Iterable[Left]
    ) -> tuple[tuple[Target, ...], tuple[Left, ...]]:
        targets = (
            Target(table=self.what.name, company=company, rows=rows, bytes=size, digest=f"{mixed & _WORD:016x}")
            for company, (rows, size, mixed) in goes.items()
            if rows
        )
        return (
            tuple(sorted(targets, key=lambda one: one.company or "")),
            tuple(sorted(left, key=lambda one: (one.company or "", one.reason))),
        )

    def _counts(
        self, connection: sa.Connection, *terms: sa.ColumnElement[bool], measured: bool
    ) -> dict[str | None, tuple[int, int, int]]:
        """Per company: rows, bytes and the XOR of the keys' hashes, which tells one set of rows from another."""
        company = sa.null() if self.what.company is None else self.what.company
        size: sa.ColumnElement[int] = sa.literal(0)
        digest: sa.ColumnElement[int] = sa.literal(0)
        if measured:
            size = sa.func.sum(self.size)
            digest = sa.func.bit_xor(sa.func.hashtextextended(sa.cast(self.what.key, sa.Text), 0))
        query = sa.select(company.label("company"), sa.func.count(), size, digest).where(self.old, *terms)
        if self.what.company is not None:
            query = query.group_by(self.what.company)
        return {
            None if whose is None else str(whose): (rows, int(size), mixed)
            for whose, rows, size, mixed in connection.execute(query)
            if rows
        }

    def overdue(self, connection: sa.Connection) -> tuple[int, datetime | None]:
        """How many rows go, and the age column of the oldest of them."""
        query = sa.select(sa.func.count(), tellable(sa.func.min(self.what.age))).where(self.eligible)
        rows, oldest = connection.execute(query).one()
        return rows, oldest

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
        if batch is None or batch.window is None or not contended:
            return batch
        free = connection.scalars(
            sa.select(self.what.key)
            .where(batch.window, self.eligible)
            .with_for_update(of=self.what.table, skip_locked=True, key_share=self.what.updated)
        ).all()
        window = sa.and_(batch.window, self.what.key == sa.any_(sa.literal(list(free), sa.ARRAY(self.what.key.type))))
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
            window=within(begin, end),
            exhausted=end >= windows[-1][0] + WINDOW_BLOCKS,
        )

    def _next_in_index_order(
        self, connection: sa.Connection, shard: Shard, after: Mapping[str, Any] | None, limit: int
    ) -> Batch | None:
        """Uses the index on (company, age); the key settles ties of age."""
        age = self.what.age
        spec = shard.spec
        inside = [
            self.company == sa.literal(spec["company"], sa.Uuid(as_uuid=False)),
            age < datetime.fromisoformat(spec["to"]),
        ]
        if spec["from"] is not None:
            inside.append(age >= datetime.fromisoformat(spec["from"]))
        if after:
            # The plain bound on age lets the index start there; the pair alone would not.
            at = datetime.fromisoformat(after["age"])
            inside += [age >= at, self._beyond(at, after["key"])]
        last, tied = self._bound(connection, inside, limit)
        if last is None:
            return Batch(after=dict(after or {}), window=sa.and_(*inside), exhausted=True)
        upto = [age <= last]
        if tied is not None:
            upto.append(~self._beyond(last, tied))
        return Batch(after={"age": last.isoformat(), "key": tied}, window=sa.and_(*inside, *upto), exhausted=False)

    def _bound(
        self, connection: sa.Connection, inside: list[sa.ColumnElement[bool]], limit: int
    ) -> tuple[datetime | None, str | None]:
        """The age up to which a window has about `limit` rows, and the key up to which of those so old.

        Without a key: all of them. The index alone can tell then.
        """
        age, key = self.what.age, self.what.key
        # Rows older than can be told are of one window, whose end can be.
        query = sa.select(tellable(age)).where(*inside).order_by(age).offset(limit - 1).limit(1)
        last = connection.scalar(query)
        if last is None:
            return None, None
        same = sa.select(sa.literal(1)).where(*inside, age == last).offset(limit).limit(1)
        if connection.scalar(same) is None:
            return last, None
        pair = sa.select(tellable(age), key).where(*inside).order_by(age, key).offset(limit - 1).limit(1)
        row = connection.execute(pair).one()
        return row[0], str(row[1])

    def _beyond(self, age: datetime, key: str | None) -> sa.ColumnElement[bool]:
        """Older than so old, or as old and with a larger key."""
        if key is None:
            return self.what.age > age
        found: sa.ColumnElement[bool] = sa.tuple_(self.what.age, self.what.key) > sa.tuple_(
            sa.literal(age), self._key(key)
        )
        return found

    def delete(self, connection: sa.Connection, batch: Batch) -> Tally:
        """Delete the batch's rows; the tally has them per company."""
        delete = sa.delete(self.what.table).where(self.rows(batch))
        if batch.amounts is None:
            gone = delete.returning(self.whose.label("company"), self.size.label("size")).cte("gone")
            return totals(connection, self.what.name, gone)
        # To have each row's company back takes nearly as long as to delete it: if as many went, it was these.
        tally = Tally({(self.what.name, whose): amount for whose, amount in batch.amounts.items()})
        if (number := connection.execute(delete).rowcount) != tally.total.rows:
            raise WorkerError(
                f"of {tally.total.rows} rows of {self.what.name} that were to go {number} went, as if a trigger kept "
                "the others; nothing was deleted"
            )
        return tally

    def rows(self, batch: Batch) -> sa.ColumnElement[bool]:
        """The rows of a batch that go."""
        window = self.window(batch)
        return window if batch.exact else sa.and_(window, self.eligible)

    def window(self, batch: Batch) -> sa.ColumnElement[bool]:
        """Where a batch's rows are; some that are there stay."""
        if batch.window is None:
            raise TypeError("the batch says no rows")
        return batch.window

    # -- parts ----------------------------------------------------------------------------------------

    @property
    def whose(self) -> sa.ColumnElement[Any]:
        """A row's company as text."""
        return sa.null() if self.what.company is None else sa.cast(self.what.company, sa.Text)

    @property
    def company(self) -> sa.Column[UUID]:
        """The column of a row's company. TypeError where rows belong to the instance."""
        if self.what.company is None:
            raise TypeError(f"{self.what.name} has no company")
        return self.what.company

    @property
    def size(self) -> sa.ColumnElement[int]:
        """A row's bytes as they are stored."""
        return sa.func.pg_column_size(self.what.table.table_valued())

    def _key(self, text: str) -> sa.ColumnElement[Any]:
        return sa.cast(sa.literal(text), self.what.key.type)


def tellable(age: sa.ColumnElement[datetime]) -> sa.ColumnElement[datetime]:
    """An age that Python can hold: `-infinity` and years before the first are its first day."""
    first = sa.literal(_FIRST_DAY)
    return sa.case((age < first, first), else_=age)


def totals(connection: sa.Connection, table: str, changed: sa.CTE, *notes: sa.CTE) -> Tally:
    """Execute a statement that changes rows (its company and size are in `changed`) and notes them; its tally."""
    query = sa.select(changed.c.company, sa.func.count(), sa.func.sum(changed.c.size)).group_by(changed.c.company)
    for note in notes:
        query = query.add_cte(note)
    rows = connection.execute(query)
    return Tally({(table, whose): Amount(number, int(size)) for whose, number, size in rows})
