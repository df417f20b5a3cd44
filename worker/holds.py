"""Legal holds: rows that no job deletes, archives away or erases while a hold is in force.

The one principle: once `add` has returned, no bite that did not know of the hold can still commit. Bites take
SHARED before their snapshot, `add` takes EXCLUSIVE and so waits for those in flight.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from functools import lru_cache
from typing import TYPE_CHECKING, Any
from uuid import UUID, uuid4

import sqlalchemy as sa

from worker.errors import Contended, Refused
from worker.layouts.model import Keep, Layout, Records, as_uuid, is_one_of
from worker.ledger import SCHEMA

if TYPE_CHECKING:
    from worker.operations import Operations


class Busy(Refused):
    """Bites in flight do not end, so that a hold could not be promised; nothing was entered."""


KINDS = ("company", "user", "task", "table")
# LOCK TABLE takes no snapshot, so what a REPEATABLE READ transaction sees afterwards is as of when it got the lock.
SHARED = f"LOCK TABLE {SCHEMA}.holds IN ROW EXCLUSIVE MODE"
# Waits longer than a bite with a slow upload takes; bites that begin meanwhile wait behind it.
EXCLUSIVE = f"SET LOCAL lock_timeout = '60s'; LOCK TABLE {SCHEMA}.holds IN SHARE ROW EXCLUSIVE MODE"

_TIME = sa.DateTime(timezone=True)
HOLDS = sa.Table(
    "holds",
    sa.MetaData(schema=SCHEMA),
    sa.Column("id", sa.Uuid),
    *(sa.Column(name, sa.Text) for name in ("kind", "target", "reason", "actor", "released_by", "release_reason")),
    *(sa.Column(name, _TIME) for name in ("created_at", "until", "released_at")),
)


@dataclass(frozen=True, kw_only=True)
class Hold:
    """One hold as the ledger has it; `target` is the id of a company, user or task, or a table's name."""

    id: UUID
    kind: str
    target: str
    reason: str
    actor: str
    created_at: datetime
    until: datetime | None
    released_at: datetime | None
    released_by: str | None
    release_reason: str | None

    def to_json(self, *, now: datetime) -> dict[str, Any]:
        times = ("created_at", "until", "released_at")
        found = {**vars(self), "id": str(self.id), "state": self.state(now)}
        return found | {name: value.isoformat() for name in times if (value := getattr(self, name)) is not None}

    def state(self, now: datetime) -> str:
        """`in force`, `ended` (its time is over) or `released`."""
        if self.released_at is not None:
            return "released"
        return "ended" if self.until is not None and self.until <= now else "in force"


@dataclass(frozen=True, kw_only=True)
class Holds:
    """The holds in force in one transaction."""

    found: tuple[Hold, ...] = ()

    def targets(self, kind: str) -> list[str]:
        return sorted({hold.target for hold in self.found if hold.kind == kind})

    def without(self, hold: UUID) -> Holds:
        """The same world with one hold released."""
        return Holds(found=tuple(one for one in self.found if one.id != hold))

    def keep(self, records: Records) -> tuple[Keep, ...]:
        """The keep that holds rows of a table back; none where no hold in force can touch it.

        The same objects for the same holds and table: each bite asks, and statements made of them can be known again.
        """
        return _keeps(self, records)


@lru_cache(maxsize=16)
def _keeps(holds: Holds, records: Records) -> tuple[Keep, ...]:
    if records.name in holds.targets("table"):
        return (_keep(sa.true()),)
    terms: list[sa.ColumnElement[bool]] = []
    if (companies := holds.targets("company")) and records.company is not None:
        terms.append(is_one_of(records.company, [UUID(one) for one in companies], sa.Uuid))
    users, tasks = holds.targets("user"), holds.targets("task")
    if not users and not tasks:
        return (_keep(_any(terms)),) if terms else ()
    terms.append(records.names(users, tasks))
    # Asked once for all ids: each time the row's JSON is made into text.
    mentions = records.mentions([*users, *tasks])
    return (_keep(_any([*terms, mentions]), needles=(*users, *tasks), unread=_any(terms)),)


def _any(terms: list[sa.ColumnElement[bool]]) -> sa.ColumnElement[bool]:
    # A column that is NULL must not make the whole answer NULL, which would be neither held nor free.
    return sa.func.coalesce(sa.or_(*terms), sa.false())


def _keep(
    rows: sa.ColumnElement[bool], *, needles: tuple[str, ...] = (), unread: sa.ColumnElement[bool] | None = None
) -> Keep:
    why = "a legal hold is in force; see `holds list`"
    return Keep(reason="legal_hold", why=why, rows=rows, needles=needles, unread=unread)


def in_force(connection: sa.Connection) -> Holds:
    """The holds in force now by the database's clock: a hold is about the present, not about a run's horizon."""
    open_ended = sa.or_(HOLDS.c.until.is_(None), HOLDS.c.until > sa.func.clock_timestamp())
    rows = connection.execute(sa.select(HOLDS).where(HOLDS.c.released_at.is_(None), open_ended))
    return Holds(found=tuple(Hold(**row._asdict()) for row in rows))


def every(connection: sa.Connection) -> list[Hold]:
    """Every hold there ever was, newest first."""
    rows = connection.execute(sa.select(HOLDS).order_by(HOLDS.c.created_at.desc(), HOLDS.c.id))
    return [Hold(**row._asdict()) for row in rows]


def add(
    connection: sa.Connection, *, kind: str, target: str, reason: str, actor: str, until: datetime | None
) -> Hold:
    """Enter a hold. Waits for bites in flight, so that what it holds is safe once the caller has committed."""
    values = {"id": uuid4(), "kind": kind, "target": target, "reason": reason, "actor": actor, "until": until}
    row = connection.execute(sa.insert(HOLDS).values(values).returning(HOLDS)).one()
    return Hold(**row._asdict())


@contextmanager
def still(deployment: Operations) -> Iterator[sa.Connection]:
    """A transaction in which no bite is in flight and none begins. Raises Busy when those in flight do not end."""
    # Beforehand: of a table to lock that is not there the server says nothing an operator could use.
    deployment.require_ledger()
    begun = False
    try:
        with deployment.transaction(first=EXCLUSIVE) as connection:
            begun = True
            yield connection
    except Contended as error:
        if begun:
            raise
        raise Busy("bites in flight do not end, so nothing was entered; try again, or stop the run") from error


def find(connection: sa.Connection, name: str) -> Hold:
    """The hold in force whose id starts with `name`. Refused when there is none, or more than one."""
    found = [hold for hold in every(connection) if str(hold.id).startswith(name.lower())] if name else []
    if len(found) != 1:
        raise Refused(f"{len(found) or 'no'} hold{'s have' if found else ' has'} an id that starts with {name!r}")
    if found[0].released_at is not None:
        raise Refused(f"hold {found[0].id} was released already")
    return found[0]


def release(connection: sa.Connection, hold: UUID, *, actor: str, reason: str) -> None:
    """Take a hold back; its row stays as evidence."""
    values = {"released_at": sa.func.clock_timestamp(), "released_by": actor, "release_reason": reason}
    connection.execute(sa.update(HOLDS).where(HOLDS.c.id == hold, HOLDS.c.released_at.is_(None)).values(values))


def _is(key: sa.Column[Any], name: str) -> sa.ColumnElement[bool]:
    if not isinstance(key.type, sa.Uuid):
        # A deployment's may be of another type than text, which is not compared with one.
        return sa.cast(key, sa.Text) == name
    return sa.false() if (found := as_uuid(name)) is None else key == found


def resolve(connection: sa.Connection, layout: Layout, kind: str, name: str) -> str:
    """The id of the company, user or task an operator named by id or by a name of its own.

    Refused when there is none, or when the name is that of several.
    """
    subject = layout.subjects[kind]
    key = sa.cast(subject.key, sa.Text)
    # Made small by the database on both sides: which letters it knows depends on its locale.
    small = sa.func.lower(sa.literal(name, sa.Text))
    named = sa.or_(_is(subject.key, name), *(sa.func.lower(column) == small for column in subject.names))
    ids = connection.scalars(sa.select(key).where(named).order_by(key).limit(4)).all()
    if not ids:
        also = "".join(f" or {column.name}" for column in subject.names)
        raise Refused(f"--{kind}: there is no {kind} with the id{also} {name!r}")
    if len(ids) > 1:
        raise Refused(f"--{kind}: {name!r} is the name of more than one {kind}; use the id: {', '.join(ids)}")
    return ids[0]
