"""The guide's retention rule (delete activity older than 90 days), made safe. See docs/prune-logs.md."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any
from uuid import UUID

from worker.errors import Refused
from worker.job import Batch, Finding, Job, Overdue, Right, Shard, Verdict, may_read
from worker.params import param, to_json
from worker.plans import Plan, Tally

if TYPE_CHECKING:
    import sqlalchemy as sa

    from worker.archive import ArchivedObject
    from worker.layouts.model import Keep, Layout, LogTable
    from worker.means import Means
    from worker.retention import Cutoffs
    from worker.rowset import RowSet


_LONGEST = timedelta(days=36_500)
# The guide's retention rule, where neither an operator nor a policy says otherwise.
_KEEP = timedelta(days=90)


@dataclass(frozen=True, kw_only=True)
class PruneLogs(Job):
    """Delete log rows older than the retention period, archived to S3 first.

    Rows that the app still reads as state stay and are counted under `left` with the reason. Tables that
    must never be pruned refuse and say why.
    """

    name = "prune-logs"
    action = "maintenance.logs_pruned"
    repeatable = True

    older_than: timedelta | None = param(
        None,
        metavar="AGE",
        help="Rows older than this go (90d, 12h, 2w); a policy that keeps longer wins.  "
        "[default: as the policy says, 90d without one]",
    )
    company: tuple[UUID, ...] = param((), metavar="ID", help="Only this company; repeatable. Default: all.")
    table: str = param("activity_log", metavar="NAME", help="The log to prune.")
    archive: bool = param(
        True,
        help="Write the rows to S3 and read them back before they go.",
        off="--without-archive",
    )
    keep_security: bool = param(
        False,
        help="Leave security events (auth.*, secret.*, ...) in place.",
    )

    def __post_init__(self) -> None:
        if self.older_than is not None and not timedelta(0) < self.older_than <= _LONGEST:
            raise Refused("--older-than must be above zero and at most 36500d")

    @property
    def subject(self) -> str:
        return self.table

    @property
    def exclusion(self) -> str:
        return f"{self.name} {self.table}"

    @property
    def archives(self) -> bool:
        return self.archive

    @property
    def archived(self) -> str | None:
        return self.table if self.archive else None

    def needs(self, layout: Layout) -> Iterable[sa.Table]:
        return layout.log(self.table).reads()

    @classmethod
    def rights(cls, layout: Layout) -> Iterable[Right]:
        for log in layout.logs.values():
            # The archive takes whole rows, columns of later releases included.
            yield Right(verb="SELECT", table=log.table)
            yield Right(verb="DELETE", table=log.table)
            # SKIP LOCKED needs a right to lock; one harmless column is the narrowest there is.
            yield Right(verb="UPDATE", table=log.table, columns=(log.key.name,))
            yield from may_read(table for keep in log.keeps for table in keep.reads)

    def check(self, means: Means) -> None:
        log = means.layout.log(self.table)
        self._cutoffs(means)
        if log.company is not None:
            means.require_companies(self.company)
        elif self.company:
            raise Refused(f"--company: the rows of {self.table} belong to no company")
        if self.keep_security and log.security is None:
            raise Refused(f"--keep-security: {self.table} does not say which rows are security events")
        means.require_prunable(log, archive=self._archived(means.layout))
        if means.run is not None:
            # To look is no harm; what is refused is to begin, and to go on.
            means.require_no_restore(self.table)
            means.require_not_restored()

    def admit(self, means: Means) -> None:
        means.require_no_restore(self.table)

    def plan(self, means: Means) -> Plan:
        return self._plan(means, exact=True)

    def outline(self, means: Means) -> Plan:
        return self._plan(means, exact=False)

    def _plan(self, means: Means, *, exact: bool) -> Plan:
        targets, left = self._expired(means).count(means.connection, exact=exact)
        log = means.layout.log(self.table)
        notes = [f"{keep.reason}: {keep.why}" for keep in self._expired(means).keeps]
        if not log.record:
            notes.append(f"{self.table} holds credentials: its rows are deleted and never archived")
        elif not self.archive:
            notes.append("without archive: what goes cannot be brought back")
        return Plan(
            job=self.name,
            params=to_json(self),
            layout=means.layout.name,
            now=means.now,
            targets=targets,
            left=left,
            notes=tuple(notes),
        )

    def overdue(self, means: Means) -> tuple[Overdue, ...]:
        rows, oldest = self._expired(means).overdue(means.connection)
        return (Overdue(table=self.table, rows=rows, oldest=oldest),)

    def shards(self, means: Means, plan: Plan) -> Iterator[Shard]:
        return means.shards(self._expired(means), plan, archive=self._archived(means.layout))

    def claim(self, means: Means, shard: Shard, after: Mapping[str, Any] | None, limit: int) -> Batch | None:
        return self._expired(means).claim(means.connection, shard, after, limit, contended=means.contended)

    def preserve(self, means: Means, batch: Batch) -> tuple[Batch, tuple[ArchivedObject, ...]]:
        return means.archive(self._expired(means), batch) if self._archived(means.layout) else (batch, ())

    def apply(self, means: Means, batch: Batch) -> Tally:
        # A plugin may have come since the run was checked, and a run takes hours.
        means.require_known_references(means.layout.log(self.table))
        return self._expired(means).delete(means.connection, batch)

    def verify(self, means: Means) -> Verdict:
        damaged = means.checking() if self._archived(means.layout) else list
        targets, left = self._expired(means).remaining(means.connection)
        findings = [
            Finding(table=one.table, company=one.company, rows=one.rows, what="expired rows are still there")
            for one in targets
        ]
        findings += [
            Finding(table=self.table, company=None, rows=0, what=f"archive object {key} is not what was written")
            for key in damaged()
        ]
        return Verdict(findings=tuple(findings), left=left)

    def index(self, means: Means) -> Mapping[str, Any]:
        retention = means.retained(self.table, asked=self.older_than, default=_KEEP)
        if not self._archived(means.layout):
            return {"retention": retention}
        facts: dict[str, object] = {
            "job": self.name,
            "params": to_json(self),
            "layout": means.layout.name,
            "run": str(means.run),
            "table": self.table,
            "horizon": means.now.isoformat(),
            **retention,
        }
        return {"retention": retention, "archive": means.index_archive(self.table, facts)}

    @classmethod
    def retaining(cls, layout: Layout, table: str) -> PruneLogs | None:
        return cls(table=table) if table in layout.logs else None

    def _expired(self, means: Means) -> RowSet:
        return means.once(self, self._make_expired)

    def _make_expired(self, means: Means) -> RowSet:
        log = means.layout.log(self.table)
        return means.rows(log, cutoffs=self._cutoffs(means), companies=self.company, keeps=self._keeps(log))

    def _keeps(self, log: LogTable) -> tuple[Keep, ...]:
        return (*log.keeps, *log.security_keep()) if self.keep_security else log.keeps

    def _archived(self, layout: Layout) -> bool:
        return self.archive and layout.log(self.table).record

    def _cutoffs(self, means: Means) -> Cutoffs:
        return means.cutoffs(self.table, asked=self.older_than, default=_KEEP)
