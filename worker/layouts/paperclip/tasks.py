"""Tasks (`issues`) of the released schema: which may be put out of sight, and which the app still counts on.

Facts: reference/paperclip-schema.md §3. A status that this release does not know counts as one that is not over.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import sqlalchemy as sa

from worker.layouts.model import Keep, TaskTable, is_one_of, uuids
from worker.layouts.paperclip.tables import (
    RUNS,
    TERMINAL_ISSUE,
    TERMINAL_RUN,
    catalogued,
    table,
)

_UUID = sa.Uuid
_ended = ("completed_at", "cancelled_at", "updated_at", "hidden_at")
TASKS = table(
    "issues",
    wide=True,
    id=_UUID,
    company_id=_UUID,
    identifier=sa.Text,
    status=sa.Text,
    status_version=sa.BigInteger,
    **{name: sa.DateTime(timezone=True) for name in _ended},
    parent_id=_UUID,
    checkout_run_id=_UUID,
    execution_run_id=_UUID,
    conversation_agent_id=_UUID,
    harness_kind=sa.Text,
    origin_kind=sa.Text,
    origin_fingerprint=sa.Text,
    **catalogued("issues"),
)
_RELATIONS = table("issue_relations", company_id=_UUID, issue_id=_UUID, related_issue_id=_UUID, type=sa.Text)
_INTERACTIONS = table("issue_thread_interactions", company_id=_UUID, issue_id=_UUID, status=sa.Text)
_LINKS = table("issue_approvals", company_id=_UUID, issue_id=_UUID, approval_id=_UUID)
_APPROVALS = table("approvals", id=_UUID, status=sa.Text)
_DECISIONS = table("decisions", id=_UUID, company_id=_UUID, origin_issue_id=_UUID, status=sa.Text)
_TARGETS = table("decision_target_issues", company_id=_UUID, issue_id=_UUID, decision_id=_UUID)
_TOOL_ACTIONS = table("tool_action_requests", company_id=_UUID, issue_id=_UUID, status=sa.Text)
_HOLDS = table("issue_tree_holds", id=_UUID, company_id=_UUID, root_issue_id=_UUID, status=sa.Text)
_HELD = table("issue_tree_hold_members", company_id=_UUID, issue_id=_UUID, hold_id=_UUID)
_RECOVERY = table(
    "issue_recovery_actions", company_id=_UUID, source_issue_id=_UUID, recovery_issue_id=_UUID, status=sa.Text
)

_CASE_LINKS = table(
    "pipeline_case_issue_links",
    company_id=_UUID,
    case_id=_UUID,
    issue_id=_UUID,
    retired_at=sa.DateTime(timezone=True),
)
_CHATS = table("chat_conversations", company_id=_UUID, issue_id=_UUID, state=sa.Text, is_direct_message=sa.Boolean)
_ROUTINES = table("routines", company_id=_UUID, parent_issue_id=_UUID, status=sa.Text)
_CASES = table("pipeline_cases", id=_UUID, terminal_kind=sa.Text, retired_at=sa.DateTime(timezone=True))


def _of_task(other: sa.Table, column: str, over: Sequence[str]) -> sa.Exists:
    """Whether a row of another table points at the task and is not over."""
    return sa.exists(other.c.company_id).where(
        other.c.company_id == TASKS.c.company_id, other.c[column] == TASKS.c.id, other.c.status.not_in(over)
    )


def _run_live() -> Keep:
    live = sa.and_(RUNS.c.company_id == TASKS.c.company_id, RUNS.c.status.not_in(TERMINAL_RUN))
    holds = sa.or_(RUNS.c.id == TASKS.c.checkout_run_id, RUNS.c.id == TASKS.c.execution_run_id)
    # By heartbeat_runs_company_ctx_issue_created_idx, ..._ctx_task_created_idx and ..._native_issue_id_uq.
    task = sa.cast(TASKS.c.id, sa.Text)
    works = (
        RUNS.c.context_snapshot["issueId"].astext == task,
        RUNS.c.context_snapshot["taskId"].astext == task,
        RUNS.c.native_issue_id == TASKS.c.id,
    )
    return Keep(
        reason="run_live",
        why="a run that has not ended works on the task or holds it",
        rows=sa.or_(*(sa.exists(RUNS.c.id).where(live, term) for term in (holds, *works))),
        reads=(RUNS,),
    )


def _child(name: str, of: sa.FromClause) -> sa.Select[Any]:
    """A task right below one of these, by issues_company_parent_idx.

    The range says what the equality says. It is there for the planner, which expects as many children of each task
    as one has that has most of them, and would scan the table each time: of a range whose ends it does not know it
    expects one in two hundred.
    """
    child, parent = TASKS.alias(name), of.c.id
    opened = sa.and_(child.c.status.not_in(TERMINAL_ISSUE), child.c.hidden_at.is_(None))
    return sa.select(child.c.id, child.c.company_id, opened.label("opened")).where(
        child.c.company_id == of.c.company_id, child.c.parent_id == parent, child.c.parent_id.between(parent, parent)
    )


def _downwards(tree: sa.CTE, name: str) -> sa.CTE:
    """A tree from its first tasks down. A union without ALL, so that a circle of parents comes to an end."""
    # OFFSET 0 makes it go by the index for each: what else it would be joined by depends on guesses.
    child = _child(name, tree).correlate(tree).offset(0).lateral(f"{name}_of")
    found = (child.c[column.name] for column in tree.c)
    return tree.union(sa.select(*found).select_from(tree.join(child, sa.true())))


def _open_below() -> Keep:
    # From the task itself, which counts as over here: the planner knows that this is one row.
    one = sa.select(sa.literal_column("1").label("one")).subquery("top")
    top = sa.select(TASKS.c.id, TASKS.c.company_id, sa.false().label("opened")).select_from(one).correlate(TASKS)
    tree = _downwards(top.cte("tree", recursive=True, nesting=True), "below")
    # Most tasks have none below them. A CASE, because the two halves of an AND may be asked in any order.
    some = _child("child", TASKS).correlate(TASKS).exists()
    return Keep(
        reason="open_below",
        why="a task below it is open and visible, and would drop out of sight with it",
        rows=sa.case((some, sa.exists(tree.c.id).where(tree.c.opened)), else_=sa.false()),
        reads=(TASKS,),
    )


def _blocks_open() -> Keep:
    blocked = TASKS.alias("blocked")
    return Keep(
        reason="blocks_open",
        why="it was cancelled and still blocks an open task, which nobody could see the reason of",
        rows=sa.and_(
            TASKS.c.status != "done",
            sa.exists(_RELATIONS.c.issue_id).where(
                _RELATIONS.c.company_id == TASKS.c.company_id,
                _RELATIONS.c.issue_id == TASKS.c.id,
                _RELATIONS.c.type == "blocks",
                blocked.c.id == _RELATIONS.c.related_issue_id,
                blocked.c.status.not_in(TERMINAL_ISSUE),
            ),
        ),
        reads=(_RELATIONS, TASKS),
    )


def _answer_pending() -> Keep:
    approval = sa.exists(_LINKS.c.issue_id).where(
        _LINKS.c.issue_id == TASKS.c.id,
        _LINKS.c.company_id == TASKS.c.company_id,
        _APPROVALS.c.id == _LINKS.c.approval_id,
        _APPROVALS.c.status.not_in(("approved", "rejected", "cancelled")),
    )
    interaction = ("accepted", "rejected", "answered", "cancelled", "expired", "failed")
    action = ("rejected", "expired", "cancelled", "executed", "failed")
    decision = ("decided", "expired", "cancelled")
    target = sa.exists(_TARGETS.c.issue_id).where(
        _TARGETS.c.issue_id == TASKS.c.id,
        _TARGETS.c.company_id == TASKS.c.company_id,
        _DECISIONS.c.id == _TARGETS.c.decision_id,
        _DECISIONS.c.status.not_in(decision),
    )
    return Keep(
        reason="answer_pending",
        why="a question, approval, decision or tool request on it waits for an answer",
        rows=sa.or_(
            _of_task(_INTERACTIONS, "issue_id", interaction),
            approval,
            _of_task(_DECISIONS, "origin_issue_id", decision),
            target,
            _of_task(_TOOL_ACTIONS, "issue_id", action),
        ),
        reads=(_INTERACTIONS, _LINKS, _APPROVALS, _DECISIONS, _TARGETS, _TOOL_ACTIONS),
    )


def _recovering() -> Keep:
    over, released = ("resolved", "cancelled"), ("released",)
    # A hold that cancelled a tree can restore its tasks, which then must not be out of sight.
    member = sa.exists(_HELD.c.issue_id).where(
        _HELD.c.issue_id == TASKS.c.id,
        _HELD.c.company_id == TASKS.c.company_id,
        _HOLDS.c.id == _HELD.c.hold_id,
        _HOLDS.c.status.not_in(released),
    )
    return Keep(
        reason="recovering",
        why="the app holds its tree and may restore it, or repairs it",
        rows=sa.or_(
            _of_task(_HOLDS, "root_issue_id", released),
            member,
            _of_task(_RECOVERY, "source_issue_id", over),
            _of_task(_RECOVERY, "recovery_issue_id", over),
        ),
        reads=(_HOLDS, _HELD, _RECOVERY),
    )


def _case_open() -> Keep:
    return Keep(
        reason="case_open",
        why="a pipeline's case that is not over hands on what the task brought forth, as long as it is in sight",
        rows=sa.and_(
            # The app itself passes over those that were cancelled.
            TASKS.c.status != "cancelled",
            sa.exists(_CASE_LINKS.c.issue_id).where(
                _CASE_LINKS.c.issue_id == TASKS.c.id,
                _CASE_LINKS.c.company_id == TASKS.c.company_id,
                _CASE_LINKS.c.retired_at.is_(None),
                _CASES.c.id == _CASE_LINKS.c.case_id,
                _CASES.c.terminal_kind.is_(None),
                _CASES.c.retired_at.is_(None),
            ),
        ),
        reads=(_CASE_LINKS, _CASES),
    )


def _chat_bound() -> Keep:
    # A direct chat that is completed goes on with another task; a thread comes back to its own, whatever its state.
    closed = sa.or_(
        _CHATS.c.state == "endpoint_removed", sa.and_(_CHATS.c.state == "completed", _CHATS.c.is_direct_message)
    )
    return Keep(
        reason="chat_bound",
        why="a message in its chat thread or mailbox would set it to work again, where nobody sees it",
        rows=sa.exists(_CHATS.c.issue_id).where(
            _CHATS.c.company_id == TASKS.c.company_id, _CHATS.c.issue_id == TASKS.c.id, ~closed
        ),
        reads=(_CHATS,),
    )


def _has_routine() -> Keep:
    return Keep(
        reason="has_routine",
        why="a routine that is not archived opens tasks below it",
        rows=_of_task(_ROUTINES, "parent_issue_id", ("archived",)),
        reads=(_ROUTINES,),
    )


def _managed() -> Keep:
    return Keep(
        reason="managed",
        why="a conversation, an onboarding task or a harness task, which the app shows and hides by itself",
        rows=sa.or_(
            TASKS.c.conversation_agent_id.is_not(None),
            TASKS.c.harness_kind.is_not(None),
            TASKS.c.origin_kind == "onboarding_first_task",
        ),
    )


def _below(ids: Sequence[str]) -> sa.ColumnElement[bool]:
    """Every task somewhere below one of these tasks, and these."""
    top = TASKS.alias("top")
    held = sa.select(top.c.id, top.c.company_id).where(is_one_of(top.c.id, uuids(ids), _UUID))
    tree = _downwards(held.cte("held", recursive=True, nesting=True), "child_of")
    return TASKS.c.id.in_(sa.select(tree.c.id))


def _named(kind: str) -> tuple[Any, ...]:
    return tuple(TASKS.c[name] for name in catalogued("issues", kind))


TASK_TABLE = TaskTable(
    table=TASKS,
    key=TASKS.c.id,
    # updated_at moves with every comment, so it counts only where neither end is noted.
    age=sa.func.coalesce(TASKS.c.completed_at, TASKS.c.cancelled_at, TASKS.c.updated_at),
    company=TASKS.c.company_id,
    indexed=False,
    updated=True,
    among=sa.and_(TASKS.c.status.in_(TERMINAL_ISSUE), TASKS.c.hidden_at.is_(None)),
    keeps=(
        _run_live(),
        _open_below(),
        _blocks_open(),
        _answer_pending(),
        _recovering(),
        _case_open(),
        _chat_bound(),
        _has_routine(),
        _managed(),
    ),
    users=_named("personal"),
    # One that was made for a task names it; `origin_id` may be of a user as well, or be put together of several ids.
    tasks=(TASKS.c.parent_id, *_named("personal")),
    of_tasks=_below,
    texts=(*_named("content"), *_named("personal"), TASKS.c.origin_fingerprint),
    # Neither updated_at nor status is set: the app compares and sorts by the one, a trigger counts the other.
    archived=lambda now: {"hidden_at": now},
    open=TASKS.c.status.not_in(TERMINAL_ISSUE),
    back={"hidden_at": None},
    mark=sa.func.concat_ws("|", TASKS.c.updated_at, TASKS.c.status, TASKS.c.status_version, TASKS.c.hidden_at),
)
