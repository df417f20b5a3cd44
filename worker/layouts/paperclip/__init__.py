"""The released schema (2026.916.1), in the terms jobs use. Facts: reference/paperclip-schema.md."""

from __future__ import annotations

from typing import Any

import sqlalchemy as sa
from sqlalchemy.dialects.postgresql import JSONB, insert

from worker.layouts.model import Activity, Keep, Layout, LogTable

_meta = sa.MetaData(schema="public")
_TIME = sa.DateTime(timezone=True)

TERMINAL_RUN = ("succeeded", "interrupted", "failed", "cancelled", "timed_out")
TERMINAL_ISSUE = ("done", "cancelled")
# §2.3: the families an auditor asks for long after the rest has gone.
SECURITY_ACTIONS = ("auth.%", "secret.%", "company_member.%", "board_api_key.%", "company.%")


def _table(name: str, **columns: Any) -> sa.Table:
    return sa.Table(name, _meta, *(sa.Column(column, kind) for column, kind in columns.items()))


COMPANIES = _table("companies", id=sa.Uuid)
ISSUES = _table("issues", id=sa.Uuid, company_id=sa.Uuid, status=sa.Text, hidden_at=_TIME)
RUNS = _table("heartbeat_runs", id=sa.Uuid, company_id=sa.Uuid, status=sa.Text)
ACTIVITY = _table(
    "activity_log",
    id=sa.Uuid,
    company_id=sa.Uuid,
    actor_type=sa.Text,
    actor_id=sa.Text,
    action=sa.Text,
    entity_type=sa.Text,
    entity_id=sa.Text,
    run_id=sa.Uuid,
    details=JSONB,
    created_at=_TIME,
)
EFFECTS = _table("decision_effect_executions", activity_log_id=sa.Uuid)


def _run_live(run: sa.Column[Any]) -> Keep:
    return Keep(
        reason="run_live",
        why="its run has not ended, so the app still reads its rows as state",
        rows=sa.exists(RUNS.c.id).where(RUNS.c.id == run, RUNS.c.status.not_in(TERMINAL_RUN)),
        reads=(RUNS,),
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
        rows=sa.exists(EFFECTS.c.activity_log_id).where(EFFECTS.c.activity_log_id == ACTIVITY.c.id),
        reads=(EFFECTS,),
    )


def _log(name: str, *, key: Any = sa.Uuid, age: str = "created_at", company: bool = True, **more: Any) -> LogTable:
    columns = {"id": key, age: _TIME} | ({"company_id": sa.Uuid} if company else {})
    table = _table(name, **columns, **more.pop("columns", {}))
    keeps = tuple(make(table) for make in more.pop("keeps", ()))
    return LogTable(
        table=table,
        key=table.c.id,
        age=table.c[age],
        company=table.c.company_id if company else None,
        indexed=more.pop("indexed", company),
        keeps=keeps,
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
)

_LOGS = (
    _ACTIVITY_LOG,
    _log(
        "heartbeat_run_events",
        key=sa.BigInteger,
        columns={"run_id": sa.Uuid},
        keeps=(lambda table: _run_live(table.c.run_id),),
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


def _record_activity(row: Activity) -> sa.Insert:
    values = {
        "id": row.id,
        "company_id": row.company,
        "actor_type": "system",
        "actor_id": "paperclip-worker",
        "action": row.action,
        "entity_type": "company",
        "entity_id": str(row.company),
        "details": dict(row.details),
        "created_at": row.at,
    }
    # A resumed run settles again: its one row then says the final numbers.
    return (
        insert(ACTIVITY)
        .values(values)
        .on_conflict_do_update(index_elements=["id"], set_={"details": values["details"]})
    )


PAPERCLIP = Layout(
    name="paperclip",
    companies=COMPANIES,
    logs={log.name: log for log in _LOGS},
    landmarks=(COMPANIES, ISSUES, RUNS, ACTIVITY),
    record_activity=_record_activity,
)
