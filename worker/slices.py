"""A run's rows laid out as shards, by the cheaper of two access paths measured in performance.md.

Block (TID) ranges where much goes, (company, age) index order where little does.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from datetime import datetime

import sqlalchemy as sa

from worker import blocks
from worker.job import Shard
from worker.plans import Target
from worker.rowset import WINDOW_BLOCKS, RowSet, tellable

SHARD_ROWS = 20_000
MOST_SHARDS = 16
# Reading a table of this many blocks (512 MB) costs less than the random reads of index order.
SMALL_TABLE_BLOCKS = 65_536
# Above this share of expired rows one read of a larger table pays for itself.
LARGE_SHARE = 0.04


def shards(
    rows: RowSet, connection: sa.Connection, targets: Sequence[Target], *, archive: bool = False
) -> Iterator[Shard]:
    """Slices that together hold every eligible row.

    `archive`: rows are copied out as well, so a batch should hold rows of one company where an index allows it.
    """
    targets = [one for one in targets if one.rows]
    if not targets:
        return iter(())
    if _by_blocks(rows, connection, targets, archive=archive):
        return _block_shards(rows, connection)
    return _company_shards(rows, connection, targets)


def _by_blocks(rows: RowSet, connection: sa.Connection, targets: Sequence[Target], *, archive: bool) -> bool:
    if not rows.what.indexed or any(one.company is None for one in targets):
        return True
    if archive:
        # One object a bite, of one company, instead of one for each company whose rows share the blocks.
        return False
    if blocks.number(connection, rows.what.table) <= SMALL_TABLE_BLOCKS:
        return True
    return sum(one.rows for one in targets) >= LARGE_SHARE * blocks.estimated_rows(connection, rows.what.table)


def _block_shards(rows: RowSet, connection: sa.Connection) -> Iterator[Shard]:
    # Where old rows are is enough here: what a keep holds back is few, and asking would cost a second plan.
    end = blocks.number(connection, rows.what.table)
    first = blocks.first_of(WINDOW_BLOCKS, 0, end).label("first")
    counted = connection.execute(
        sa.select(first, sa.func.count()).select_from(rows.what.table).where(rows.old).group_by(first)
    )
    windows = sorted((int(start), int(found)) for start, found in counted)
    total = sum(found for _, found in windows)
    number = min(MOST_SHARDS, max(1, total // SHARD_ROWS))
    share, held, rows_held = -(-total // number), list[list[int]](), 0
    for block, found in windows:
        held.append([block, found])
        rows_held += found
        if rows_held >= share:
            yield _block_shard(held, rows_held)
            held, rows_held = [], 0
    if held:
        yield _block_shard(held, rows_held)


def _block_shard(windows: list[list[int]], rows: int) -> Shard:
    return Shard(key=f"blocks:{windows[0][0]}", rows=rows, spec={"blocks": windows})


def _company_shards(rows: RowSet, connection: sa.Connection, targets: Sequence[Target]) -> Iterator[Shard]:
    for target in targets:
        cutoff = rows.cutoffs.of(target.company)
        number = min(MOST_SHARDS, max(1, target.rows // SHARD_ROWS))
        # One shard has no bound within: of thousands of companies most have few rows, and need not be asked.
        oldest = _oldest(rows, connection, target.company) if number > 1 else cutoff
        step = (cutoff - oldest) / number
        for part in range(number):
            spec = {
                "company": target.company,
                # Without a bound where older rows than the oldest that can be told belong.
                "from": (oldest + step * part).isoformat() if part else None,
                "to": cutoff.isoformat() if part == number - 1 else (oldest + step * (part + 1)).isoformat(),
            }
            yield Shard(key=f"{target.company}:{part}", rows=target.rows // number, spec=spec)


def _oldest(rows: RowSet, connection: sa.Connection, company: str | None) -> datetime:
    whose = rows.company == sa.literal(company, sa.Uuid(as_uuid=False))
    query = sa.select(tellable(sa.func.min(rows.what.age))).where(whose, rows.old)
    found: datetime = connection.execute(query).scalar_one()
    return found
