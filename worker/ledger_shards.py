"""The shards of runs in the ledger: laid out, taken, and moved on by bites, with the archive objects these wrote."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from uuid import UUID

import sqlalchemy as sa

from worker.archive import ArchivedObject
from worker.job import Shard
from worker.ledger_schema import BITES, OBJECTS, RUNS, SHARDS
from worker.plans import Amount, Place, Tally
from worker.states import State

if TYPE_CHECKING:
    from worker.ledger import Run


@dataclass(frozen=True, kw_only=True)
class HeldShard:
    """A shard whose row this transaction has locked."""

    run: UUID
    sweep: int
    number: int
    bites: int
    cursor: Mapping[str, Any] | None
    tally: Tally
    shard: Shard


def add_shards(connection: sa.Connection, run: UUID, sweep: int, shards: Iterable[Shard]) -> int:
    """Lay out a sweep's shards, numbered in the order of their stages; how many there are."""
    rows = [
        {
            "run_id": run,
            "sweep": sweep,
            "stage": shard.stage,
            "number": number,
            "key": shard.key,
            "planned_rows": shard.rows,
            "spec": dict(shard.spec),
        }
        for number, shard in enumerate(sorted(shards, key=lambda shard: shard.stage))
    ]
    if rows:
        connection.execute(sa.insert(SHARDS), rows)
    return len(rows)


def _take_shard() -> sa.Select[Any]:
    run = sa.bindparam("run", type_=sa.Uuid)
    sweep = sa.select(RUNS.c.sweep).where(RUNS.c.id == run, RUNS.c.state == State.RUNNING).scalar_subquery()
    # By themselves, not beside each shard: a run may have one for each of thousands of companies.
    other = SHARDS.alias()
    of_run = sa.and_(other.c.run_id == run, other.c.sweep == sweep, ~other.c.done)
    earliest = sa.select(sa.func.min(other.c.stage)).where(of_run).scalar_subquery()
    return (
        sa.select(SHARDS)
        .where(SHARDS.c.run_id == run, SHARDS.c.sweep == sweep, ~SHARDS.c.done, SHARDS.c.stage == earliest)
        .order_by(SHARDS.c.number)
        .limit(1)
        .with_for_update(of=SHARDS, skip_locked=True)
    )


def _record_bite() -> sa.Update:
    run = sa.bindparam("of_run", type_=sa.Uuid)
    sweep, shard = (sa.bindparam(name, type_=sa.BigInteger) for name in ("of_sweep", "of_shard"))
    bites = sa.bindparam("now_bites", type_=sa.BigInteger)
    cursor = sa.bindparam("now_cursor", type_=SHARDS.c.cursor.type)
    microseconds = sa.bindparam("bite_microseconds", type_=sa.BigInteger)
    bite = (
        sa.insert(BITES)
        .values(
            run_id=run,
            sweep=sweep,
            shard=shard,
            number=bites,
            rows=sa.bindparam("bite_rows"),
            bytes=sa.bindparam("bite_bytes"),
            microseconds=microseconds,
            cursor=cursor,
        )
        .cte("bite")
    )
    return (
        sa.update(SHARDS)
        .where(SHARDS.c.run_id == run, SHARDS.c.sweep == sweep, SHARDS.c.number == shard)
        .values(
            cursor=cursor,
            done=sa.bindparam("now_done"),
            bites=bites,
            rows=sa.bindparam("now_rows"),
            bytes=sa.bindparam("now_bytes"),
            microseconds=SHARDS.c.microseconds + microseconds,
            tally=sa.bindparam("now_tally", type_=SHARDS.c.tally.type),
            touched_at=sa.func.clock_timestamp(),
        )
        .add_cte(bite)
    )


# Built once, not once a bite.
_TAKE_SHARD, _RECORD_BITE = _take_shard(), _record_bite()


def take_shard(connection: sa.Connection, run: UUID) -> HeldShard | None:
    """Lock an unfinished shard nobody else holds, while the run is running; None when there is none."""
    row = connection.execute(_TAKE_SHARD, {"run": run}).one_or_none()
    if row is None:
        return None
    return HeldShard(
        run=run,
        sweep=row.sweep,
        number=row.number,
        bites=row.bites,
        cursor=row.cursor,
        tally=Tally.from_json(row.tally),
        shard=Shard(key=row.key, rows=row.planned_rows, spec=row.spec, stage=row.stage),
    )


def record_bite(
    connection: sa.Connection,
    held: HeldShard,
    *,
    cursor: Mapping[str, Any] | None,
    tally: Tally,
    done: bool,
    objects: Sequence[ArchivedObject],
    seconds: float,
) -> None:
    """Cursor, tally and archive objects of a bite, in the very transaction of its effect."""
    amount, total = tally.total, held.tally + tally
    values = {
        "of_run": held.run,
        "of_sweep": held.sweep,
        "of_shard": held.number,
        "now_done": done,
        "now_bites": held.bites + 1,
        "now_cursor": dict(cursor) if cursor is not None else None,
        "bite_rows": amount.rows,
        "bite_bytes": amount.bytes,
        "bite_microseconds": round(seconds * 1e6),
        "now_rows": total.total.rows,
        "now_bytes": total.total.bytes,
        "now_tally": total.to_json(),
    }
    connection.execute(_RECORD_BITE, values)
    if objects:
        connection.execute(sa.insert(OBJECTS), [{"run_id": held.run, **vars(one)} for one in objects])


def unfinished(connection: sa.Connection, run: Run, *, stage: int | None = None) -> int:
    """Shards of the current sweep, of a stage or of all, that are not done, held by somebody or not."""
    query = sa.select(sa.func.count()).where(SHARDS.c.run_id == run.id, SHARDS.c.sweep == run.sweep, ~SHARDS.c.done)
    query = query.where(SHARDS.c.stage == stage) if stage is not None else query
    return connection.execute(query).scalar_one()


def earliest(connection: sa.Connection, run: Run) -> int:
    """The stage that the next bite of a run is of."""
    query = sa.select(sa.func.min(SHARDS.c.stage)).where(SHARDS.c.run_id == run.id, ~SHARDS.c.done)
    return connection.execute(query.where(SHARDS.c.sweep == run.sweep)).scalar_one() or 0


def no_bite_in_flight(connection: sa.Connection, run: UUID) -> bool:
    """Whether this transaction now holds every shard that a bite could hold, so that the run's tally is final."""
    rows = sa.select(SHARDS.c.number).where(SHARDS.c.run_id == run, ~SHARDS.c.done)
    held = connection.execute(rows.with_for_update(skip_locked=True)).all()
    if len(held) < len(connection.execute(rows).all()):
        return False
    # A bite whose snapshot is older sees the run under way still, and could lock a shard that is as it was.
    undone = sa.update(SHARDS).where(SHARDS.c.run_id == run, ~SHARDS.c.done)
    connection.execute(undone.values(done=SHARDS.c.done))
    return True


def tally(connection: sa.Connection, run: UUID) -> Tally:
    """What the run has done so far."""
    parts = connection.scalars(sa.select(SHARDS.c.tally).where(SHARDS.c.run_id == run))
    # Added up in one go: each sum of two is a copy, and there may be a shard for each of thousands of companies.
    done: dict[Place, Amount] = {}
    for part in parts:
        for place, amount in Tally.from_json(part).done.items():
            done[place] = done.get(place, Amount()) + amount
    return Tally(done)


def stage(connection: sa.Connection, run: UUID) -> str | None:
    """The stage a run is in, where it has more than one; None when all of them are done."""
    # Of the last shard laid out: none has a later one.
    latest = sa.select(SHARDS.c.stage).where(SHARDS.c.run_id == run)
    latest = latest.order_by(SHARDS.c.sweep.desc(), SHARDS.c.number.desc()).limit(1)
    shards = sa.select(SHARDS.c.key).where(SHARDS.c.run_id == run, ~SHARDS.c.done, latest.scalar_subquery() != 0)
    key = connection.scalar(shards.order_by(SHARDS.c.sweep, SHARDS.c.stage, SHARDS.c.number).limit(1))
    return None if key is None else key.partition(":")[0]


def progress(connection: sa.Connection, run: UUID) -> tuple[int, int]:
    """Rows and bites done so far."""
    query = sa.select(
        sa.func.coalesce(sa.func.sum(SHARDS.c.rows), 0), sa.func.coalesce(sa.func.sum(SHARDS.c.bites), 0)
    ).where(SHARDS.c.run_id == run)
    rows, bites = connection.execute(query).one()
    return int(rows), int(bites)


def objects(connection: sa.Connection, run: UUID) -> list[ArchivedObject]:
    """The archive objects whose rows the run has deleted."""
    columns = [column for column in OBJECTS.c if column.name != "run_id"]
    rows = connection.execute(sa.select(*columns).where(OBJECTS.c.run_id == run).order_by(OBJECTS.c.key))
    return [ArchivedObject(**row._asdict()) for row in rows]


def cursors(connection: sa.Connection, run: UUID, prefix: str) -> list[tuple[Mapping[str, Any], Mapping[str, Any]]]:
    """Spec and cursor of a run's shards whose key begins so, those of its newest sweep that has any."""
    query = sa.select(SHARDS.c.sweep, SHARDS.c.spec, SHARDS.c.cursor).where(
        SHARDS.c.run_id == run, SHARDS.c.key.startswith(prefix)
    )
    rows = connection.execute(query.order_by(SHARDS.c.sweep, SHARDS.c.number)).all()
    return [(row.spec, row.cursor or {}) for row in rows if row.sweep == rows[-1].sweep]
