"""`schedule list` and `metrics`: what an operator and Prometheus are told of entries, work and backlog."""

from __future__ import annotations

import socket
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import psycopg
import pytest
from prometheus_client.parser import text_string_to_metric_families

import schedules
from tests.cli.helpers import INLINE, complete, refused
from tests.conftest import Deployment
from tests.faults.evidence import begin, wait
from worker import app, backlog, ledger, metrics, standing, timetable
from worker.job import Job
from worker.states import State
from worker.timetable import Timetable

ACTIVITY, EVENTS, *_ = schedules.SCHEDULE
DAY = timedelta(days=1)
Samples = Mapping[tuple[str, frozenset[tuple[str, str]]], float]


def _entries(deployment: Deployment, **env: str) -> dict[str, dict[str, Any]]:
    done = deployment.cli("schedule", "list", env=env)
    assert done.stderr == ""
    header, *lines = (line.split("\t") for line in done.stdout.splitlines())
    return {line[0]: dict(zip(header, line, strict=True)) for line in lines}


def _run(deployment: Deployment, entry: str, job: Job, *, at: datetime) -> str:
    """A kept run of a schedule entry, entered at that moment."""
    operations = deployment.operations
    run = operations.start(job, actor="beat", via=standing.origin(entry))
    operations.runner().work(run, seconds=60)
    deployment.query("UPDATE paperclip_worker.runs SET created_at = %s WHERE id = %s", at, run)
    return str(run)


def _age(deployment: Deployment, age: timedelta) -> None:
    """As if the ledger had been made so long ago."""
    deployment.query("UPDATE paperclip_worker.chain SET born = clock_timestamp() - %s::interval", age)


def _standing(deployment: Deployment, times: Timetable | None = None) -> dict[str, standing.Standing]:
    times = times or timetable.load(deployment.operations.settings)
    with deployment.operations.transaction(read_only=True) as connection:
        return {one.name: one for one in standing.standings(connection, times, now=datetime.now(UTC))}


# -- schedule list ------------------------------------------------------------------------------------


def test_a_new_ledger_has_missed_nothing_and_run_nothing(released: Deployment) -> None:
    for one in released.json("schedule", "list")["schedule"]:
        assert (one["last"], one["missed"], one["never"], one["enabled"]) == (None, 0, True, True)
        due = datetime.fromisoformat(one["next"])
        assert datetime.now(UTC) < due <= datetime.now(UTC) + DAY
        assert f"{due.minute} {due.hour} * * *" == one["crontab"]


def test_an_entry_that_never_ran_missed_every_due_time_since_the_ledger_was_made(released: Deployment) -> None:
    _age(released, 3 * DAY + timedelta(hours=1))
    found = released.json("schedule", "list")["schedule"]
    # Between three and four days lie three or four due times; the grace may hide one of this moment.
    assert all(one["never"] and one["missed"] in {3, 4} for one in found)
    _age(released, 4000 * DAY)
    assert {one["missed"] for one in released.json("schedule", "list")["schedule"]} == {timetable.MOST_MISSED}


def test_the_last_run_of_an_entry_and_what_it_missed_since(released: Deployment) -> None:
    _age(released, 30 * DAY)
    at = datetime.now(UTC) - 2 * DAY - timedelta(hours=1)
    run = _run(released, ACTIVITY, schedules.SCHEDULE[ACTIVITY].job, at=at)
    # A run of an operator's is none of the entry's.
    complete(released, table="heartbeat_run_events")
    found = {one["entry"]: one for one in released.json("schedule", "list")["schedule"]}
    assert found[ACTIVITY]["last"] == {"run": run, "at": at.isoformat(timespec="seconds"), "state": "kept"}
    assert found[ACTIVITY]["never"] is False
    assert found[ACTIVITY]["missed"] in {2, 3}
    assert found[EVENTS]["never"] is True
    assert found[EVENTS]["missed"] in {29, 30}
    line = _entries(released)[ACTIVITY]
    assert line["last"] == f"{at.isoformat(timespec='seconds')} kept"
    assert (line["enabled"], line["never"], line["timezone"]) == ("yes", "no", "UTC")


@pytest.mark.parametrize(
    ("ago", "missed"),
    [
        # Due, and beat or a worker may still come to it.
        (standing.GRACE - timedelta(seconds=70), 0),
        (standing.GRACE + timedelta(seconds=1), 1),
    ],
)
def test_a_due_time_counts_as_missed_after_a_grace(released: Deployment, ago: timedelta, missed: int) -> None:
    _age(released, DAY - timedelta(hours=1))
    assert _standing(released, _due(datetime.now(UTC) - ago))[ACTIVITY].missed == missed


def test_a_run_entered_just_before_its_due_time_is_that_times_run(released: Deployment) -> None:
    """The database's clock may be a little behind beat's."""
    due = datetime.now(UTC).replace(second=0, microsecond=0) - timedelta(minutes=20)
    _age(released, DAY - timedelta(hours=1))
    _run(released, ACTIVITY, schedules.SCHEDULE[ACTIVITY].job, at=due - timedelta(seconds=2))
    assert _standing(released, _due(due))[ACTIVITY].missed == 0


def _due(moment: datetime) -> Timetable:
    """One entry, due each day at the minute of that moment."""
    entry = schedules.Entry(f"{moment.minute} {moment.hour} * * *", schedules.SCHEDULE[ACTIVITY].job)
    return Timetable(timezone="UTC", entries={ACTIVITY: entry})


def test_beat_keeps_since_when_an_entry_holds_as_it_is(released: Deployment) -> None:
    """What is new, changed or on again has not missed the due times of the time before."""
    _age(released, 30 * DAY)
    one = schedules.SCHEDULE[ACTIVITY]
    off = schedules.Entry(one.crontab, one.job, enabled=False)
    other = schedules.Entry("0 0 * * *", one.job)

    def start(entry: schedules.Entry, zone: str = "UTC", *, days: int) -> int | None:
        times = Timetable(timezone=zone, entries={ACTIVITY: entry})
        for _ in range(2):
            with released.operations.transaction() as connection:
                standing.note(connection, times)
        missed = _standing(released, times)[ACTIVITY].missed
        released.query("UPDATE paperclip_worker.entries SET since = since - %s::interval", timedelta(days=days))
        return missed

    assert _standing(released)[ACTIVITY].missed in {29, 30}
    assert start(one, days=4) == 0
    assert start(one, days=0) in {3, 4}
    assert start(other, days=4) == 0
    assert start(other, "Europe/Berlin", days=4) == 0
    assert start(off, days=4) == 0
    assert start(other, "Europe/Berlin", days=0) == 0


def test_beat_notes_its_entries_when_it_starts(released: Deployment) -> None:
    with released.worker("beat"):
        wait(lambda: len(released.query("SELECT entry FROM paperclip_worker.entries")) == len(schedules.SCHEDULE))


def test_the_file_of_the_deployment_is_shown(released: Deployment, tmp_path: Path) -> None:
    file = tmp_path / "schedule.toml"
    file.write_text(
        f'[entry.{ACTIVITY}]\ncrontab = "0 7 * * *"\n[entry.{EVENTS}]\nenabled = false\n'
        '[entry.extra]\njob = "prune-logs"\ncrontab = "0 8 * * 1"\n[entry.extra.params]\nolder_than = "400d"\n'
    )
    _age(released, 30 * DAY)
    env = {"PAPERCLIP_WORKER_SCHEDULE_FILE": str(file), "PAPERCLIP_WORKER_TIMEZONE": "Asia/Kolkata"}
    found = _entries(released, **env)
    assert found[ACTIVITY]["crontab"] == "0 7 * * *"
    assert found[ACTIVITY]["next"].endswith("T01:30:00+00:00")
    assert (found[EVENTS]["enabled"], found[EVENTS]["next"], found[EVENTS]["missed"]) == ("no", "-", "0")
    assert "older_than=400d" in found["extra"]["params"]
    assert {one["timezone"] for one in found.values()} == {"Asia/Kolkata"}


def test_an_entry_for_another_layout_is_off(
    make_deployment: Callable[..., Deployment],
    fresh_database: Callable[..., str],
    template: Callable[[str], str],
    tmp_path: Path,
) -> None:
    """Every night it would be refused, and counted as missed."""
    guide = make_deployment(fresh_database(template("guide")), "guide")
    _age(guide, 3 * DAY)
    found = {one["entry"]: one for one in guide.json("schedule", "list")["schedule"]}
    assert [name for name, one in found.items() if not one["enabled"]] == [EVENTS]
    assert (found[EVENTS]["next"], found[EVENTS]["missed"]) == (None, 0)
    assert found[ACTIVITY]["missed"] == 3
    with guide.worker("beat"):
        wait(lambda: guide.query("SELECT count(*) > 0 FROM paperclip_worker.entries")[0][0])
    noted = {name for (name,) in guide.query("SELECT entry FROM paperclip_worker.entries")}
    assert noted == {name for name, one in found.items() if one["enabled"]}
    # With parameters of the operator's it is the operator's entry.
    file = tmp_path / "schedule.toml"
    file.write_text(f'[entry.{EVENTS}.params]\ntable = "activity_log"\n')
    own = _entries(guide, PAPERCLIP_WORKER_SCHEDULE_FILE=str(file))
    assert own[EVENTS]["enabled"] == "yes"


def test_without_a_database_what_can_be_shown_is(released: Deployment) -> None:
    found = _entries(released, DATABASE_URL="", PAPERCLIP_WORKER_BROKER_URL="")
    assert set(found) == set(schedules.SCHEDULE)
    for one in found.values():
        assert (one["last"], one["missed"], one["never"]) == ("-", "-", "-")
        assert one["next"] != "-"


def test_a_bad_file_is_refused_by_whatever_reads_it(released: Deployment, tmp_path: Path) -> None:
    file = tmp_path / "bad.toml"
    file.write_text("[entry.nothing]\nenabled = true\n[entry.more]\ncolour = 1\n")
    env = {"PAPERCLIP_WORKER_SCHEDULE_FILE": str(file)}
    for words in (("schedule", "list"), ("metrics",)):
        line = refused(released, *words, says=r"bad\.toml: entry\.nothing: ", env=env)
        assert "entry.more.colour: " in line
        env_gone = {"PAPERCLIP_WORKER_SCHEDULE_FILE": str(tmp_path / "gone.toml")}
        refused(released, *words, says="PAPERCLIP_WORKER_SCHEDULE_FILE names no file", env=env_gone)
    for service in ("worker", "beat"):
        done = released.cli(service, ok=False, env=env)
        assert done.returncode == 2
        assert [line for line in done.stderr.splitlines() if "entry.nothing" in line and line[0] != "{"]


def test_a_worker_launches_what_the_file_says(released: Deployment, tmp_path: Path) -> None:
    file = tmp_path / "schedule.toml"
    file.write_text(
        f'[entry.{ACTIVITY}.params]\nolder_than = "120d"\n[entry.{EVENTS}]\nenabled = false\n'
        '[entry.extra]\njob = "prune-logs"\ncrontab = "0 8 * * 1"\n'
        '[entry.extra.params]\ntable = "heartbeat_run_events"\narchive = false\n'
    )
    with released.worker(schedule_file=str(file)), app.make(released.operations.settings) as celery:
        for name in (EVENTS, ACTIVITY, "extra"):
            celery.send_task("paperclip_worker.launch", (name,))
        query = (
            "SELECT via, params->>'older_than', params->>'archive' FROM paperclip_worker.runs WHERE state = 'kept'"
        )
        wait(lambda: len(released.query(query)) == 2)
        assert set(released.query(query)) == {
            (f"schedule:{ACTIVITY}", "120d", "true"),
            ("schedule:extra", None, "false"),
        }
    assert released.query("SELECT count(*) FROM paperclip_worker.runs") == [(2,)]


def test_a_schedule_that_archives_nothing_needs_no_bucket(released: Deployment, tmp_path: Path) -> None:
    file = tmp_path / "schedule.toml"
    file.write_text("".join(f"[entry.{name}.params]\narchive = false\n" for name in (ACTIVITY, EVENTS)))
    released.with_settings(s3_bucket="", schedule_file=str(file)).check_ready()


# -- metrics ------------------------------------------------------------------------------------------


def _parse(text: str) -> Samples:
    found: dict[tuple[str, frozenset[tuple[str, str]]], float] = {}
    for family in text_string_to_metric_families(text):
        for one in family.samples:
            place = (one.name, frozenset(one.labels.items()))
            assert place not in found
            found[place] = one.value
    return found


def _value(found: Samples, name: str, **labels: str) -> float:
    return found["paperclip_worker_" + name, frozenset(labels.items())]


def _names(found: Samples) -> set[str]:
    return {name for name, _ in found}


@contextmanager
def _served(deployment: Deployment, **settings: str) -> Iterator[str]:
    """A real worker that answers scrapes; the URL."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    url = f"http://127.0.0.1:{port}/metrics"

    def answers() -> bool:
        try:
            return bool(_scrape(url))
        except OSError:
            return False

    with deployment.worker(metrics_port=str(port), **settings):
        wait(answers)
        yield url


def _scrape(url: str) -> Samples:
    with urllib.request.urlopen(url, timeout=10) as answer:  # noqa: S310 - loopback
        return _parse(answer.read().decode())


def test_a_worker_serves_what_the_ledger_and_the_measurement_say(released: Deployment) -> None:
    _age(released, 10 * DAY)
    result = released.json(*INLINE)
    run = _run(released, ACTIVITY, schedules.SCHEDULE[ACTIVITY].job, at=datetime.now(UTC))
    with _served(released) as url, app.make(released.operations.settings) as celery:
        celery.send_task("paperclip_worker.measure")
        wait(lambda: len(released.query("SELECT entry FROM paperclip_worker.backlog")) == len(schedules.SCHEDULE))
        found = _scrape(url)
        assert _value(found, "ledger_up") == 1
        job = {"job": "prune-logs"}
        assert _value(found, "runs", state="kept", **job) == 2
        assert _value(found, "rows_total", **job) == result["rows"]
        assert _value(found, "bytes_total", **job) == result["bytes"]
        bites, seconds = released.query("SELECT count(*), sum(microseconds) / 1e6 FROM paperclip_worker.bites")[0]
        assert _value(found, "bites_total", **job) == _value(found, "bite_seconds_count", **job) == bites
        assert _value(found, "bite_seconds_sum", **job) == pytest.approx(float(seconds))
        assert _value(found, "run_seconds_count", **job) == 2
        assert _value(found, "run_seconds_bucket", le="+Inf", **job) == 2
        assert _value(found, "schedule_missed", entry=ACTIVITY, **job) == 0
        assert _value(found, "schedule_missed", entry=EVENTS, **job) in {9, 10}
        assert _value(found, "schedule_last_run_timestamp_seconds", entry=EVENTS, **job) == 0
        assert _value(found, "schedule_last_run_timestamp_seconds", entry=ACTIVITY, **job) > 0
        events = {"entry": EVENTS, "table": "heartbeat_run_events"}
        assert _value(found, "backlog_rows", **events, **job) > 0
        assert _value(found, "backlog_rows", entry=ACTIVITY, table="activity_log", **job) == 0
        # The same from the command line, but for what the clock moves.
        printed = _parse(released.cli("metrics").stdout)
        assert _names(printed) == _names(found)
        assert {key: value for key, value in printed.items() if "age" not in key[0]} == {
            key: value for key, value in found.items() if "age" not in key[0]
        }
        companies = {row[0] for row in released.query("SELECT id::text FROM companies")}
        values = {value for _, labels in found for _, value in labels}
        assert not values & (companies | {run, result["run"]})
        released.query("ALTER SCHEMA paperclip_worker RENAME TO away")
        assert _scrape(url) == {("paperclip_worker_ledger_up", frozenset()): 0}


def test_measuring_the_backlog_from_the_command_line(deployment: Deployment) -> None:
    log = "activity_log"
    before = deployment.digest()
    assert "paperclip_worker_backlog_rows" not in _names(_parse(deployment.cli("metrics").stdout))
    planned = deployment.json("plan", "prune-logs")
    found = deployment.json("metrics", "--measure")["metrics"]
    here = {
        one["name"].removeprefix("paperclip_worker_"): one["value"]
        for one in found
        if one["labels"].get("entry") == ACTIVITY and one["labels"].get("table") == log
    }
    assert here["backlog_rows"] == planned["rows"] > 0
    ((oldest,),) = deployment.query(
        "SELECT extract(epoch FROM clock_timestamp() - oldest) FROM paperclip_worker.backlog WHERE entry = %s",
        ACTIVITY,
    )
    assert here["backlog_oldest_age_seconds"] == pytest.approx(float(oldest), abs=60)
    assert deployment.digest() == before
    # The oldest is the oldest of those that go, not of those that stay.
    gone = deployment.json(*INLINE)
    assert gone["rows"] == here["backlog_rows"]
    after = _parse(deployment.cli("metrics", "--measure").stdout)
    place = {"entry": ACTIVITY, "job": "prune-logs", "table": log}
    assert _value(after, "backlog_rows", **place) == 0
    assert _value(after, "backlog_oldest_age_seconds", **place) == 0


def test_workers_measure_one_at_a_time(released: Deployment) -> None:
    """Where it takes longer than beat waits for the next, all of them would measure, and none would prune."""
    times = timetable.load(released.operations.settings)
    with (
        app.make(released.operations.settings) as celery,
        psycopg.connect(released.environment["DATABASE_URL"]) as other,
    ):
        site = app.Site(released.operations.settings, times, celery)
        released.opened.append(site.operations)
        other.execute("SELECT pg_advisory_xact_lock(hashtextextended('paperclip-worker:measure', 0))")
        site.measure()
        assert released.query("SELECT count(*) FROM paperclip_worker.backlog") == [(0,)]
        other.rollback()

        def measured() -> bool:
            # It is left out for as long as it took to be refused.
            site.measure()
            return released.query("SELECT count(*) FROM paperclip_worker.backlog") == [(len(times.enabled),)]

        wait(measured)


def test_the_oldest_overdue_row_is_not_one_that_stays(released: Deployment) -> None:
    planned = released.json("plan", "prune-logs")
    assert planned["left"]
    released.query(
        "UPDATE activity_log SET created_at = '2001-01-01' WHERE id = (SELECT a.id FROM activity_log a "
        "JOIN heartbeat_runs r ON r.id = a.run_id WHERE r.status IN ('queued', 'running') LIMIT 1)"
    )
    ((moved,),) = released.query("SELECT count(*) FROM activity_log WHERE created_at = '2001-01-01'")
    assert moved == 1
    (found,) = released.operations.overdue(schedules.SCHEDULE[ACTIVITY].job)
    assert found.rows == planned["rows"]
    assert found.oldest is not None
    assert found.oldest.year > 2001


def test_an_entry_that_cannot_be_measured_is_named_and_the_others_are_measured(
    released: Deployment, tmp_path: Path
) -> None:
    file = tmp_path / "schedule.toml"
    file.write_text(f'[entry.{ACTIVITY}.params]\ntable = "companies"\n')
    done = released.cli("metrics", "--measure", ok=False, env={"PAPERCLIP_WORKER_SCHEDULE_FILE": str(file)})
    assert done.returncode == 1
    assert len(done.stderr.splitlines()) == 1
    assert f"the backlog was not measured: {ACTIVITY}: " in done.stderr
    assert _value(_parse(done.stdout), "backlog_rows", entry=EVENTS, job="prune-logs", table="heartbeat_run_events")


def test_a_table_an_entry_no_longer_prunes_has_no_backlog_and_an_entry_that_is_off_is_not_shown(
    released: Deployment,
) -> None:
    operations = released.operations
    times = timetable.load(operations.settings)
    assert not backlog.measure(operations, times)
    moved = Timetable(timezone="UTC", entries={ACTIVITY: times.entries[EVENTS], EVENTS: times.entries[EVENTS]})
    assert not backlog.measure(operations, moved)
    rows = dict(released.query(f"SELECT \"table\", rows FROM paperclip_worker.backlog WHERE entry = '{ACTIVITY}'"))
    assert rows["activity_log"] == 0
    assert rows["heartbeat_run_events"] > 0
    entries = {name: schedules.Entry(one.crontab, one.job, name == EVENTS) for name, one in times.entries.items()}
    found = _parse(metrics.text(metrics.LedgerCollector(operations, Timetable(timezone="UTC", entries=entries))))
    assert {dict(labels)["entry"] for _, labels in found if "entry" in dict(labels)} == {EVENTS}


def test_durations_fall_into_buckets_and_only_of_runs_that_never_move_again(released: Deployment) -> None:
    complete(released)
    for seconds, state in ((5, State.KEPT), (100_000, State.UNKEPT), (70, State.FAILED), (70, State.STOPPED)):
        released.query(
            "INSERT INTO paperclip_worker.runs "
            "(id, job, params, exclusion, layout, state, now, actor, via, created_at, settled_at) "
            "SELECT gen_random_uuid(), 'other', '{}', 'x', 'paperclip', %s, now(), 'a', 'v', now(), "
            "now() + %s::interval",
            state,
            timedelta(seconds=seconds),
        )
    found = _parse(released.cli("metrics").stdout)
    assert _value(found, "run_seconds_count", job="other") == 2
    assert _value(found, "run_seconds_sum", job="other") == pytest.approx(100_005)
    bounds = ("1.0", "10.0", "86400.0", "+Inf")
    assert [_value(found, "run_seconds_bucket", job="other", le=bound) for bound in bounds] == [0, 1, 1, 2]


def test_rests_are_counted_by_reason(released: Deployment) -> None:
    """While it is under way as when it has settled."""
    run = begin(released.operations)
    with released.operations.transaction() as connection:
        for kind, seconds in (("replica_lag", 7), ("retained_wal", 2)):
            ledger.note_wait(connection, run, None, kind=kind, seconds=seconds)
    for settled in (False, True):
        if settled:
            released.operations.runner().work(run, seconds=60)
        found = _parse(released.cli("metrics").stdout)
        assert _value(found, "runs", job="prune-logs", state="kept") == settled
        assert _value(found, "rest_seconds_total", job="prune-logs", reason="replica_lag") == 7
        assert _value(found, "rest_seconds_total", job="prune-logs", reason="retained_wal") == 2


def test_metrics_of_a_database_without_a_ledger_are_refused(released: Deployment) -> None:
    released.query("DROP SCHEMA paperclip_worker CASCADE")
    refused(released, "metrics", says="ledger is not there")
    refused(released, "schedule", "list", says="ledger is not there")
