"""Real beats on a real Redis: two of them, one killed, one that comes back late, and entries that are gone."""

from __future__ import annotations

import base64
import json
import signal
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo

import pytest
import redis
from redbeat import RedBeatScheduler, RedBeatSchedulerEntry  # type: ignore[import-untyped]

import schedules
from tests.conftest import Deployment
from tests.faults.evidence import wait
from worker import app, config

pytestmark = pytest.mark.faults
ACTIVITY, EVENTS, *OTHERS = schedules.SCHEDULE
PREFIX = "paperclip-worker:beat:"
LOCK, DUE, STATICS = (f"{PREFIX}:{name}" for name in ("lock", "schedule", "statics"))
BEAT = {"beat_seconds": "1", "backlog_every": "0"}


@pytest.fixture
def broker(released: Deployment) -> Iterator[redis.Redis]:
    """The deployment's Redis, empty."""
    url = released.environment["PAPERCLIP_WORKER_BROKER_URL"]
    with redis.Redis.from_url(url, decode_responses=True) as client:
        client.flushdb()
        yield client
        client.flushdb()


def _launched(broker: redis.Redis) -> Counter[str]:
    """How often each entry's message is in the queue; no worker is up to take one."""
    found: Counter[str] = Counter()
    for text in broker.lrange(app.QUEUE, 0, -1):
        message = json.loads(text)
        if message["headers"]["task"] == "paperclip_worker.launch":
            ((name,), _, _) = json.loads(base64.b64decode(message["body"]))
            found[name] += 1
    return found


@contextmanager
def _celery(deployment: Deployment, **settings: str) -> Iterator[Any]:
    extra = {f"PAPERCLIP_WORKER_{name.upper()}": value for name, value in settings.items()}
    celery = app.make(config.load({**deployment.environment, **extra}))
    try:
        yield celery
    finally:
        if client := getattr(celery, "redbeat_redis", None):
            client.close()
        celery.close()


def make_due(deployment: Deployment, entry: str) -> None:
    """As if the newest due time of an entry had passed without a beat."""
    with _celery(deployment) as celery:
        found = RedBeatSchedulerEntry.from_key(PREFIX + entry, app=celery)
        found.reschedule(last_run_at=celery.now() - timedelta(days=2))


def test_when_the_beat_that_holds_the_lock_is_killed_the_other_takes_over(
    released: Deployment, broker: redis.Redis
) -> None:
    with released.worker("beat", **BEAT) as holder:
        wait(lambda: broker.get(LOCK) is not None)
        held = broker.get(LOCK)
        with released.worker("beat", **BEAT) as other:
            # Both are up, and one of them alone fires.
            make_due(released, ACTIVITY)
            wait(lambda: _launched(broker)[ACTIVITY] == 1)
            holder.send_signal(signal.SIGKILL)
            holder.wait(10)
            make_due(released, ACTIVITY)
            make_due(released, EVENTS)
            wait(lambda: len(_launched(broker)) == 2)
            assert broker.get(LOCK) not in {None, held}
            # Some rounds more of the survivor: what has fired does not fire again.
            time.sleep(3)
            assert other.poll() is None
            assert _launched(broker) == {ACTIVITY: 2, EVENTS: 1}


def test_a_due_time_that_passed_without_a_beat_is_caught_up_once(released: Deployment, broker: redis.Redis) -> None:
    with released.worker("beat", **BEAT):
        wait(lambda: 0 < broker.pttl(LOCK) < 4_500)
        # It has begun its rounds: each extends the lock.
        wait(lambda: broker.pttl(LOCK) > 4_500)
    # It was told to end: the lock is free at once.
    assert broker.get(LOCK) is None
    assert not _launched(broker)
    make_due(released, ACTIVITY)
    with released.worker("beat", **BEAT):
        wait(lambda: _launched(broker)[ACTIVITY] == 1)
        time.sleep(3)
    assert _launched(broker) == {ACTIVITY: 1}


def test_a_beat_whose_redis_lost_its_data_ends_and_the_next_starts_anew(
    released: Deployment, broker: redis.Redis
) -> None:
    """A beat that went on would go on with an empty schedule."""
    with released.worker("beat", **BEAT) as beat:
        wait(lambda: broker.get(LOCK) is not None)
        broker.flushdb()
        beat.wait(30)
        assert beat.returncode != 0
    with released.worker("beat", **BEAT):
        wait(lambda: broker.zcard(DUE) == len(schedules.SCHEDULE) + 1 and broker.get(LOCK) is not None)
    assert not _launched(broker)


def test_an_entry_that_is_off_or_gone_vanishes_from_redis(
    released: Deployment, broker: redis.Redis, tmp_path: Path
) -> None:
    file = tmp_path / "schedule.toml"
    added = '[entry.added]\njob = "prune-logs"\ncrontab = "0 5 * * *"\n'
    names = {ACTIVITY, EVENTS, *OTHERS, "added", "rescue", "measure"}

    def start(text: str, **settings: str) -> set[str]:
        file.write_text(text)
        with _celery(released, schedule_file=str(file), **settings) as celery:
            RedBeatScheduler(app=celery)
        found = {str(name) for name in broker.smembers(STATICS)}
        assert {PREFIX + name for name in found} == set(broker.zrange(DUE, 0, -1))
        assert {PREFIX + name for name in found} == {key for key in broker.keys(PREFIX + "*") if "::" not in str(key)}
        return found

    assert start(added) == names
    assert start(f"{added}enabled = false") == names - {"added"}
    assert start(f"[entry.{EVENTS}]\nenabled = false", backlog_every="0") == {
        ACTIVITY,
        *OTHERS,
        "rescue",
    }
    assert start("") == names - {"added"}


def test_a_changed_crontab_and_timezone_reach_redis(
    released: Deployment, broker: redis.Redis, tmp_path: Path
) -> None:
    file = tmp_path / "schedule.toml"
    file.write_text("")
    changes = {"schedule_file": str(file), "timezone": "Asia/Kolkata"}
    with _celery(released) as celery:
        RedBeatScheduler(app=celery)
    file.write_text(f'[entry.{ACTIVITY}]\ncrontab = "0 6 * * *"\n')
    with _celery(released, **changes) as celery:
        RedBeatScheduler(app=celery)
        due = RedBeatSchedulerEntry.from_key(PREFIX + ACTIVITY, app=celery).due_at
    assert due is not None
    # RedBeat's own sum is off by the milliseconds between two looks at the clock.
    local = (due + timedelta(seconds=5)).astimezone(ZoneInfo("Asia/Kolkata"))
    assert (local.hour, local.minute) == (6, 0)
