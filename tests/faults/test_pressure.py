"""A run rests while the server is under pressure, says why, and goes on by itself."""

from __future__ import annotations

import math
import threading

import psycopg
import pytest

from tasks.prune_logs import PruneLogs
from tests.conftest import Deployment
from tests.faults.evidence import begin, check_kept, rows, wait

pytestmark = pytest.mark.faults


def test_a_run_rests_while_a_slot_retains_wal(released: Deployment) -> None:
    """A real replication slot that nobody reads from."""
    before = rows(released)
    tight = released.with_settings(max_retained_wal="1", bite_rows="100")
    run = begin(tight, PruneLogs())
    slot = f"behind_{run.hex[:8]}"
    # A connection of its own: the slot outlives its transaction, and must be dropped whatever happens.
    with psycopg.connect(released.environment["DATABASE_URL"], autocommit=True) as admin:
        admin.execute("SELECT pg_create_physical_replication_slot(%s, true)", (slot,))
        try:
            admin.execute("SELECT pg_logical_emit_message(false, 'x', repeat('x', 100000))")
            worker = threading.Thread(target=lambda: tight.runner().work(run, seconds=math.inf))
            worker.start()
            wait(lambda: tight.result(run)["waiting"])
            resting = tight.result(run)
            assert "retains" in resting["waiting"]
            assert released.json("runs", "show", str(run))["waiting"] == resting["waiting"]
            wait(lambda: tight.result(run)["waits"].get("retained_wal", 0) >= 2)
            # It rests before the first batch: nothing moves under pressure.
            assert tight.result(run)["rows"] == 0
        finally:
            admin.execute("SELECT pg_drop_replication_slot(%s)", (slot,))
    worker.join(60)
    check_kept(released, run, before)
    result = tight.result(run)
    assert result["waiting"] is None
    assert result["waits"]["retained_wal"] >= 2
