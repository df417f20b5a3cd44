"""A run rests while the server is under pressure, says why, and goes on by itself."""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import psycopg
import pytest

from tasks.prune_logs import PruneLogs
from tests.conftest import Deployment
from tests.faults.evidence import begin, check_kept, rows, wait
from worker.states import State

pytestmark = pytest.mark.faults


@contextmanager
def _slot(released: Deployment, name: str) -> Iterator[None]:
    """A real replication slot that nobody reads from."""
    # A connection of its own: the slot outlives its transaction, and must be dropped whatever happens.
    with psycopg.connect(released.environment["DATABASE_URL"], autocommit=True) as admin:
        admin.execute("SELECT pg_create_physical_replication_slot(%s, true)", (name,))
        try:
            admin.execute("SELECT pg_logical_emit_message(false, 'x', repeat('x', 100000))")
            yield
        finally:
            admin.execute("SELECT pg_drop_replication_slot(%s)", (name,))


def test_a_run_rests_while_a_slot_retains_wal(released: Deployment) -> None:
    before = rows(released)
    tight = released.with_settings(max_retained_wal="1", bite_rows="100")
    run = begin(tight, PruneLogs())
    worker = threading.Thread(target=lambda: tight.runner().work(run, seconds=math.inf))
    with _slot(released, f"behind_{run.hex[:8]}"):
        worker.start()
        wait(lambda: tight.result(run)["waiting"])
        resting = tight.result(run)
        assert "retains" in resting["waiting"]
        assert released.json("runs", "show", str(run))["waiting"] == resting["waiting"]
        wait(lambda: tight.result(run)["waits"].get("retained_wal", 0) >= 2)
        # It rests before the first batch: nothing moves under pressure.
        assert tight.result(run)["rows"] == 0
    worker.join(60)
    check_kept(released, run, before)
    result = tight.result(run)
    assert result["waiting"] is None
    assert result["waits"]["retained_wal"] >= 2


def test_a_run_rests_for_no_slot_that_the_server_has_given_up(released: Deployment) -> None:
    """It says where it was, which falls behind for ever, and retains nothing: nobody would end the rest."""
    timeout = "idle_replication_slot_timeout"
    if not released.query("SELECT current_setting(%s, true)", timeout)[0][0]:
        pytest.skip("PostgreSQL before 18 forgets where such a slot was")
    with psycopg.connect(released.environment["DATABASE_URL"], autocommit=True) as admin:

        def given_up() -> bool:
            admin.execute("CHECKPOINT")
            lost = "SELECT count(*) FROM pg_replication_slots WHERE wal_status = 'lost' AND restart_lsn IS NOT NULL"
            return admin.execute(lost).fetchone() == (1,)

        with _slot(released, "forgotten"):
            admin.execute(f"ALTER SYSTEM SET {timeout} = '1s'".encode())
            try:
                admin.execute("SELECT pg_reload_conf()")
                wait(given_up)
                released.query("SELECT pg_logical_emit_message(false, 'x', repeat('x', 100000))")
                tight = released.with_settings(max_retained_wal="1")
                run = begin(tight, PruneLogs())
                tight.runner().work(run, seconds=5)
                assert (tight.result(run)["waits"], tight.result(run)["kept"]) == ({}, True)
            finally:
                admin.execute(f"ALTER SYSTEM RESET {timeout}".encode())
                admin.execute("SELECT pg_reload_conf()")


def test_a_run_that_is_stopped_rests_no_longer(released: Deployment) -> None:
    """Whoever works on it goes home, though the pressure stays; a run that has ended waits for nothing."""
    tight = released.with_settings(max_retained_wal="1")
    run = begin(tight, PruneLogs())
    worker = threading.Thread(target=lambda: tight.runner().work(run, seconds=60))
    with _slot(released, f"behind_{run.hex[:8]}"):
        worker.start()
        wait(lambda: tight.result(run)["waiting"])
        assert released.operations.stop(str(run)).state is State.STOPPED
        worker.join(10)
        assert not worker.is_alive()
        assert tight.result(run)["waiting"] is None
