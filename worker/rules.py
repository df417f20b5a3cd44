"""What operators do to the rules: legal holds and retention policies, each with a look at what it would change.

Whatever lets more rows go (a hold released, a policy made shorter or taken back) is shown row for row before it is
done: the next runs planned as the rules are, and as they would be. Where those are refused the rules can be changed
all the same, since that is how it is put right.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any
from uuid import UUID

from worker import db, holds, layouts, ledger, registry, retention
from worker.errors import Refused
from worker.holds import Hold
from worker.means import Means, Rules
from worker.params import duration_text
from worker.plans import Amount
from worker.retention import Policy

if TYPE_CHECKING:
    import sqlalchemy as sa

    from worker.job import Job
    from worker.layouts.model import Layout
    from worker.operations import Operations
    from worker.plans import Place


@dataclass(frozen=True, kw_only=True)
class Look:
    """What the next runs would take under other rules that they do not take under those in force.

    `doomed`: rows per job, table and company. `refused`: jobs whose runs would be refused, with why; they would take
    nothing, and what they take once that is put right nobody can say.
    """

    doomed: list[dict[str, Any]]
    refused: list[dict[str, str]]

    def to_json(self) -> dict[str, Any]:
        return {"next_runs": self.doomed, "refused": self.refused}


def _look(deployment: Operations, jobs: Iterable[Job], rules: Rules) -> Look:
    look = Look(doomed=[], refused=[])
    for job in jobs:
        now = deployment.now()
        # Both plans in one snapshot and as of one moment: no rule dooms what merely grew old in between.
        with deployment.transaction(scan=True, read_only=True) as connection:
            means = Means(
                connection=connection,
                now=now,
                layout=layouts.detect(connection),
                settings=deployment.settings,
                store=deployment.store,
            )
            after = _taken(replace(means, rules=rules), job)
            if isinstance(after, Refused):
                look.refused.append({"job": job.name, "why": str(after)})
                continue
            before = _taken(means, job)
        # Rules in force by which a run is refused let it take nothing.
        had = {} if isinstance(before, Refused) else before
        for (table, company), amount in sorted(after.items(), key=lambda item: (item[0][0], item[0][1] or "")):
            if (more := amount.rows - had.get((table, company), Amount()).rows) > 0:
                look.doomed.append({"job": job.name, "table": table, "company": company, "rows": more})
    return look


def _taken(means: Means, job: Job) -> Mapping[Place, Amount] | Refused:
    """What a run of a job would take, or why it would be refused; the transaction can go on either way."""
    try:
        with db.translated(), means.connection.begin_nested():
            means.require_fit(job)
            job.foresee(means)
            return job.plan(means).tally.done
    except Refused as error:
        return error


def add_hold(
    deployment: Operations, *, kind: str, name: str, reason: str, actor: str, until: datetime | None
) -> Hold:
    """Put a hold on a company, user, task or table. In force for every bite that commits after this returns."""
    require_reason(reason)
    # The clock that holds end by.
    if until is not None and until <= deployment.now():
        raise Refused(f"--until: {until.isoformat()} is past")
    with holds.still(deployment) as connection:
        layout = _ready(connection)
        target = layout.records(name).name if kind == "table" else holds.resolve(connection, layout, kind, name)
        return holds.add(connection, kind=kind, target=target, reason=reason, actor=actor, until=until)


def look_at_release(deployment: Operations, name: str, jobs: Iterable[Job]) -> tuple[Hold, Look]:
    """A hold by the start of its id, and what the next runs take once it is released."""
    with deployment.transaction(read_only=True) as connection:
        layout = _ready(connection)
        hold = holds.find(connection, name)
    able = [job for job in jobs if _fits(job, layout)]
    return hold, _look(deployment, able, Rules(holds=lambda found: found.without(hold.id)))


def release_hold(deployment: Operations, hold: Hold, *, reason: str, actor: str) -> None:
    """Release a hold; its row stays as evidence."""
    require_reason(reason)
    with deployment.transaction() as connection:
        holds.release(connection, holds.find(connection, str(hold.id)).id, actor=actor, reason=reason)


def job_of(layout: Layout, table: str) -> Job:
    """The job that keeps the retention of a table. Refused, with the reason, when no job may."""
    found = (job.retaining(layout, table) for job in registry.jobs().values())
    if (job := next((one for one in found if one is not None), None)) is None:
        layout.records(table)
        raise Refused(f"--table: no job keeps the retention of {table}")
    return job


def look_at_policy(
    deployment: Operations, *, table: str, company: str | None, keep: timedelta | None
) -> tuple[UUID | None, Look]:
    """The company meant, and what a policy (None: taken back) would newly doom. Refused as `set_policy`."""
    with deployment.transaction(read_only=True) as connection:
        layout = _ready(connection)
        job = job_of(layout, table)
        versions = retention.versions(connection, table=table)
        whose = _company(connection, layout, table, company, versions)
    _check(deployment, versions, whose, keep)

    def changed(found: list[Policy]) -> list[Policy]:
        # As of the beginning of time, so that a plan made a moment ago heeds it; the one it replaces is left out.
        others = [one for one in found if (one.table, one.company) != (table, whose)]
        if keep is None:
            return others
        always = datetime.min.replace(tzinfo=UTC)
        mine = Policy(table=table, company=whose, version=1, keep=keep, reason="", actor="", created_at=always)
        return [*others, mine]

    return whose, _look(deployment, [job], Rules(policies=changed))


def set_policy(
    deployment: Operations, *, table: str, company: UUID | None, keep: timedelta | None, reason: str, actor: str
) -> Policy:
    """Enter a policy's next version; `keep` None takes the policy back.

    Refused under the floor, over the ceiling, and when there is nothing to take back.
    """
    require_reason(reason)
    with holds.still(deployment) as connection:
        ledger.require(connection)
        _check(deployment, retention.versions(connection, table=table), company, keep)
        return retention.add(connection, table=table, company=company, keep=keep, reason=reason, actor=actor)


def _check(deployment: Operations, versions: list[Policy], company: UUID | None, keep: timedelta | None) -> None:
    if keep is not None:
        retention.require_within(keep, deployment.settings, what=f"--keep {duration_text(keep)}")
    elif company not in retention.newest(versions):
        raise Refused("there is no such policy to remove; see `policy list`")


def _company(
    connection: sa.Connection, layout: Layout, table: str, name: str | None, versions: list[Policy]
) -> UUID | None:
    if name is None:
        return None
    if layout.records(table).company is None:
        raise Refused(f"--company: the rows of {table} belong to no company")
    # A company may be gone, and its policy still stop the runs of all.
    with suppress(ValueError):
        if (known := UUID(name)) in {one.company for one in versions}:
            return known
    return UUID(holds.resolve(connection, layout, "company", name))


def _fits(job: Job, layout: Layout) -> bool:
    """Whether a layout has what a job is about; one that it does not have takes nothing there."""
    try:
        job.needs(layout)
    except Refused:
        return False
    return True


def _ready(connection: sa.Connection) -> Layout:
    ledger.require(connection)
    return layouts.detect(connection)


def require_reason(reason: str) -> None:
    """Refused when nothing is said."""
    if not reason.strip():
        raise Refused("--reason is empty; say why, it is kept as evidence")
