"""How long rows are kept: policies per company and table, and the moments before which rows are old.

A policy is never changed but replaced by another version. A run keeps to what was in force when it was entered and
to what is in force now, whichever keeps longer: a policy that is made longer takes effect with the next bite, one
that is made shorter with the next run.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from operator import eq
from typing import TYPE_CHECKING, Any
from uuid import UUID

import sqlalchemy as sa

from worker.errors import Refused
from worker.layouts.model import is_one_of
from worker.ledger import SCHEMA
from worker.params import duration_text

if TYPE_CHECKING:
    from worker.config import Settings

POLICIES = sa.Table(
    "policies",
    sa.MetaData(schema=SCHEMA),
    *(sa.Column(name, sa.Text) for name in ("table", "reason", "actor")),
    sa.Column("company", sa.Uuid),
    sa.Column("version", sa.Integer),
    sa.Column("keep_seconds", sa.BigInteger),
    sa.Column("created_at", sa.DateTime(timezone=True)),
)
# No company's id: stands for every company without a policy of its own.
_EVERY = sa.literal(UUID(int=0), sa.Uuid)


@dataclass(frozen=True, kw_only=True)
class Policy:
    """One version of what holds for a table, in one company or (None) in every one without its own.

    `keep` None takes the policy back.
    """

    table: str
    company: UUID | None
    version: int
    keep: timedelta | None
    reason: str
    actor: str
    created_at: datetime

    def to_json(self) -> dict[str, Any]:
        return {
            "table": self.table,
            "company": str(self.company) if self.company else None,
            "version": self.version,
            "keep": duration_text(self.keep) if self.keep else None,
            "reason": self.reason,
            "actor": self.actor,
            "created_at": self.created_at.isoformat(),
        }


@dataclass(frozen=True, kw_only=True)
class Cutoffs:
    """The moment before which a row is old: `special` for companies whose policy differs, else `default`."""

    default: datetime
    special: Mapping[UUID, datetime] = field(default_factory=dict, hash=False)

    def of(self, company: str | None) -> datetime:
        return self.default if company is None else self.special.get(UUID(company), self.default)

    def old(self, age: sa.ColumnElement[datetime], company: sa.ColumnElement[Any] | None) -> sa.ColumnElement[bool]:
        """Whether a row is old; one term a distinct moment, not one a company."""
        if company is None or not self.special:
            return age < self.default
        moments: dict[datetime, list[UUID]] = {}
        for whose, moment in self.special.items():
            moments.setdefault(moment, []).append(whose)
        # A row of no company has none of these.
        others = sa.or_(company.is_(None), company != sa.all_(sa.literal(list(self.special), sa.ARRAY(sa.Uuid))))
        each = (sa.and_(is_one_of(company, ids, sa.Uuid), age < at) for at, ids in sorted(moments.items()))
        return sa.or_(sa.and_(others, age < self.default), *each)

    def to_json(self) -> dict[str, Any]:
        special = {str(whose): moment.isoformat() for whose, moment in sorted(self.special.items())}
        return {"cutoff": self.default.isoformat(), "companies": special}


def versions(connection: sa.Connection, *, table: str | None = None) -> list[Policy]:
    """Every version of every policy (of one table), in the order they were made."""
    query = sa.select(POLICIES).order_by(POLICIES.c.created_at, POLICIES.c.version)
    rows = connection.execute(query.where(POLICIES.c.table == table) if table else query)
    return [_policy(row) for row in rows]


def _counting() -> sa.Select[Any]:
    later = POLICIES.alias("later")
    # For the server to hash, which it cannot by IS NOT DISTINCT FROM alone.
    whose = (sa.func.coalesce(one.c.company, _EVERY) for one in (later, POLICIES))
    replaced = sa.exists(later.c.version).where(
        later.c.table == POLICIES.c.table,
        eq(*whose),
        later.c.company.is_not_distinct_from(POLICIES.c.company),
        later.c.version > POLICIES.c.version,
        later.c.created_at <= sa.bindparam("now"),
    )
    return sa.select(POLICIES).where(POLICIES.c.table == sa.bindparam("of"), ~replaced)


# Made once: each bite asks, and to make it takes longer than to ask it.
_COUNTING = _counting()


def counting(connection: sa.Connection, table: str, *, now: datetime) -> list[Policy]:
    """The versions that count for a run entered at `now`: for each company that of then, and those since.

    What was replaced before stays as evidence for good, and grows.
    """
    return [_policy(row) for row in connection.execute(_COUNTING, {"of": table, "now": now})]


def _policy(row: sa.Row[Any]) -> Policy:
    found = row._asdict()
    seconds = found.pop("keep_seconds")
    return Policy(**found, keep=None if seconds is None else timedelta(seconds=seconds))


def newest(found: Iterable[Policy]) -> dict[UUID | None, Policy]:
    """The version that holds for each company (None: for every one without its own), those taken back left out."""
    last: dict[UUID | None, Policy] = {}
    for one in sorted(found, key=lambda policy: policy.version):
        last[one.company] = one
    return {whose: one for whose, one in last.items() if one.keep is not None}


def add(
    connection: sa.Connection, *, table: str, company: UUID | None, keep: timedelta | None, reason: str, actor: str
) -> Policy:
    """Enter the next version of a policy."""
    before = [one.version for one in versions(connection, table=table) if one.company == company]
    values = {
        "table": table,
        "company": company,
        "version": max(before, default=0) + 1,
        "keep_seconds": None if keep is None else round(keep.total_seconds()),
        "reason": reason,
        "actor": actor,
    }
    return _policy(connection.execute(sa.insert(POLICIES).values(values).returning(POLICIES)).one())


def require_within(keep: timedelta, settings: Settings, *, what: str) -> None:
    """Refused when a retention period is under the floor or over the ceiling of the settings."""
    floor, ceiling = settings.retention_floor, settings.retention_ceiling
    if floor is not None and keep < floor:
        raise Refused(f"{what} is under the floor of {duration_text(floor)} (PAPERCLIP_WORKER_RETENTION_FLOOR)")
    if keep > ceiling:
        raise Refused(f"{what} is over the ceiling of {duration_text(ceiling)} (PAPERCLIP_WORKER_RETENTION_CEILING)")


def cutoffs(
    found: Sequence[Policy],
    settings: Settings,
    *,
    now: datetime,
    asked: timedelta | None,
    default: timedelta,
) -> Cutoffs:
    """The moments for a run entered at `now`.

    `asked` is what an operator asks for; it can only keep longer than a policy. Without it a policy decides, and
    `default` where there is none. Refused when a policy in force is not within the settings: fails closed.
    """
    present, then = newest(found), newest(one for one in found if one.created_at <= now)
    for one in present.values():
        if one.keep is not None:
            whose = f"company {one.company}" if one.company else "every company"
            what = f"the policy of {one.table} for {whose} (version {one.version}, {duration_text(one.keep)})"
            require_within(one.keep, settings, what=what)
    if asked is None and None not in present:
        require_within(default, settings, what=f"the default of {duration_text(default)} (a policy overrides it)")
    return _longest([present, then], now=now, asked=asked, default=default)


def entered(found: Sequence[Policy], *, now: datetime, asked: timedelta | None, default: timedelta) -> Cutoffs:
    """The moments for a run by what was in force when it was entered at `now`, whatever came after. Never refused."""
    then = newest(one for one in found if one.created_at <= now)
    return _longest([then], now=now, asked=asked, default=default)


def _longest(
    each: Sequence[Mapping[UUID | None, Policy]], *, now: datetime, asked: timedelta | None, default: timedelta
) -> Cutoffs:
    """The moments by whichever of several sets of policies keep longest."""

    def keeps(whose: UUID | None) -> timedelta:
        rules = [policies.get(whose) or policies.get(None) for policies in each]
        periods = [rule.keep if rule and rule.keep else (asked or default) for rule in rules]
        return max(*periods, asked or timedelta(0))

    base = keeps(None)
    own = {whose: keeps(whose) for policies in each for whose in policies if whose is not None}
    return Cutoffs(
        default=now - base, special={whose: now - period for whose, period in own.items() if period != base}
    )
