"""archive-tasks --undo: exactly what a run archived comes back, and nothing that somebody has changed since."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from typing import Any
from uuid import UUID

import pytest

from tasks.archive_tasks import ArchiveTasks
from tasks.prune_logs import PruneLogs
from tests.cli.helpers import refused, world
from tests.conftest import Deployment
from tests.promises.board import Board
from worker.errors import Refused
from worker.params import RunId
from worker.runner import Outcome
from worker.states import State

UNDO = ("run", "archive-tasks", "--inline", "--yes", "--undo")


@pytest.fixture
def board(deployment: Deployment) -> Board:
    """A company of its own, once on each layout."""
    return Board(deployment=deployment)


@pytest.fixture
def own(released: Deployment) -> Board:
    """A company of its own on the released layout."""
    return Board(deployment=released)


def test_the_whole_table_is_as_it_was(board: Board) -> None:
    before = board.world()
    result = board.archive(company=())
    assert result["rows"] > 10
    assert board.world() != before
    undone = board.undo(result, company=())
    assert (undone["kept"], undone["rows"], undone["left"]) == (True, result["rows"], [])
    assert board.world() == before
    assert undone["receipt"]["evidence"] == {"undoes": result["run"]}


def test_only_what_that_run_archived(board: Board) -> None:
    first = board.task()
    board.archive()
    second = board.task()
    result = board.archive()
    assert board.undo(result)["rows"] == 1
    assert (board.hidden(first), board.hidden(second)) == (True, False)


_CHANGES: dict[str, dict[str, str]] = {
    "paperclip": {
        "commented": "updated_at = now()",
        "reopened": "status = 'todo', completed_at = NULL, status_version = status_version + 1",
        "brought back": "hidden_at = NULL",
        "hidden by somebody": "hidden_at = now()",
        "hidden a tick later": "hidden_at = hidden_at + interval '1 microsecond'",
        "of no age": "updated_at = 'infinity', completed_at = 'infinity'",
        "of another company": "company_id = %(other)s",
    },
    "guide": {
        "updated": "updated_at = now()",
        "reopened": "status = 'todo'",
        "brought back": "archived = false",
        "of no age": "updated_at = 'infinity'",
        "of another company": "company_id = %(other)s",
    },
}


def test_what_somebody_has_changed_since_stays_as_it_is(board: Board) -> None:
    changes = _CHANGES[board.deployment.layout]
    tasks = dict(zip(changes, board.tasks(len(changes)), strict=True))
    gone, rest = board.tasks(2)
    other = Board(deployment=board.deployment).company
    result = board.archive()
    assert result["rows"] == len(changes) + 2
    for name, change in changes.items():
        board.sql(f"UPDATE {board.table} SET {change} WHERE id = %(task)s", task=tasks[name], other=other)
    board.sql(f"DELETE FROM {board.table} WHERE id = %(task)s", task=gone)
    one = f"SELECT to_jsonb(t) FROM {board.table} t WHERE id = %(task)s"
    theirs = {name: board.sql(one, task=task) for name, task in tasks.items()}
    stay = {"changed": len(changes), "gone": 1}
    planned = board.plan(undo=RunId(result["run"])).left
    assert Counter(left.reason for left in planned for _ in range(left.rows)) == stay
    undone = board.undo(result)
    assert (undone["kept"], undone["rows"]) == (True, 1)
    assert Counter(left["reason"] for left in undone["left"] for _ in range(left["rows"])) == stay
    assert not board.hidden(rest)
    assert {name: board.sql(one, task=task) for name, task in tasks.items()} == theirs


def test_one_company_after_the_other(board: Board) -> None:
    other = Board(deployment=board.deployment)
    mine, theirs = board.task(), other.task()
    result = board.archive(company=(board.company, other.company))
    assert board.undo(result)["rows"] == 1
    assert (board.hidden(mine), other.hidden(theirs)) == (False, True)
    with pytest.raises(Refused, match="undone already"):
        board.undo(result)
    third = Board(deployment=board.deployment)
    with pytest.raises(Refused, match="archived nothing of that company"):
        third.undo(result)
    assert board.undo(result, company=())["rows"] == 1
    assert not other.hidden(theirs)
    for company in ((), (board.company,), (other.company,)):
        with pytest.raises(Refused, match="undone already"):
            board.undo(result, company=company)


def test_companies_undone_one_by_one_are_all_of_it(board: Board) -> None:
    other = Board(deployment=board.deployment)
    board.task()
    other.task()
    result = board.archive(company=(board.company, other.company))
    assert board.undo(result)["rows"] == other.undo(result)["rows"] == 1
    with pytest.raises(Refused, match="undone already"):
        board.undo(result, company=())


def _part(board: Board, job: ArchiveTasks) -> UUID:
    """A run that was stopped after some bites."""
    small = board.deployment.with_settings(bite_rows="2")
    run = small.start(job, actor="tester", via="test")
    assert small.runner().work(run, seconds=math.inf, leave=lambda: small.result(run)["rows"] > 0) is Outcome.MORE
    assert small.stop(str(run)).state is State.STOPPED
    found = small.result(run)
    assert 0 < found["rows"] < found["planned"]
    return run


def test_of_a_stopped_run_its_part_comes_back_and_it_cannot_be_resumed(board: Board) -> None:
    before = board.world()
    run = _part(board, ArchiveTasks())
    assert board.world() != before
    undone = board.archive(undo=RunId(str(run)), company=())
    assert undone["kept"]
    assert undone["rows"] == board.deployment.operations.result(run)["rows"]
    assert board.world() == before
    with pytest.raises(Refused, match=f"{run} was undone by run {undone['run']}"):
        board.deployment.operations.resume(str(run))
    assert board.deployment.operations.find(str(run)).state is State.STOPPED
    assert board.world() == before


def test_a_run_whose_undo_found_nothing_to_bring_back_cannot_be_resumed_either(board: Board) -> None:
    """What it archived afterwards could not be undone: an undo that was kept is not repeated."""
    run = _part(board, ArchiveTasks())
    noted = "SELECT task FROM paperclip_worker.archived_tasks"
    board.sql(f"UPDATE {board.table} SET updated_at = now() WHERE id IN ({noted})")
    undone = board.archive(undo=RunId(str(run)), company=())
    assert (undone["kept"], undone["rows"]) == (True, 0)
    before = board.world()
    with pytest.raises(Refused, match=f"{run} was undone by run {undone['run']}"):
        board.deployment.operations.resume(str(run))
    assert board.deployment.operations.find(str(run)).state is State.STOPPED
    assert board.world() == before


def test_an_undo_that_was_stopped_goes_on_and_so_does_another(board: Board) -> None:
    before = board.world()
    archived = board.archive(company=())
    half = _part(board, ArchiveTasks(undo=RunId(archived["run"])))
    rest = board.undo(archived, company=())
    assert rest["kept"]
    assert rest["rows"] + board.deployment.operations.result(half)["rows"] == archived["rows"]
    assert board.world() == before
    with pytest.raises(Refused, match="undone already"):
        board.deployment.operations.resume(str(half))


def test_what_was_undone_can_be_archived_and_undone_again(board: Board) -> None:
    task = board.task()
    first = board.archive()
    board.undo(first)
    second = board.archive()
    assert board.hidden(task)
    assert board.undo(second)["rows"] == 1
    assert not board.hidden(task)


def test_the_audit_rows_say_which_was_which(board: Board) -> None:
    board.tasks(2)
    board.undo(board.archive())
    said = board.sql("SELECT action FROM activity_log WHERE company_id = %(company)s ORDER BY action")
    assert said == [("maintenance.tasks_archived",), ("maintenance.tasks_unarchived",)]


def _nothing(board: Board) -> str:
    return str(board.archive()["run"])


def _of_another_job(board: Board) -> str:
    operations = board.deployment.operations
    run = operations.start(PruneLogs(), actor="tester", via="test")
    operations.runner().work(run, seconds=math.inf)
    return str(run)


def _an_undo(board: Board) -> str:
    board.task()
    return str(board.undo(board.archive())["run"])


def _undone(board: Board) -> str:
    board.task()
    result = board.archive()
    board.undo(result)
    return str(result["run"])


def _under_way(board: Board) -> str:
    board.task()
    return str(board.deployment.operations.start(board.job(), actor="tester", via="test"))


_REFUSALS: dict[str, tuple[Callable[[Board], str], tuple[str, ...], str, int]] = {
    "unknown": (lambda _: "00000000-0000-4000-8000-000000000000", (), "no run has an id", 2),
    "no run at all": (lambda _: "last", (), "no run has an id that starts with 'last'", 2),
    "archived nothing": (_nothing, (), "--undo: .* archived nothing", 2),
    "of another job": (_of_another_job, (), "--undo: .* is not a run of archive-tasks", 2),
    "an undo": (_an_undo, (), "--undo: .* itself undid run", 2),
    "undone already": (_undone, (), "--undo: .* undone already, by run", 2),
    "with an age": (_nothing, ("--older-than", "30d"), "leave out --older-than", 2),
    "under way": (_under_way, (), "already under way", 3),
}


@pytest.mark.parametrize("name", _REFUSALS)
def test_refused_in_one_line_and_nothing_changed(own: Board, name: str) -> None:
    make, words, says, status = _REFUSALS[name]
    run = make(own)
    before = world(own.deployment)
    refused(own.deployment, *UNDO, run, *words, says=says, status=status)
    assert world(own.deployment) == before
    verb = ("plan", "archive-tasks", "--undo", run, *words)
    refused(own.deployment, *verb, says="under way" if status == 3 else says, status=status)


def test_the_start_of_an_id_must_be_that_of_one_run(own: Board) -> None:
    own.task()
    result: dict[str, Any] = own.archive()
    start, digit, rest = result["run"][:20], result["run"][20], result["run"][21:]
    own.sql(
        "INSERT INTO paperclip_worker.runs "
        "SELECT (jsonb_populate_record(r, jsonb_build_object('id', %(twin)s::text))).* FROM paperclip_worker.runs r",
        twin=start + ("0" if digit != "0" else "1") + rest,
    )
    before = world(own.deployment)
    refused(own.deployment, *UNDO, start, says="2 runs have an id that starts with")
    assert world(own.deployment) == before
    assert own.deployment.json(*UNDO, start + digit)["rows"] == 1


def test_the_last_run_is_undone_by_that_word(own: Board) -> None:
    task = own.task()
    archived = own.deployment.json("run", "archive-tasks", "--company", str(own.company), "--inline", "--yes")
    assert own.hidden(task)
    undone = own.deployment.json(*UNDO, "last")
    assert undone["params"]["undo"] == archived["run"]
    assert (undone["kept"], undone["rows"]) == (True, 1)
    assert not own.hidden(task)
