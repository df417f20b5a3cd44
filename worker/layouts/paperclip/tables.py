"""Tables of the released schema that more than one part of the layout speaks of, with just the columns needed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import sqlalchemy as sa
from sqlalchemy.dialects.postgresql import JSONB

from worker.layouts import catalogue
from worker.layouts.model import is_one_of, uuids

_meta, _wide = sa.MetaData(schema="public"), sa.MetaData(schema="public")
TIME = sa.DateTime(timezone=True)

TERMINAL_RUN = ("succeeded", "interrupted", "failed", "cancelled", "timed_out")
TERMINAL_ISSUE = ("done", "cancelled")


def table(name: str, /, *, wide: bool = False, **columns: Any) -> sa.Table:
    """A table with these columns; `wide` where another, narrower one of the name is there for guards."""
    found = (sa.Column(column, kind) for column, kind in columns.items())
    return sa.Table(name, _wide if wide else _meta, *found)


def catalogued(name: str, *kinds: str) -> dict[str, Any]:
    """The columns of a table that the catalogue does not class as plain: what a legal hold looks into."""
    wanted = kinds or tuple(kind for kind in catalogue.ColumnClass if kind is not catalogue.ColumnClass.PLAIN)
    columns = catalogue.load("paperclip").tables[name].columns
    return {column: sa.types.NullType for column, fact in columns.items() if fact.kind in wanted}


COMPANIES = table("companies", id=sa.Uuid)
ISSUES = table(
    "issues",
    id=sa.Uuid,
    company_id=sa.Uuid,
    status=sa.Text,
    hidden_at=TIME,
    checkout_run_id=sa.Uuid,
    execution_run_id=sa.Uuid,
)
RUNS = table(
    "heartbeat_runs",
    id=sa.Uuid,
    company_id=sa.Uuid,
    status=sa.Text,
    native_issue_id=sa.Uuid,
    context_snapshot=JSONB,
)
EFFECTS = table("decision_effect_executions", activity_log_id=sa.Uuid)
FINALIZATIONS = table(
    "native_run_finalizations",
    run_id=sa.Uuid,
    phase=sa.Text,
    result_id=sa.Uuid,
    failure_code=sa.Text,
    failure_detail=JSONB,
)
RECOVERIES = table("issue_recovery_actions", wide=True, status=sa.Text, evidence=JSONB)


def runs_of_tasks(ids: Sequence[str]) -> sa.Select[Any]:
    """The runs that worked on one of these tasks, by what they or the tasks say; none is NULL."""
    named = (RUNS.c.context_snapshot["issueId"].astext, RUNS.c.context_snapshot["taskId"].astext)
    tasks = uuids(ids)
    # Not by lower(): the app's indexes are on what it says itself.
    spelled = [*ids, *(one.upper() for one in ids)]
    of = sa.or_(*(is_one_of(one, spelled) for one in named), is_one_of(RUNS.c.native_issue_id, tasks, sa.Uuid))
    # The app's indexes on these begin with the company.
    by_run = sa.select(RUNS.c.id.label("id")).where(RUNS.c.company_id == COMPANIES.c.id, of)
    by_task = (
        sa.select(column.label("id")).where(is_one_of(ISSUES.c.id, tasks, sa.Uuid), column.is_not(None))
        for column in (ISSUES.c.checkout_run_id, ISSUES.c.execution_run_id)
    )
    return sa.select(sa.union_all(by_run, *by_task).subquery("runs_of_tasks").c.id)


# What the foreign keys of logs refer to, by the name their column has in each.
_PARENTS = {
    "action_request_id": "tool_action_requests",
    "agent_id": "agents",
    "application_id": "tool_applications",
    "catalog_entry_id": "tool_catalog_entries",
    "company_id": "companies",
    "connection_id": "tool_connections",
    "gateway_id": "tool_mcp_gateways",
    "gateway_token_id": "tool_mcp_gateway_tokens",
    "heartbeat_run_id": "heartbeat_runs",
    "invocation_id": "tool_invocations",
    "issue_id": "issues",
    "plugin_id": "plugins",
    "project_id": "projects",
    "run_id": "heartbeat_runs",
    "runtime_slot_id": "tool_runtime_slots",
    "secret_id": "company_secrets",
    "user_secret_definition_id": "user_secret_definitions",
}


def parents(name: str) -> tuple[sa.Table, ...]:
    """What the foreign keys of a log refer to."""
    found = sorted(
        {_PARENTS[column] for column in catalogue.load("paperclip").tables[name].columns if column in _PARENTS}
    )
    return tuple(sa.Table(parent, sa.MetaData(schema="public"), sa.Column("id", sa.Uuid)) for parent in found)
