"""archive-tasks on the released layout: each guard holds a task back that would go without it, then lets it go."""

from __future__ import annotations

from dataclasses import dataclass
from uuid import uuid4

import pytest
import sqlalchemy as sa

from tests.conftest import Deployment
from tests.promises import explained
from tests.promises.board import Board
from worker.layouts import LAYOUTS

_LIVE = "UPDATE heartbeat_runs SET status = 'running' WHERE id = %(run)s"
_ENDED = "UPDATE heartbeat_runs SET status = 'timed_out' WHERE id = %(run)s"
_CHILD = (
    "INSERT INTO issues (id, company_id, title, parent_id, status, completed_at, hidden_at) "
    "VALUES (%(other)s, %(company)s, 'child', %(task)s, {status}, now(), {hidden})"
)
_BELOW = (
    "INSERT INTO issues (id, company_id, title, parent_id, status) "
    "VALUES (%(third)s, %(company)s, 'grandchild', %(other)s, 'in_progress')"
)
_BELOW_ENDS = "UPDATE issues SET status = 'done', completed_at = now() WHERE id = %(third)s"
_INTERACTION = (
    "INSERT INTO issue_thread_interactions (id, company_id, issue_id, kind, payload, status) "
    "VALUES (%(other)s, %(company)s, %(task)s, 'ask_user_questions', '{{}}', '{status}')"
)
_APPROVAL = (
    "INSERT INTO approvals (id, company_id, type, payload, status) "
    "VALUES (%(other)s, %(company)s, 'request_board_approval', '{{}}', '{status}')"
)
_LINK = (
    "INSERT INTO issue_approvals (company_id, issue_id, approval_id, created_at) "
    "VALUES (%(company)s, %(task)s, %(other)s, now())"
)
_DECISION = (
    "INSERT INTO decisions (id, company_id, origin_agent_id, origin_issue_id, origin_run_id, title, body, options, "
    "status, expires_at, signed_spec, target_snapshots) VALUES (%(other)s, %(company)s, %(agent)s, %({origin})s, "
    "%(run)s, 'which', 'one', '[]', '{status}', now() + interval '1 day', 'x', '{{}}')"
)
_TOOL = (
    "INSERT INTO tool_invocations (id, company_id, actor_type, tool_name, matched_policy_ids, approval_state, "
    "status) VALUES (%(third)s, %(company)s, 'agent', 'send', '[]', 'pending', 'pending')",
    "INSERT INTO tool_action_requests (id, company_id, invocation_id, issue_id, canonical_arguments_hash, "
    "canonical_arguments_summary, status) "
    "VALUES (%(other)s, %(company)s, %(third)s, %(task)s, 'x', '{{}}', '{status}')",
)
_HOLD = (
    "INSERT INTO issue_tree_holds (id, company_id, root_issue_id, mode, status) "
    "VALUES (%(other)s, %(company)s, %({root})s, 'cancel', '{status}')"
)
_MEMBER = (
    "INSERT INTO issue_tree_hold_members (company_id, hold_id, issue_id, depth, issue_title, issue_status) "
    "VALUES (%(company)s, %(other)s, %(task)s, 1, 'own', 'todo')"
)
_RECOVERY = (
    "INSERT INTO issue_recovery_actions (id, company_id, source_issue_id, recovery_issue_id, kind, owner_type, "
    "cause, fingerprint, evidence, next_action, attempt_count, status) VALUES (%(other)s, %(company)s, %({source})s, "
    "%({repair})s, 'stranded', 'agent', 'lost', 'x', '{{}}', 'look', 0, '{status}')"
)
_OPENED = "INSERT INTO issues (id, company_id, title, status) VALUES (%({name})s, %(company)s, 'open', 'todo')"
_BLOCKS = (
    "INSERT INTO issue_relations (id, company_id, issue_id, related_issue_id, type) "
    "VALUES (%(third)s, %(company)s, %(task)s, %(other)s, 'blocks')"
)
_CANCELLED = (
    "UPDATE issues SET status = 'cancelled', cancelled_at = completed_at, completed_at = NULL WHERE id = %(task)s"
)


_CASE = (
    "INSERT INTO pipeline_cases (id, company_id, pipeline_id, stage_id, case_key, title, fields, version, "
    "child_count, terminal_child_count) "
    "VALUES (%(other)s, %(company)s, %(third)s, %(third)s, 'c', 'own', '{}', 1, 0, 0)",
    "INSERT INTO pipeline_case_issue_links (company_id, case_id, issue_id, role) "
    "VALUES (%(company)s, %(other)s, %(task)s, 'automation')",
)


_CHAT = (
    "INSERT INTO chat_conversations (id, company_id, endpoint_id, issue_id, external_conversation_id, "
    "external_thread_id, external_label, is_direct_message, state, session_generation) "
    "VALUES (%(other)s, %(company)s, %(third)s, %(task)s, 'c', 't', 'own', {direct}, '{state}', 1)"
)
_ROUTINE = (
    "INSERT INTO routines (id, company_id, parent_issue_id, title, priority, status, concurrency_policy, "
    "catch_up_policy, variables, latest_revision_number, origin_kind, activity_gate_policy, activity_gate_scope) "
    "VALUES (%(other)s, %(company)s, %(task)s, 'own', 'medium', '{status}', 'x', 'x', '[]', 1, 'x', 'x', 'x')"
)


def _status(table: str, status: str) -> str:
    return f"UPDATE {table} SET status = '{status}' WHERE id = %(other)s"


@dataclass(frozen=True)
class _Case:
    """What makes a guard's condition true, and what takes it away. `own`: it can only be of the task's company."""

    reason: str
    on: tuple[str, ...]
    off: tuple[str, ...]
    own: bool = False


_CASES: dict[str, _Case] = {
    **{
        f"{column} {status}": _Case(
            "run_live",
            (
                f"UPDATE issues SET {column} = %(run)s WHERE id = %(task)s",
                f"UPDATE heartbeat_runs SET status = '{status}' WHERE id = %(run)s",
            ),
            (_ENDED,),
        )
        for column in ("checkout_run_id", "execution_run_id")
        for status in ("running", "scheduled_retry", "unheard_of")
    },
    **{
        f"run by {key}": _Case(
            "run_live",
            (
                f"UPDATE heartbeat_runs SET context_snapshot = jsonb_build_object('{key}', %(task)s::text) "
                "WHERE id = %(run)s",
                _LIVE,
            ),
            (_ENDED,),
        )
        for key in ("issueId", "taskId")
    },
    "run by native_issue_id": _Case(
        "run_live", ("UPDATE heartbeat_runs SET native_issue_id = %(task)s WHERE id = %(run)s", _LIVE), (_ENDED,)
    ),
    "open child": _Case("open_below", (_CHILD.format(status="'todo'", hidden="NULL"),), (_status("issues", "done"),)),
    "open child, then hidden": _Case(
        "open_below",
        (_CHILD.format(status="'unheard_of'", hidden="NULL"),),
        ("UPDATE issues SET hidden_at = now() WHERE id = %(other)s",),
    ),
    "open below a done child": _Case(
        "open_below", (_CHILD.format(status="'done'", hidden="NULL"), _BELOW), (_BELOW_ENDS,)
    ),
    "open below a hidden child": _Case(
        "open_below", (_CHILD.format(status="'todo'", hidden="now()"), _BELOW), (_BELOW_ENDS,)
    ),
    "cancelled blocker, then none": _Case(
        "blocks_open", (_CANCELLED, _OPENED.format(name="other"), _BLOCKS), (_status("issues", "cancelled"),)
    ),
    "cancelled blocker, then done": _Case(
        "blocks_open",
        (_CANCELLED, _OPENED.format(name="other"), _BLOCKS),
        ("UPDATE issues SET status = 'done', completed_at = cancelled_at WHERE id = %(task)s",),
    ),
    **{
        f"interaction {status}": _Case(
            "answer_pending",
            (_INTERACTION.format(status=status),),
            (_status("issue_thread_interactions", "answered"),),
        )
        for status in ("pending", "unheard_of")
    },
    **{
        f"approval {status}": _Case(
            "answer_pending", (_APPROVAL.format(status=status), _LINK), (_status("approvals", "approved"),)
        )
        for status in ("pending", "revision_requested", "unheard_of")
    },
    **{
        f"decision {status}": _Case(
            "answer_pending", (_DECISION.format(status=status, origin="task"),), (_status("decisions", "expired"),)
        )
        for status in ("open", "unheard_of")
    },
    "decision about it": _Case(
        "answer_pending",
        (
            _OPENED.format(name="third"),
            _DECISION.format(status="open", origin="third"),
            "INSERT INTO decision_target_issues (decision_id, issue_id, company_id) "
            "VALUES (%(other)s, %(task)s, %(company)s)",
        ),
        (_status("decisions", "decided"),),
    ),
    **{
        f"tool request {status}": _Case(
            "answer_pending",
            (_TOOL[0], _TOOL[1].format(status=status)),
            (_status("tool_action_requests", "executed"),),
        )
        for status in ("pending", "approved", "unheard_of")
    },
    "held tree": _Case(
        "recovering", (_HOLD.format(root="task", status="active"),), (_status("issue_tree_holds", "released"),)
    ),
    "member of a held tree": _Case(
        "recovering",
        (_OPENED.format(name="third"), _HOLD.format(root="third", status="unheard_of"), _MEMBER),
        (_status("issue_tree_holds", "released"),),
    ),
    "being recovered": _Case(
        "recovering",
        (_OPENED.format(name="third"), _RECOVERY.format(source="task", repair="third", status="escalated")),
        (_status("issue_recovery_actions", "resolved"),),
    ),
    "recovers another": _Case(
        "recovering",
        (_OPENED.format(name="third"), _RECOVERY.format(source="third", repair="task", status="active")),
        (_status("issue_recovery_actions", "cancelled"),),
    ),
    **{
        f"case, then {how}": _Case("case_open", _CASE, (off,))
        for how, off in {
            "over": "UPDATE pipeline_cases SET terminal_kind = 'done' WHERE id = %(other)s",
            "retired": "UPDATE pipeline_cases SET retired_at = now() WHERE id = %(other)s",
            "unlinked": "UPDATE pipeline_case_issue_links SET retired_at = now() WHERE case_id = %(other)s",
            "cancelled": _CANCELLED,
        }.items()
    },
    **{
        f"{'direct chat' if direct else 'thread'} {state}, then {after}": _Case(
            "chat_bound",
            (_CHAT.format(direct=direct, state=state),),
            (f"UPDATE chat_conversations SET state = '{after}' WHERE id = %(other)s",),
        )
        for direct, state, after in (
            (True, "active", "completed"),
            (True, "unheard_of", "endpoint_removed"),
            (False, "waiting", "endpoint_removed"),
            (False, "completed", "endpoint_removed"),
            (False, "unavailable", "endpoint_removed"),
        )
    },
    **{
        f"routine {status}": _Case(
            "has_routine", (_ROUTINE.format(status=status),), (_status("routines", "archived"),)
        )
        for status in ("active", "paused", "unheard_of")
    },
    "harness": _Case(
        "managed",
        ("UPDATE issues SET harness_kind = 'skill_test' WHERE id = %(task)s",),
        ("UPDATE issues SET harness_kind = NULL WHERE id = %(task)s",),
        own=True,
    ),
    "onboarding": _Case(
        "managed",
        ("UPDATE issues SET origin_kind = 'onboarding_first_task' WHERE id = %(task)s",),
        ("UPDATE issues SET origin_kind = 'manual' WHERE id = %(task)s",),
        own=True,
    ),
}


@pytest.mark.parametrize("case", _CASES.values(), ids=_CASES)
def test_a_task_the_app_counts_on_stays_and_goes_once_it_does_not(released: Deployment, case: _Case) -> None:
    board = Board(deployment=released)
    names = {"task": board.task(), "other": uuid4(), "third": uuid4()}
    assert (board.plan().tally.total.rows, board.left()) == (1, {})
    for statement in case.on:
        board.sql(statement, **names)
    assert (board.plan().tally.total.rows, board.left()) == (0, {case.reason: 1})
    result = board.archive()
    assert (result["kept"], result["rows"]) == (True, 0)
    assert [(one["reason"], one["rows"]) for one in result["left"]] == [(case.reason, 1)]
    assert not board.hidden(names["task"])
    for statement in case.off:
        board.sql(statement, **names)
    assert board.left() == {}
    assert board.archive()["kept"]
    assert board.hidden(names["task"])


_FOREIGN = {name: case for name, case in _CASES.items() if not case.own}


@pytest.mark.parametrize("case", _FOREIGN.values(), ids=_FOREIGN)
def test_rows_of_another_company_never_hold(released: Deployment, case: _Case) -> None:
    board, other = Board(deployment=released), Board(deployment=released)
    names = {"task": board.task(), "other": uuid4(), "third": uuid4()}
    for statement in case.on:
        other.sql(statement, **names)
    assert (board.plan().tally.total.rows, board.left()) == (1, {})


def test_every_guard_has_a_case() -> None:
    assert {keep.reason for keep in LAYOUTS["paperclip"].tasks.keeps} == {case.reason for case in _CASES.values()}


def test_a_hidden_open_child_does_not_hold(released: Deployment) -> None:
    board = Board(deployment=released)
    task = board.task()
    board.sql(_CHILD.format(status="'todo'", hidden="now()"), task=task, other=uuid4())
    assert board.archive()["rows"] == 1
    assert board.hidden(task)


def test_a_done_blocker_does_not_hold(released: Deployment) -> None:
    board = Board(deployment=released)
    names = {"task": board.task(), "other": uuid4(), "third": uuid4()}
    for statement in (_OPENED.format(name="other"), _BLOCKS):
        board.sql(statement, **names)
    assert board.archive()["rows"] == 1


def test_a_circle_of_parents_comes_to_an_end(released: Deployment) -> None:
    board = Board(deployment=released)
    first, second, third = board.tasks(3)
    for task, parent in ((first, second), (second, third), (third, first)):
        board.sql("UPDATE issues SET parent_id = %(parent)s WHERE id = %(task)s", task=task, parent=parent)
    opened = uuid4()
    board.sql(_CHILD.format(status="'todo'", hidden="NULL"), task=second, other=opened)
    assert (board.archive()["rows"], board.left()) == (0, {"open_below": 3})
    board.sql(_status("issues", "done"), other=opened)
    assert board.archive()["rows"] == 3


def test_the_first_guard_counts_a_task_that_several_hold(released: Deployment) -> None:
    board = Board(deployment=released)
    names = {"task": board.task(), "other": uuid4()}
    for statement in (*_CASES["harness"].on, *_CASES["open child"].on, *_CASES["run by issueId"].on):
        board.sql(statement, **names)
    assert board.left() == {"run_live": 1}


def test_many_ended_tasks_below_one_are_looked_at_once_each(released: Deployment) -> None:
    """The planner expects as many below any: it must not scan them, or make room for them, at each of them."""
    board, many = Board(deployment=released), 2_000
    (task,) = board.tasks(1)
    board.sql(
        "INSERT INTO issues (company_id, title, parent_id, status, completed_at) SELECT %(company)s, 'child', "
        "%(task)s, 'done', now() FROM generate_series(1, %(many)s)",
        task=task,
        many=many,
    )
    board.sql("ANALYZE issues")
    (keep,) = (one for one in LAYOUTS["paperclip"].tasks.keeps if one.reason == "open_below")
    query = sa.select(sa.func.count()).select_from(LAYOUTS["paperclip"].tasks.table).where(~keep.rows)
    text = query.compile(dialect=released.operations.engine.dialect, compile_kwargs={"literal_binds": True})
    with released.operations.engine.connect() as connection:
        nodes = list(explained.nodes(explained.plan(connection, str(text))))
    assert sum(one["Actual Rows"] * one["Actual Loops"] for one in nodes if "Relation Name" in one) < 6 * many
    assert {one["Plan Rows"] < 10_000 for one in nodes if one["Node Type"] == "Recursive Union"} == {True}
