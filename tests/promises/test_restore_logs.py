"""restore-logs puts archived rows back byte-equal: every column, on both layouts, whatever is in them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from uuid import UUID

import psycopg
import pytest

from tasks.prune_logs import PruneLogs
from tasks.restore_logs import RestoreLogs
from tests.cli.helpers import begin, least
from tests.conftest import ROOT, Deployment
from tests.faults import doomed
from tests.faults.evidence import check_manifests
from tests.faults.evidence import complete as take_up
from tests.promises.archived import LOGS, complete, content, objects_of, prune, restore, spoil
from worker import archive
from worker.params import RunId

_MEGABYTES = "(SELECT string_agg(md5(g::text), E'\\n\"') FROM generate_series(1, 90000) g)"
_FORKS = """
ALTER TABLE plugin_logs
  ADD "Seen at" timestamptz DEFAULT 'infinity', ADD since timestamptz DEFAULT '-infinity', ADD share numeric,
  ADD "raw""s" bytea, ADD tags text[], ADD line json, ADD took interval, ADD during tstzrange, ADD ratio float8,
  ADD "tw%in" jsonb DEFAULT 'null', ADD name char(9) DEFAULT 'x', ADD "%s" int DEFAULT 7;
UPDATE plugin_logs SET share = 'NaN', "raw""s" = '\\x00ff0a', tags = '{}', took = '1 mon -2 days 00:00:00.000001',
  line = '{"b" :  1, "a":"\\u0001", "b": 2.50}', during = '[-infinity,)', ratio = 0.1::float8 + 0.2::float8
WHERE id::text < '8';
UPDATE plugin_logs SET share = 12345678901234567890.123400, tags = ARRAY['a,"b', NULL, ''], line = 'null',
  ratio = 'NaN' WHERE id::text >= '8';
"""


@pytest.mark.parametrize("table", LOGS)
def test_every_column_of_every_row_comes_back(released: Deployment, table: str) -> None:
    """By digest of the whole table; a second run has nothing to do."""
    spoil(released, table)
    before = content(released, table)
    run = prune(released, table)
    gone = len(before) - len(content(released, table))
    others = released.digest(without=(table, "activity_log"))
    result = restore(released, run, settings={"bite_rows": "70"})
    assert content(released, table) == before
    assert result["rows"] == result["planned"] == gone
    assert result["receipt"]["evidence"] == {"restores": str(run), "table": table}
    assert restore(released, run)["rows"] == 0
    assert content(released, table) == before
    assert released.digest(without=(table, "activity_log")) == others


def test_on_each_layout_by_the_command(deployment: Deployment) -> None:
    spoil(deployment, "activity_log")
    before = content(deployment, "activity_log")
    run = prune(deployment)
    done = deployment.json("run", "restore-logs", "--run", str(run)[:8], "--inline")
    assert done["kept"]
    assert done["rows"] > 0
    assert content(deployment, "activity_log") == before


@pytest.mark.parametrize("resumed", [False, True])
def test_an_archive_of_an_earlier_release_comes_back(
    released: Deployment, monkeypatch: pytest.MonkeyPatch, *, resumed: bool
) -> None:
    """Whose manifest has the one name that they all had; also one that was begun then, and completed now."""
    before = content(released, "activity_log")
    with monkeypatch.context() as earlier:
        earlier.setattr(archive, "manifest_key", lambda root, _: root + "manifest.json")
        if resumed:
            run = RunId(str(begin(released)))
            released.operations.stop(str(run))
        else:
            run = prune(released)
    if resumed:
        released.operations.resume(str(run))
        take_up(released.operations, run)
    manifests = check_manifests(released, run)
    assert manifests[0].endswith("/manifest.json")
    assert len(set(manifests)) == 1 + resumed
    restore(released, run)
    assert content(released, "activity_log") == before


def test_columns_of_forks_come_back_whatever_their_type(released: Deployment) -> None:
    released.query(_FORKS)
    before = content(released, "plugin_logs")
    run = prune(released, "plugin_logs")
    restore(released, run)
    assert content(released, "plugin_logs") == before


def test_line_breaks_between_tokens_of_plain_json_become_spaces(released: Deployment) -> None:
    """The one thing that is not the same afterwards, because a line must be one line; nothing inside a string is."""
    released.query("ALTER TABLE plugin_logs ADD plain json")
    released.query(
        "UPDATE plugin_logs SET plain = (CASE "
        "WHEN id::text < '8' THEN E'{\\r\"a\":1}' ELSE E'{\\n\"a\\\\n\":\\r\\n1}' END)::json"
    )
    run = prune(released, "plugin_logs")
    restore(released, run)
    found = dict(
        released.query(
            "SELECT plain::text, count(*) FROM plugin_logs WHERE created_at < now() - '20d'::interval GROUP BY 1"
        )
    )
    assert found.keys() == {'{ "a":1}', '{ "a\\n":  1}'}


def test_old_times_and_microseconds_come_back(released: Deployment) -> None:
    released.query(
        "UPDATE activity_log SET created_at = '0001-01-01 00:00:00.000001+00'::timestamptz "
        "+ abs(hashtext(id::text)) * interval '1.000001 s' WHERE created_at < now() - interval '95 days'"
    )
    before = content(released, "activity_log")
    restore(released, prune(released))
    assert content(released, "activity_log") == before


def test_a_row_of_some_megabytes_comes_back(released: Deployment) -> None:
    oldest = "(SELECT id FROM plugin_logs ORDER BY created_at LIMIT 3)"
    released.query(
        f"UPDATE plugin_logs SET message = {_MEGABYTES}, meta = to_jsonb({_MEGABYTES}) WHERE id IN {oldest}"
    )
    before = content(released, "plugin_logs")
    run = prune(released, "plugin_logs")
    result = restore(released, run)
    assert result["bytes"] > 15_000_000
    assert content(released, "plugin_logs") == before


def test_only_the_rows_of_the_companies_asked_for(deployment: Deployment) -> None:
    before = content(deployment, "activity_log")
    run = prune(deployment)
    ((company,), *_) = deployment.query("SELECT DISTINCT company FROM paperclip_worker.objects ORDER BY 1")
    result = restore(deployment, run, company=(UUID(company),))
    assert {one["company"] for one in result["tally"]} == {company}
    now = content(deployment, "activity_log")
    back = {
        row[0] for row in deployment.query("SELECT id::text FROM activity_log WHERE company_id::text = %s", company)
    }
    assert {one: text for one, text in before.items() if one in back} == {
        one: now[one] for one in back & before.keys()
    }
    lacking = before.keys() - now.keys()
    assert lacking
    assert restore(deployment, run)["rows"] == len(lacking)
    assert content(deployment, "activity_log") == before


def test_rows_of_no_company_come_back_too(released: Deployment) -> None:
    run = prune(released, "plugin_logs")
    result = restore(released, run)
    assert None in {one["company"] for one in result["tally"]}


def test_a_partly_restored_table_is_completed(deployment: Deployment) -> None:
    before = content(deployment, "activity_log")
    run = prune(deployment)
    lost = sorted(before.keys() - content(deployment, "activity_log").keys())[::7]
    restore(deployment, run)
    deployment.query("DELETE FROM activity_log WHERE id::text = ANY(%s)", lost)
    planned = deployment.operations.plan(RestoreLogs(run=run))
    assert planned.tally.total.rows == len(lost)
    assert restore(deployment, run)["rows"] == len(lost)
    assert content(deployment, "activity_log") == before


def test_rows_whose_parent_the_app_holds_wait_and_the_others_do_not(released: Deployment) -> None:
    """However long it is held: what is not back then is said, and comes back by another run."""
    before = content(released, "activity_log")
    run = prune(released)
    lacking = len(before) - len(content(released, "activity_log"))
    ((company, rows), *_) = released.query(
        "SELECT company, sum(rows)::bigint FROM paperclip_worker.objects GROUP BY 1 ORDER BY 1"
    )
    with psycopg.connect(released.environment["DATABASE_URL"]) as app:
        app.execute("SELECT FROM companies WHERE id = %s FOR UPDATE", (company,))
        result = complete(released, RestoreLogs(run=run), lock_timeout="0.05")
    assert result["state"] == "unkept"
    assert [(one["company"], one["rows"]) for one in result["findings"]] == [(company, rows)]
    assert result["rows"] == lacking - rows > 0
    assert restore(released, run)["rows"] == rows
    assert content(released, "activity_log") == before


def test_a_column_the_table_has_got_since_takes_its_default(released: Deployment) -> None:
    before = content(released, "activity_log")
    run = prune(released)
    released.query(
        "ALTER TABLE activity_log ADD COLUMN mood text NOT NULL DEFAULT 'calm', "
        "ADD COLUMN n bigint GENERATED ALWAYS AS IDENTITY"
    )
    assert restore(released, run)["rows"] > 0
    assert restore(released, run)["rows"] == 0
    assert released.query("SELECT DISTINCT mood FROM activity_log") == [("calm",)]
    released.query("ALTER TABLE activity_log DROP COLUMN mood, DROP COLUMN n")
    assert content(released, "activity_log") == before


@pytest.mark.parametrize("rule", ["hold", "policy"])
def test_restored_rows_stay_when_a_hold_or_policy_says_so(released: Deployment, rule: str) -> None:
    before = content(released, "activity_log")
    run = prune(released)
    if rule == "hold":
        for (company,) in released.query("SELECT id::text FROM companies"):
            released.cli("holds", "add", "--company", company, "--reason", "case 12")
    else:
        released.cli("policy", "set", "--table", "activity_log", "--keep", "3650d", "--reason", "case 12")
    restored = restore(released, run)["rows"]
    assert restored > 0
    again = complete(released, PruneLogs())
    assert again["kept"]
    assert again["rows"] == 0
    assert content(released, "activity_log") == before


def test_without_either_the_next_prune_takes_them_again(released: Deployment) -> None:
    run = prune(released)
    rows = restore(released, run)["rows"]
    assert complete(released, PruneLogs())["rows"] == rows


def test_the_printed_grants_are_enough(deployment: Deployment) -> None:
    before = content(deployment, "activity_log")
    run = prune(deployment)
    with least(deployment) as login:
        deployment.cli("run", "restore-logs", "--run", str(run), "--inline", env=login)
    assert content(deployment, "activity_log") == before


@pytest.mark.faults
@pytest.mark.parametrize("step", doomed.RESTORE)
def test_killed_at_any_step_a_run_goes_on_as_if_it_had_not_been(released: Deployment, step: str) -> None:
    """At the kill the tally is what is back; once resumed the table is what it was."""
    spoil(released, "activity_log")
    before = content(released, "activity_log")
    pruned = prune(released)
    after = content(released, "activity_log")
    run = released.operations.start(RestoreLogs(run=pruned), actor="tester", via="test")
    doomed.work_and_die(released.environment, step, run, bite_rows=40)
    back = content(released, "activity_log").keys() - after.keys()
    assert released.operations.result(run)["rows"] == len(back)
    take_up(released.with_settings(bite_rows="33"), run)
    result = released.operations.result(run)
    assert result["kept"]
    assert result["rows"] == result["planned"] == len(before) - len(after)
    assert content(released, "activity_log") == before


_PEAK = """
import sys
from pathlib import Path
from cli import main
try:
    main()
finally:
    # Not ru_maxrss, which a child has from its parent.
    (peak,) = [line.split()[1] for line in Path("/proc/self/status").read_text().splitlines() if "VmHWM" in line]
    print(peak)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from /proc")
def test_memory_stays_bounded_for_a_large_object(released: Deployment) -> None:
    """One object of 100 MB whose large rows stand together, among many small ones."""
    released.query(
        f"WITH big AS MATERIALIZED (SELECT {_MEGABYTES} AS text) UPDATE plugin_logs "
        "SET company_id = NULL, message = big.text FROM big "
        "WHERE id IN (SELECT id FROM plugin_logs ORDER BY created_at LIMIT 30)"
    )
    count = "SELECT count(*), sum(length(message))::bigint FROM plugin_logs"
    before = released.query(count)
    run = prune(released, "plugin_logs", bite_rows="100000")
    assert len(objects_of(released, run)) <= 3
    words = [sys.executable, "-c", _PEAK, "run", "restore-logs", "--run", str(run), "--inline", "--json"]
    environment = {**released.process_environment(), "PYTHONPATH": str(ROOT)}
    done = subprocess.run(words, env=environment, capture_output=True, text=True, check=True)
    assert int(done.stdout.splitlines()[-1]) < 220 * 1024
    assert released.query(count) == before


@pytest.mark.parametrize("value", ["[" * 3000 + "]" * 3000, f'{{"n": 1{"0" * 5000}}}'], ids=["deep", "long"])
def test_json_that_python_cannot_read_comes_back(released: Deployment, value: str) -> None:
    """PostgreSQL takes numbers of any length, and lists within lists within lists."""
    old = "created_at < now() - interval '89 days'"
    few = f"SELECT id FROM activity_log WHERE {old} ORDER BY created_at LIMIT 40"
    released.query(f"DELETE FROM activity_log WHERE {old} AND id NOT IN ({few})")
    released.query(f"UPDATE activity_log SET details = %s::jsonb WHERE {old}", value)
    before = content(released, "activity_log")
    restore(released, prune(released))
    assert content(released, "activity_log") == before
