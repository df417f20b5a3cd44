"""Our own schema in the deployment's database: runs, shards, bites, archive objects.

It lives beside the data so that an effect and the cursor that says so commit together. The functions take a
connection inside a transaction and never commit.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any
from uuid import UUID, uuid4

import sqlalchemy as sa
from sqlalchemy import exc

from worker.archive import ArchivedObject
from worker.errors import Refused, UnderWay
from worker.job import Shard, Tally
from worker.ledger_schema import BITES, OBJECTS, RUNS, SCHEMA, SHARDS, VERSION, init, require
from worker.states import ACTIVE, STEPS, State

if TYPE_CHECKING:
    from worker.job import Plan

# The one door to the ledger for everybody else, its schema included.
__all__ = ["OBJECTS", "RUNS", "SCHEMA", "SHARDS", "VERSION", "init", "require"]


@dataclass(frozen=True, kw_only=True)
class Run:
    """One run as the ledger has it."""

    id: UUID
    job: str
    params: Mapping[str, Any]
    exclusion: str
    layout: str
    state: State
    sweep: int
    now: datetime
    plan_hash: str | None
    plan: Mapping[str, Any] | None
    planned_rows: int | None
    actor: str
    reason: str | None
    via: str
    findings: Sequence[Mapping[str, Any]]
    left_rows: Sequence[Mapping[str, Any]]
    waits: Mapping[str, int]
    waiting: str | None
    error: str | None
    rescues: int
    created_at: datetime
    touched_at: datetime
    settled_at: datetime | None


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


def create(
    connection: sa.Connection,
    *,
    job: str,
    params: Mapping[str, Any],
    exclusion: str,
    layout: str,
    now: datetime,
    actor: str,
    via: str,
    reason: str | None = None,
    plan_hash: str | None = None,
) -> UUID:
    """Enter a run in state queued. Raises UnderWay when its exclusion is taken."""
    run = uuid4()
    values = {
        "id": run,
        "job": job,
        "params": dict(params),
        "exclusion": exclusion,
        "layout": layout,
        "state": State.QUEUED,
        "now": now,
        "actor": actor,
        "via": via,
        "reason": reason,
        "plan_hash": plan_hash,
    }
    try:
        with connection.begin_nested():
            connection.execute(sa.insert(RUNS).values(values))
    except exc.IntegrityError as error:
        require_free(connection, exclusion)
        raise UnderWay(f"{exclusion} was started by somebody else this moment") from error
    return run


def require_free(connection: sa.Connection, exclusion: str) -> None:
    """Raise UnderWay, naming the run, when the exclusion is taken."""
    query = sa.select(RUNS.c.id, RUNS.c.state).where(RUNS.c.exclusion == exclusion, RUNS.c.state.in_(ACTIVE))
    if other := connection.execute(query).one_or_none():
        raise UnderWay(f"{exclusion} is already under way: run {other.id} ({other.state}); watch or stop it")


def find(connection: sa.Connection, name: str) -> Run:
    """The run whose id starts with `name`, or `last`. Refused when there is none, or more than one."""
    if not name:
        raise Refused("an empty text names no run; give the start of its id, or `last`")
    query = sa.select(RUNS).order_by(RUNS.c.created_at.desc()).limit(2)
    if name == "last":
        rows = connection.execute(query.limit(1)).all()
    else:
        text = sa.cast(RUNS.c.id, sa.Text)
        rows = connection.execute(query.where(text.startswith(name.lower(), autoescape=True))).all()
    if len(rows) != 1:
        raise Refused(f"{len(rows) or 'no'} run{'s have' if rows else ' has'} an id that starts with {name!r}")
    return _run(rows[0])


def get(connection: sa.Connection, run: UUID, *, hold: bool = False) -> Run | None:
    """The run; with `hold` its row is locked until the transaction ends, and None means another has it."""
    query = sa.select(RUNS).where(RUNS.c.id == run)
    row = connection.execute(query.with_for_update(skip_locked=True) if hold else query).one_or_none()
    return _run(row) if row else None


def recent(connection: sa.Connection, *, limit: int, state: State | None = None) -> list[Run]:
    """The newest runs first."""
    query = sa.select(RUNS).order_by(RUNS.c.created_at.desc()).limit(limit)
    return [_run(row) for row in connection.execute(query.where(RUNS.c.state == state) if state else query)]


def _run(row: sa.Row[Any]) -> Run:
    return Run(**{**row._asdict(), "state": State(row.state)})


def step(connection: sa.Connection, run: Run, to: State, **values: Any) -> None:
    """Move a held run to another state. A step the table does not have is a fault of ours (ValueError)."""
    if to not in STEPS[run.state]:
        raise ValueError(f"a run cannot go from {run.state} to {to}")
    values |= {"state": to, "touched_at": sa.func.clock_timestamp()}
    connection.execute(sa.update(RUNS).where(RUNS.c.id == run.id).values(values))


def reopen(connection: sa.Connection, run: Run) -> None:
    """Take a stopped or failed, held run up again: at its cursors, or from the start when it never had any."""
    require_free(connection, run.exclusion)
    to = State.QUEUED if run.plan is None else State.RUNNING
    step(connection, run, to, settled_at=None, error=None)


def record_plan(connection: sa.Connection, run: UUID, plan: Plan) -> None:
    """Keep the plan a run started from; its progress is measured against it."""
    left = [one.to_json() for one in plan.left]
    values = {"plan": plan.to_json(), "planned_rows": plan.tally.total.rows, "left_rows": left}
    connection.execute(sa.update(RUNS).where(RUNS.c.id == run).values(values))


def note_wait(connection: sa.Connection, run: UUID, reason: str | None, *, kind: str, seconds: int) -> None:
    """Show why the run rests, and add to the seconds it has rested for reasons of that kind."""
    path = sa.cast([kind], sa.ARRAY(sa.Text))
    so_far = sa.cast(sa.func.coalesce(RUNS.c.waits[kind].astext, "0"), sa.BigInteger)
    waits = sa.func.jsonb_set(RUNS.c.waits, path, sa.func.to_jsonb(so_far + seconds))
    values = {"waiting": reason, "waits": waits, "touched_at": sa.func.clock_timestamp()}
    connection.execute(sa.update(RUNS).where(RUNS.c.id == run).values(values))


def add_shards(connection: sa.Connection, run: UUID, sweep: int, shards: Iterable[Shard]) -> int:
    """Lay out a sweep's shards; how many there are."""
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
        for number, shard in enumerate(shards)
    ]
    if rows:
        connection.execute(sa.insert(SHARDS), rows)
    return len(rows)


def take_shard(connection: sa.Connection, run: UUID) -> HeldShard | None:
    """Lock an unfinished shard nobody else holds, while the run is running; None when there is none."""
    other = SHARDS.alias()
    of_run = sa.and_(other.c.run_id == RUNS.c.id, other.c.sweep == RUNS.c.sweep, ~other.c.done)
    earliest = sa.select(sa.func.min(other.c.stage)).where(of_run).correlate(RUNS).scalar_subquery()
    query = (
        sa.select(SHARDS)
        .join(RUNS, RUNS.c.id == SHARDS.c.run_id)
        .where(RUNS.c.id == run, RUNS.c.state == State.RUNNING, SHARDS.c.sweep == RUNS.c.sweep, ~SHARDS.c.done)
        .where(SHARDS.c.stage == earliest)
        .order_by(SHARDS.c.number)
        .limit(1)
        .with_for_update(of=SHARDS, skip_locked=True)
    )
    row = connection.execute(query).one_or_none()
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
    bite = (
        sa.insert(BITES)
        .values(
            run_id=held.run,
            sweep=held.sweep,
            shard=held.number,
            number=held.bites + 1,
            rows=amount.rows,
            bytes=amount.bytes,
            microseconds=round(seconds * 1e6),
            cursor=dict(cursor) if cursor is not None else None,
        )
        .cte("bite")
    )
    connection.execute(
        sa.update(SHARDS)
        .where(SHARDS.c.run_id == held.run, SHARDS.c.sweep == held.sweep, SHARDS.c.number == held.number)
        .values(
            cursor=dict(cursor) if cursor is not None else None,
            done=done,
            bites=held.bites + 1,
            rows=total.total.rows,
            bytes=total.total.bytes,
            microseconds=SHARDS.c.microseconds + round(seconds * 1e6),
            tally=total.to_json(),
            touched_at=sa.func.clock_timestamp(),
        )
        .add_cte(bite)
    )
    if objects:
        connection.execute(sa.insert(OBJECTS), [{"run_id": held.run, **vars(one)} for one in objects])


def unfinished(connection: sa.Connection, run: Run, *, stage: int | None = None) -> int:
    """Shards of the current sweep, of a stage or of all, that are not done, held by somebody or not."""
    query = sa.select(sa.func.count()).where(SHARDS.c.run_id == run.id, SHARDS.c.sweep == run.sweep, ~SHARDS.c.done)
    query = query.where(SHARDS.c.stage == stage) if stage is not None else query
    return connection.execute(query).scalar_one()


def no_bite_in_flight(connection: sa.Connection, run: UUID) -> bool:
    """Whether this transaction now holds every shard of the run, so that its tally is final."""
    rows = sa.select(SHARDS.c.number).where(SHARDS.c.run_id == run)
    held = connection.execute(rows.with_for_update(skip_locked=True)).all()
    return len(held) == len(connection.execute(rows).all())


def tally(connection: sa.Connection, run: UUID) -> Tally:
    """What the run has done so far."""
    parts = connection.scalars(sa.select(SHARDS.c.tally).where(SHARDS.c.run_id == run))
    return sum((Tally.from_json(part) for part in parts), Tally())


def stage(connection: sa.Connection, run: UUID) -> str | None:
    """The stage a run is in, where it has more than one; None when all of them are done."""
    shards = sa.select(SHARDS.c.key, SHARDS.c.done, SHARDS.c.stage).where(SHARDS.c.run_id == run)
    rows = connection.execute(shards.order_by(SHARDS.c.sweep.desc(), SHARDS.c.stage, SHARDS.c.number)).all()
    if not any(row.stage for row in rows):
        return None
    return next((row.key.partition(":")[0] for row in rows if not row.done), None)


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


def stalled(connection: sa.Connection, *, after: timedelta) -> list[Run]:
    """Active runs on which nothing has moved for a while. The clock is the database's own."""
    latest = sa.select(sa.func.max(SHARDS.c.touched_at)).where(SHARDS.c.run_id == RUNS.c.id).scalar_subquery()
    moved = sa.func.greatest(RUNS.c.touched_at, latest)
    query = sa.select(RUNS).where(RUNS.c.state.in_(ACTIVE), moved < sa.func.clock_timestamp() - after)
    return [_run(row) for row in connection.execute(query)]


def count_rescue(connection: sa.Connection, run: UUID) -> None:
    """Count that a stalled run was taken up again."""
    connection.execute(
        sa.update(RUNS)
        .where(RUNS.c.id == run)
        .values(rescues=RUNS.c.rescues + 1, touched_at=sa.func.clock_timestamp())
    )
