"""How a run ends: verify, finish, one activity row per company, a receipt, and the last state, together."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any
from uuid import UUID, uuid5

import sqlalchemy as sa
from sqlalchemy import exc

from worker import audit, db, ledger, ledger_shards, livetable
from worker.errors import DatabaseGone
from worker.layouts.model import Activity, is_one_of
from worker.logs import log
from worker.states import State

if TYPE_CHECKING:
    from datetime import datetime

    from worker.audit import Signer
    from worker.chains import Receipt
    from worker.job import Job
    from worker.ledger import Run
    from worker.means import Means
    from worker.plans import Tally

SWEEPS = 2
# So many companies are told at once: a statement and a savepoint for each takes a millisecond, and there may be
# thousands.
_TOLD = 500


def verify(means: Means, job: Job, run: Run) -> State:
    """Judge a held run whose shards are all done; the state it is in afterwards.

    Findings of the first sweep (rows that came late, or that others held) cause one more sweep.
    """
    verdict = job.verify(means)
    means.require_as_seen(job)
    findings = [one.to_json() for one in verdict.findings]
    values = {"findings": findings, "left_rows": [one.to_json() for one in verdict.left]}
    if findings and run.sweep < SWEEPS:
        ledger_shards.add_shards(means.connection, run.id, run.sweep + 1, job.shards(means, job.outline(means)))
        ledger.step(means.connection, run, State.RUNNING, sweep=run.sweep + 1, **values)
        return State.RUNNING
    ledger.step(means.connection, run, State.FINISHING, **values)
    return State.FINISHING


def finish(means: Means, job: Job, run: Run, *, signer: Signer) -> State:
    """Close a held, verified run for good; the state it ends in."""
    state = State.UNKEPT if run.findings else State.KEPT
    evidence = dict(job.index(means))
    if state is State.KEPT:
        evidence |= job.finish(means)
    settle(means, job, run, state, signer, evidence=evidence)
    return state


def end_early(means: Means, job: Job | None, run: Run, state: State, signer: Signer, *, error: str | None) -> None:
    """Settle a held run that was stopped or failed: what it did so far is indexed and attested.

    Whatever stands in the way of the index, the run must end: it keeps others from its table. Without a `job` this
    release does not know it, or one of its parameters.
    """
    try:
        with means.connection.begin_nested():
            evidence = dict(job.index(means)) if job else {"index": "not written: the job is not known"}
    except Exception as fault:
        # The store may be the very thing that failed; resuming the run writes the index.
        if isinstance(fault, DatabaseGone) or means.connection.invalidated:
            raise
        evidence = {"index": f"not written: {type(fault).__name__}"}
    settle(means, job, run, state, signer, evidence=evidence, error=error)


def settle(
    means: Means,
    job: Job | None,
    run: Run,
    state: State,
    signer: Signer,
    *,
    evidence: Mapping[str, Any],
    error: str | None = None,
) -> Receipt:
    """Activity rows, receipt and state in the one transaction of `means`. No bite may be in flight."""
    connection = means.connection
    now = connection.execute(sa.select(sa.func.clock_timestamp())).scalar_one()
    tally = ledger_shards.tally(connection, run.id)
    missing = _tell_companies(means, job, run, state, tally=tally, now=now)
    facts = {
        "job": run.job,
        "params": dict(run.params),
        "layout": run.layout,
        "state": state.value,
        "kept": state is State.KEPT,
        "horizon": run.now.isoformat(),
        # What was approved; the outline of a run that was entered without one is not a plan one could make again.
        "plan": run.plan_hash,
        "actor": run.actor,
        "reason": run.reason,
        "via": run.via,
        "created_at": run.created_at.isoformat(),
        "settled_at": now.isoformat(),
        "tally": tally.to_json(),
        "left": list(run.left_rows),
        "findings": list(run.findings),
        "error": error,
        "holds": [str(one.id) for one in means.holds.found],
        "evidence": {**evidence, "activity_not_written": missing} if missing else dict(evidence),
    }
    receipt = audit.append(connection, signer, run.id, facts)
    ledger.step(connection, run, state, settled_at=now, error=error, waiting=None)
    return receipt


def _tell_companies(
    means: Means, job: Job | None, run: Run, state: State, *, tally: Tally, now: datetime
) -> dict[str, str]:
    """Write an activity row for each company touched; why not, for those that could not get theirs.

    A run that cannot tell a company must still end: the receipt has what the row would have said.
    """
    companies: dict[str, int] = {}
    for (_, company), amount in tally.done.items():
        if company is not None and amount.rows:
            companies[company] = companies.get(company, 0) + amount.rows
    known = means.layout.companies.c.id
    found = sa.select(sa.cast(known, sa.Text)).where(is_one_of(known, map(UUID, companies), sa.Uuid))
    there = set(means.connection.scalars(found)) if companies else set()
    missing = {company: "the company is gone" for company in companies if company not in there}
    if missing:
        livetable.require_as_seen(means.connection, [means.layout.companies.name])
    details = {"run": str(run.id), "job": run.job, "params": dict(run.params), "state": state.value}
    action = job.activity if job else run.job
    rows = [
        Activity(
            id=uuid5(run.id, company),
            company=company,
            action=action,
            at=now,
            details=details | {"rows": companies[company]},
        )
        for company in sorted(there)
    ]
    for first in range(0, len(rows), _TOLD):
        missing |= _write(means, rows[first : first + _TOLD])
    if missing:
        log.error("activity rows not written", run=str(run.id), companies=len(missing))
    return missing


def _write(means: Means, rows: list[Activity]) -> dict[str, str]:
    """Write activity rows, each by itself where the database refuses some; why not, by company."""
    try:
        with means.connection.begin_nested():
            means.connection.execute(means.layout.record_activity(rows))
    except exc.DBAPIError as fault:
        if db.passes(fault):
            raise
        if len(rows) == 1:
            state = getattr(fault.orig, "sqlstate", None)
            return {rows[0].company: f"the database refuses it (SQLSTATE {state})"}
        return {whose: why for one in rows for whose, why in _write(means, [one]).items()}
    return {}
