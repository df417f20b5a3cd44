"""The released schema (2026.916.1), in the terms jobs use. Facts: reference/paperclip-schema.md."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import sqlalchemy as sa
from sqlalchemy.dialects.postgresql import JSONB

from worker.layouts import catalogue
from worker.layouts.model import SECURITY_ACTIONS, Keep, Layout, LogTable, Subject, record_activity
from worker.layouts.paperclip.carriers import CARRIERS, SCHEME
from worker.layouts.paperclip.tables import (
    COMPANIES,
    EFFECTS,
    FINALIZATIONS,
    ISSUES,
    RECOVERIES,
    RUNS,
    TERMINAL_ISSUE,
    TERMINAL_RUN,
    TIME,
    catalogued,
    parents,
    runs_of_tasks,
    table,
)
from worker.layouts.paperclip.tasks import TASK_TABLE, TASKS

ACTIVITY = table(
    "activity_log",
    id=sa.Uuid,
    company_id=sa.Uuid,
    actor_type=sa.Text,
    actor_id=sa.Text,
    action=sa.Text,
    entity_type=sa.Text,
    entity_id=sa.Text,
    run_id=sa.Uuid,
    responsible_user_id=sa.Text,
    details=JSONB,
    created_at=TIME,
)
_USERS = table("user", id=sa.Text, email=sa.Text)
_NAMES = table("companies", wide=True, id=sa.Uuid, name=sa.Text)


def _run_live(run: sa.Column[Any]) -> Keep:
    return Keep(
        reason="run_live",
        why="its run has not ended, so the app still reads its rows as state",
        rows=sa.exists(RUNS.c.id).where(RUNS.c.id == run, RUNS.c.status.not_in(TERMINAL_RUN)),
        reads=(RUNS,),
    )


# Of these failures the app asks the run's events, at each of its rounds until it has decided, whether another run may
# do the work anew.
_LOOKED_INTO = (
    "native_provider_terminal_failed",
    "native_session_cleanup_quarantined",
    "provider_transport_failed",
)


def _unsettled(run: sa.Column[Any]) -> Keep:
    end = FINALIZATIONS.c
    decided = (end.failure_detail[name].astext for name in ("successorRunId", "replacementDenied"))
    undecided = sa.and_(
        end.phase == "terminal_failure",
        end.failure_code.in_(_LOOKED_INTO),
        end.result_id.is_(None),
        *(sa.func.coalesce(one, "") == "" for one in decided),
    )
    open_ = sa.or_(end.phase.not_in(("committed", "terminal_failure")), undecided)
    return Keep(
        reason="run_unsettled",
        why="its run has ended, but the app may take it up again or have its work done anew, by what its rows say",
        rows=sa.exists(end.run_id).where(end.run_id == run, open_),
        reads=(FINALIZATIONS,),
    )


def _recovering(run: sa.Column[Any]) -> Keep:
    action = RECOVERIES.c
    named = _as_id(sa.func.coalesce(action.evidence["runId"].astext, action.evidence["sourceRunId"].astext))
    # One that is resolved may forbid for good that the run's work is done anew.
    forbids = action.evidence["automaticRecovery"]["replay"].astext == "blocked"
    runs = sa.select(named.label("run")).where(sa.or_(action.status.not_in(("resolved", "cancelled")), forbids))
    found = runs.subquery("recovering")
    return Keep(
        reason="recovering",
        why="the app repairs its task, and asks its rows whether the run has stopped",
        # Not EXISTS: of the few rows that the planner expects in a bite it would ask each against all of these.
        rows=sa.and_(run.is_not(None), run.in_(sa.select(found.c.run).where(found.c.run.is_not(None)))),
        reads=(RECOVERIES,),
    )


def _as_id(text: sa.ColumnElement[str]) -> sa.ColumnElement[Any]:
    """A text as the id that it is, else NULL; a cast alone would fail on it."""
    return sa.case((text.regexp_match("^[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}$"), sa.cast(text, sa.Uuid)))


def _given_up(of: sa.Table) -> Keep:
    task = _as_id(sa.func.coalesce(*(RUNS.c.context_snapshot[name].astext for name in ("issueId", "taskId"))))
    of_open = (
        sa.select(RUNS.c.id)
        .where(
            RUNS.c.id == of.c.run_id,
            RUNS.c.status.in_(("failed", "timed_out")),
            ISSUES.c.id == task,
            ISSUES.c.company_id == RUNS.c.company_id,
            ISSUES.c.status.not_in(TERMINAL_ISSUE),
            ISSUES.c.hidden_at.is_(None),
        )
        # Asked for the few rows that say so, and never of all runs at once, whose contexts are large.
        .offset(0)
        .exists()
    )
    says = sa.and_(of.c.event_type == "lifecycle", of.c.message.like("Bounded retry exhausted%"))
    return Keep(
        reason="issue_open",
        why="its issue is open and visible, and by this row alone the app shows that its run failed for good",
        rows=sa.case((says, of_open), else_=sa.false()),
        reads=(RUNS, ISSUES),
    )


def _issue_open() -> Keep:
    # Compared as text: a cast of entity_id would fail on what is no id, and a guard for that costs more than the
    # whole delete. The text also lets a plan start at the few open issues, by (entity_type, entity_id).
    return Keep(
        reason="issue_open",
        why="its issue is open and visible; reviews, hand-offs and inboxes read its rows as state",
        rows=sa.exists(ISSUES.c.id).where(
            ACTIVITY.c.entity_type == "issue",
            ACTIVITY.c.entity_id == sa.cast(ISSUES.c.id, sa.Text),
            ACTIVITY.c.company_id == ISSUES.c.company_id,
            ISSUES.c.status.not_in(TERMINAL_ISSUE),
            ISSUES.c.hidden_at.is_(None),
        ),
        reads=(ISSUES,),
    )


def _cited() -> Keep:
    return Keep(
        reason="cited",
        why="a decision's effect cites the row; deleting it would null the citation",
        # No deployment is known to have any, and a join with nothing is as dear as one with something.
        rows=sa.and_(
            sa.exists(EFFECTS.c.activity_log_id),
            sa.exists(EFFECTS.c.activity_log_id).where(EFFECTS.c.activity_log_id == ACTIVITY.c.id),
        ),
        reads=(EFFECTS,),
    )


def _named(of: sa.Table) -> dict[str, Any]:
    """How rows of a log name and mention users and tasks: what a legal hold on one of them holds back."""
    facts = catalogue.load("paperclip").tables[of.name].columns
    by_class: dict[str, list[sa.Column[Any]]] = {}
    for name in catalogued(of.name):
        by_class.setdefault(facts[name].kind, []).append(of.c[name])
    personal = by_class.get("personal", [])
    ids = [of.c[name] for name in _ids_of_anything(of.name)]
    others = [of.c.issue_id, *ids] if "issue_id" in of.c else ids
    return {
        "users": tuple(personal),
        # What a column that names a person has may be a task: the app's `entity_id` and `consumer_id` name either.
        "tasks": (*personal, *others),
        # A secret may name a user: what `verification` checks a password reset by holds the id. So may an id that is
        # put together of several, as the app's own are.
        "texts": (*by_class.get("content", ()), *by_class.get("secret", ()), *personal, *ids),
        "of_tasks": _of_runs(of),
    }


def _ids_of_anything(name: str) -> list[str]:
    """The columns of a table that hold an id as text of which nobody knows what it is of."""
    columns = catalogue.load("paperclip").tables[name].columns.values()
    return [one.name for one in columns if one.kind == "plain" and one.type == "text" and one.name.endswith("_id")]


def _of_runs(of: sa.Table) -> Callable[[Sequence[str]], sa.ColumnElement[bool]] | None:
    """Which rows are of, or about, a run of one of some tasks; None where none can be."""
    run = next((of.c[name] for name in ("run_id", "heartbeat_run_id") if name in of.c), None)
    if run is None and "details" not in of.c:
        return None

    def found(ids: Sequence[str]) -> sa.ColumnElement[bool]:
        runs = runs_of_tasks(ids)
        texts = sa.select(sa.cast(runs.selected_columns.id, sa.Text))
        if run is None:
            # That a tool was let in, or a token given out, the app writes down with the run in the details alone.
            said: sa.ColumnElement[str] = sa.type_coerce(of.c.details, JSONB)["runId"].astext
            return said.in_(texts)
        terms = [sa.and_(run.is_not(None), run.in_(runs))]
        if "entity_id" in of.c:
            terms.append(sa.and_(of.c.entity_type == "heartbeat_run", of.c.entity_id.in_(texts)))
        return sa.or_(*terms)

    return found


def _log(name: str, *, key: Any = sa.Uuid, age: str = "created_at", company: bool = True, **more: Any) -> LogTable:
    facts = catalogue.load("paperclip").tables[name].columns
    links = {link: sa.Uuid for link in ("run_id", "heartbeat_run_id", "issue_id") if link in facts}
    columns = (
        catalogued(name)
        | dict.fromkeys(_ids_of_anything(name), sa.Text)
        | links
        | more.pop("also", {})
        | {"id": key, age: TIME}
        | ({"company_id": sa.Uuid} if company else {})
    )
    found = table(name, **columns)
    keeps = tuple(make(found) for make in more.pop("keeps", ()))
    return LogTable(
        table=found,
        key=found.c.id,
        age=found.c[age],
        company=found.c.company_id if company else None,
        indexed=more.pop("indexed", company),
        keeps=keeps,
        parents=parents(name),
        **_named(found),
        **more,
    )


_ACTIVITY_LOG = LogTable(
    table=ACTIVITY,
    key=ACTIVITY.c.id,
    age=ACTIVITY.c.created_at,
    company=ACTIVITY.c.company_id,
    indexed=True,
    keeps=(_run_live(ACTIVITY.c.run_id), _issue_open(), _cited()),
    security=sa.or_(*(ACTIVITY.c.action.like(family) for family in SECURITY_ACTIONS)),
    parents=parents("activity_log"),
    cited_by=(EFFECTS.c.activity_log_id,),
    **_named(ACTIVITY),
)

_LOGS = (
    _ACTIVITY_LOG,
    _log(
        "heartbeat_run_events",
        key=sa.BigInteger,
        also={"event_type": sa.Text, "message": sa.Text},
        keeps=(
            lambda log: _run_live(log.c.run_id),
            lambda log: _unsettled(log.c.run_id),
            lambda log: _recovering(log.c.run_id),
            _given_up,
        ),
    ),
    _log("secret_access_events"),
    _log("tool_call_events"),
    _log("tool_access_audit_events"),
    _log("connection_token_issuances"),
    _log("plugin_logs", indexed=False),
    _log("session", key=sa.Text, age="expires_at", company=False, record=False),
    _log("verification", key=sa.Text, age="expires_at", company=False, record=False),
    _log("cli_auth_challenges", age="expires_at", company=False, record=False),
    _log("tool_gateway_sessions", age="expires_at", record=False),
)

PAPERCLIP = Layout(
    name="paperclip",
    companies=COMPANIES,
    logs={log.name: log for log in _LOGS},
    tasks=TASK_TABLE,
    subjects={
        "company": Subject(key=_NAMES.c.id, names=(_NAMES.c.name,)),
        "user": Subject(key=_USERS.c.id, names=(_USERS.c.email,)),
        "task": Subject(key=TASKS.c.id, names=(TASKS.c.identifier,)),
    },
    scheme=SCHEME,
    carriers=CARRIERS,
    landmarks=(COMPANIES, ISSUES, RUNS, ACTIVITY),
    record_activity=record_activity(
        ACTIVITY, details="details", at="created_at", entity_type="company", entity_id="company_id"
    ),
)
