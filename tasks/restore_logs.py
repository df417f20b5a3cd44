"""What prune-logs took and archived, put back. See docs/restore-logs.md."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from uuid import UUID

from worker.job import Batch, Finding, Job, Right, Shard, Verdict, may_read
from worker.params import RunId, param, to_json
from worker.plans import Plan, Tally, Target

if TYPE_CHECKING:
    import sqlalchemy as sa

    from worker.layouts.model import Layout
    from worker.means import Means
    from worker.restore import Restore


@dataclass(frozen=True, kw_only=True)
class RestoreLogs(Job):
    """Put the rows that a run of prune-logs archived back into their table, byte for byte.

    The archive is read whole and compared with the ledger first. Rows that are there already are left; a row that is
    there with other content refuses the whole, and is named.
    """

    name = "restore-logs"
    action = "maintenance.logs_restored"
    repeatable = True
    destructive = False

    run: RunId | None = param(
        None, metavar="RUN", help="The run of prune-logs whose rows are to come back.  [required]"
    )
    company: tuple[UUID, ...] = param((), metavar="ID", help="Only this company; repeatable. Default: all.")

    @property
    def archives(self) -> bool:
        return True

    def needs(self, layout: Layout) -> Iterable[sa.Table]:
        return (layout.companies,)

    @classmethod
    def rights(cls, layout: Layout) -> Iterable[Right]:
        yield from may_read((layout.companies,))
        for log in layout.logs.values():
            if log.record:
                yield Right(verb="SELECT", table=log.table)
                yield Right(verb="INSERT", table=log.table)
                # A row whose parent is gone is found before the first is put back.
                yield from may_read(log.parents)

    def check(self, means: Means) -> None:
        means.require_companies(self.company)
        self._restore(means).check()

    def foresee(self, means: Means) -> None:
        self._restore(means).foresee()

    def plan(self, means: Means) -> Plan:
        return self._plan(means, self._restore(means).targets())

    def outline(self, means: Means) -> Plan:
        # What is there already was looked for before the run was entered, and is again in each bite.
        return self._plan(means, self._restore(means).archived())

    def _plan(self, means: Means, targets: tuple[Target, ...]) -> Plan:
        return Plan(
            job=self.name,
            params=to_json(self),
            layout=means.layout.name,
            now=means.now,
            targets=targets,
            left=(),
            notes=(
                f"rows come back into {self._restore(means).log.name}",
                "the next prune-logs takes them again, unless a policy or a legal hold keeps them",
            ),
        )

    def shards(self, means: Means, plan: Plan) -> Iterator[Shard]:  # noqa: ARG002 - one an object
        return self._restore(means).shards()

    def claim(self, means: Means, shard: Shard, after: Mapping[str, Any] | None, limit: int) -> Batch | None:
        cursor = self._restore(means).next(shard, after, limit)
        return Batch(after=cursor, exhausted=cursor["line"] == shard.rows)

    def apply(self, means: Means, batch: Batch) -> Tally:
        return self._restore(means).put(batch.after)

    def verify(self, means: Means) -> Verdict:
        lacks = self._restore(means).targets()
        what = "archived rows are not back"
        return Verdict(
            findings=tuple(Finding(table=one.table, company=one.company, rows=one.rows, what=what) for one in lacks),
            left=(),
        )

    def index(self, means: Means) -> Mapping[str, Any]:
        return {"restores": str(self.run), "table": self._restore(means).log.name}

    def _restore(self, means: Means) -> Restore:
        return means.restore(self.run, self.company)
