"""Ended tasks out of sight after a while, and back again. See docs/archive-tasks.md."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any
from uuid import UUID

from worker.errors import Refused
from worker.job import Batch, Finding, Job, Overdue, Right, Shard, Verdict, may_read
from worker.params import RunId, param, to_json
from worker.plans import Plan, Tally

if TYPE_CHECKING:
    import sqlalchemy as sa

    from worker.layouts.model import Layout
    from worker.means import Means
    from worker.retention import Cutoffs
    from worker.rowset import RowSet

_LONGEST = timedelta(days=36_500)
# The guide's rule, where neither an operator nor a policy says otherwise.
_KEEP = timedelta(days=30)


@dataclass(frozen=True, kw_only=True)
class ArchiveTasks(Job):
    """Put tasks that ended long ago out of sight, and with --undo bring back just those a run archived.

    Nothing is deleted. Tasks that the app still counts on stay in sight and are counted under `left` with the
    reason: live runs, open tasks below, cancelled blockers of open tasks, pending answers, and more.
    """

    name = "archive-tasks"
    action = "maintenance.tasks_archived"
    repeatable = True

    older_than: timedelta | None = param(
        None,
        metavar="AGE",
        help="Tasks that ended longer ago are archived (30d, 12w); a policy that keeps longer wins.  "
        "[default: as the policy says, 30d without one]",
    )
    company: tuple[UUID, ...] = param((), metavar="ID", help="Only this company; repeatable. Default: all.")
    undo: RunId | None = param(
        None, metavar="RUN", help="Bring back what this run archived and nobody has changed since."
    )

    def __post_init__(self) -> None:
        if self.older_than is not None and not timedelta(0) < self.older_than <= _LONGEST:
            raise Refused("--older-than must be above zero and at most 36500d")
        if self.undo is not None and self.older_than is not None:
            raise Refused("--undo brings back what a run archived whatever its age; leave out --older-than")

    @property
    def activity(self) -> str:
        return self.action if self.undo is None else "maintenance.tasks_unarchived"

    @property
    def subject(self) -> str:
        return "tasks"

    @classmethod
    def retaining(cls, layout: Layout, table: str) -> ArchiveTasks | None:
        return cls() if table == layout.tasks.name else None

    def needs(self, layout: Layout) -> Iterable[sa.Table]:
        return layout.tasks.reads()

    @classmethod
    def rights(cls, layout: Layout) -> Iterable[Right]:
        yield from may_read(layout.tasks.reads())
        # The size of a row is that of all its columns.
        yield Right(verb="SELECT", table=layout.tasks.table)
        yield Right(verb="UPDATE", table=layout.tasks.table, columns=tuple(layout.tasks.back))

    def check(self, means: Means) -> None:
        means.require_companies(self.company)
        means.tasks.require_untriggered()
        if self.undo is not None:
            means.tasks.require_undoable(self.undo, self.company, job=self.name)
            return
        means.require_whole(means.layout.tasks)
        means.require_kinds(means.layout.tasks)
        self._cutoffs(means)
        if means.run is not None:
            means.tasks.require_not_undone(means.run)

    def plan(self, means: Means) -> Plan:
        return self._plan(means, exact=True)

    def outline(self, means: Means) -> Plan:
        return self._plan(means, exact=False)

    def _plan(self, means: Means, *, exact: bool) -> Plan:
        rows = self._rows(means)
        targets, left = rows.count(means.connection, exact=exact)
        if self.undo is not None:
            left += tuple(means.tasks.gone(self.undo, self.company))
        return Plan(
            job=self.name,
            params=to_json(self),
            layout=means.layout.name,
            now=means.now,
            targets=targets,
            left=left,
            notes=tuple(f"{keep.reason}: {keep.why}" for keep in rows.keeps),
        )

    def overdue(self, means: Means) -> tuple[Overdue, ...]:
        rows, oldest = self._rows(means).overdue(means.connection)
        return (Overdue(table=means.layout.tasks.name, rows=rows, oldest=oldest),)

    def shards(self, means: Means, plan: Plan) -> Iterator[Shard]:
        return means.shards(self._rows(means), plan)

    def claim(self, means: Means, shard: Shard, after: Mapping[str, Any] | None, limit: int) -> Batch | None:
        return self._rows(means).claim(means.connection, shard, after, limit, contended=means.contended)

    def apply(self, means: Means, batch: Batch) -> Tally:
        if self.undo is None:
            return means.tasks.archive(self._rows(means), batch)
        return means.tasks.bring_back(self._rows(means), batch, of=self.undo)

    def verify(self, means: Means) -> Verdict:
        rows = self._rows(means)
        targets, left = rows.remaining(means.connection)
        still = "ended tasks are still in sight" if self.undo is None else "archived tasks are not back"
        findings = [Finding(table=one.table, company=one.company, rows=one.rows, what=still) for one in targets]
        if self.undo is not None:
            return Verdict(findings=tuple(findings), left=left + tuple(means.tasks.gone(self.undo, self.company)))
        late = "archived, and the app came to count on them meanwhile; bring them back with --undo"
        lost = "archived, and gone on with meanwhile; show them again in the app, for --undo leaves what was changed"
        findings += [
            Finding(table=rows.what.name, company=company, rows=number, what=lost if changed else late)
            for company, changed, number in means.tasks.wanted_after_all(rows)
        ]
        return Verdict(findings=tuple(findings), left=left)

    def index(self, means: Means) -> Mapping[str, Any]:
        if self.undo is not None:
            return {"undoes": str(self.undo)}
        return {"retention": means.retained(means.layout.tasks.name, asked=self.older_than, default=_KEEP)}

    def _rows(self, means: Means) -> RowSet:
        return means.once(self, self._make_rows)

    def _make_rows(self, means: Means) -> RowSet:
        tasks = means.layout.tasks
        if self.undo is not None:
            return means.tasks.archived_by(self.undo, self.company)
        return means.rows(tasks, cutoffs=self._cutoffs(means), companies=self.company, keeps=tasks.keeps)

    def _cutoffs(self, means: Means) -> Cutoffs:
        return means.cutoffs(means.layout.tasks.name, asked=self.older_than, default=_KEEP)
