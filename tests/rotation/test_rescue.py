"""A rotation whose worker was killed, taken up by the rescue of stalled runs: nobody resumes it."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from uuid import UUID

import pytest
import redis

from tests.faults.evidence import wait
from tests.faults.test_beats import PREFIX, make_due
from tests.rotation import test_kills
from tests.rotation.vault import Vault
from worker import app, timetable

pytestmark = pytest.mark.faults
# One message for a run, and a dead worker's is not handed out again within the time of a test: who comes was sent by
# the rescue.
WORKER, SETTINGS = ("worker", "--concurrency=1"), {"rescue_after": "1", "slice_seconds": "60", "parallel": "1"}


@pytest.fixture
def broker(released_vault: Vault) -> Iterator[redis.Redis]:
    """The deployment's Redis, empty."""
    url = released_vault.deployment.environment["PAPERCLIP_WORKER_BROKER_URL"]
    with redis.Redis.from_url(url) as client:
        client.flushdb()
        yield client
        client.flushdb()


def _wait_until_stalled(vault: Vault) -> None:
    """Until the dead worker's transaction is gone, and the run has stood still for long enough."""
    vault.wait_for_nobody()
    stalled = "SELECT greatest(max(s.touched_at), max(r.touched_at)) < clock_timestamp() - interval '1.1 s' "
    stalled += "FROM paperclip_worker.runs r LEFT JOIN paperclip_worker.shards s ON s.run_id = r.id"
    wait(lambda: vault.deployment.query(stalled)[0][0])


def _wait_until_settled(vault: Vault, run: UUID) -> None:
    wait(lambda: vault.deployment.operations.find(str(run)).settled_at is not None, seconds=60)


def _waits_for_its_lock(vault: Vault) -> bool:
    query = "SELECT count(*) > 0 FROM pg_locks WHERE relation = 'company_secret_versions'::regclass "
    return bool(vault.deployment.query(query + "AND mode = 'ExclusiveLock' AND NOT granted")[0][0])


def test_beat_has_it_taken_up(released_vault: Vault, broker: redis.Redis) -> None:
    """By a worker that was up before there was a run, and whose own look for stalled ones found none."""
    vault = released_vault
    rest = vault.rest()
    with vault.deployment.worker(*WORKER, **SETTINGS), app.make(vault.deployment.operations.settings) as celery:
        wait(lambda: celery.control.ping(timeout=0.3))
        run = test_kills.begin(vault)
        test_kills.work_and_die(vault, "renamed, uncommitted", run)
        _wait_until_stalled(vault)
        assert vault.deployment.operations.find(str(run)).state.value == "running"
        with vault.deployment.worker("beat", beat_seconds="1", backlog_every="0"):
            wait(lambda: broker.exists(f"{PREFIX}{timetable.RESCUE}"))
            make_due(vault.deployment, timetable.RESCUE)
            _wait_until_settled(vault, run)
    test_kills.check_kept(vault, run, rest)


def test_a_worker_that_starts_takes_up_what_another_died_on_in_the_cut_over(
    released_vault: Vault, broker: redis.Redis
) -> None:
    """SIGKILL to a worker and its processes while it waits for writers, with its message not acknowledged."""
    vault = released_vault
    rest = vault.rest()
    with vault.connect() as writer, vault.deployment.worker(*WORKER, **SETTINGS) as first:
        writer.execute("LOCK TABLE company_secret_versions IN ROW EXCLUSIVE MODE")
        run = test_kills.begin(vault)
        with app.make(vault.deployment.operations.settings) as celery:
            app.send_work(celery, run)
        wait(lambda: _waits_for_its_lock(vault))
        os.killpg(first.pid, signal.SIGKILL)
    _wait_until_stalled(vault)
    assert not test_kills.cut_over(vault)
    new = test_kills.staged(vault, run)
    assert vault.now == vault.key
    assert vault.opened(vault.key) == vault.held
    with vault.deployment.worker(*WORKER, **SETTINGS):
        _wait_until_settled(vault, run)
    assert vault.now == new
    test_kills.check_kept(vault, run, rest)
