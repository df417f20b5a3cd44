"""What README and docs say is so: commands run, settings and tables are all there, and archives can be queried."""

from __future__ import annotations

import json
import re
import shlex
import tomllib
from pathlib import Path
from typing import Any
from uuid import uuid4

import duckdb
import pytest
import yaml
from pydantic import AliasChoices

import schedules
from tests.cli.helpers import complete, find_command, keys
from tests.conftest import NOW, ROOT, Deployment
from tests.rotation.conftest import equipped
from worker import config, registry, timetable
from worker.config import FROM_FILE, Settings
from worker.holds import Hold, Holds
from worker.layouts import LAYOUTS, catalogue
from worker.layouts.catalogue import ColumnClass, Retention, Scope
from worker.metrics import LedgerCollector
from worker.states import State

PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]
_SERVICES = {"worker", "beat", "demo"}
_BLOCK = re.compile(r"^```console\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_VARIABLE = re.compile(r"^\| `([A-Z0-9_]+)` \| (.+?) \|", re.MULTILINE)


def _commands(page: Path) -> list[tuple[str, ...]]:
    """The worker's own commands in a page's console blocks, without the program's name."""
    lines = [line for block in _BLOCK.findall(page.read_text(encoding="utf-8")) for line in block.splitlines()]
    words = [tuple(shlex.split(line, comments=True)) for line in lines]
    return [one[1:] for one in words if one[:1] == ("paperclip-worker",)]


_EVERY = [(page, words) for page in PAGES for words in _commands(page)]


@pytest.mark.parametrize(
    ("page", "words"), _EVERY, ids=[f"{page.name}: {shlex.join(words)}" for page, words in _EVERY]
)
def test_a_command_that_is_shown_exists(page: Path, words: tuple[str, ...]) -> None:
    command, rest = find_command(words)
    command.make_context(command.name, rest)


@pytest.mark.parametrize("page", [page for page in PAGES if _commands(page)], ids=lambda page: page.name)
def test_the_commands_of_a_page_work_in_their_order(
    released: Deployment, page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each from nothing: a command that lives off the imports of another fails here."""
    monkeypatch.chdir(tmp_path)
    if page.name == "rotate-master-key.md":
        vault = equipped(released, tmp_path / "secrets")
        vault.plant()
        released = vault.deployment
    shown = _commands(page)
    acting = [words for words in shown if words[0] not in _SERVICES]
    if any(words[0] == "worker" for words in shown) and not any("--detach" in words for words in shown):
        with released.worker():
            for words in acting:
                released.cli(*words, alone=True)
    else:
        for words in acting:
            released.cli(*words, alone=True)


def test_the_first_screen_of_the_readme_has_the_two_commands() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    (first, *_) = _BLOCK.findall(text)
    assert first.splitlines() == ["python3 .ci/start.py demo", "python3 .ci/start.py test"]
    assert text.index(first) < len("\n".join(text.splitlines()[:12]))


def test_every_setting_is_explained_and_nothing_else_is() -> None:
    rows = dict(_VARIABLE.findall((ROOT / "docs" / "configuration.md").read_text(encoding="utf-8")))
    defaults = {
        str(name): field.default
        for field in Settings.model_fields.values()
        if isinstance(field.validation_alias, AliasChoices)
        for name in field.validation_alias.choices
    }
    assert set(rows) == set(defaults) | set(FROM_FILE)
    for name, default in defaults.items():
        if isinstance(default, int | float) and not isinstance(default, bool):
            assert rows[name] == f"`{default}`", name


def test_every_log_and_every_table_that_stays_is_on_the_page() -> None:
    text = (ROOT / "docs" / "prune-logs.md").read_text(encoding="utf-8")
    layout = LAYOUTS["paperclip"]
    rows = {line.split("`")[1]: line for line in text.splitlines() if line.startswith("| `")}
    for log in layout.logs.values():
        assert f"`{log.age.name}`" in rows[log.name]
        assert ("| yes |" in rows[log.name]) is log.record
        assert all(keep.reason in rows for keep in (*log.keeps, *log.security_keep()))
    refused = {name for line in text.splitlines() if line.startswith("| `") for name in re.findall(r"`(\w+)`", line)}
    known = catalogue.load("paperclip").tables.values()
    assert {one.name for one in known if one.retention is Retention.NEVER and one.reason != "not a log"} <= refused


def _hold_on(table: str) -> Hold:
    ends: dict[str, Any] = dict.fromkeys(("until", "released_at", "released_by", "release_reason"))
    return Hold(id=uuid4(), kind="table", target=table, reason="case", actor="me", created_at=NOW, **ends)


def test_every_guard_of_tasks_is_on_the_page() -> None:
    text = (ROOT / "docs" / "archive-tasks.md").read_text(encoding="utf-8")
    rows = {line.split("`")[1] for line in text.splitlines() if line.startswith("| `")}
    tasks = LAYOUTS["paperclip"].tasks
    (hold,) = Holds(found=(_hold_on(tasks.name),)).keep(tasks)
    assert rows == {hold.reason, *(keep.reason for keep in tasks.keeps)}


def test_every_metric_is_on_the_page(released: Deployment) -> None:
    complete(released)
    text = (ROOT / "docs" / "operations.md").read_text(encoding="utf-8")
    times = timetable.load(released.operations.settings)
    for family in LedgerCollector(released.operations, times).collect():
        name = family.name + ("_total" if family.type == "counter" else "")
        assert f"`{name}`" in text


def test_the_alerts_ask_for_metrics_there_are(released: Deployment) -> None:
    (rules,) = re.findall(r"^```yaml\n(.*?)^```$", (ROOT / "docs" / "operations.md").read_text(), re.M | re.S)
    collector = LedgerCollector(released.operations, timetable.load(released.operations.settings))
    known = {family.name for family in collector.collect()} | {"paperclip_worker_ledger_up"}
    named = set(re.findall(r"paperclip_worker_\w+", rules))
    assert named
    assert named <= known
    entries = set(re.findall(r'entry="([^"]+)"', rules))
    assert entries <= set(schedules.SCHEDULE)


def test_the_alerts_work_on_a_deployment_where_nothing_has_happened_yet(released: Deployment) -> None:
    """What an alert compares with is there before the first fault, or its lack is asked for."""
    (rules,) = re.findall(r"^```yaml\n(.*?)^```$", (ROOT / "docs" / "operations.md").read_text(), re.M | re.S)
    (group,) = yaml.safe_load(rules)["groups"]
    asked = {rule["alert"]: rule["expr"] for rule in group["rules"]}
    collector = LedgerCollector(released.operations, timetable.load(released.operations.settings))
    samples = [one for family in collector.collect() for one in family.samples]
    runs = {(one.labels["job"], one.labels["state"]): one.value for one in samples if one.name.endswith("_runs")}
    assert runs == {(job, state.value): 0 for job in registry.jobs() for state in State}
    # `delta` would take a failure and a resumed run for nothing.
    assert "min_over_time(paperclip_worker_runs" in asked["RunWentWrong"]
    assert "absent(paperclip_worker_ledger_up)" in asked["LedgerDown"]
    measured = "paperclip_worker_backlog_measured_timestamp_seconds"
    assert f"paperclip_worker_schedule_missed unless on (entry) {measured}" in asked["BacklogNotMeasured"]
    entries = {one.labels["entry"] for one in samples if one.name == "paperclip_worker_schedule_missed"}
    assert entries == set(schedules.SCHEDULE)


def test_the_example_of_a_schedule_file_is_one(released: Deployment, tmp_path: Path) -> None:
    (example,) = re.findall(r"^```toml\n(.*?)^```$", (ROOT / "docs" / "schedules.md").read_text(), re.M | re.S)
    file = tmp_path / "schedule.toml"
    file.write_text(example)
    times = timetable.load(config.load({"PAPERCLIP_WORKER_SCHEDULE_FILE": str(file)}))
    assert len(times.entries) == len(schedules.SCHEDULE) + 1
    for entry in times.entries.values():
        released.operations.plan(entry.job)


def test_the_example_of_a_catalogue_file_is_one(released: Deployment, tmp_path: Path) -> None:
    """A database with just what the page describes is one that `db check` has nothing to say of."""
    text = (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8")
    (example,) = re.findall(r"^```toml\n(.*?)^```$", text, re.M | re.S)
    released.query("ALTER TABLE agents ADD nickname text")
    released.query(
        "CREATE TABLE crm_contacts (id uuid PRIMARY KEY, company_id uuid NOT NULL, email varchar(128) NOT NULL)"
    )
    released.query("CREATE SCHEMA plug")
    released.query(
        "CREATE TABLE plug.notes (id bigint PRIMARY KEY, contact_id uuid NOT NULL REFERENCES crm_contacts, "
        "body text, written_at timestamptz NOT NULL)"
    )
    assert released.json("db", "check")["unknown"] == ["agents.nickname", "crm_contacts", "plug.notes"]
    (tmp_path / "own.toml").write_text(example)
    done = released.cli("db", "check", "--json", env={"PAPERCLIP_WORKER_CATALOGUE_FILE": str(tmp_path / "own.toml")})
    assert {name: json.loads(done.stdout)[name] for name in ("missing", "unknown", "changed")} == {
        "missing": [],
        "unknown": [],
        "changed": [],
    }
    named = set(re.findall(r"^\| `(\w+)` \|", text, re.M))
    assert {*ColumnClass, *Scope} <= named


def test_the_changelog_is_of_this_version() -> None:
    version = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"]
    assert f"\n## {version}\n" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def test_links_between_pages_lead_somewhere() -> None:
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).is_file(), (page.name, target)


def test_no_page_names_a_path_of_some_machine() -> None:
    for page in PAGES:
        assert not re.search(r"(?<![\w.`/])/(work|tmp|home|root|Users)/", page.read_text(encoding="utf-8")), page.name


def test_the_archive_can_be_queried_in_place(
    released: Deployment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The SQL of the page, on copies of the objects: DuckDB finds the very rows that are gone."""
    released.query("UPDATE activity_log SET details = 'null' WHERE action = 'issue.created'")
    query = "SELECT id::text, company_id::text, action, created_at, details->>'note' FROM activity_log"
    before = set(released.query(query))
    complete(released)
    gone = before - set(released.query(query))
    store = released.operations.store
    assert store is not None
    for key in keys(released):
        (tmp_path / key).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / key).write_bytes(b"".join(store.read(key)))
    monkeypatch.chdir(tmp_path)
    text = (ROOT / "docs" / "restore-logs.md").read_text(encoding="utf-8")
    view, sums, some = re.findall(r"^```sql\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    with duckdb.connect() as connection:
        connection.execute(view)
        found = connection.sql(
            "SELECT id::text, company::text, action, epoch_us(created_at), details->>'note' FROM archived"
        ).fetchall()
        assert len(found) == len(gone) > 0
        assert set(found) == {(*one[:3], round(one[3].timestamp() * 1_000_000), one[4]) for one in gone}
        assert sum(row[2] for row in connection.sql(sums).fetchall()) == len(gone)
        assert 0 < len(connection.sql(some).fetchall()) <= 20
