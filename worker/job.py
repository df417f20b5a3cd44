"""What a job is: a frozen value whose fields are its parameters, and the steps the one loop takes with it.

Nothing here (nor in `tasks/`) imports the database: `--help` reads the jobs without paying for it.
"""

from __future__ import annotations

import abc
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import TYPE_CHECKING, Any, ClassVar, Self
from uuid import UUID

if TYPE_CHECKING:
    import sqlalchemy as sa

    from worker.archive import ArchivedObject
    from worker.layouts.model import Layout
    from worker.means import Means
    from worker.plans import Amount, Left, Plan, Tally

# The run of steps that are rolled back.
REHEARSAL = UUID(int=0)


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
    # Of an exact batch how much it is per company, where that is known.
    amounts: Mapping[str | None, Amount] | None = None
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

    @property
    def archived(self) -> str | None:
        """The table whose rows the job archives, as `Means.archive` does; None where it archives none."""
        return None

    def may_rest(self, stage: int) -> bool:  # noqa: ARG002 - most may rest before any
        """Whether a run may rest before bites of this stage, for as long as the server is under pressure."""
        return True

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
