"""Our own schema in the deployment's database: runs; their shards, bites and archive objects in ledger_shards.

It lives beside the data so that an effect and the cursor that says so commit together. The functions take a
connection inside a transaction and never commit.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any
from uuid import UUID, uuid4

import sqlalchemy as sa
from sqlalchemy import exc
from sqlalchemy.dialects.postgresql import JSONB

from worker import sums
from worker.errors import Refused, UnderWay
from worker.ledger_schema import OBJECTS, RUNS, SCHEMA, SHARDS, VERSION, identity, init, require
from worker.states import ACTIVE, SETTLED, STEPS, State

if TYPE_CHECKING:
    from worker.plans import Plan

# The one door to the ledger for everybody else, its schema included.
__all__ = ["OBJECTS", "RUNS", "SCHEMA", "SHARDS", "VERSION", "identity", "init", "require"]


@dataclass(frozen=True, kw_only=True)
class Run:
    """One run as the ledger has it, without its plan: of thousands of companies that takes some megabytes."""

    id: UUID
    job: str
    params: Mapping[str, Any]
    exclusion: str
    layout: str
    state: State
    sweep: int
    now: datetime
    plan_hash: str | None
    laid_out: bool
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


def find(connection: sa.Connection, name: str, *, brief: bool = False) -> Run:
    """The run whose id starts with `name`, or `last`. Refused when there is none, or more than one.

    `brief`: without its findings and what it left.
    """
    if not name:
        raise Refused("an empty text names no run; give the start of its id, or `last`")
    query = _select(brief=brief).order_by(RUNS.c.created_at.desc()).limit(2)
    if name == "last":
        rows = connection.execute(query.limit(1)).all()
    else:
        rows = connection.execute(query.where(_starts(name.lower()))).all()
    if len(rows) != 1:
        raise Refused(f"{len(rows) or 'no'} run{'s have' if rows else ' has'} an id that starts with {name!r}")
    return _run(rows[0])


def _starts(name: str) -> sa.ColumnElement[bool]:
    """Whether the id of a run starts so, by its index."""
    ends = [name + str(UUID(int=bound))[len(name) :] for bound in (0, (1 << 128) - 1)]
    try:
        first, last = map(UUID, ends)
    except ValueError:
        return sa.false()
    # Python takes an id also without dashes, or in braces.
    return RUNS.c.id.between(first, last) if [str(first), str(last)] == ends else sa.false()


def get(connection: sa.Connection, run: UUID, *, hold: bool = False) -> Run | None:
    """The run; with `hold` its row is locked until the transaction ends, and None means another has it."""
    query = _select().where(RUNS.c.id == run)
    row = connection.execute(query.with_for_update(skip_locked=True) if hold else query).one_or_none()
    return _run(row) if row else None


def goes_on(connection: sa.Connection, run: UUID) -> bool:
    """Whether bites of a run are to be taken."""
    return connection.scalar(sa.select(RUNS.c.state).where(RUNS.c.id == run)) == State.RUNNING


def recent(connection: sa.Connection, *, limit: int, state: State | None = None) -> list[Run]:
    """The newest runs first, without their findings and what they left."""
    query = _select(brief=True).order_by(RUNS.c.created_at.desc()).limit(limit)
    return [_run(row) for row in connection.execute(query.where(RUNS.c.state == state) if state else query)]


def _select(*, brief: bool = False) -> sa.Select[Any]:
    none = sa.literal([], JSONB)
    columns = [
        none.label(column.name) if brief and column.name in {"findings", "left_rows"} else column
        for column in RUNS.c
        if column.name not in {"plan", "in_sums"}
    ]
    return sa.select(*columns, RUNS.c.plan.is_not(None).label("laid_out"))


def _run(row: sa.Row[Any]) -> Run:
    return Run(**{**row._asdict(), "state": State(row.state)})


def step(connection: sa.Connection, run: Run, to: State, **values: Any) -> None:
    """Move a held run to another state. A step the table does not have is a fault of ours (ValueError)."""
    if to not in STEPS[run.state]:
        raise ValueError(f"a run cannot go from {run.state} to {to}")
    if run.state in SETTLED:
        sums.take_out(connection, run.id)
    values |= {"state": to, "rescues": 0, "touched_at": sa.func.clock_timestamp()}
    connection.execute(sa.update(RUNS).where(RUNS.c.id == run.id).values(values))
    if to in SETTLED:
        sums.add(connection, run.id)


def reopen(connection: sa.Connection, run: Run) -> None:
    """Take a stopped or failed, held run up again: at its cursors, or from the start when it never had any."""
    require_free(connection, run.exclusion)
    to = State.RUNNING if run.laid_out else State.QUEUED
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
    values = {
        "waiting": reason,
        "waits": waits,
        "rescues": 0,
        "touched_at": sa.func.clock_timestamp(),
    }
    connection.execute(sa.update(RUNS).where(RUNS.c.id == run).values(values))


def stalled(connection: sa.Connection, *, after: timedelta) -> list[Run]:
    """Active runs on which nothing has moved for a while. The clock is the database's own."""
    return [_run(row) for row in connection.execute(_select(brief=True).where(*_stalled(after)))]


def count_rescue(connection: sa.Connection, run: UUID, *, after: timedelta) -> int | None:
    """Count that a run is taken up again: how often since it last went on. None when it is not stalled (any longer).

    To be asked in READ COMMITTED: of several that ask at the same time one is told a number.
    """
    # A step or a rest has set the number to 0 itself; bites do not touch the run.
    fruitless = sa.case((_last_bite() > RUNS.c.touched_at, 0), else_=RUNS.c.rescues)
    values = {"rescues": fruitless + 1, "touched_at": sa.func.clock_timestamp()}
    update = sa.update(RUNS).where(RUNS.c.id == run, *_stalled(after)).values(values)
    return connection.execute(update.returning(RUNS.c.rescues)).scalar_one_or_none()


def _stalled(after: timedelta) -> tuple[sa.ColumnElement[bool], ...]:
    moved = sa.func.greatest(RUNS.c.touched_at, _last_bite())
    return RUNS.c.state.in_(ACTIVE), moved < sa.func.clock_timestamp() - after


def _last_bite() -> sa.ScalarSelect[Any]:
    return sa.select(sa.func.max(SHARDS.c.touched_at)).where(SHARDS.c.run_id == RUNS.c.id).scalar_subquery()
