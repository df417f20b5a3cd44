"""The schedule as a deployment's file changes it, and when its entries are due."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from itertools import islice, pairwise
from pathlib import Path
from zoneinfo import ZoneInfo

import pytest
from hypothesis import given
from hypothesis import strategies as st

import schedules
from tasks.prune_logs import PruneLogs
from worker import app, config, params, timetable
from worker.errors import Refused, SettingsError
from worker.job import Job, Overdue
from worker.plans import Plan, Target
from worker.timetable import MOST_MISSED, Timetable

ACTIVITY, EVENTS, *OTHERS = schedules.SCHEDULE
NOW = datetime(2026, 9, 20, 12, tzinfo=UTC)
_CHANGES = f"""
[entry.{ACTIVITY}]
crontab = "30 2 * * sun"
[entry.{ACTIVITY}.params]
older_than = "180d"
[entry.{EVENTS}]
enabled = false
[entry.yearly]
job = "prune-logs"
crontab = "0 0 1 1 *"
[entry.yearly.params]
table = "heartbeat_run_events"
company = ["00000000-0000-4000-8000-000000000001"]
archive = false
"""


def _load(tmp_path: Path, text: str, **settings: str) -> Timetable:
    file = tmp_path / "schedule.toml"
    file.write_text(text)
    named = {f"PAPERCLIP_WORKER_{name.upper()}": value for name, value in settings.items()}
    return timetable.load(config.load({"PAPERCLIP_WORKER_SCHEDULE_FILE": str(file), **named}))


def test_without_a_file_the_schedule_is_the_built_in_one() -> None:
    times = timetable.load(config.load({}))
    assert times.entries == schedules.SCHEDULE
    assert times.timezone == "UTC"


def test_a_file_changes_switches_off_and_adds(tmp_path: Path) -> None:
    times = _load(tmp_path, _CHANGES, timezone="Europe/Berlin")
    changed, added = times.entries[ACTIVITY], times.entries["yearly"]
    assert changed.crontab == "30 2 * * sun"
    assert params.to_json(changed.job) == params.to_json(schedules.SCHEDULE[ACTIVITY].job) | {"older_than": "180d"}
    assert set(times.enabled) == {ACTIVITY, "yearly", *OTHERS}
    assert times.entries[EVENTS].job == schedules.SCHEDULE[EVENTS].job
    assert isinstance(added.job, PruneLogs)
    assert (added.crontab, added.job.table, added.job.archive) == ("0 0 1 1 *", "heartbeat_run_events", False)
    assert len(added.job.company) == 1
    assert times.timezone == "Europe/Berlin"


def test_beat_gets_the_merged_schedule_and_its_own_entries(tmp_path: Path) -> None:
    times = _load(tmp_path, _CHANGES)
    settings = config.load({"PAPERCLIP_WORKER_BACKLOG_EVERY": "60"})
    schedule = app.beat_schedule(settings, times)
    assert set(schedule) == {ACTIVITY, "yearly", "rescue", "measure", *OTHERS}
    assert schedule[ACTIVITY]["args"] == (ACTIVITY,)
    assert schedule["measure"]["schedule"] == 60
    # While no worker is up, these would pile up in the queue. The longest slice is 240 s.
    assert [schedule[name]["options"]["expires"] for name in ("rescue", "measure")] == [600, 60]
    never = app.beat_schedule(config.load({"PAPERCLIP_WORKER_BACKLOG_EVERY": "0"}), times)
    assert set(never) == {ACTIVITY, "yearly", "rescue", *OTHERS}


def test_an_entry_that_is_off_or_unknown_is_not_launched(tmp_path: Path) -> None:
    times = _load(tmp_path, _CHANGES)
    assert times.entry("yearly") is times.entries["yearly"]
    for name in (EVENTS, "nothing"):
        with pytest.raises(Refused, match=name):
            times.entry(name)


_NEW = '[entry.new]\njob = "prune-logs"\n'
_BAD = {
    "[other]": "other: is not a known key",
    f"[entry.{ACTIVITY}]\ncolour = 1": f"entry.{ACTIVITY}.colour: is not a known key",
    f'[entry.{ACTIVITY}]\nenabled = "no"': f"entry.{ACTIVITY}.enabled: input should be a valid boolean",
    f"[entry.{ACTIVITY}]\ncrontab = 5": f"entry.{ACTIVITY}.crontab: input should be a valid string",
    "entry = 5": "entry: input should be a valid dictionary",
    "[entry.nothing]\nenabled = true": "entry.nothing: is no entry there is",
    f'[entry.{ACTIVITY}]\njob = "other"': f"entry.{ACTIVITY}.job: there is no job 'other'",
    '[entry.Ne_w]\njob = "prune-logs"\ncrontab = "* * * * *"': "entry.Ne_w: is no name",
    '[entry.rescue]\njob = "prune-logs"\ncrontab = "* * * * *"': "entry.rescue: is no name",
    '[entry.measure]\njob = "prune-logs"\ncrontab = "* * * * *"': "entry.measure: is no name",
    _NEW: "entry.new.crontab: is required",
    f'{_NEW}crontab = ""': "entry.new.crontab: has 0 fields",
    f'{_NEW}crontab = "1 2 3 4"': "entry.new.crontab: has 4 fields",
    f'{_NEW}crontab = "60 * * * *"': "entry.new.crontab: minute '60'",
    f'{_NEW}crontab = "* 24 * * *"': "entry.new.crontab: hour '24'",
    f'{_NEW}crontab = "* * 0 * *"': "entry.new.crontab: day-of-month '0'",
    f'{_NEW}crontab = "* * * 13 *"': "entry.new.crontab: month-of-year '13'",
    f'{_NEW}crontab = "* * * * 7"': "entry.new.crontab: day-of-week '7'",
    f'{_NEW}crontab = "*/0 * * * *"': "entry.new.crontab: minute '*/0'",
    f'{_NEW}crontab = "0 0 30 2 *"': "entry.new.crontab: names a day that no month has",
    f"[entry.{ACTIVITY}.params]\ncolour = 1": f"entry.{ACTIVITY}.params.colour: is no parameter of prune-logs",
    f"[entry.{ACTIVITY}.params]\nolder_than = 7": f"entry.{ACTIVITY}.params.older_than: 7 is not a duration",
    f"[entry.{ACTIVITY}.params]\ncompany = [5]": f"entry.{ACTIVITY}.params.company: 5 is not an id",
    f"[entry.{ACTIVITY}.params]\ncompany = [2026-01-01]": f"entry.{ACTIVITY}.params.company: datetime.date",
    f'[entry.{ACTIVITY}.params]\ncompany = "a"': f"entry.{ACTIVITY}.params.company: must be a list",
    f"[entry.{ACTIVITY}.params]\ntable = []": f"entry.{ACTIVITY}.params.table: must be one value",
    f'[entry.{ACTIVITY}.params]\narchive = "no"': f"entry.{ACTIVITY}.params.archive: 'no' is not true or false",
    f'[entry.{ACTIVITY}.params]\nolder_than = "99999d"': f"entry.{ACTIVITY}.params: --older-than must be",
    "entry = ": "is not TOML",
}


@pytest.mark.parametrize("text", _BAD)
def test_a_fault_is_named_by_file_and_key(tmp_path: Path, text: str) -> None:
    with pytest.raises(SettingsError) as caught:
        _load(tmp_path, text)
    said = str(caught.value)
    assert said.startswith(f"PAPERCLIP_WORKER_SCHEDULE_FILE schedule.toml: {_BAD[text]}"), said
    assert "\n" not in said


def test_a_job_of_another_name_is_not_put_under_a_built_in_entry(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("worker.registry.jobs", lambda: {"other": PruneLogs, "prune-logs": PruneLogs})
    with pytest.raises(SettingsError, match=rf"entry\.{ACTIVITY}\.job: is prune-logs for this entry"):
        _load(tmp_path, f'[entry.{ACTIVITY}]\njob = "other"')


def test_every_fault_is_in_the_one_line(tmp_path: Path) -> None:
    text = f'[entry.{ACTIVITY}]\ncrontab = "x * * * *"\ncolour = 1\n[entry.{ACTIVITY}.params]\nolder_than = 1\n'
    with pytest.raises(SettingsError) as caught:
        _load(tmp_path, text + "[entry.nothing]\n[entry.new]\njob = 5\n")
    for key in (f"{ACTIVITY}.crontab", f"{ACTIVITY}.colour", f"{ACTIVITY}.params.older_than", "nothing", "new.job"):
        assert f"entry.{key}: " in str(caught.value)


@pytest.mark.parametrize("zone", ["", " ", "Europe", "Mars/Base", "/etc/localtime", "../UTC", "CEST+2x"])
def test_what_is_no_timezone_is_refused(zone: str) -> None:
    if not zone:
        assert config.load({"PAPERCLIP_WORKER_TIMEZONE": zone}).timezone == "UTC"
        return
    with pytest.raises(SettingsError, match="PAPERCLIP_WORKER_TIMEZONE must be the IANA name"):
        config.load({"PAPERCLIP_WORKER_TIMEZONE": zone})


def _due(crontab: str, after: datetime, number: int, zone: str = "UTC") -> list[datetime]:
    return list(islice(Timetable(timezone=zone, entries={}).due_times(crontab, after), number))


def test_crontabs_are_read_in_the_timezone() -> None:
    assert _due("15 3 * * *", NOW, 1) == [datetime(2026, 9, 21, 3, 15, tzinfo=UTC)]
    assert _due("15 3 * * *", NOW, 1, "Asia/Kolkata") == [datetime(2026, 9, 20, 21, 45, tzinfo=UTC)]
    assert _due("0 0 29 2 *", NOW, 2) == [datetime(year, 2, 29, tzinfo=UTC) for year in (2028, 2032)]


@pytest.mark.parametrize(
    ("day", "due"),
    [
        # 02:30 does not exist: the clock jumps from 02:00 to 03:00.
        (datetime(2026, 3, 29, tzinfo=UTC), datetime(2026, 3, 29, 1, 30, tzinfo=UTC)),
        # 02:30 comes twice: once is enough.
        (datetime(2026, 10, 25, tzinfo=UTC), datetime(2026, 10, 25, 0, 30, tzinfo=UTC)),
    ],
)
def test_a_daily_entry_is_due_once_on_the_days_the_clocks_change(day: datetime, due: datetime) -> None:
    first, second = _due("30 2 * * *", day - timedelta(hours=1), 2, "Europe/Berlin")
    assert first == due
    assert second.astimezone(ZoneInfo("Europe/Berlin")).date() == day.date() + timedelta(days=1)


@given(
    st.sampled_from(["* * * * *", "*/7 * * * *", "30 1-3 * * *", "59 23 31 * *", "0 0 * * sun", "0 2 29 2 *"]),
    st.datetimes(datetime(2025, 1, 1), datetime(2027, 12, 31)),  # noqa: DTZ001 - made aware below
    st.sampled_from(["UTC", "Europe/Berlin", "America/St_Johns", "Australia/Lord_Howe", "Africa/Casablanca"]),
)
def test_due_times_always_go_forward(crontab: str, after: datetime, zone: str) -> None:
    after = after.replace(tzinfo=UTC)
    found = [after, *_due(crontab, after, 5, zone)]
    assert all(one < other for one, other in pairwise(found))


def test_missed_due_times_are_counted_up_to_a_bound() -> None:
    times = Timetable(timezone="UTC", entries={})
    day = timedelta(days=1)
    assert times.missed("0 12 * * *", NOW, NOW + 3 * day) == 3
    assert times.missed("0 12 * * *", NOW, NOW + 3 * day - timedelta(seconds=1)) == 2
    assert times.missed("0 12 * * *", NOW, NOW - day) == 0
    assert times.missed("* * * * *", NOW, NOW + day) == MOST_MISSED


def test_a_job_that_says_nothing_of_its_backlog_has_that_of_its_plan() -> None:
    def target(table: str, company: str, rows: int) -> Target:
        return Target(table=table, company=company, rows=rows, bytes=rows, digest="")

    targets = (target("a", "1", 2), target("b", "1", 3), target("a", "2", 5))
    plan = Plan(job="j", params={}, layout="guide", now=NOW, targets=targets, left=())

    class Planned(PruneLogs):
        overdue = Job.overdue

        def plan(self, means: object) -> Plan:
            del means
            return plan

    found = Planned().overdue(None)  # type: ignore[arg-type]
    assert found == (Overdue(table="a", rows=7), Overdue(table="b", rows=3))
