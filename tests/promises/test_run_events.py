"""Events of runs that have ended, by which the app still decides or shows something: prune-logs leaves them."""

from __future__ import annotations

from collections import Counter
from datetime import timedelta
from uuid import uuid4

from tasks.prune_logs import PruneLogs
from tests.conftest import NOW, Deployment
from tests.promises.archived import complete
from tests.promises.board import Board

_END = (
    "INSERT INTO native_run_finalizations (run_id, company_id, issue_id, phase, failure_code, failure_detail, "
    "attempt, controller_generation, recovery_history) "
    "VALUES (%(run)s, %(company)s, %(other)s, '{phase}', {code}, {detail}, 1, 1, '[]')"
)
_ACTION = (
    "INSERT INTO issue_recovery_actions (company_id, source_issue_id, kind, owner_type, cause, fingerprint, "
    "evidence, next_action, attempt_count, status) VALUES (%(company)s, %(other)s, 'stranded', 'agent', 'lost', "
    "%(other)s::text, {evidence}, 'look', 0, '{status}')"
)
_SETTLED = "UPDATE native_run_finalizations SET phase = 'committed' WHERE run_id = %(run)s"
_DENIED = 'UPDATE native_run_finalizations SET failure_detail = \'{"replacementDenied": "x"}\' WHERE run_id = %(run)s'
_FOLLOWED = 'UPDATE native_run_finalizations SET failure_detail = \'{"successorRunId": "x"}\' WHERE run_id = %(run)s'
_RESOLVED = "UPDATE issue_recovery_actions SET status = '{}' WHERE company_id = %(company)s"
_UNDECIDED = _END.format(phase="terminal_failure", code="'provider_transport_failed'", detail="NULL")
_OF_RUN = "jsonb_build_object('{}', %(run)s::text)"
_BLOCKED = "jsonb_build_object('runId', %(run)s::text, 'automaticRecovery', '{\"replay\": \"blocked\"}'::jsonb)"

# What makes the app look into the events of a run again, and what ends that.
_CASES = {
    "it may be taken up again": (_END.format(phase="retryable_failure", code="NULL", detail="'{}'"), _SETTLED),
    "it is yet to be judged": (_END.format(phase="workspace_finalizing", code="NULL", detail="NULL"), _SETTLED),
    "another may follow it": (_UNDECIDED, _FOLLOWED),
    "another is not denied yet": (_UNDECIDED, _DENIED),
    "a recovery looks at it": (
        _ACTION.format(evidence=_OF_RUN.format("runId"), status="active"),
        _RESOLVED.format("resolved"),
    ),
    "a recovery begins at it": (
        _ACTION.format(evidence=_OF_RUN.format("sourceRunId"), status="unheard_of"),
        _RESOLVED.format("cancelled"),
    ),
    "its work must not be done anew": (
        _ACTION.format(evidence=_BLOCKED, status="resolved"),
        "UPDATE issue_recovery_actions SET evidence = '{}' WHERE company_id = %(company)s",
    ),
}


def _event(board: Board, *, kind: str = "session.started", says: str | None = None) -> int:
    """An event of half a year ago, of the company's run."""
    ((event,),) = board.sql(
        "INSERT INTO heartbeat_run_events (company_id, run_id, agent_id, seq, event_type, message, created_at) "
        "SELECT %(company)s, %(run)s, %(agent)s, count(*), %(kind)s, %(says)s, %(at)s FROM heartbeat_run_events "
        "WHERE run_id = %(run)s RETURNING id",
        at=NOW - timedelta(days=180),
        kind=kind,
        says=says,
    )
    return int(event)


def test_events_that_decide_what_becomes_of_an_ended_run_stay(released: Deployment) -> None:
    boards = {case: Board(deployment=released) for case in _CASES}
    free = Board(deployment=released)
    # Evidence that names no run must not stop anything.
    for evidence in ("'[]'", '\'{"runId": "none"}\'', "'{\"runId\": 7}'"):
        free.sql(_ACTION.format(evidence=evidence, status="active"), other=uuid4())
    _event(free)
    held = {case: _event(board) for case, board in boards.items()}
    for case, board in boards.items():
        board.sql("UPDATE heartbeat_runs SET status = 'failed' WHERE id = %(run)s")
        board.sql(_CASES[case][0], other=uuid4())
    job = PruneLogs(table="heartbeat_run_events", company=tuple(one.company for one in (free, *boards.values())))
    result = complete(released, job)
    assert (result["kept"], result["rows"]) == (True, 1)
    reasons = Counter(one["reason"] for one in result["left"])
    assert reasons == {"run_unsettled": 4, "recovering": 3}
    left = {case: _events(board) for case, board in boards.items()}
    assert left == {case: [event] for case, event in held.items()}
    for case, board in boards.items():
        board.sql(_CASES[case][1])
    assert complete(released, job)["rows"] == len(boards)


def test_that_a_run_failed_for_good_is_said_as_long_as_its_task_is_open(released: Deployment) -> None:
    """The app shows it to the board by that one event, until somebody sees to it."""
    over = {
        "UPDATE issues SET status = 'done' WHERE id = %(task)s": "issueId",
        "UPDATE issues SET hidden_at = now() WHERE id = %(task)s": "taskId",
        "UPDATE heartbeat_runs SET status = 'succeeded' WHERE id = %(run)s": "issueId",
    }
    boards = {one: Board(deployment=released) for one in over}
    tasks = {one: board.task() for one, board in boards.items()}
    says, held = "Bounded retry exhausted after 3 scheduled attempts", dict[str, int]()
    for one, board in boards.items():
        board.sql("UPDATE issues SET status = 'blocked' WHERE id = %(task)s", task=tasks[one])
        board.sql(
            "UPDATE heartbeat_runs SET status = 'failed', context_snapshot = jsonb_build_object(%(name)s::text, "
            "%(task)s::text) WHERE id = %(run)s",
            name=over[one],
            task=tasks[one],
        )
        held[one] = _event(board, kind="lifecycle", says=says)
        for kind, text in (("lifecycle", "run failed"), ("error", says), ("lifecycle", None)):
            _event(board, kind=kind, says=text)
    job = PruneLogs(table="heartbeat_run_events", company=tuple(one.company for one in boards.values()))
    result = complete(released, job)
    assert (result["kept"], result["rows"]) == (True, 9)
    assert {(one["reason"], one["rows"]) for one in result["left"]} == {("issue_open", 1)}
    assert {one: _events(board) for one, board in boards.items()} == {one: [event] for one, event in held.items()}
    for one, board in boards.items():
        board.sql(one, task=tasks[one])
    assert complete(released, job)["rows"] == 3


def _events(board: Board) -> list[int]:
    rows = board.sql("SELECT id FROM heartbeat_run_events WHERE company_id = %(company)s ORDER BY id")
    return [int(event) for (event,) in rows]
