"""What of a job's rights the database role at hand lacks. PostgreSQL answers that to anybody."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import sqlalchemy as sa

from worker import discovery, grants, ledger
from worker.errors import Denied, LedgerMissing, Refused
from worker.ledger import SCHEMA

if TYPE_CHECKING:
    from worker.job import Job
    from worker.layouts.model import Layout

# A table or column that is not there has no privileges.
_LACKING = sa.text("""
SELECT DISTINCT wanted.verb, wanted.name
FROM unnest(CAST(:verbs AS text[]), CAST(:names AS text[]), CAST(:columns AS text[])) AS wanted (verb, name, part)
JOIN pg_catalog.pg_class relation ON relation.relname = wanted.name AND relation.relkind IN ('r', 'p')
JOIN pg_catalog.pg_namespace space ON space.oid = relation.relnamespace AND space.nspname = :schema
LEFT JOIN pg_catalog.pg_attribute attribute ON attribute.attrelid = relation.oid AND attribute.attname = wanted.part
     AND NOT attribute.attisdropped
WHERE CASE WHEN wanted.part IS NULL THEN NOT has_table_privilege(relation.oid, wanted.verb)
      ELSE NOT has_column_privilege(relation.oid, attribute.attnum, wanted.verb) END
ORDER BY wanted.name, wanted.verb
""")
_SHUT = sa.text("""
SELECT nspname FROM pg_catalog.pg_namespace
WHERE nspname IN (:schema, 'public') AND NOT has_schema_privilege(oid, 'USAGE') ORDER BY nspname
""")
# Without it a replica that is behind is not seen, and no run rests for it.
_STATS = "pg_read_all_stats"


def lacking(connection: sa.Connection, job: type[Job], layout: Layout) -> list[str]:
    """What this role lacks of what `db grants` gives for runs of the job, and the ledger where that is not there."""
    shut = list(connection.scalars(_SHUT, {"schema": SCHEMA}))
    found = [f"USAGE on schema {name}" for name in shut]
    if SCHEMA not in shut:
        found += _on_ledger(connection, keys=job.reads_everything)
        found = found or _ledger(connection)
    rights = [*grants.of_every_run(layout), *job.rights(layout)]
    host = ((right.verb, right.table.name, column) for right in rights for column in right.columns or (None,))
    found += [f"{verb} on {name}" for verb, name in _lacking(connection, "public", host)]
    if not connection.scalar(sa.select(sa.func.pg_has_role(_STATS, "USAGE"))):
        found.append(_STATS)
    return found + (_unread(connection, layout) if job.reads_everything else [])


def require_on_ledger(connection: sa.Connection) -> None:
    """Denied where the role lacks a right on the ledger that every run needs: it would change rows and not settle."""
    if lacking := _on_ledger(connection, keys=False):
        raise Denied(f"the database role lacks {', '.join(lacking)}; have the owner run what `db grants` prints")


def _on_ledger(connection: sa.Connection, *, keys: bool) -> list[str]:
    return [f"{verb} on {SCHEMA}.{name}" for verb, name in _lacking(connection, SCHEMA, grants.on_ledger(keys=keys))]


def _lacking(
    connection: sa.Connection, schema: str, wanted: Iterable[tuple[str, str, str | None]]
) -> list[tuple[str, str]]:
    verbs, names, columns = (list(part) for part in zip(*wanted, strict=True))
    given = {"schema": schema, "verbs": verbs, "names": names, "columns": columns}
    return [(verb, name) for verb, name in connection.execute(_LACKING, given)]


def _ledger(connection: sa.Connection) -> list[str]:
    try:
        ledger.require(connection)
    except LedgerMissing:
        return ["the ledger of this release (`db init`)"]
    return []


def _unread(connection: sa.Connection, layout: Layout) -> list[str]:
    try:
        discovery.tables(connection, layout, ())
    except Refused:
        return ["SELECT on every table (pg_read_all_data)"]
    return []
