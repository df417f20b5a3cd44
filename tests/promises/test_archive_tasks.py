"""archive-tasks: what goes and when, that nothing else changes, races with the app, holds and policies."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID

import psycopg
import pytest

from tasks.archive_tasks import ArchiveTasks
from tests.cli.helpers import least
from tests.conftest import NOW, Deployment
from tests.promises.board import OLD, Board
from worker.errors import Refused
from worker.job import Batch
from worker.means import Means
from worker.plans import Tally
from worker.runner import Outcome
from worker.states import State

RECENT = timedelta(days=3)
KEEP = timedelta(days=30)


@pytest.fixture
def board(deployment: Deployment) -> Board:
    """A company of its own, once on each layout."""
    return Board(deployment=deployment)


@pytest.fixture
def own(released: Deployment) -> Board:
    """A company of its own on the released layout."""
    return Board(deployment=released)


def test_only_the_one_column_differs(board: Board) -> None:
    """Of the whole seeded deployment: every other column, and every table but the activity log."""
    column = "hidden_at" if board.released else "archived"
    rest = f"SELECT md5(string_agg((to_jsonb(t) - '{column}')::text, '|' ORDER BY id)) FROM {board.table} t"
    ours = ("activity_log", board.table)
    tables, columns, rows = board.deployment.digest(without=ours), board.sql(rest), board.world()
    result = board.archive(company=())
    assert result["rows"] > 10
    assert board.deployment.digest(without=ours) == tables
    assert board.sql(rest) == columns
    assert board.world() != rows


def test_the_mark_of_an_archived_task_is_the_moment_the_run_was_entered(own: Board) -> None:
    task = own.task()
    result = own.archive()
    assert own.sql("SELECT hidden_at FROM issues WHERE id = %(task)s", task=task) == [
        (datetime.fromisoformat(result["horizon"]),)
    ]


def test_age_to_the_microsecond(board: Board) -> None:
    now, tick = datetime.now(UTC), timedelta(microseconds=1)
    before, at, after = (board.task(ended=now - KEEP + shift) for shift in (-tick, timedelta(0), tick))
    assert board.archive(now=now)["rows"] == 1
    assert [board.hidden(task) for task in (before, at, after)] == [True, False, False]


_TIMES = ("completed_at", "cancelled_at", "updated_at")


@pytest.mark.parametrize(
    ("ages", "goes"),
    [
        ((OLD, RECENT, RECENT), True),
        ((RECENT, OLD, OLD), False),
        ((None, OLD, RECENT), True),
        ((None, RECENT, OLD), False),
        ((None, None, OLD), True),
        ((None, None, RECENT), False),
    ],
)
def test_the_end_that_is_noted_counts_before_the_last_update(
    own: Board, ages: tuple[timedelta | None, ...], goes: bool
) -> None:
    task = own.task()
    times = {name: None if age is None else NOW - age for name, age in zip(_TIMES, ages, strict=True)}
    own.sql(
        "UPDATE issues SET completed_at = %(completed_at)s, cancelled_at = %(cancelled_at)s, "
        "updated_at = %(updated_at)s WHERE id = %(task)s",
        task=task,
        **times,
    )
    assert own.archive()["rows"] == goes
    assert own.hidden(task) is goes


def test_a_comment_does_not_keep_a_done_task(own: Board) -> None:
    task = own.task()
    own.sql(
        "INSERT INTO issue_comments (company_id, issue_id, body) VALUES (%(company)s, %(task)s, 'thanks')", task=task
    )
    own.sql("UPDATE issues SET updated_at = now() WHERE id = %(task)s", task=task)
    own.archive()
    assert own.hidden(task)


def test_only_ended_tasks_in_sight_go(own: Board) -> None:
    tasks = dict(zip(("done", "cancelled", "blocked", "completed", "unheard_of"), own.tasks(5), strict=True))
    for status, task in tasks.items():
        own.sql("UPDATE issues SET status = %(status)s WHERE id = %(task)s", status=status, task=task)
    hidden = own.task()
    own.sql("UPDATE issues SET hidden_at = '2026-01-01' WHERE id = %(task)s", task=hidden)
    assert own.archive()["rows"] == 2
    assert {status for status, task in tasks.items() if own.hidden(task)} == {"done", "cancelled"}
    assert own.sql("SELECT hidden_at::date::text FROM issues WHERE id = %(task)s", task=hidden) == [("2026-01-01",)]


def test_the_guide_keeps_what_was_updated_since(
    make_deployment: Callable[..., Deployment], fresh_database: Callable[..., str], template: Callable[[str], str]
) -> None:
    board = Board(deployment=make_deployment(fresh_database(template("guide")), "guide"))
    task, opened = board.task(ended=NOW - RECENT), board.task()
    board.sql("UPDATE tasks SET status = 'todo' WHERE id = %(task)s", task=opened)
    assert board.archive()["rows"] == 0
    assert not board.hidden(task)
    assert not board.hidden(opened)


def test_where_the_guides_column_may_be_null_such_a_task_goes_and_comes_back_as_not_archived(
    make_deployment: Callable[..., Deployment], fresh_database: Callable[..., str], template: Callable[[str], str]
) -> None:
    board = Board(deployment=make_deployment(fresh_database(template("guide")), "guide"))
    board.sql("ALTER TABLE tasks ALTER archived DROP NOT NULL")
    task, archived = board.tasks(2)
    board.sql("UPDATE tasks SET archived = NULL WHERE id = %(task)s", task=task)
    board.sql("UPDATE tasks SET archived = true WHERE id = %(task)s", task=archived)
    result = board.archive()
    assert (result["kept"], result["rows"]) == (True, 1)
    assert board.hidden(task)
    assert board.undo(result)["rows"] == 1
    assert board.sql("SELECT archived FROM tasks WHERE id = %(task)s", task=task) == [(False,)]
    assert board.hidden(archived)


# -- races --------------------------------------------------------------------------------------------


def _meanwhile(monkeypatch: pytest.MonkeyPatch, step: str, act: Callable[[], Any]) -> None:
    """Let the app act once, in its own transaction, after a step of the first bite and before its commit."""
    original, acted = getattr(ArchiveTasks, step), [False]

    def then_act(self: ArchiveTasks, means: Means, *rest: Any) -> Batch | Tally | None:
        found: Batch | Tally | None = original(self, means, *rest)
        if not acted[0]:
            acted[0] = True
            act()
        return found

    monkeypatch.setattr(ArchiveTasks, step, then_act)


def _open_child(board: Board, task: UUID) -> None:
    board.sql(
        "INSERT INTO issues (company_id, title, parent_id, status) VALUES (%(company)s, 'new', %(task)s, 'todo')",
        task=task,
    )


def _begin_work(board: Board, task: UUID) -> None:
    board.sql(
        "UPDATE heartbeat_runs SET status = 'running', "
        "context_snapshot = jsonb_build_object('issueId', %(task)s::text) WHERE id = %(run)s",
        task=task,
    )


@pytest.mark.parametrize("act", [_open_child, _begin_work])
@pytest.mark.parametrize("step", ["claim", "apply"])
def test_what_the_app_did_meanwhile_is_found_and_can_be_undone(
    own: Board, monkeypatch: pytest.MonkeyPatch, step: str, act: Callable[[Board, UUID], None]
) -> None:
    task, other = own.tasks(2)
    before = own.sql("SELECT hidden_at, updated_at FROM issues WHERE id = %(task)s", task=task)
    _meanwhile(monkeypatch, step, lambda: act(own, task))
    result = own.archive()
    assert result["state"] == "unkept"
    ((finding),) = result["findings"]
    assert (finding["company"], finding["rows"]) == (str(own.company), 1)
    assert "bring them back with --undo" in finding["what"]
    assert own.hidden(task)
    assert own.undo(result)["kept"]
    assert own.sql("SELECT hidden_at, updated_at FROM issues WHERE id = %(task)s", task=task) == before
    assert own.archive()["kept"]
    assert (own.hidden(task), own.hidden(other)) == (False, True)


def test_a_task_that_is_reopened_meanwhile_stays(board: Board, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its row changed after the bite's snapshot: the bite is rolled back and taken again."""
    task, other = board.tasks(2)
    reopen = f"UPDATE {board.table} SET status = 'todo', updated_at = now() WHERE id = %(task)s"
    _meanwhile(monkeypatch, "claim", lambda: board.sql(reopen, task=task))
    result = board.archive()
    assert (result["state"], result["rows"]) == ("kept", 1)
    assert (board.hidden(task), board.hidden(other)) == (False, True)


def test_a_task_that_is_brought_back_meanwhile_is_archived_by_the_second_sweep(
    own: Board, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = own.task()
    original, acted = ArchiveTasks.verify, [False]

    def comes_back(self: ArchiveTasks, means: Means) -> Any:
        if not acted[0]:
            acted[0] = True
            own.sql("UPDATE issues SET hidden_at = NULL WHERE id = %(task)s", task=task)
        # The snapshot of verify is older than what the app did.
        return original(self, means)

    monkeypatch.setattr(ArchiveTasks, "verify", comes_back)
    assert own.archive()["state"] == "kept"
    own.sql("UPDATE issues SET hidden_at = NULL WHERE id = %(task)s", task=task)
    assert own.archive()["kept"]
    assert own.hidden(task)


def test_a_task_that_is_opened_again_while_the_run_lasts_is_named(board: Board) -> None:
    ended = ", completed_at = NULL" if board.released else ""
    _gone_on_with(board, f"status = 'todo', updated_at = now(){ended}")


def test_a_task_that_is_worked_on_again_while_the_run_lasts_is_named(own: Board) -> None:
    _gone_on_with(own, "updated_at = now(), execution_run_id = %(run)s")


def _gone_on_with(board: Board, change: str) -> None:
    """The task is out of sight, and no undo brings it back: it was changed. One only commented does not count."""
    task, hidden, commented = board.tasks(3)
    operations = board.deployment.operations
    run = operations.start(board.job(), actor="tester", via="test")
    operations.runner().work(run, seconds=math.inf, leave=lambda: all(map(board.hidden, (task, hidden, commented))))
    assert operations.find(str(run)).state is State.RUNNING
    if board.released:
        board.sql("UPDATE heartbeat_runs SET status = 'running' WHERE id = %(run)s")
    board.sql(f"UPDATE {board.table} SET {change} WHERE id = %(task)s", task=task)
    board.sql(f"UPDATE {board.table} SET updated_at = now() WHERE id = %(task)s", task=commented)
    assert operations.runner().work(run, seconds=math.inf) is Outcome.SETTLED
    result = operations.result(run)
    assert result["state"] == "unkept"
    ((finding),) = result["findings"]
    assert (finding["company"], finding["rows"]) == (str(board.company), 1)
    assert "show them again in the app" in finding["what"]


def test_a_task_that_is_moved_and_archived_again_comes_back_too(board: Board) -> None:
    """What the note said of its company was of the first time."""
    other = Board(deployment=board.deployment)
    task, rest = board.tasks(2)
    operations, shown = board.deployment.operations, ("hidden_at = NULL" if board.released else "archived = false")
    run = operations.start(board.job(company=(board.company, other.company)), actor="tester", via="test")
    operations.runner().work(run, seconds=math.inf, leave=lambda: board.hidden(task) and board.hidden(rest))
    board.sql(
        f"UPDATE {board.table} SET company_id = %(to)s, {shown} WHERE id = %(task)s", to=other.company, task=task
    )
    assert operations.runner().work(run, seconds=math.inf) is Outcome.SETTLED
    result = operations.result(run)
    assert (result["kept"], result["rows"]) == (True, 3)
    assert board.undo(result, company=())["rows"] == 2
    assert not board.hidden(task)


def test_rows_that_others_only_refer_to_are_not_left_out(own: Board) -> None:
    """A comment that is being written locks its task's key; only the task that is being changed is left."""
    commented, changed, *_ = own.tasks(5)
    operations = own.deployment.with_settings(lock_timeout="0.05")
    with psycopg.connect(own.deployment.environment["DATABASE_URL"]) as app:
        app.execute("SELECT 1 FROM issues WHERE id = %s FOR KEY SHARE", (commented,))
        app.execute("SELECT 1 FROM issues WHERE id = %s FOR UPDATE", (changed,))
        result = own.archive(on=operations)
    assert (result["state"], result["rows"]) == ("unkept", 4)
    assert own.hidden(commented)
    assert not own.hidden(changed)


# -- holds and policies -------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["task", "company", "table"])
def test_a_legal_hold_is_heeded(board: Board, kind: str) -> None:
    task, other = board.tasks(2)
    target = {"task": str(task), "company": str(board.company), "table": board.table}[kind]
    hold = board.deployment.json("holds", "add", f"--{kind}", target, "--reason", "case 12")
    held = 1 if kind == "task" else 2
    assert board.left() == {"legal_hold": held}
    result = board.archive()
    assert (result["kept"], result["rows"]) == (True, 2 - held)
    assert (board.hidden(task), board.hidden(other)) == (False, kind == "task")
    board.deployment.cli("holds", "release", hold["id"], "--reason", "closed", "--yes")
    assert board.archive()["kept"]
    assert board.hidden(task)


def test_a_policy_decides_and_an_age_can_only_keep_longer(board: Board) -> None:
    board.task()
    policy = ("policy", "set", "--table", board.table, "--reason", "contract", "--yes")
    board.deployment.cli(*policy, "--keep", "90d", "--company", str(board.company))
    assert board.plan().tally.total.rows == board.plan(older_than=KEEP).tally.total.rows == 0
    board.deployment.cli(*policy, "--keep", "40d", "--company", str(board.company))
    assert board.plan().tally.total.rows == 1
    assert board.plan(older_than=timedelta(days=61)).tally.total.rows == 0
    assert board.plan(company=()).tally.total.rows > 1


def test_the_printed_grants_are_enough(board: Board) -> None:
    board.tasks(3)
    run = ("run", "archive-tasks", "--company", str(board.company), "--inline", "--yes", "--json")
    with least(board.deployment) as login:
        done = json.loads(board.deployment.cli(*run, env=login).stdout)
        assert done["rows"] == 3
        undone = json.loads(board.deployment.cli(*run, "--undo", done["run"], env=login).stdout)
        assert undone["rows"] == 3
        with psycopg.connect(login["DATABASE_URL"]) as connection:
            with pytest.raises(psycopg.errors.InsufficientPrivilege):
                connection.execute(f"UPDATE {board.table} SET status = 'todo'".encode())
            connection.rollback()


def test_companies_are_kept_apart(board: Board) -> None:
    other = Board(deployment=board.deployment)
    mine, theirs = board.task(), other.task()
    board.archive()
    assert (board.hidden(mine), other.hidden(theirs)) == (True, False)


_TOUCH = {
    "BEFORE": "NEW.updated_at = now(); RETURN NEW;",
    "AFTER": "UPDATE {table} SET updated_at = now() WHERE id = NEW.id; RETURN NULL;",
}


@pytest.mark.parametrize("when", _TOUCH)
def test_a_trigger_that_fires_on_it_is_named_and_nothing_is_archived(deployment: Deployment, when: str) -> None:
    """It may change what is compared later: no undo would bring the task back as it was, or at all."""
    board = Board(deployment=deployment)
    task, column = board.task(), "hidden_at" if board.released else "archived"
    body = _TOUCH[when].format(table=board.table)
    board.sql(f"CREATE FUNCTION touch() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN {body} END $$")

    def fires(of: str) -> None:
        board.sql(f"DROP TRIGGER IF EXISTS touched ON {board.table}")
        board.sql(
            f"CREATE TRIGGER touched {when} UPDATE {of} ON {board.table} FOR EACH ROW "
            "WHEN (pg_trigger_depth() = 0) EXECUTE FUNCTION touch()"
        )

    for of in ("", f"OF status, {column}"):
        fires(of)
        before = board.world()
        with pytest.raises(Refused, match=f"{board.table}: the trigger touched would fire"):
            board.archive()
        assert board.world() == before
    fires("OF status")
    result = board.archive()
    assert board.hidden(task)
    fires("")
    with pytest.raises(Refused, match="the trigger touched would fire"):
        board.undo(result)
    board.sql(f"ALTER TABLE {board.table} DISABLE TRIGGER touched")
    assert board.undo(result)["rows"] == 1
