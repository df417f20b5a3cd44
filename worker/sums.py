"""What runs amount to, for metrics: summed once a run settles, so that a scrape looks at those under way alone.

A run is added in the transaction that settles it and taken out in the one that takes it up again. What the sums and
the runs outside of them say together never shrinks by either.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any
from uuid import UUID

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql

from worker.ledger_schema import RUNS, SCHEMA, SHARDS
from worker.states import FINAL, State

SUMS = sa.Table(
    "sums",
    sa.MetaData(schema=SCHEMA),
    *(sa.Column(name, sa.Text) for name in ("job", "state", "kind", "part")),
    sa.Column("amount", sa.BigInteger),
)
_PLACE = ("job", "state", "kind", "part")
WORK = ("bites", "rows", "bytes", "microseconds")
# Seconds: from a run that finds nothing to one that works through a first backlog. For others the ledger needs a
# version that counts all runs anew.
BUCKETS = (1, 10, 60, 300, 900, 3_600, 14_400, 86_400)


@dataclass(frozen=True, kw_only=True)
class Sum:
    """What the runs of a job in a state amount to.

    `kind`: `runs`; `work` of their shards, by `WORK`; `rests`, seconds by reason; and of runs that never move again
    what they `took`, and how many `within` each of the `BUCKETS`.
    """

    job: str
    state: State
    kind: str
    part: str
    amount: int


def read(connection: sa.Connection) -> list[Sum]:
    """What all runs there are amount to; those that are not in the sums are looked at."""
    others = _amounts(~RUNS.c.in_sums).subquery()
    every = sa.union_all(sa.select(SUMS), sa.select(others)).subquery()
    place = [every.c[name] for name in _PLACE]
    amount = sa.cast(sa.func.sum(every.c.amount), sa.BigInteger).label("amount")
    rows = connection.execute(sa.select(*place, amount).group_by(*place).order_by(*place))
    return [Sum(**{**row._asdict(), "state": State(row.state)}) for row in rows]


def add(connection: sa.Connection, run: UUID) -> None:
    """Add a held run that has settled."""
    _change(connection, run, inside=True)


def take_out(connection: sa.Connection, run: UUID) -> None:
    """Take out a held run that is about to go on, where it was added."""
    _change(connection, run, inside=False)


def _change(connection: sa.Connection, run: UUID, *, inside: bool) -> None:
    found = _amounts(sa.and_(RUNS.c.id == run, RUNS.c.in_sums != inside)).subquery()
    place = [found.c[name] for name in _PLACE]
    # In one order, or two at a time could wait for each other.
    change = sa.select(*place, found.c.amount if inside else -found.c.amount).order_by(*place)
    row = postgresql.insert(SUMS).from_select([*_PLACE, "amount"], change)
    together = {"amount": SUMS.c.amount + row.excluded.amount}
    connection.execute(row.on_conflict_do_update(index_elements=_PLACE, set_=together))
    connection.execute(sa.update(RUNS).where(RUNS.c.id == run).values(in_sums=inside))


def _amounts(which: sa.ColumnElement[bool]) -> sa.CompoundSelect[Any]:
    """What these runs amount to, in the columns of the sums."""
    took = sa.func.round(sa.extract("epoch", RUNS.c.settled_at - RUNS.c.created_at) * 1_000_000)
    columns = (RUNS.c.id, RUNS.c.job, RUNS.c.state, RUNS.c.waits, took.label("took"))
    runs = sa.select(*columns).where(which).cte("looked_at")
    ended = sa.select(runs).where(runs.c.state.in_(FINAL)).cte("ended")
    # One run's after the other's, by their key: the planner must not come to read all shards there are.
    shards = sa.select(*(sa.func.sum(SHARDS.c[name]).label(name) for name in WORK), sa.func.count().label("shards"))
    of_run = shards.where(SHARDS.c.run_id == runs.c.id).lateral("of_run")
    work = sa.select(runs.c.job, runs.c.state, *(of_run.c[name] for name in WORK))
    work_of = work.join_from(runs, of_run, of_run.c.shards > 0).cte("work")
    rest = sa.func.jsonb_each_text(runs.c.waits).table_valued("key", "value")
    rests = _each(runs, "rests", rest.c.key, sa.func.sum(sa.cast(rest.c.value, sa.BigInteger)))
    return sa.union_all(
        _each(runs, "runs", "", sa.func.count()),
        *(_each(work_of, "work", name, sa.func.sum(work_of.c[name])) for name in WORK),
        rests.join_from(runs, rest, sa.true()).group_by(rest.c.key),
        _each(ended, "took", "runs", sa.func.count()),
        _each(ended, "took", "microseconds", sa.func.coalesce(sa.func.sum(ended.c.took), 0)),
        *(
            _each(ended, "within", str(bound), sa.func.count().filter(ended.c.took <= bound * 1_000_000))
            for bound in BUCKETS
        ),
    )


def _each(of: sa.CTE, kind: str, part: str | sa.ColumnElement[Any], amount: sa.ColumnElement[Any]) -> sa.Select[Any]:
    """An amount per job and state."""
    named = sa.literal(part, sa.Text) if isinstance(part, str) else part
    columns = (of.c.job, of.c.state, sa.literal(kind, sa.Text).label("kind"), named.label("part"))
    return sa.select(*columns, sa.cast(amount, sa.BigInteger).label("amount")).group_by(of.c.job, of.c.state)
