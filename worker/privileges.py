"""What of a job's rights the database role at hand lacks. PostgreSQL answers that to anybody."""

from __future__ import annotations

from typing import TYPE_CHECKING

import sqlalchemy as sa

from worker.ledger import SCHEMA

if TYPE_CHECKING:
    from worker.job import Job
    from worker.layouts.model import Layout

# A table or column that is not there has no privileges.
_LACKING = sa.text("""
SELECT DISTINCT wanted.verb, wanted.name
FROM unnest(CAST(:verbs AS text[]), CAST(:names AS text[]), CAST(:columns AS text[])) AS wanted (verb, name, part)
JOIN pg_catalog.pg_class relation ON relation.relname = wanted.name AND relation.relkind IN ('r', 'p')
JOIN pg_catalog.pg_namespace space ON space.oid = relation.relnamespace AND space.nspname = 'public'
LEFT JOIN pg_catalog.pg_attribute attribute ON attribute.attrelid = relation.oid AND attribute.attname = wanted.part
     AND NOT attribute.attisdropped
WHERE CASE WHEN wanted.part IS NULL THEN NOT has_table_privilege(relation.oid, wanted.verb)
      ELSE NOT has_column_privilege(relation.oid, attribute.attnum, wanted.verb) END
ORDER BY wanted.name, wanted.verb
""")
_NO_LEDGER = sa.text("""
SELECT NOT has_schema_privilege(oid, 'USAGE') FROM pg_catalog.pg_namespace WHERE nspname = :schema
""")


def lacking(connection: sa.Connection, job: type[Job], layout: Layout) -> list[str]:
    """`VERB on table` for each right of the job that this role lacks, and the ledger where that is closed to it."""
    wanted = [
        (right.verb, right.table.name, column)
        for right in job.rights(layout)
        for column in (right.columns or (None,))
    ]
    verbs, names, columns = (list(part) for part in zip(*wanted, strict=True)) if wanted else ([], [], [])
    rows = connection.execute(_LACKING, {"verbs": verbs, "names": names, "columns": columns})
    found = [f"{verb} on {name}" for verb, name in rows]
    shut = connection.scalar(_NO_LEDGER, {"schema": SCHEMA})
    return [*(["USAGE on schema " + SCHEMA] if shut else []), *found]
