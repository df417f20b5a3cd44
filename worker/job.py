"""What a job is: a frozen value whose fields are its parameters, and the steps the one loop takes with it.

Nothing here (nor in `tasks/`) imports the database: `--help` reads the jobs without paying for it.
"""

from __future__ import annotations

import abc
import hashlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any, ClassVar, Self
from uuid import UUID

from worker import canonical
from worker.errors import Refused

if TYPE_CHECKING:
    import sqlalchemy as sa

    from worker.archive import ArchivedObject
    from worker.layouts.model import Layout
    from worker.means import Means

# The run of steps that are rolled back.
REHEARSAL = UUID(int=0)

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


def horizon_of(plan_hash: str, *, now: datetime) -> datetime:
    """The horizon inside a plan's hash. Refused when the text is no plan hash or lies in the future."""
    stamp, _, rest = plan_hash.rpartition("-")
    try:
        horizon = datetime.strptime(stamp, _STAMP).replace(tzinfo=UTC)
    except ValueError:
        horizon = None
    if horizon is None or len(rest) != 24:
        raise Refused("--plan is not the hash of a plan; take it from `paperclip-worker plan JOB`")
    if horizon > now + timedelta(minutes=5):
        raise Refused("--plan has a horizon in the future; make the plan again")
    return horizon


@dataclass(frozen=True, kw_only=True)
class Shard:
    """An independent slice of a run that any worker may take. `spec` is JSON the job alone understands.

    One of a later `stage` is taken when all of the earlier ones are done.
    """

    key: str
    rows: int
    spec: Mapping[str, Any]
    stage: int = 0


@dataclass(frozen=True, kw_only=True)
class Batch:
    """The rows of one bite. `after` is the shard's cursor once the bite is committed (JSON).

    `exact`: the window holds nothing but rows that were found eligible in this very snapshot.
    """

    after: Mapping[str, Any]
    exhausted: bool
    window: sa.ColumnElement[bool] | None = None
    exact: bool = False
    # Of an exact batch the rows' bytes per company, where they are known.
    sizes: Mapping[str | None, int] | None = None
    # What the job's own `apply` is to do; for jobs whose batches are not windows of rows.
    spec: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One way in which the promise is still unkept. Holds no row content."""

    table: str
    company: str | None
    rows: int
    what: str

    def to_json(self) -> dict[str, Any]:
        return {"table": self.table, "company": self.company, "rows": self.rows, "what": self.what}


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What verify saw: findings (none = the promise is kept) and the rows that rightly stay."""

    findings: tuple[Finding, ...]
    left: tuple[Left, ...]


@dataclass(frozen=True, kw_only=True)
class Right:
    """A privilege a job needs on a table of the host; `columns` empty: on the whole of it."""

    verb: str
    table: sa.Table
    columns: tuple[str, ...] = ()


def may_read(tables: Iterable[sa.Table]) -> Iterator[Right]:
    """The right to read just the named columns of these tables."""
    for table in tables:
        yield Right(verb="SELECT", table=table, columns=tuple(table.c.keys()))


@dataclass(frozen=True, kw_only=True)
class Overdue:
    """Rows of one table that a run started now would change; `oldest` is None where a job cannot say."""

    table: str
    rows: int
    oldest: datetime | None = None


class Job(abc.ABC):
    """A frozen, keyword-only dataclass. Its docstring's first line is its promise and its `--help`."""

    name: ClassVar[str]
    action: ClassVar[str]
    destructive: ClassVar[bool] = True
    # Whether a bite sees what others commit while it runs: for a job that first locks, then looks.
    read_committed: ClassVar[bool] = False
    # Whether a bite that a crash of the server loses is simply taken again: such bites need not wait for the disk.
    # Not for a job whose bites act outside of the database on what they committed.
    repeatable: ClassVar[bool] = False
    # Whether it reads every table there is, known or not. Such rights are printed only for a job asked for by name.
    reads_everything: ClassVar[bool] = False

    @property
    def activity(self) -> str:
        """The action of the activity row that each touched company gets."""
        return self.action

    @property
    def subject(self) -> str:
        """What an operator types to confirm a destructive run."""
        return self.name

    @property
    def exclusion(self) -> str:
        """Two runs with the same text here are never under way together."""
        return self.name

    @property
    def archives(self) -> bool:
        """Whether the job writes to the object store, which is then checked before anything starts."""
        return False

    @classmethod
    def usual(cls) -> Self:
        """The job with its usual parameters, for what is asked of every job."""
        return cls()

    @classmethod
    def retaining(cls, layout: Layout, table: str) -> Job | None:  # noqa: ARG003
        """The job that keeps a retention policy of this table, with its other parameters at their defaults."""
        return None

    @abc.abstractmethod
    def check(self, means: Means) -> None:
        """Raise Refused or SchemaError when this job cannot run here. Changes nothing."""

    @abc.abstractmethod
    def needs(self, layout: Layout) -> Iterable[sa.Table]:
        """The host's tables, with just the columns, that this job cannot do without."""

    def foresee(self, means: Means) -> None:  # noqa: B027 - most jobs have nothing to look for
        """Raise Refused for what only a long look at the data can tell. Asked before a plan, and before a run."""

    def admit(self, means: Means) -> None:
        """Raise Refused for what forbids a run but not the plan that shows it. Asked before a run is entered."""
        self.foresee(means)

    @classmethod
    @abc.abstractmethod
    def rights(cls, layout: Layout) -> Iterable[Right]:
        """Every privilege on the host's tables that the job needs, whatever its parameters."""

    @abc.abstractmethod
    def plan(self, means: Means) -> Plan:
        """What a run started at `means.now` would change. Reads only."""

    def outline(self, means: Means) -> Plan:
        """The plan of a run that was entered without one, where it can be had for less than a look at everything."""
        return self.plan(means)

    def overdue(self, means: Means) -> tuple[Overdue, ...]:
        """What a run started at `means.now` would change, per table, for the backlog. Reads only."""
        rows: dict[str, int] = {}
        for one in self.plan(means).targets:
            rows[one.table] = rows.get(one.table, 0) + one.rows
        return tuple(Overdue(table=table, rows=number) for table, number in rows.items())

    @abc.abstractmethod
    def shards(self, means: Means, plan: Plan) -> Iterator[Shard]:
        """Independent slices that together hold every row of the plan."""

    @abc.abstractmethod
    def claim(self, means: Means, shard: Shard, after: Mapping[str, Any] | None, limit: int) -> Batch | None:
        """The next batch of at most about `limit` rows past the cursor; None when nothing lies beyond it.

        With `means.contended` it must lock what it can and leave what others hold.
        """

    def preserve(self, means: Means, batch: Batch) -> tuple[Batch, tuple[ArchivedObject, ...]]:  # noqa: ARG002
        """Copy out what `apply` will destroy, and read it back. Takes no lock on the host's rows.

        Returns the batch that `apply` is to change (just what was copied) and the objects.
        """
        return batch, ()

    @abc.abstractmethod
    def apply(self, means: Means, batch: Batch) -> Tally:
        """Change the batch's rows and nothing else."""

    @abc.abstractmethod
    def verify(self, means: Means) -> Verdict:
        """Whether the promise is kept now. Reads only."""

    def index(self, means: Means) -> Mapping[str, Any]:  # noqa: ARG002
        """Write the index of what was done so far outside the database, however the run ends. Safe to repeat.

        What it returns goes into the receipt as evidence.
        """
        return {}

    def finish(self, means: Means) -> Mapping[str, Any]:  # noqa: ARG002
        """The irreversible closing act of a run that kept its promise. Safe to repeat; evidence as for `index`."""
        return {}


def _order(place: Place) -> tuple[str, bool, str]:
    table, company = place
    return table, company is not None, company or ""
