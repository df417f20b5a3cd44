"""The schema as Paperclip's security guide names it. Facts: reference/guide-layout.md."""

from __future__ import annotations

from typing import Any

import sqlalchemy as sa
from sqlalchemy.dialects.postgresql import JSONB, insert

from worker.layouts.model import Activity, Layout, LogTable

_meta = sa.MetaData(schema="public")
_TIME = sa.DateTime(timezone=True)


def _table(name: str, **columns: Any) -> sa.Table:
    return sa.Table(name, _meta, *(sa.Column(column, kind) for column, kind in columns.items()))


COMPANIES = _table("companies", id=sa.Uuid)
TASKS = _table("tasks", id=sa.Uuid, company_id=sa.Uuid, status=sa.Text, archived=sa.Boolean, updated_at=_TIME)
USERS = _table("authUsers", id=sa.Text)
ACTIVITY = _table(
    "activity_log",
    id=sa.Uuid,
    company_id=sa.Uuid,
    action=sa.Text,
    actor_type=sa.Text,
    actor_id=sa.Text,
    metadata=JSONB,
    timestamp=_TIME,
)

_ACTIVITY_LOG = LogTable(
    table=ACTIVITY,
    key=ACTIVITY.c.id,
    age=ACTIVITY.c.timestamp,
    company=ACTIVITY.c.company_id,
    indexed=True,
    security=sa.or_(*(ACTIVITY.c.action.like(family) for family in ("auth.%", "secret.%"))),
)


def _record_activity(row: Activity) -> sa.Insert:
    values = {
        "id": row.id,
        "company_id": row.company,
        "action": row.action,
        "actor_type": "system",
        "actor_id": "paperclip-worker",
        "metadata": dict(row.details),
        "timestamp": row.at,
    }
    return (
        insert(ACTIVITY)
        .values(values)
        .on_conflict_do_update(index_elements=["id"], set_={"metadata": values["metadata"]})
    )


GUIDE = Layout(
    name="guide",
    companies=COMPANIES,
    logs={"activity_log": _ACTIVITY_LOG},
    landmarks=(COMPANIES, TASKS, USERS, ACTIVITY),
    record_activity=_record_activity,
)
