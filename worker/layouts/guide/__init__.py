"""The schema as Paperclip's security guide names it. Facts: reference/guide-layout.md."""

from __future__ import annotations

from typing import Any

import sqlalchemy as sa
from sqlalchemy.dialects.postgresql import JSONB

from worker.layouts.model import (
    SECURITY_ACTIONS,
    Carrier,
    Layout,
    LogTable,
    Subject,
    TaskTable,
    record_activity,
)

_meta = sa.MetaData(schema="public")
_TIME = sa.DateTime(timezone=True)


def _table(name: str, /, **columns: Any) -> sa.Table:
    return sa.Table(name, _meta, *(sa.Column(column, kind) for column, kind in columns.items()))


COMPANIES = _table("companies", id=sa.Uuid, name=sa.Text)
TASKS = _table(
    "tasks",
    id=sa.Uuid,
    company_id=sa.Uuid,
    title=sa.Text,
    description=sa.Text,
    status=sa.Text,
    archived=sa.Boolean,
    created_by_user_id=sa.Text,
    updated_at=_TIME,
)
USERS = _table("authUsers", id=sa.Text, email=sa.Text)
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

_SECRETS = _table("company_secrets", id=sa.Uuid, company_id=sa.Uuid)
_VERSIONS = _table("company_secret_versions", id=sa.Uuid, secret_id=sa.Uuid, material=JSONB)
_MATERIAL = Carrier(
    table=_VERSIONS,
    key=_VERSIONS.c.id,
    column=_VERSIONS.c.material,
    owner=_VERSIONS.c.secret_id,
    owners=(_SECRETS.c.id, _SECRETS.c.company_id),
    fresh=True,
)

_ACTIVITY_LOG = LogTable(
    table=ACTIVITY,
    key=ACTIVITY.c.id,
    age=ACTIVITY.c.timestamp,
    company=ACTIVITY.c.company_id,
    indexed=True,
    security=sa.or_(*(ACTIVITY.c.action.like(family) for family in SECURITY_ACTIONS)),
    parents=(COMPANIES,),
    users=(ACTIVITY.c.actor_id,),
    texts=(ACTIVITY.c.metadata, ACTIVITY.c.actor_id),
)

_TASKS = TaskTable(
    table=TASKS,
    key=TASKS.c.id,
    age=TASKS.c.updated_at,
    company=TASKS.c.company_id,
    indexed=False,
    updated=True,
    # Its column may be NULL in a deployment, and the guide's rule archives such a task as well.
    among=sa.and_(TASKS.c.status == "completed", TASKS.c.archived.is_not(True)),
    users=(TASKS.c.created_by_user_id,),
    tasks=(TASKS.c.id,),
    texts=(TASKS.c.title, TASKS.c.description, TASKS.c.created_by_user_id),
    archived=lambda _: {"archived": True},
    open=TASKS.c.status != "completed",
    back={"archived": False},
    mark=sa.func.concat_ws("|", TASKS.c.updated_at, TASKS.c.status, TASKS.c.archived),
    resized=False,
)


GUIDE = Layout(
    name="guide",
    companies=COMPANIES,
    logs={"activity_log": _ACTIVITY_LOG},
    tasks=_TASKS,
    subjects={
        "company": Subject(key=COMPANIES.c.id, names=(COMPANIES.c.name,)),
        "user": Subject(key=USERS.c.id, names=(USERS.c.email,)),
        "task": Subject(key=TASKS.c.id, names=()),
    },
    scheme="pbkdf2_aes_256_gcm_v1",
    carriers=(_MATERIAL,),
    landmarks=(COMPANIES, TASKS, USERS, ACTIVITY),
    record_activity=record_activity(ACTIVITY, details="metadata", at="timestamp"),
)
