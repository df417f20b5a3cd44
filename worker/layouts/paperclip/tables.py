"""Tables of the released schema that more than one part of the layout speaks of, with just the columns needed."""

from __future__ import annotations

from typing import Any

import sqlalchemy as sa
from sqlalchemy.dialects.postgresql import JSONB

from worker.layouts import catalogue

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
ISSUES = table("issues", id=sa.Uuid, company_id=sa.Uuid, status=sa.Text, hidden_at=TIME)
RUNS = table(
    "heartbeat_runs",
    id=sa.Uuid,
    company_id=sa.Uuid,
    status=sa.Text,
    native_issue_id=sa.Uuid,
    context_snapshot=JSONB,
)
EFFECTS = table("decision_effect_executions", activity_log_id=sa.Uuid)


def run_of_task(run: sa.ColumnElement[Any], ids: list[str]) -> sa.ColumnElement[bool]:
    """Whether a row's run worked on one of these tasks."""
    named = (RUNS.c.context_snapshot["issueId"].astext, RUNS.c.context_snapshot["taskId"].astext)
    of = sa.or_(*(one.in_(ids) for one in (*named, sa.cast(RUNS.c.native_issue_id, sa.Text))))
    return sa.and_(run.is_not(None), run.in_(sa.select(RUNS.c.id).where(of)))


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
