"""The least privilege the workers need, as SQL an owner runs."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from sqlalchemy.dialects import postgresql

from worker.errors import Refused
from worker.ledger import SCHEMA

if TYPE_CHECKING:
    from worker.layouts.model import Layout


def statements(layout: Layout, role: str) -> Iterator[str]:
    """GRANT statements for `role`, idempotent. Refused for a role name that could not be one."""
    if not role or "\0" in role or len(role.encode()) > 63:
        raise Refused("--role is not a name PostgreSQL can have for a role")
    preparer = postgresql.dialect().identifier_preparer  # type: ignore[no-untyped-call]
    to = preparer.quote(role)
    yield f"GRANT USAGE ON SCHEMA public, {SCHEMA} TO {to}"
    yield f"GRANT SELECT, INSERT, UPDATE ON ALL TABLES IN SCHEMA {SCHEMA} TO {to}"
    # The evidence is append-only even for the worker itself.
    yield f"REVOKE UPDATE ON {SCHEMA}.receipts, {SCHEMA}.bites, {SCHEMA}.objects, {SCHEMA}.anchors FROM {to}"
    read, deleted = {}, {}
    for log in layout.logs.values():
        deleted[log.name] = log.table
        for table in log.reads():
            read[table.name] = table
    read |= {table.name: table for table in layout.landmarks}
    for name in sorted(read):
        place = preparer.format_table(read[name])
        if name in deleted:
            # The archive takes whole rows, columns of later releases included.
            yield f"GRANT SELECT, DELETE ON {place} TO {to}"
        else:
            columns = ", ".join(preparer.quote(column.name) for column in read[name].c)
            yield f"GRANT SELECT ({columns}) ON {place} TO {to}"
    activity = layout.logs["activity_log"].table
    # Its own row per run and company, whose details a resumed run brings up to date.
    details = "details" if "details" in activity.c else "metadata"
    yield f"GRANT INSERT, UPDATE ({preparer.quote(details)}) ON {preparer.format_table(activity)} TO {to}"
    # SKIP LOCKED on rows to delete needs a right to lock them; one harmless column is the narrowest there is.
    for name in sorted(deleted):
        key = preparer.quote(layout.logs[name].key.name)
        yield f"GRANT UPDATE ({key}) ON {preparer.format_table(deleted[name])} TO {to}"
    yield f"GRANT pg_read_all_stats TO {to}"
