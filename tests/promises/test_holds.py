"""Legal holds: what is held stays, whatever a run was told, and a hold binds from the moment it was entered."""

from __future__ import annotations

import json
import math
import threading
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID, uuid4

import psycopg
import pytest
from click.testing import CliRunner

from cli import cli
from tasks.archive_tasks import ArchiveTasks
from tasks.prune_logs import PruneLogs
from tests.cli.helpers import check_refusal, complete, keys, refused, world
from tests.conftest import NOW, Deployment
from tests.promises.board import Board
from worker import db, holds, rules
from worker.errors import Refused
from worker.job import Job
from worker.operations import Operations
from worker.params import RunId
from worker.runner import Outcome
from worker.states import State


def _hold(deployment: Deployment, kind: str, name: str, *, until: datetime | None = None) -> holds.Hold:
    return rules.add_hold(deployment.operations, kind=kind, name=name, reason="case 7", actor="counsel", until=until)


def _release(deployment: Deployment, hold: holds.Hold) -> None:
    rules.release_hold(deployment.operations, hold, reason="over", actor="counsel")


def _held(deployment: Deployment, job: Job) -> int:
    return sum(one.rows for one in deployment.operations.plan(job).left if one.reason == "legal_hold")


def _run(deployment: Deployment, job: Job) -> dict[str, Any]:
    run = deployment.operations.start(job, actor="tester", via="test")
    assert deployment.operations.runner().work(run, seconds=math.inf) is Outcome.SETTLED
    return deployment.operations.result(run)


def _one(deployment: Deployment, query: str, *values: Any) -> Any:
    ((found,),) = deployment.query(query, *values)
    return found


def _target(deployment: Deployment, kind: str) -> tuple[str, str]:
    """What to hold, and a predicate of the old rows of the log that the hold must keep."""
    guide = deployment.layout == "guide"
    details = "metadata" if guide else "details"
    if kind == "table":
        return "activity_log", "true"
    if kind == "company":
        company = _one(deployment, "SELECT company_id::text FROM activity_log GROUP BY 1 ORDER BY count(*) LIMIT 1")
        return company, f"company_id = '{company}'"
    if kind == "user":
        user = _one(deployment, "SELECT actor_id FROM activity_log WHERE actor_type = 'user' ORDER BY 1 LIMIT 1")
        own = "" if guide else f" OR responsible_user_id = '{user}' OR entity_id = '{user}'"
        return user, f"(actor_id = '{user}' OR {details}::text LIKE '%{user}%'{own})"
    if guide:
        task = _one(deployment, "SELECT metadata->>'taskId' FROM activity_log ORDER BY timestamp LIMIT 1")
        return task, f"metadata::text LIKE '%{task}%'"
    task = _one(
        deployment,
        "SELECT a.entity_id FROM activity_log a JOIN issues i ON i.id::text = a.entity_id AND i.status = 'done' "
        "JOIN heartbeat_runs r ON r.context_snapshot->>'issueId' = a.entity_id "
        "WHERE a.created_at < now() - interval '91 days' GROUP BY 1 ORDER BY count(*) DESC, 1 LIMIT 1",
    )
    of_runs = f"run_id IN (SELECT id FROM heartbeat_runs WHERE context_snapshot->>'issueId' = '{task}')"
    return task, f"(entity_id = '{task}' OR {details}::text LIKE '%{task}%' OR {of_runs})"


def test_a_column_that_nobody_has_classed_is_looked_into(released: Deployment) -> None:
    user = _one(released, 'SELECT id FROM "user" LIMIT 1')
    for column in ("text", "uuid", "text[]"):
        released.query(f'ALTER TABLE activity_log ADD "of {column}" {column}')
    task = _one(released, "SELECT id::text FROM issues LIMIT 1")
    old = "created_at < now() - interval '91 days'"
    released.query(
        "UPDATE activity_log SET run_id = NULL, entity_type = 'x', details = NULL, "
        '"of text" = CASE abs(hashtext(id::text)) %% 3 WHEN 0 THEN %s END, '
        '"of uuid" = CASE abs(hashtext(id::text)) %% 3 WHEN 1 THEN %s::uuid END, '
        '"of text[]" = CASE abs(hashtext(id::text)) %% 3 WHEN 2 THEN ARRAY[%s] END',
        user,
        task,
        user,
    )
    before = _one(released, f"SELECT count(*) FROM activity_log WHERE {old}")
    _hold(released, "user", user)
    _hold(released, "task", task)
    result = _run(released, PruneLogs())
    assert (result["kept"], result["rows"]) == (True, 0)
    assert _one(released, f"SELECT count(*) FROM activity_log WHERE {old}") == before


def test_a_secret_may_be_what_names_a_user(released: Deployment) -> None:
    user = _one(released, 'SELECT id FROM "user" LIMIT 1')
    released.query(
        "INSERT INTO verification (id, identifier, value, expires_at, created_at, updated_at) VALUES "
        "('mine', 'reset-password:x', %s, now() - interval '200 days', now() - interval '200 days', now())",
        user,
    )
    _hold(released, "user", user)
    assert _run(released, PruneLogs(table="verification"))["kept"]
    assert _one(released, "SELECT count(*) FROM verification WHERE id = 'mine'") == 1


@pytest.mark.parametrize("name", ["issueId", "taskId"])
def test_rows_of_a_held_tasks_runs_stay_by_whichever_name_a_run_has_it(released: Deployment, name: str) -> None:
    task = _one(released, "SELECT id::text FROM issues LIMIT 1")
    released.query("UPDATE heartbeat_run_events SET message = 'x', payload = NULL")
    released.query(
        "UPDATE heartbeat_runs SET status = 'succeeded', native_issue_id = NULL, "
        "context_snapshot = jsonb_build_object(%s::text, %s::text)",
        name,
        task,
    )
    _hold(released, "task", task)
    result = _run(released, PruneLogs(table="heartbeat_run_events", older_than=timedelta(days=20)))
    assert (result["kept"], result["rows"]) == (True, 0)
    assert sum(one["rows"] for one in result["left"] if one["reason"] == "legal_hold") > 0


def _ended_task(board: Board, **columns: Any) -> UUID:
    task = board.task()
    for name, value in columns.items():
        board.sql(f"UPDATE issues SET {name} = %(value)s WHERE id = %(task)s", task=task, value=value)
    return task


@pytest.mark.parametrize("column", ["parent_id", "origin_id"])
def test_a_task_that_names_a_held_one_stays(released: Deployment, column: str) -> None:
    board = Board(deployment=released)
    held = board.task()
    of_it, other = _ended_task(board, **{column: held}), board.task()
    _hold(released, "task", str(held))
    result = board.archive()
    assert [board.hidden(one) for one in (held, of_it, other)] == [False, False, True]
    assert [one["rows"] for one in result["left"] if one["reason"] == "legal_hold"] == [2]


@pytest.mark.parametrize(
    ("column", "made"),
    [
        ("origin_id", "harness_liveness:{company}:{held}:blocked_by_cancelled_issue:{leaf}"),
        ("origin_fingerprint", "task_watchdog_product_bug:{held}:{leaf}"),
    ],
)
def test_a_task_that_the_app_made_for_a_held_one_stays(released: Deployment, column: str, made: str) -> None:
    """The app names what a task was made for in an id that it puts together of several."""
    board = Board(deployment=released)
    held, leaf = board.task(), uuid4()
    of_it, of_another = (
        _ended_task(board, **{column: made.format(company=board.company, held=task, leaf=leaf)})
        for task in (held, uuid4())
    )
    _hold(released, "task", str(held))
    board.archive()
    assert [board.hidden(one) for one in (held, of_it, of_another)] == [False, False, True]


def test_every_task_below_a_held_one_stays(released: Deployment) -> None:
    board = Board(deployment=released)
    held, above, other = board.tasks(3)
    child = _ended_task(board, parent_id=held)
    grandchild = _ended_task(board, parent_id=child)
    board.sql("UPDATE issues SET parent_id = %(above)s WHERE id = %(held)s", above=above, held=held)
    _hold(released, "task", str(held))
    board.archive()
    tasks = (held, child, grandchild, above, other)
    assert [board.hidden(one) for one in tasks] == [False, False, False, True, True]


@pytest.mark.parametrize("archive", [True, False])
@pytest.mark.parametrize("kind", ["task", "user"])
def test_a_uuid_is_the_same_in_capitals(released: Deployment, kind: str, archive: bool) -> None:
    board = Board(deployment=released)
    held = board.task() if kind == "task" else uuid4()
    if kind == "user":
        _user(released, str(held))
    written = (str(held).upper(), str(held).title(), held.urn.upper())
    rows = [_old_row(board, "activity_log", {"details": json.dumps({"of": one})}) for one in written]
    rows += [_old_row(board, "activity_log", {"entity_id": one}) for one in written]
    free = _old_row(board, "activity_log", {"details": json.dumps({"of": str(uuid4()).upper()})})
    _hold(released, kind, str(held))
    result = _run(released, PruneLogs(company=(board.company,), archive=archive))
    assert (result["kept"], result["rows"]) == (True, 1)
    left = board.sql("SELECT id::text FROM activity_log WHERE id::text = ANY(%(ids)s)", ids=[*rows, free])
    assert sorted(left) == sorted((one,) for one in rows)


@pytest.mark.parametrize("archive", [True, False])
@pytest.mark.parametrize(
    ("table", "column", "form"),
    [
        ("activity_log", "entity_id", "user:{}"),
        ("tool_access_audit_events", "correlation_id", "{}"),
        ("tool_access_audit_events", "client_name", "of {}"),
    ],
)
def test_a_user_is_found_in_whatever_id_has_the_user_s(
    released: Deployment, table: str, column: str, form: str, archive: bool
) -> None:
    """The first is what the app writes when a plugin changes somebody's rights."""
    board, user = Board(deployment=released), "Kq3xW9"
    _user(released, user)
    held = _old_row(board, table, {column: form.format(user)})
    free = _old_row(board, table, {column: form.format(user[:-1])})
    _hold(released, "user", user)
    assert _run(released, PruneLogs(table=table, company=(board.company,), archive=archive))["kept"]
    assert board.sql(f"SELECT id::text FROM {table} WHERE id::text = ANY(%(ids)s)", ids=[held, free]) == [(held,)]


@pytest.mark.parametrize("archive", [True, False])
@pytest.mark.parametrize(
    ("table", "columns"),
    [
        ("secret_access_events", {"consumer_type": "issue", "consumer_id": "held"}),
        ("tool_access_audit_events", {"correlation_id": "held"}),
        ("activity_log", {"entity_type": "heartbeat_run", "entity_id": "run", "run_id": None}),
        ("heartbeat_run_events", {"run_id": "run"}),
    ],
)
def test_rows_that_name_a_held_task_or_its_run_stay(
    released: Deployment, table: str, columns: dict[str, str | None], archive: bool
) -> None:
    """By whatever column; `run` is the one that the task itself names, and that says nothing of the task."""
    board = Board(deployment=released)
    held = _ended_task(board, execution_run_id=board.run)
    names = {"held": held, "run": board.run}
    made = _old_row(board, table, {column: names.get(value or "", value) for column, value in columns.items()})
    other = _old_row(board, table, {"run_id": _another_run(board)} if "run_id" in columns else {})
    _hold(released, "task", str(held))
    result = _run(released, PruneLogs(table=table, company=(board.company,), archive=archive))
    assert result["kept"]
    left = board.sql(
        f"SELECT id::text FROM {table} WHERE company_id = %(company)s AND id::text = ANY(%(ids)s)", ids=[made, other]
    )
    assert left == [(made,)]


@pytest.mark.parametrize("archive", [True, False])
def test_a_record_that_names_a_held_tasks_run_in_its_details_stays(released: Deployment, archive: bool) -> None:
    """So the app writes down that a token was given to a run: without its task, and in no column of its own."""
    board = Board(deployment=released)
    held = _ended_task(board, execution_run_id=board.run)
    rows = [
        _old_row(board, "tool_access_audit_events", {"details": json.dumps({"path": "exchange", "runId": str(run)})})
        for run in (board.run, _another_run(board))
    ]
    _hold(released, "task", str(held))
    job = PruneLogs(table="tool_access_audit_events", company=(board.company,), archive=archive)
    assert _run(released, job)["kept"]
    left = board.sql("SELECT id::text FROM tool_access_audit_events WHERE id::text = ANY(%(ids)s)", ids=rows)
    assert left == [(rows[0],)]


def _another_run(board: Board) -> UUID:
    ((found,),) = board.sql(
        "INSERT INTO heartbeat_runs (company_id, agent_id, status) VALUES (%(company)s, %(agent)s, 'succeeded') "
        "RETURNING id"
    )
    return UUID(str(found))


def _old_row(board: Board, table: str, columns: dict[str, Any]) -> str:
    """A row of a log of half a year ago with these columns; its id."""
    given = dict.fromkeys(columns)
    needed = board.sql(
        "SELECT a.attname::text, a.atttypid::regtype::text FROM pg_attribute a "
        "WHERE a.attrelid = %(table)s::regclass AND a.attnum > 0 AND NOT a.attisdropped AND a.attnotnull "
        "AND NOT a.atthasdef AND a.attidentity = ''",
        table=table,
    )
    fill = {"text": "x", "integer": 1, "bigint": 1, "uuid": None, "jsonb": "{}", "boolean": False}
    values = {name: fill.get(kind) for name, kind in needed if name not in given} | columns
    values |= {"company_id": board.company, "created_at": NOW - timedelta(days=180)}
    if "agent_id" in values:
        values["agent_id"] = board.agent
    names = ", ".join(values)
    ((found,),) = board.sql(
        f"INSERT INTO {table} ({names}) VALUES ({', '.join(f'%({name})s' for name in values)}) RETURNING id::text",
        **values,
    )
    return str(found)


@pytest.mark.parametrize("archive", [True, False])
@pytest.mark.parametrize("user", ["CORP\\alice", 'a"b'])
def test_a_user_whose_id_json_writes_otherwise_is_found_in_it(released: Deployment, user: str, archive: bool) -> None:
    """In JSON, and in the text of a column that is JSON again."""
    board = Board(deployment=released)
    _user(released, user)
    details = json.dumps({"by": user})
    rows = [
        _old_row(board, "activity_log", {"details": details}),
        _old_row(board, "activity_log", {"details": json.dumps({"was": details})}),
        _old_row(board, "activity_log", {"actor_id": user}),
    ]
    free = _old_row(board, "activity_log", {"details": json.dumps({"by": user[:-1]})})
    _hold(released, "user", user)
    assert _run(released, PruneLogs(company=(board.company,), archive=archive))["kept"]
    left = board.sql("SELECT id::text FROM activity_log WHERE id::text = ANY(%(ids)s)", ids=[*rows, free])
    assert sorted(left) == sorted((one,) for one in rows)


@pytest.mark.parametrize("kind", holds.KINDS)
def test_held_rows_stay_are_counted_and_go_once_released(deployment: Deployment, kind: str) -> None:
    target, rows = _target(deployment, kind)
    age = '"timestamp"' if deployment.layout == "guide" else "created_at"
    ids = f"SELECT id::text FROM activity_log WHERE {age} < now() - interval '90 days 1 hour' AND {rows} ORDER BY 1"
    before = deployment.query(ids)
    assert before
    free = deployment.operations.plan(PruneLogs())
    hold = _hold(deployment, kind, target)
    held = _held(deployment, PruneLogs())
    assert held > 0
    result = _run(deployment, PruneLogs())
    assert result["kept"]
    assert deployment.query(ids) == before
    # Rows that the app needs count under that: the hold's are those that would have gone without it.
    assert result["rows"] == free.tally.total.rows - held
    assert sum(one["rows"] for one in result["left"] if one["reason"] == "legal_hold") == held
    assert result["receipt"]["holds"] == [str(hold.id)]
    assert result["receipt"]["left"] == result["left"]
    _release(deployment, hold)
    again = _run(deployment, PruneLogs())
    assert again["rows"] > 0
    assert again["receipt"]["holds"] == []
    assert result["rows"] + again["rows"] == free.tally.total.rows


def test_holds_may_be_thousands(released: Deployment) -> None:
    """Each on a task of a project that is in dispute; a statement has at most 65535 parameters."""
    board = Board(deployment=released)
    tasks = board.tasks(2)
    board.sql("UPDATE issues SET execution_run_id = %(run)s WHERE id = %(task)s", task=tasks[0])
    held, mentions, _ = (
        _old_row(board, "heartbeat_run_events", columns)
        for columns in (
            {"run_id": board.run},
            {"run_id": _another_run(board), "message": f"see {tasks[0]}"},
            {"run_id": _another_run(board)},
        )
    )
    released.query(
        "INSERT INTO paperclip_worker.holds (id, kind, target, reason, actor) SELECT gen_random_uuid(), 'task', "
        "CASE n WHEN 1 THEN %s ELSE gen_random_uuid()::text END, 'x', 'x' FROM generate_series(1, 9000) n",
        str(tasks[0]),
    )
    board.archive()
    assert [board.hidden(one) for one in tasks] == [False, True]
    job = PruneLogs(table="heartbeat_run_events", company=(board.company,), archive=False)
    assert _run(released, job)["rows"] == 1
    left = board.sql("SELECT id::text FROM heartbeat_run_events WHERE company_id = %(company)s ORDER BY id")
    assert left == [(held,), (mentions,)]


@pytest.mark.parametrize("archive", [True, False])
def test_a_user_is_found_in_json_whoever_wrote_it(released: Deployment, archive: bool) -> None:
    """Within a text of JSON's: what a tool answered, in letters of ASCII alone or with slashes escaped."""
    board, user = Board(deployment=released), "corp/jürgen"
    _user(released, user)
    written = (json.dumps({"by": user}), '{"by":"corp\\/jürgen"}', '{"by":"corp\\/j\\u00FCrgen"}')
    rows = [_old_row(board, "activity_log", {"details": json.dumps({"answer": one})}) for one in written]
    _hold(released, "user", user)
    assert _run(released, PruneLogs(company=(board.company,), archive=archive))["rows"] == 0
    assert board.sql("SELECT count(*) FROM activity_log WHERE id::text = ANY(%(ids)s)", ids=rows) == [(3,)]


def _user(released: Deployment, user: str) -> None:
    released.query(
        'INSERT INTO "user" (id, name, email, email_verified, created_at, updated_at) VALUES '
        "(%s, 'x', 'x@x.example', true, now(), now())",
        user,
    )


def test_a_mention_anywhere_in_the_details_is_enough(released: Deployment) -> None:
    user = "Wq3_x%9"
    _user(released, user)
    row = _one(
        released,
        "UPDATE activity_log SET details = jsonb_build_object('deep', jsonb_build_array(jsonb_build_object('u', "
        "%s::text))) WHERE id = (SELECT id FROM activity_log a WHERE created_at < now() - interval '100 days' "
        "AND run_id IS NULL AND entity_type <> 'issue' AND NOT EXISTS (SELECT FROM decision_effect_executions "
        "WHERE activity_log_id = a.id) LIMIT 1) RETURNING id",
        user,
    )
    # One that a pattern with wildcards would take for it.
    released.query(
        'UPDATE activity_log SET details = \'{"u": "WqZ-xx-9"}\' WHERE id = (SELECT id FROM activity_log a '
        "WHERE created_at < now() - interval '100 days' AND id <> %s AND run_id IS NULL AND entity_type <> 'issue' "
        "AND NOT EXISTS (SELECT FROM decision_effect_executions WHERE activity_log_id = a.id) LIMIT 1)",
        row,
    )
    _hold(released, "user", user)
    assert _held(released, PruneLogs()) == 1
    _run(released, PruneLogs())
    assert _one(released, "SELECT count(*) FROM activity_log WHERE id = %s", row) == 1


def test_a_mention_is_found_in_text_that_json_writes_otherwise(released: Deployment) -> None:
    """Rows are first looked into as lines of JSON, many at once."""
    user = 'q"uo\\te'
    _user(released, user)
    row = _one(
        released,
        "UPDATE plugin_logs SET message = 'for ' || %s || ', again' WHERE id = (SELECT id FROM plugin_logs "
        "WHERE created_at < now() - interval '100 days' LIMIT 1) RETURNING id",
        user,
    )
    _hold(released, "user", user)
    assert _held(released, PruneLogs(table="plugin_logs")) == 1
    _run(released, PruneLogs(table="plugin_logs"))
    assert _one(released, "SELECT count(*) FROM plugin_logs WHERE id = %s", row) == 1


def test_where_a_line_says_otherwise_than_its_row_each_row_is_looked_into(released: Deployment) -> None:
    """A column that a fork made an array: `{x7,y9}` as text, `["x7","y9"]` in a line."""
    user = "x7,y9"
    _user(released, user)
    released.query("ALTER TABLE plugin_logs ALTER message TYPE text[] USING ARRAY['other']")
    row = _one(
        released,
        "UPDATE plugin_logs SET message = ARRAY['x7', 'y9'] WHERE id = (SELECT id FROM plugin_logs "
        "WHERE created_at < now() - interval '100 days' LIMIT 1) RETURNING id",
    )
    _hold(released, "user", user)
    _run(released, PruneLogs(table="plugin_logs"))
    assert _one(released, "SELECT count(*) FROM plugin_logs WHERE id = %s", row) == 1


@pytest.mark.parametrize(("table", "column"), [("session", "user_id"), ("secret_access_events", "actor_id")])
def test_holds_on_users_reach_the_other_logs(released: Deployment, table: str, column: str) -> None:
    age = "expires_at" if table == "session" else "created_at"
    user = _one(released, 'SELECT id FROM "user" ORDER BY 1 LIMIT 1')
    released.query(f"UPDATE {table} SET {column} = %s WHERE {age} < now() - interval '2 days'", user)
    job = PruneLogs(table=table, older_than=timedelta(days=1))
    rows = released.operations.plan(job).tally.total.rows
    assert rows > 0
    hold = _hold(released, "user", user)
    assert _held(released, job) > 0
    assert _run(released, job)["rows"] < rows
    assert _run(released, job)["rows"] == 0
    _release(released, hold)
    assert _run(released, job)["rows"] > 0


@pytest.mark.parametrize("kind", holds.KINDS)
def test_tasks_are_held_too(deployment: Deployment, kind: str) -> None:
    table = "tasks" if deployment.layout == "guide" else "issues"
    plan = deployment.operations.plan(ArchiveTasks())
    owner = "created_by_user_id"
    run = _run(deployment, ArchiveTasks())["run"]
    assert _run(deployment, ArchiveTasks(undo=RunId(run)))["kept"]
    task = _one(deployment, f"SELECT task::text FROM paperclip_worker.archived_tasks WHERE run_id = '{run}' LIMIT 1")
    company, user = deployment.query(f"SELECT company_id::text, {owner} FROM {table} WHERE id = %s", task)[0]
    _hold(deployment, kind, {"company": company, "user": user, "task": task, "table": table}[kind])
    held = _held(deployment, ArchiveTasks())
    assert held >= 1
    assert (held == 1) is (kind == "task")
    result = _run(deployment, ArchiveTasks())
    assert result["kept"]
    assert result["rows"] < plan.tally.total.rows
    hidden = "archived" if table == "tasks" else "hidden_at IS NOT NULL"
    assert _one(deployment, f"SELECT {hidden} FROM {table} WHERE id = %s", task) is False


def test_a_hold_added_mid_run_takes_effect_on_the_next_bite(deployment: Deployment) -> None:
    small = deployment.with_settings(bite_rows="50")
    run = small.start(PruneLogs(), actor="tester", via="test")
    bites = iter(range(4))
    assert small.runner().work(run, seconds=math.inf, leave=lambda: next(bites, None) is None) is Outcome.MORE
    done = small.result(run)["rows"]
    assert 0 < done < small.result(run)["planned"]
    _hold(deployment, "table", "activity_log")
    assert small.runner().work(run, seconds=math.inf) is Outcome.SETTLED
    result = small.result(run)
    assert result["rows"] == done
    # What was planned and is held now is no broken promise.
    assert result["kept"]
    assert sum(one["rows"] for one in result["left"] if one["reason"] == "legal_hold") > 0


def test_adding_waits_for_the_bite_in_flight_and_binds_all_after_it(
    released: Deployment, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once `holds add` has returned, no bite that did not know of it can still commit."""
    small = released.with_settings(bite_rows="50")
    run = small.start(PruneLogs(), actor="tester", via="test")
    small.runner().work(run, seconds=0)  # lays out
    in_flight, go_on, added = threading.Event(), threading.Event(), threading.Event()
    original = PruneLogs.apply

    def waits(self: PruneLogs, *arguments: Any) -> Any:
        found = original(self, *arguments)
        in_flight.set()
        assert go_on.wait(20)
        return found

    monkeypatch.setattr(PruneLogs, "apply", waits)
    worker = threading.Thread(target=lambda: small.runner().work(run, seconds=0))
    worker.start()
    assert in_flight.wait(20)

    def add() -> None:
        _hold(released, "table", "activity_log")
        added.set()

    counsel = threading.Thread(target=add)
    counsel.start()
    assert not added.wait(0.5)
    go_on.set()
    worker.join(20)
    assert added.wait(20)
    counsel.join(20)
    done = small.result(run)["rows"]
    assert done > 0
    assert small.runner().work(run, seconds=math.inf) is Outcome.SETTLED
    assert small.result(run)["rows"] == done


def test_bites_that_do_not_end_refuse_the_hold_rather_than_promise_it(
    released: Deployment, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(holds, "EXCLUSIVE", holds.EXCLUSIVE.replace("60s", "200ms"))
    with psycopg.connect(released.environment["DATABASE_URL"]) as bite:
        bite.execute(holds.SHARED.encode())
        with pytest.raises(holds.Busy, match="bites in flight"):
            _hold(released, "table", "activity_log")
    assert released.query("SELECT * FROM paperclip_worker.holds") == []


def test_who_dies_with_the_lock_in_hand_is_cut_off(released: Deployment, monkeypatch: pytest.MonkeyPatch) -> None:
    """A host that is gone after its first words."""
    monkeypatch.setattr(db, "_IDLE", "300ms")
    monkeypatch.setattr(holds, "EXCLUSIVE", holds.EXCLUSIVE.replace("60s", "5s"))
    with released.operations.engine.connect() as dead:
        dead.begin()
        bounds = db._bounds(lock=2, statement=30)
        db._begin(dead, holds.SHARED, bounds, read_only=False, lasting=True)
        assert _hold(released, "table", "activity_log")
        dead.invalidate()


def test_a_hold_ends_by_itself(released: Deployment) -> None:
    hold = _hold(released, "table", "activity_log", until=datetime.now(UTC) + timedelta(hours=1))
    assert _held(released, PruneLogs()) > 0
    released.query("UPDATE paperclip_worker.holds SET until = now() - interval '1 second'")
    assert _held(released, PruneLogs()) == 0
    assert released.json("holds", "list") == {"holds": []}
    (listed,) = released.json("holds", "list", "--all")["holds"]
    assert (listed["id"], listed["state"]) == (str(hold.id), "ended")


def test_a_hold_ends_by_the_database_s_clock(released: Deployment, monkeypatch: pytest.MonkeyPatch) -> None:
    """An operator's own clock that is hours late neither enters a hold that is over nor lists it as in force."""
    late = datetime.now(UTC) + timedelta(hours=1)
    _hold(released, "table", "activity_log", until=late)
    monkeypatch.setattr(Operations, "now", lambda _: late + timedelta(hours=1))
    with pytest.raises(Refused, match=r"--until: .* is past"):
        _hold(released, "table", "activity_log", until=late)
    _hold(released, "table", "activity_log", until=late + timedelta(hours=2))
    released.query("UPDATE paperclip_worker.holds SET until = %s", late)
    listed = CliRunner(env=released.environment).invoke(cli, ["holds", "list", "--json"], standalone_mode=False)
    assert json.loads(listed.stdout) == {"holds": []}


def test_the_command_line_adds_lists_and_releases(released: Deployment) -> None:
    email, user = released.query('SELECT email, id FROM "user" ORDER BY 1 LIMIT 1')[0]
    task, identifier = released.query("SELECT id::text, identifier FROM issues ORDER BY 2 LIMIT 1")[0]
    name, company = released.query("SELECT name, id::text FROM companies ORDER BY 1 LIMIT 1")[0]
    for words, target in (
        (("--user", email.upper()), user),
        (("--task", identifier), task),
        (("--company", name), company),
        (("--table", "activity_log"), "activity_log"),
    ):
        added = released.json("holds", "add", *words, "--reason", "case 7", "--actor", "counsel")
        assert (added["target"], added["state"], added["actor"]) == (target, "in force", "counsel")
    listed = released.json("holds", "list")["holds"]
    assert [one["kind"] for one in listed] == ["table", "company", "task", "user"]
    lines = released.cli("holds", "list").stdout.splitlines()
    assert [line.split("\t")[1] for line in lines] == ["kind", "table", "company", "task", "user"]
    for one in listed[1:]:
        released.cli("holds", "release", one["id"], "--reason", "over", "--yes")
    found = released.json("holds", "release", listed[0]["id"][:8], "--reason", "over", "--yes")
    doomed = sum(one["rows"] for one in found["next_runs"] if one["table"] == "activity_log")
    assert doomed == complete(released)["rows"] > 0
    assert released.json("holds", "list") == {"holds": []}
    assert {one["state"] for one in released.json("holds", "list", "--all")["holds"]} == {"released"}
    refused(released, "holds", "release", listed[0]["id"], "--reason", "x", "--yes", says="released already")


ADD = ("holds", "add", "--reason", "case 7")


def test_an_email_of_two_is_no_target(released: Deployment) -> None:
    released.query('UPDATE "user" SET email = \'same@demo.example\' WHERE id IN (SELECT id FROM "user" LIMIT 2)')
    before = world(released)
    refused(released, *ADD, "--user", "same@demo.example", says="more than one user; use the id: .*, ")
    assert world(released) == before


def test_releasing_asks(released: Deployment) -> None:
    hold = _hold(released, "table", "activity_log")
    before = world(released)
    done = released.cli("holds", "release", str(hold.id), "--reason", "x", ok=False)
    check_refusal(done, says="activity_log would no longer be held.*--yes", status=2)
    assert world(released) == before
    assert keys(released) == []


def test_a_plan_goes_stale_when_a_hold_comes(released: Deployment) -> None:
    planned = released.operations.plan(PruneLogs())
    _hold(released, "company", str(planned.targets[0].company))
    words = ("run", "prune-logs", "--inline", "--plan", planned.hash)
    refused(released, *words, says="drifted")
    run = released.operations.start(PruneLogs(), actor="tester", via="test")
    assert released.operations.runner().work(run, seconds=math.inf) is Outcome.SETTLED
    assert released.operations.find(str(run)).state is State.KEPT
