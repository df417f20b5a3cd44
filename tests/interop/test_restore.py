"""What prune-logs took on the real release's schema, put back: the whole database is what it was."""

from __future__ import annotations

import pytest

from tests.conftest import Deployment
from tests.promises.archived import LOGS, content, spoil
from worker.layouts import LAYOUTS

pytestmark = pytest.mark.interop


@pytest.mark.parametrize("table", LOGS)
def test_the_whole_database_is_what_it_was(real: Deployment, table: str) -> None:
    """But for the audit rows, one a company and run."""
    spoil(real, table)
    before, rows = real.digest(without=("activity_log",)), content(real, "activity_log")
    age = "90d" if table == "activity_log" else "1d"
    pruned = real.json("run", "prune-logs", "--table", table, "--older-than", age, "--yes", "--inline")
    assert pruned["rows"] > 0
    restored = real.json("run", "restore-logs", "--run", pruned["run"], "--inline")
    assert restored["kept"]
    assert restored["rows"] == pruned["rows"]
    assert real.digest(without=("activity_log",)) == before
    assert content(real, "activity_log") == rows
    said = real.query(
        "SELECT action, count(*) FROM activity_log WHERE action LIKE 'maintenance.%' GROUP BY 1 ORDER BY 1"
    )
    companies = sum(one["company"] is not None for one in pruned["tally"])
    assert said == [("maintenance.logs_pruned", companies), ("maintenance.logs_restored", companies)]


def test_every_parent_of_a_log_may_be_looked_at(real: Deployment) -> None:
    """A foreign key into a table that the layout does not name would be found out by the insert only."""
    for log in LAYOUTS["paperclip"].logs.values():
        found = real.query(
            "SELECT DISTINCT p.relname::text, a.attname::text FROM pg_constraint f "
            "JOIN pg_class p ON p.oid = f.confrelid "
            "JOIN pg_attribute a ON a.attrelid = p.oid AND a.attnum = ANY (f.confkey) "
            "WHERE f.contype = 'f' AND f.conrelid = %s::regclass AND f.confrelid <> f.conrelid",
            log.name,
        )
        if log.record:
            assert set(found) == {(parent.name, column.name) for parent in log.parents for column in parent.c}
