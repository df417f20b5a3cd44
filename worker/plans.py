"""What a run would change, and what it did: rows and bytes by table and company.

Nothing here imports the database: `--help` reads the jobs without paying for it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any

from worker import canonical
from worker.errors import Refused

# A table and the company its rows belong to; None stands for rows of the whole instance.
Place = tuple[str, str | None]


@dataclass(frozen=True)
class Amount:
    """How much: rows, and their size in bytes as the database stores them uncompressed."""

    rows: int = 0
    bytes: int = 0

    def __add__(self, other: Amount) -> Amount:
        return Amount(self.rows + other.rows, self.bytes + other.bytes)


@dataclass(frozen=True)
class Tally:
    """What was done, per table and company. Adds up."""

    done: Mapping[Place, Amount] = field(default_factory=dict)

    def __add__(self, other: Tally) -> Tally:
        total = dict(self.done)
        for place, amount in other.done.items():
            total[place] = total.get(place, Amount()) + amount
        return Tally(total)

    @property
    def total(self) -> Amount:
        return sum(self.done.values(), Amount())

    def to_json(self) -> list[dict[str, Any]]:
        """One object per table and company, in a fixed order."""
        return [
            {"table": table, "company": company, "rows": amount.rows, "bytes": amount.bytes}
            for (table, company), amount in sorted(self.done.items(), key=lambda item: _order(item[0]))
            if amount.rows
        ]

    @classmethod
    def from_json(cls, items: Iterable[Mapping[str, Any]]) -> Tally:
        return cls({(one["table"], one["company"]): Amount(one["rows"], one["bytes"]) for one in items})


@dataclass(frozen=True, kw_only=True)
class Target:
    """Rows of one table and company that a run would change; the digest tells one set of rows from another."""

    table: str
    company: str | None
    rows: int
    bytes: int
    digest: str


@dataclass(frozen=True, kw_only=True)
class Left:
    """Rows old enough to go that stay in place, and the reason."""

    table: str
    company: str | None
    reason: str
    rows: int

    def to_json(self) -> dict[str, Any]:
        return {"table": self.table, "company": self.company, "reason": self.reason, "rows": self.rows}


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a run started at `now` would change. `hash` names exactly this plan of exactly this world."""

    job: str
    params: Mapping[str, Any]
    layout: str
    now: datetime
    targets: tuple[Target, ...]
    left: tuple[Left, ...]
    notes: tuple[str, ...] = ()

    @property
    def tally(self) -> Tally:
        """The tally of a run of this plan on a world that stands still."""
        return Tally({(one.table, one.company): Amount(one.rows, one.bytes) for one in self.targets})

    @property
    def hash(self) -> str:
        """`<horizon>-<digest>`: the horizon travels with it, so the plan can be made again and compared."""
        facts = {
            "job": self.job,
            "params": dict(self.params),
            "layout": self.layout,
            "now": self.now.isoformat(),
            "targets": [[t.table, t.company, t.rows, t.bytes, t.digest] for t in self.targets],
            "left": [one.to_json() for one in self.left],
        }
        return f"{self.now.strftime(_STAMP)}-{hashlib.sha256(canonical.encode(facts)).hexdigest()[:24]}"

    def to_json(self) -> dict[str, Any]:
        total = self.tally.total
        return {
            "job": self.job,
            "params": dict(self.params),
            "layout": self.layout,
            "horizon": self.now.isoformat(),
            "rows": total.rows,
            "bytes": total.bytes,
            "tally": self.tally.to_json(),
            "left": [one.to_json() for one in self.left],
            "notes": list(self.notes),
            "hash": self.hash,
        }


_STAMP = "%Y%m%dT%H%M%S.%fZ"
_FIRST_YEAR = 2000


def horizon_of(plan_hash: str, *, now: datetime) -> datetime:
    """The horizon inside a plan's hash. Refused when the text is no plan hash or lies in the future."""
    stamp, _, rest = plan_hash.rpartition("-")
    try:
        horizon = datetime.strptime(stamp, _STAMP).replace(tzinfo=UTC)
    except ValueError:
        horizon = None
    # No plan is older than the app; the first years have no room for an age to be taken off.
    if horizon is None or len(rest) != 24 or horizon.year < _FIRST_YEAR:
        raise Refused("--plan is not the hash of a plan; take it from `paperclip-worker plan JOB`")
    if horizon > now + timedelta(minutes=5):
        raise Refused("--plan has a horizon in the future; make the plan again")
    return horizon


def _order(place: Place) -> tuple[str, bool, str]:
    table, company = place
    return table, company is not None, company or ""
