"""Real beats on a real Redis: two of them, one killed, one that comes back late, and entries that are gone."""

from __future__ import annotations

import base64
import json
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo

import psycopg
import pytest
import redis
from redbeat import RedBeatSchedulerEntry  # type: ignore[import-untyped]

import schedules
from tests.conftest import Deployment
from tests.faults.evidence import wait
from worker import app, beat, brokers, config, logs, timetable
from worker.runner import Outcome

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


def _due_times(broker: redis.Redis) -> dict[Any, float]:
    """When each entry is due, in seconds since the epoch."""
    return {name: broker.zscore(DUE, str(name)) or 0.0 for name in broker.zrange(DUE, 0, -1)}


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


@contextmanager
def _scheduler(deployment: Deployment, **settings: str) -> Iterator[beat.Scheduler]:
    """Beat's scheduler without its process; the settings are those of the worker's."""
    with _celery(deployment, **settings) as celery:
        times = timetable.load(deployment.with_settings(**settings).settings)
        scheduler = beat.Scheduler(
            app=celery, times=times, own=deployment.operations.require_ledger(), note=lambda: None
        )
        try:
            yield scheduler
        finally:
            scheduler.close()


@contextmanager
def _at_work(deployment: Deployment, **settings: str) -> Iterator[beat.Scheduler]:
    """The same, after its first round, with the lock."""
    with _scheduler(deployment, **settings) as scheduler:
        scheduler.tick()
        assert scheduler.lock is not None
        yield scheduler


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


def test_two_beats_whose_redis_lost_its_data_go_on(released: Deployment, broker: redis.Redis) -> None:
    """One of them with a schedule written anew: an empty one would be nobody's."""
    with released.worker("beat", **BEAT) as one, released.worker("beat", **BEAT) as other:
        wait(lambda: broker.zcard(DUE) == len(schedules.SCHEDULE) + 1 and broker.get(LOCK) is not None)
        held = broker.get(LOCK)
        broker.flushdb()
        wait(lambda: broker.get(LOCK) not in {None, held})
        wait(lambda: broker.zcard(DUE) == len(schedules.SCHEDULE) + 1)
        assert (one.poll(), other.poll()) == (None, None)
        make_due(released, ACTIVITY)
        wait(lambda: _launched(broker)[ACTIVITY] == 1)
    assert _launched(broker) == {ACTIVITY: 1}
    assert (one.returncode, other.returncode) == (0, 0)


@pytest.mark.parametrize("lost", [DUE, STATICS, PREFIX + "rescue", PREFIX + ACTIVITY])
def test_what_the_broker_loses_of_the_schedule_comes_back(
    released: Deployment, broker: redis.Redis, lost: str
) -> None:
    """A Redis that is set up as a cache evicts what it likes, and the lock may be there still."""
    with _at_work(released) as scheduler:
        due, entries = _due_times(broker), broker.smembers(STATICS)
        broker.delete(lost)
        scheduler.tick()
        assert _due_times(broker) == pytest.approx(due, abs=60)
        assert all(broker.hexists(str(key), "definition") for key in due)
        assert broker.smembers(STATICS) == entries
    assert not _launched(broker)


def test_a_claim_that_went_with_the_data_is_made_again(released: Deployment, broker: redis.Redis) -> None:
    """Or another deployment with this broker in its settings, refused until then, would take our messages."""
    with _at_work(released) as scheduler:
        broker.flushdb()
        scheduler.tick()
        assert broker.get(brokers.CLAIM) == str(released.operations.require_ledger())


def test_a_beat_whose_broker_another_deployment_claimed_sends_nothing(
    released: Deployment, broker: redis.Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    monkeypatch.setattr(logs.log, "error", lambda event, **_: said.append(event))
    with _at_work(released) as scheduler:
        make_due(released, ACTIVITY)
        broker.set(brokers.CLAIM, "another")
        scheduler.tick()
        assert (scheduler.lock, broker.get(LOCK)) == (None, None)
        assert not _launched(broker)
        assert said == ["another deployment has claimed the broker"]
        broker.delete(brokers.CLAIM)
        scheduler.tick()
    assert _launched(broker) == {ACTIVITY: 1}


def test_a_beat_leaves_a_broker_that_became_a_replica(released: Deployment, broker: redis.Redis) -> None:
    """In a failover the name is another server's by now: who stays connected hears for ever that it takes nothing."""

    def connections() -> set[str]:
        return {one["id"] for one in broker.client_list()} - {str(broker.client_id())}

    of_others = connections()
    with _at_work(released) as scheduler:
        make_due(released, ACTIVITY)
        scheduler.tick()
        assert _launched(broker) == {ACTIVITY: 1}
        before = connections() - of_others
        assert before
        broker.replicaof("127.0.0.1", "1")
        try:
            scheduler.tick()
        finally:
            broker.replicaof("NO", "ONE")
        make_due(released, EVENTS)
        scheduler.tick()
        assert _launched(broker) == {ACTIVITY: 1, EVENTS: 1}
        assert not before & connections()


def test_a_beat_that_waits_leaves_the_schedule_and_the_ledger_as_they_are(
    released: Deployment, broker: redis.Redis, tmp_path: Path
) -> None:
    """With another file than the beat at work has: its own holds from when it is at work."""
    file = tmp_path / "schedule.toml"
    file.write_text('[entry.added]\njob = "prune-logs"\ncrontab = "0 5 * * *"\n')
    entries = "SELECT entry, crontab, since FROM paperclip_worker.entries ORDER BY entry"

    def seen() -> tuple[Any, ...]:
        return set(broker.zrange(DUE, 0, -1)), broker.smembers(STATICS), released.query(entries)

    with released.worker("beat", schedule_file=str(file), **BEAT) as holder:
        wait(lambda: PREFIX + "added" in broker.zrange(DUE, 0, -1) and released.query(entries))
        held, before, clients = broker.get(LOCK), seen(), len(broker.client_list())
        with released.worker("beat", **BEAT) as other:
            wait(lambda: len(broker.client_list()) > clients)
            # It looks for the lock, again and again.
            time.sleep(3)
            assert other.poll() is None
            assert seen() == before
            assert broker.get(LOCK) == held
            holder.terminate()
            wait(lambda: PREFIX + "added" not in broker.zrange(DUE, 0, -1))
            wait(lambda: ("added", None) in [row[:2] for row in released.query(entries)])
    assert not _launched(broker)


def test_a_beat_that_waits_says_that_the_one_at_work_has_another_schedule(
    released: Deployment, broker: redis.Redis, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    monkeypatch.setattr(logs.log, "warning", lambda event, **_: said.append(event))
    file = tmp_path / "schedule.toml"
    file.write_text(f"[entry.{EVENTS}]\nenabled = false")
    with _at_work(released), _scheduler(released) as same, _scheduler(released, schedule_file=str(file)) as other:
        for _ in range(2):
            same.tick()
            assert said == []
        for _ in range(2):
            other.tick()
        assert len(said) == 1
        assert "another schedule" in said[0]
        assert (same.lock, other.lock) == (None, None)


@pytest.mark.parametrize("ended", [False, True], ids=["at work", "started again"])
def test_what_a_clock_that_was_ahead_has_sent_is_due_as_ever(
    released: Deployment, broker: redis.Redis, ended: bool
) -> None:
    def put_ahead() -> None:
        with _celery(released) as celery:
            for name in ("rescue", ACTIVITY):
                found = RedBeatSchedulerEntry.from_key(PREFIX + name, app=celery)
                found.reschedule(last_run_at=celery.now() + timedelta(days=90))

    with _at_work(released) as scheduler:
        due = _due_times(broker)
        if not ended:
            put_ahead()
            scheduler.tick()
    if ended:
        put_ahead()
        with _at_work(released):
            pass
    assert _due_times(broker) == pytest.approx(due, abs=60)
    assert not _launched(broker)


def test_a_moment_s_difference_of_clocks_sends_nothing_again(released: Deployment, broker: redis.Redis) -> None:
    with _at_work(released) as scheduler, _celery(released) as celery:
        found = RedBeatSchedulerEntry.from_key(PREFIX + ACTIVITY, app=celery)
        at = celery.now() + timedelta(seconds=20)
        found.reschedule(last_run_at=at)
        scheduler.tick()
        assert RedBeatSchedulerEntry.from_key(PREFIX + ACTIVITY, app=celery).last_run_at == at
    assert not _launched(broker)


def test_an_entry_that_is_off_or_gone_vanishes_from_redis(
    released: Deployment, broker: redis.Redis, tmp_path: Path
) -> None:
    file = tmp_path / "schedule.toml"
    added = '[entry.added]\njob = "prune-logs"\ncrontab = "0 5 * * *"\n'
    names = {ACTIVITY, EVENTS, *OTHERS, "added", "rescue", "measure"}

    def start(text: str, **settings: str) -> set[str]:
        file.write_text(text)
        with _at_work(released, schedule_file=str(file), **settings):
            pass
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


@pytest.mark.parametrize("changed", [("crontab",), ("timezone",), ("crontab", "timezone")], ids="+".join)
def test_a_changed_crontab_or_timezone_is_first_due_at_its_next_due_time(
    released: Deployment, broker: redis.Redis, tmp_path: Path, changed: tuple[str, ...]
) -> None:
    """As `schedule list` has it, and not for a due time of the day that was never its own."""
    file = tmp_path / "schedule.toml"
    file.write_text("")
    zone = "Asia/Kolkata" if "timezone" in changed else "UTC"
    with _at_work(released, schedule_file=str(file)):
        pass
    make_due(released, ACTIVITY)
    if "crontab" in changed:
        file.write_text(f'[entry.{ACTIVITY}]\ncrontab = "0 6 * * *"\n')
    with _at_work(released, schedule_file=str(file), timezone=zone), _celery(released, timezone=zone) as celery:
        due = RedBeatSchedulerEntry.from_key(PREFIX + ACTIVITY, app=celery).due_at
    assert due is not None
    # RedBeat's own sum is off by the milliseconds between two looks at the clock.
    local = (due + timedelta(seconds=5)).astimezone(ZoneInfo(zone))
    assert f"{local.minute} {local.hour} * * *" == (
        "0 6 * * *" if "crontab" in changed else schedules.SCHEDULE[ACTIVITY].crontab
    )
    assert not _launched(broker)


@pytest.fixture
def at(monkeypatch: pytest.MonkeyPatch) -> Callable[[Any, datetime], None]:
    """A function that sets the clock of a Celery app, which tells it by the app's timezone."""

    def put(celery: Any, moment: datetime) -> None:
        monkeypatch.setattr(celery, "now", lambda: moment.astimezone(celery.timezone), raising=False)

    return put


@pytest.mark.parametrize("minutes", [-30, 30], ids=["before the hour that comes twice", "within it"])
def test_the_hour_that_comes_twice_makes_nothing_late_and_nothing_due_again(
    released: Deployment, broker: redis.Redis, at: Callable[[Any, datetime], None], minutes: int
) -> None:
    """On 25 October 2026 the clocks of Berlin go from 03:00 back to 02:00, at 01:00 UTC."""
    changes = datetime(2026, 10, 25, 1, tzinfo=UTC)
    begins = changes + timedelta(minutes=minutes)
    with _scheduler(released, timezone="Europe/Berlin", backlog_every="900") as scheduler:
        at(scheduler.app, begins)
        scheduler.tick()
        sent = Counter[str]()
        for seconds in range(0, 3600, 30):
            at(scheduler.app, begins + timedelta(seconds=seconds))
            scheduler.tick()
        for text in broker.lrange(app.QUEUE, 0, -1):
            sent[json.loads(text)["headers"]["task"].rpartition(".")[2]] += 1
    assert sent.pop("launch", 0) <= 1
    # Once a minute and once a quarter of an hour, as in any other hour.
    assert sent == {"rescue": pytest.approx(59, abs=2), "measure": pytest.approx(3, abs=1)}


def test_on_the_day_of_25_hours_an_entry_is_sent_at_its_due_time(
    released: Deployment, broker: redis.Redis, at: Callable[[Any, datetime], None]
) -> None:
    due = datetime(2026, 10, 25, 2, 15, tzinfo=UTC)  # 03:15 in Berlin, where it was summer the day before
    with _scheduler(released, timezone="Europe/Berlin", backlog_every="0") as scheduler:
        for moment, sent in ((due - timedelta(hours=14), 0), (due - timedelta(minutes=1), 0), (due, 1)):
            at(scheduler.app, moment)
            scheduler.tick()
            assert _launched(broker)[ACTIVITY] == sent, moment


# -- the launch -----------------------------------------------------------------------------------------


def _messages(broker: redis.Redis) -> list[list[Any]]:
    """What the launches in the queue are called with; taken from it."""
    found = [json.loads(text) for text in broker.lrange(app.QUEUE, 0, -1)]
    broker.delete(app.QUEUE)
    assert {message["headers"]["task"] for message in found} <= {"paperclip_worker.launch"}
    return [json.loads(base64.b64decode(message["body"]))[0] for message in found]


@contextmanager
def _site(deployment: Deployment, **environment: str) -> Iterator[app.Site]:
    """What a worker holds, whose `work` messages go nowhere."""
    settings = config.load({**deployment.environment, **environment})
    with app.make(settings) as celery:
        site = app.Site(settings, timetable.load(settings), celery)
        deployment.opened.append(site.operations)
        yield site


@contextmanager
def _held(deployment: Deployment, held: bool) -> Iterator[None]:
    """The ledger's runs locked by somebody."""
    with psycopg.connect(deployment.environment["DATABASE_URL"]) as connection:
        if held:
            connection.execute("LOCK TABLE paperclip_worker.runs")
        yield


_FAULTS = {
    "database": {"DATABASE_URL": "postgres://nobody@127.0.0.1:9/none"},
    "bucket": {"PAPERCLIP_STORAGE_S3_ENDPOINT": "http://127.0.0.1:9"},
    "lock": {},
}


@pytest.mark.parametrize("fault", _FAULTS)
def test_an_entry_that_is_due_while_something_is_away_is_started_later_and_once(
    released: Deployment, broker: redis.Redis, fault: str
) -> None:
    with _held(released, fault == "lock"), _site(released, **_FAULTS[fault]) as site:
        site.launch(ACTIVITY)
        (again,) = _messages(broker)
        site.launch(*again)
        (again,) = _messages(broker)
    assert again[:2] == [ACTIVITY, 2]
    operations = released.operations
    # As if the first had been entered, and the answer lost; or the message comes twice.
    for _ in range(2):
        with _site(released) as site:
            site.launch(*again)
        ((run, via),) = released.query("SELECT id, via FROM paperclip_worker.runs")
        assert via == f"schedule:{ACTIVITY}"
        assert operations.runner().work(run, seconds=60) is Outcome.SETTLED
        assert not broker.exists(app.QUEUE)
    # The next due time is another.
    with _site(released) as site:
        site.launch(ACTIVITY)
    assert released.query("SELECT count(*) FROM paperclip_worker.runs") == [(2,)]


def test_a_worker_takes_a_launch_up_again(
    released: Deployment, broker: redis.Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(app, "LAUNCH_AGAIN", 0.5)
    with _site(released, **_FAULTS["database"]) as site:
        site.launch(ACTIVITY)
    assert broker.llen(app.QUEUE) == 1
    with released.worker():
        wait(lambda: released.query("SELECT state FROM paperclip_worker.runs") == [("kept",)])


def test_a_worker_of_another_release_leaves_an_entry_to_others(released: Deployment, broker: redis.Redis) -> None:
    """Old workers may be up for a while when `db init` has brought the ledger to the new release."""
    ((mine,),) = released.query("SELECT version_num FROM paperclip_worker.alembic_version")
    released.query("UPDATE paperclip_worker.alembic_version SET version_num = '9999'")
    with _site(released) as site:
        site.launch(ACTIVITY)
        (again,) = _messages(broker)
        released.query("UPDATE paperclip_worker.alembic_version SET version_num = %s", mine)
        site.launch(*again)
    assert released.query("SELECT via FROM paperclip_worker.runs") == [(f"schedule:{ACTIVITY}",)]


def test_after_an_hour_a_launch_is_given_up(released: Deployment, broker: redis.Redis) -> None:
    assert app.MOST_LAUNCHES * app.LAUNCH_AGAIN == 3600
    with _site(released, **_FAULTS["database"]) as site:
        site.launch(ACTIVITY, app.MOST_LAUNCHES, "2026-01-01T00:00:00+00:00")
    assert not broker.exists(app.QUEUE)
