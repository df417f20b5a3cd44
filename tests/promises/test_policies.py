"""Retention policies: per company and table, versioned, bounded; what is wrong with one stops the deleting."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from datetime import timedelta
from typing import Any
from uuid import UUID, uuid4

import pytest

from tasks.archive_tasks import ArchiveTasks
from tasks.prune_logs import PruneLogs
from tests.cli.helpers import check_refusal, refused, world
from tests.conftest import Deployment
from worker import retention, rules
from worker.errors import Refused
from worker.job import Job
from worker.layouts import LAYOUTS
from worker.runner import Outcome

SET = ("policy", "set", "--table", "activity_log", "--reason", "law 12")
REMOVE = ("policy", "remove", "--table", "activity_log", "--reason", "law 13")
PREVIEW = ("policy", "preview", "--table", "activity_log")
FLOOR = {"PAPERCLIP_WORKER_RETENTION_FLOOR": "60d"}


def _days(number: float) -> timedelta:
    return timedelta(days=number)


def _set(deployment: Deployment, keep: timedelta | None, *, company: str | None = None, table: str = "") -> None:
    rules.set_policy(
        deployment.operations,
        table=table or "activity_log",
        company=UUID(company) if company else None,
        keep=keep,
        reason="law 12",
        actor="officer",
    )


def _planned(deployment: Deployment, job: Job) -> dict[str | None, int]:
    return {one.company: one.rows for one in deployment.operations.plan(job).targets}


def _companies(deployment: Deployment) -> list[str]:
    return sorted(str(company) for company in _planned(deployment, PruneLogs()))


def _run(deployment: Deployment, job: Job) -> dict[str, Any]:
    run = deployment.operations.start(job, actor="tester", via="test")
    assert deployment.operations.runner().work(run, seconds=math.inf) is Outcome.SETTLED
    return deployment.operations.result(run)


def _json(deployment: Deployment, *words: str) -> Any:
    """What a command prints where nothing may be kept for less than 60 days."""
    return json.loads(deployment.cli(*words, "--json", env=FLOOR).stdout)


def _doomed(look: dict[str, Any]) -> dict[str | None, int]:
    return {one["company"]: one["rows"] for one in look["next_runs"]}


def _age(deployment: Deployment) -> str:
    return '"timestamp"' if deployment.layout == "guide" else "created_at"


def test_each_company_by_its_own_policy_the_others_by_that_for_all(deployment: Deployment) -> None:
    first, second, third = _companies(deployment)
    at = {days: _planned(deployment, PruneLogs(older_than=_days(days))) for days in (30, 90, 120, 180)}
    assert at[30][first] > at[90][first] > at[120][first] > at[180][first] > 0
    _set(deployment, _days(120))
    _set(deployment, _days(180), company=first)
    _set(deployment, _days(30), company=second)
    expected = {first: at[180][first], second: at[30][second], third: at[120][third]}
    assert _planned(deployment, PruneLogs()) == expected
    result = _run(deployment, PruneLogs())
    assert result["kept"]
    assert {one["company"]: one["rows"] for one in result["tally"]} == expected
    retained = result["receipt"]["evidence"]["retention"]
    assert set(retained["companies"]) == {first, second}
    youngest = dict(
        deployment.query(
            "SELECT company_id::text, max(extract(epoch FROM now() - "
            f"{_age(deployment)}) / 86400)::float8 FROM activity_log WHERE action NOT LIKE 'maintenance.%' GROUP BY 1"
        )
    )
    assert youngest[first] > 150


def test_what_an_operator_asks_for_can_only_keep_longer(deployment: Deployment) -> None:
    company = _companies(deployment)[0]
    at = {days: _planned(deployment, PruneLogs(older_than=_days(days))) for days in (60, 120, 180)}
    _set(deployment, _days(120), company=company)
    for asked, keeps in ((60, 120), (180, 180)):
        planned = _planned(deployment, PruneLogs(older_than=_days(asked)))
        assert planned[company] == at[keeps][company]
        others = {whose: rows for whose, rows in planned.items() if whose != company}
        assert others == {whose: rows for whose, rows in at[asked].items() if whose != company}


def test_versions_stay_and_a_policy_taken_back_is_none(released: Deployment) -> None:
    free = _planned(released, PruneLogs())
    _set(released, _days(120))
    _set(released, _days(180))
    _set(released, None)
    assert _planned(released, PruneLogs()) == free
    assert released.json("policy", "list") == {"policies": []}
    history = released.json("policy", "list", "--history")["policies"]
    assert [(one["version"], one["keep"]) for one in history] == [(1, "120d"), (2, "180d"), (3, None)]
    assert {(one["actor"], one["reason"]) for one in history} == {("officer", "law 12")}
    with pytest.raises(Refused, match="no such policy"):
        _set(released, None)


def test_tasks_have_policies_too(deployment: Deployment) -> None:
    table = "tasks" if deployment.layout == "guide" else "issues"
    company = sorted(map(str, _planned(deployment, ArchiveTasks())))[0]
    longer = _planned(deployment, ArchiveTasks(older_than=_days(120)))[company]
    assert longer < _planned(deployment, ArchiveTasks())[company]
    _set(deployment, _days(120), company=company, table=table)
    assert _planned(deployment, ArchiveTasks())[company] == longer
    assert {one["company"]: one["rows"] for one in _run(deployment, ArchiveTasks())["tally"]}[company] == longer


def test_a_preview_is_what_the_next_run_takes_more(released: Deployment) -> None:
    now = _planned(released, PruneLogs())
    before = world(released)
    found = released.json("policy", "preview", "--table", "activity_log", "--keep", "45d")["next_runs"]
    assert world(released) == before
    check_refusal(released.cli(*SET, "--keep", "45d", ok=False), says="newly dooms .* rows.*--yes", status=2)
    assert world(released) == before
    made = released.json(*SET, "--keep", "45d", "--yes")
    assert made["next_runs"] == found
    assert (made["version"], made["keep"]) == (1, "45d")
    then = _planned(released, PruneLogs())
    assert {one["company"]: one["rows"] for one in found} == {
        whose: rows - now[whose] for whose, rows in then.items()
    }
    # Longer dooms nothing and needs no word.
    assert released.json(*SET, "--keep", "400d")["next_runs"] == []
    # Taken back, 90 days hold again, which dooms what 400 days did not.
    check_refusal(
        released.cli("policy", "remove", "--table", "activity_log", "--reason", "x", ok=False),
        says="newly dooms",
        status=2,
    )


def test_a_policy_made_longer_mid_run_binds_the_next_bite(deployment: Deployment) -> None:
    small = deployment.with_settings(bite_rows="50")
    run = small.start(PruneLogs(), actor="tester", via="test")
    bites = iter(range(3))
    assert small.runner().work(run, seconds=math.inf, leave=lambda: next(bites, None) is None) is Outcome.MORE
    done = small.result(run)["rows"]
    _set(deployment, _days(400))
    assert small.runner().work(run, seconds=math.inf) is Outcome.SETTLED
    result = small.result(run)
    assert 0 < done == result["rows"] < result["planned"]
    assert result["kept"]


def test_a_policy_made_shorter_mid_run_waits_for_the_next_run(deployment: Deployment) -> None:
    planned = deployment.operations.plan(PruneLogs()).tally.total.rows
    small = deployment.with_settings(bite_rows="50")
    run = small.start(PruneLogs(), actor="tester", via="test")
    bites = iter(range(3))
    assert small.runner().work(run, seconds=math.inf, leave=lambda: next(bites, None) is None) is Outcome.MORE
    _set(deployment, _days(10))
    assert small.runner().work(run, seconds=math.inf) is Outcome.SETTLED
    assert small.result(run)["rows"] == planned
    assert _run(deployment, PruneLogs())["rows"] > 0


@pytest.mark.parametrize(
    ("bound", "says"),
    [("RETENTION_FLOOR", "under the floor of 200d"), ("RETENTION_CEILING", "over the ceiling of 60d")],
)
def test_a_policy_that_the_settings_no_longer_allow_stops_its_tables_runs(
    released: Deployment, bound: str, says: str
) -> None:
    _set(released, _days(120))
    before = world(released)
    env = {f"PAPERCLIP_WORKER_{bound}": "200d" if "FLOOR" in bound else "60d"}
    for verb in ("plan", "rehearse"):
        refused(released, verb, "prune-logs", says=f"the policy of activity_log .*{says}", env=env)
    refused(released, "run", "prune-logs", "--inline", "--yes", says=says, env=env)
    refused(released, *SET, "--keep", "120d", says=f"--keep 120d is {says}", env=env)
    assert world(released) == before
    # A table whose policy is in order is not stopped.
    _set(released, _days(250 if "FLOOR" in bound else 50), table="plugin_logs")
    released.cli("plan", "prune-logs", "--table", "plugin_logs", env=env)


@pytest.mark.parametrize("change", [(*SET, "--keep", "120d"), REMOVE])
def test_a_policy_out_of_bounds_can_be_put_right(released: Deployment, change: tuple[str, ...]) -> None:
    """As things are no run can begin, so whatever the next one takes is newly doomed."""
    then = _planned(released, PruneLogs(older_than=None if change is REMOVE else _days(120)))
    _set(released, _days(30))
    before = world(released)
    refused(released, *change, says=f"newly dooms {sum(then.values())} rows of activity_log.*--yes", env=FLOOR)
    assert world(released) == before
    made = _json(released, *change, "--yes")
    assert (_doomed(made), made["refused"]) == (then, [])
    assert _planned(released, PruneLogs()) == then


def test_of_several_policies_out_of_bounds_each_can_be_put_right(released: Deployment) -> None:
    """While another is, nobody can say what the next run takes: that is said, and has to be confirmed."""
    first, second, _ = _companies(released)
    for company in (first, second):
        _set(released, _days(30), company=company)
    says = f"the policy of activity_log for company {second} .* is under the floor"
    before = world(released)
    refused(released, *SET, "--company", first, "--keep", "90d", says=f"{says}.*--yes", env=FLOOR)
    assert world(released) == before
    look = _json(released, *PREVIEW, "--company", first, "--keep", "90d")
    made = _json(released, *SET, "--company", first, "--keep", "90d", "--yes")
    for one in (look, made):
        assert one["next_runs"] == []
        ((job, why),) = [(it["job"], it["why"]) for it in one["refused"]]
        assert (job, re.match(says, why) is not None) == ("prune-logs", True)
    assert says.partition(" .*")[0] in released.cli(*PREVIEW, "--company", first, "--keep", "90d", env=FLOOR).stdout
    made = _json(released, *SET, "--company", second, "--keep", "90d", "--yes")
    assert (_doomed(made), made["refused"]) == (_planned(released, PruneLogs()), [])


def test_a_default_under_the_floor_is_overridden_by_a_policy(released: Deployment) -> None:
    then = _planned(released, ArchiveTasks(older_than=_days(90)))
    made = _json(released, "policy", "set", "--table", "issues", "--keep", "90d", "--reason", "x", "--yes")
    assert (_doomed(made), made["refused"]) == (then, [])
    _json(released, "plan", "archive-tasks")


def test_the_policy_of_a_company_that_is_gone_can_be_changed(deployment: Deployment) -> None:
    gone = str(uuid4())
    columns, values = (
        ("id, name, issue_prefix", "%s, 'x', 'x'") if deployment.layout == "paperclip" else ("id, name", "%s, 'x'")
    )
    deployment.query(f"INSERT INTO companies ({columns}) VALUES ({values})", gone)
    _set(deployment, _days(30), company=gone)
    deployment.query("DELETE FROM companies WHERE id = %s", gone)
    company = ("--company", gone.upper())
    assert _json(deployment, *SET, *company, "--keep", "90d", "--yes")["version"] == 2
    assert _json(deployment, *REMOVE, *company, "--yes")["version"] == 3
    refused(deployment, *SET, "--company", str(uuid4()), "--keep", "90d", says="there is no company")


@pytest.mark.parametrize("form", [str.upper, lambda one: f"{{{one}}}"])
def test_an_id_is_the_same_however_it_is_written(deployment: Deployment, form: Callable[[str], str]) -> None:
    company = _companies(deployment)[0]
    assert deployment.json(*SET, "--company", form(company), "--keep", "400d")["company"] == company
    deployment.cli("holds", "add", "--company", form(company), "--reason", "x")
    assert [one["target"] for one in deployment.json("holds", "list")["holds"]] == [company]


def test_a_table_that_has_no_policy_is_told_those_that_do(released: Deployment) -> None:
    refused(
        released,
        "policy",
        "set",
        "--table",
        "tasks",
        "--keep",
        "1d",
        "--reason",
        "x",
        says="tasks is not a log or the tasks' table of the paperclip layout; it has issues, activity_log, ",
    )


def test_a_table_that_cannot_be_pruned_can_be_kept_longer(released: Deployment) -> None:
    released.query("CREATE TABLE notes (log uuid REFERENCES activity_log ON DELETE CASCADE)")
    words = (*SET, "--keep", "3650d")
    refused(released, *words, says="rows of notes refer to activity_log.*--yes")
    assert "rows of notes refer to" in released.json(*words, "--yes")["refused"][0]["why"]


def test_a_hold_is_released_whatever_is_wrong_with_a_policy(released: Deployment) -> None:
    _set(released, _days(30))
    hold = released.cli("holds", "add", "--table", "heartbeat_run_events", "--reason", "x").stdout.strip()
    found = _json(released, "holds", "release", hold, "--reason", "over", "--yes")
    events = PruneLogs(table="heartbeat_run_events")
    assert _doomed(found) == _planned(released, events)
    assert sorted(one["job"] for one in found["refused"]) == ["archive-tasks", "prune-logs"]


def test_a_look_counts_no_row_that_merely_grew_old_meanwhile(released: Deployment) -> None:
    first, second, _ = _companies(released)
    released.query(
        "INSERT INTO activity_log (company_id, actor_id, action, entity_type, entity_id, created_at) "
        "SELECT %s, 'x', 'x', 'x', 'x', now() - interval '90 days' + n * interval '1 ms' "
        "FROM generate_series(0, 30000) n",
        first,
    )
    for company, days in ((second, 365), (None, 90)):
        _, look = rules.look_at_policy(released.operations, table="activity_log", company=company, keep=_days(days))
        assert (look.doomed, look.refused) == ([], [])


def test_an_age_under_the_floor_is_refused_whoever_asks(released: Deployment) -> None:
    env = {"PAPERCLIP_WORKER_RETENTION_FLOOR": "60d"}
    before = world(released)
    refused(
        released, "plan", "prune-logs", "--older-than", "30d", says="--older-than is under the floor of 60d", env=env
    )
    refused(released, "plan", "archive-tasks", says="30d.* is under the floor of 60d", env=env)
    assert world(released) == before


def test_bounds_that_contradict_each_other_are_a_fault_of_the_settings(released: Deployment) -> None:
    env = {"PAPERCLIP_WORKER_RETENTION_FLOOR": "90d", "PAPERCLIP_WORKER_RETENTION_CEILING": "30d"}
    refused(released, "plan", "prune-logs", says="FLOOR is over .*CEILING", env=env)
    refused(
        released,
        "plan",
        "prune-logs",
        says="FLOOR.* is not a duration",
        env={"PAPERCLIP_WORKER_RETENTION_FLOOR": "soon"},
    )
    refused(
        released,
        *SET,
        "--keep",
        "120000w",
        says="CEILING must not be longer than 100 years",
        env={"PAPERCLIP_WORKER_RETENTION_CEILING": "999999w"},
    )


def test_many_companies_cost_one_term_a_moment(released: Deployment) -> None:
    """The predicate grows with the distinct moments, not with the companies."""
    found = [
        retention.Policy(
            table="activity_log",
            company=UUID(int=number),
            version=1,
            keep=_days(30 + number % 3),
            reason="x",
            actor="x",
            created_at=released.operations.plan(PruneLogs()).now - _days(1),
        )
        for number in range(300)
    ]
    now = found[0].created_at + _days(1)
    cutoffs = retention.cutoffs(found, released.operations.settings, now=now, asked=None, default=_days(90))
    assert len(set(cutoffs.special.values())) == 3
    activity = LAYOUTS["paperclip"].logs["activity_log"]
    assert str(cutoffs.old(activity.age, activity.company)).count("created_at <") == 4
