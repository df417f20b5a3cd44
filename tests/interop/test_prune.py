"""The job on the schema that the real release's own migrations make."""

from __future__ import annotations

import json

import pytest

from tests.conftest import Deployment
from worker import registry

pytestmark = pytest.mark.interop


def test_only_the_rows_of_the_tally_differ(real: Deployment) -> None:
    before = real.digest(without=("activity_log",))
    ids = {row[0] for row in real.query("SELECT id::text FROM activity_log")}
    result = real.json("run", "prune-logs", "--yes", "--inline")
    assert result["kept"]
    assert result["rows"] > 0
    assert real.digest(without=("activity_log",)) == before
    now = {row[0] for row in real.query("SELECT id::text FROM activity_log")}
    assert len(ids - now) == result["rows"]
    assert len(now - ids) == len({one["company"] for one in result["tally"]})
    kept = real.query(
        "SELECT count(*) FROM activity_log a JOIN issues i ON i.id::text = a.entity_id WHERE a.entity_type = 'issue' "
        "AND i.status NOT IN ('done', 'cancelled') AND i.hidden_at IS NULL "
        "AND a.created_at < now() - interval '91 days'"
    )
    assert kept[0][0] > 0


@pytest.mark.parametrize(
    "table",
    [
        "heartbeat_run_events",
        "secret_access_events",
        "tool_call_events",
        "plugin_logs",
        "session",
        "verification",
        "cli_auth_challenges",
    ],
)
def test_every_log_can_be_pruned_alone(real: Deployment, table: str) -> None:
    """Other tables stay as they are, the activity log but for the audit row."""
    before = real.digest(without=(table, "activity_log"))
    result = real.json("run", "prune-logs", "--table", table, "--older-than", "1d", "--yes", "--inline")
    assert result["kept"], result
    assert result["rows"] > 0
    assert real.digest(without=(table, "activity_log")) == before


def test_db_check_knows_all_of_it(real: Deployment) -> None:
    found = json.loads(real.cli("db", "check", "--json").stdout)
    assert found["layout"] == "paperclip"
    assert found["missing"] == found["changed"] == found["unknown"] == []
    assert found["tables"] == 210
    assert found["jobs"] == {name: [] for name in registry.jobs()}
