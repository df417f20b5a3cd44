"""How each schedule entry stands: when it last ran, when it is due, how many due times nothing ran at.

`PAPERCLIP_WORKER_TIMEZONE` and the crontabs say when an entry was due; the ledger says what ran. A run that an
operator started is none of the entry's.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any

import sqlalchemy as sa
from sqlalchemy.dialects.postgresql import insert

from worker import params
from worker.ledger import RUNS, SCHEMA
from worker.states import State

if TYPE_CHECKING:
    from schedules import Entry
    from worker.timetable import Timetable

# Beat looks, the broker delivers and a worker is free in less; a due time is missed only after it.
GRACE = timedelta(minutes=5)
# By so much the clocks of beat and database may differ: a run entered just before its due time is that time's.
SKEW = timedelta(minutes=1)
_ORIGIN = "schedule:"

_meta = sa.MetaData(schema=SCHEMA)
_TIME = sa.DateTime(timezone=True)
CHAIN = sa.Table("chain", _meta, sa.Column("born", _TIME))
ENTRIES = sa.Table(
    "entries",
    _meta,
    *(sa.Column(name, sa.Text) for name in ("entry", "crontab", "timezone")),
    sa.Column("since", _TIME),
)


def origin(entry: str) -> str:
    """The `via` of the runs of a schedule entry."""
    return _ORIGIN + entry


@dataclass(frozen=True, kw_only=True)
class LastRun:
    """The newest run of an entry."""

    run: str
    at: datetime
    state: State


@dataclass(frozen=True, kw_only=True)
class Standing:
    """One entry. Without a ledger `never` and `missed` are not known (None); `next` is None when it is off."""

    name: str
    timezone: str
    entry: Entry
    next: datetime | None
    last: LastRun | None = None
    missed: int | None = None
    never: bool | None = None

    def to_json(self) -> dict[str, Any]:
        last = self.last
        return {
            "entry": self.name,
            "crontab": self.entry.crontab,
            "timezone": self.timezone,
            "job": self.entry.job.name,
            "params": params.to_json(self.entry.job),
            "enabled": self.entry.enabled,
            "last": {"run": last.run, "at": _text(last.at), "state": last.state.value} if last else None,
            "next": _text(self.next) if self.next else None,
            "missed": self.missed,
            "never": self.never,
        }


def _text(moment: datetime) -> str:
    return moment.isoformat(timespec="seconds")


def planned(times: Timetable, *, now: datetime) -> list[Standing]:
    """Every entry without what only the ledger knows."""
    return [
        Standing(name=name, timezone=times.timezone, entry=entry, next=_next(times, entry, now))
        for name, entry in times.entries.items()
    ]


def standings(connection: sa.Connection, times: Timetable, *, now: datetime) -> list[Standing]:
    """Every entry with its last run and the due times it missed since that, or since the entry holds."""
    last = _last(connection, times.entries)
    since = {row.entry: row.since for row in connection.execute(sa.select(ENTRIES.c.entry, ENTRIES.c.since))}
    born = connection.execute(sa.select(CHAIN.c.born)).scalar_one()
    return [
        Standing(
            name=name,
            timezone=times.timezone,
            entry=entry,
            next=_next(times, entry, now),
            last=last.get(name),
            missed=_missed(times, entry, last.get(name), since.get(name, born), now),
            never=name not in last,
        )
        for name, entry in times.entries.items()
    ]


def has_run(connection: sa.Connection, name: str, *, since: datetime) -> bool:
    """Whether a run of the entry was entered since then, by a clock that may differ."""
    query = sa.select(RUNS.c.id).where(RUNS.c.via == origin(name), RUNS.c.created_at > since - SKEW)
    return connection.execute(query.limit(1)).one_or_none() is not None


def note(connection: sa.Connection, times: Timetable) -> None:
    """Keep since when each entry holds as it is: due times before that were never its own to miss."""
    now = {name: (entry.crontab, times.timezone) for name, entry in times.enabled.items()}
    known = {row.entry: (row.crontab, row.timezone) for row in connection.execute(sa.select(ENTRIES))}
    gone = {name: (None, None) for name, held in known.items() if name not in now and held != (None, None)}
    for name, (crontab, timezone) in {**now, **gone}.items():
        if known.get(name) == (crontab, timezone):
            continue
        values = {"crontab": crontab, "timezone": timezone, "since": sa.func.clock_timestamp()}
        entry = insert(ENTRIES).values(entry=name, **values)
        connection.execute(entry.on_conflict_do_update(index_elements=["entry"], set_=values))


def _last(connection: sa.Connection, names: Iterable[str]) -> Mapping[str, LastRun]:
    named = sa.func.unnest(sa.literal([origin(name) for name in names], sa.ARRAY(sa.Text)))
    entries = named.table_valued(sa.Column("via", sa.Text)).render_derived()
    # The last in the index up to the entry's own: for runs equal to it the planner goes back through all of them in
    # the order of time, to the first where the entry never ran.
    up_to = sa.select(RUNS.c.via, RUNS.c.id, RUNS.c.created_at, RUNS.c.state).where(RUNS.c.via <= entries.c.via)
    last = up_to.order_by(RUNS.c.via.desc(), RUNS.c.created_at.desc()).limit(1).lateral("last")
    rows = connection.execute(sa.select(last).join_from(entries, last, last.c.via == entries.c.via))
    return {
        via.removeprefix(_ORIGIN): LastRun(run=str(run), at=at, state=State(state)) for via, run, at, state in rows
    }


def _next(times: Timetable, entry: Entry, now: datetime) -> datetime | None:
    return next(times.due_times(entry.crontab, now)) if entry.enabled else None


def _missed(times: Timetable, entry: Entry, last: LastRun | None, since: datetime, now: datetime) -> int:
    if not entry.enabled:
        return 0
    after = max(since, last.at + SKEW) if last else since
    return times.missed(entry.crontab, after, now - GRACE)
