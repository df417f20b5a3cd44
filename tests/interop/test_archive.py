"""archive-tasks on the schema that the real release's own migrations make."""

from __future__ import annotations

from typing import Any
from uuid import uuid4

import psycopg
import pytest

from tests.conftest import Deployment
from tests.promises.board import Board

pytestmark = pytest.mark.interop

_BUT_HIDDEN = "SELECT id::text, md5((to_jsonb(t) - 'hidden_at')::text) FROM issues t ORDER BY id"
_CONVERSATION = (
    "INSERT INTO issues (id, company_id, title, status, assignee_agent_id, conversation_agent_id, "
    "conversation_user_id, conversation_state, created_at, updated_at) VALUES (%(task)s, %(company)s, 'talk', "
    "'todo', %(agent)s, %(agent)s, 'someone', 'waiting', now() - interval '90 days', now() - interval '90 days')"
)


def _archived(board: Board) -> tuple[dict[str, Any], set[str]]:
    result = board.archive(company=())
    notes = board.sql(
        "SELECT task::text FROM paperclip_worker.archived_tasks WHERE run_id = %(of)s", of=result["run"]
    )
    return result, {task for (task,) in notes}


def test_only_the_mark_of_the_tasks_of_the_tally_differs(real: Deployment) -> None:
    """Neighbours, blockers, comments, conversations: all as they were. The trigger on status counted nothing."""
    board = Board(deployment=real)
    talk, others = uuid4(), ("activity_log", "issues")
    board.sql(_CONVERSATION, task=talk)
    tables, rows = real.digest(without=others), board.sql(_BUT_HIDDEN)
    marks = dict(board.sql("SELECT id::text, hidden_at FROM issues"))
    result, archived = _archived(board)
    assert result["kept"]
    assert len(archived) == result["rows"] > 20
    assert real.digest(without=others) == tables
    assert board.sql(_BUT_HIDDEN) == rows
    after = dict(board.sql("SELECT id::text, hidden_at FROM issues"))
    assert {task for task, mark in after.items() if mark != marks[task]} == archived
    assert str(talk) not in archived


def test_what_the_app_counts_on_is_in_sight(real: Deployment) -> None:
    """Asked of the real tables in words of our own, not by the guards."""
    board = Board(deployment=real)
    result, archived = _archived(board)
    reasons = {one["reason"] for one in result["left"]}
    assert reasons >= {"run_live", "open_below", "blocks_open", "answer_pending", "recovering", "managed"}
    open_children = board.sql(
        "SELECT parent_id::text FROM issues WHERE parent_id IS NOT NULL AND hidden_at IS NULL "
        "AND status NOT IN ('done', 'cancelled')"
    )
    blockers = board.sql(
        "SELECT b.id::text FROM issue_relations r JOIN issues b ON b.id = r.issue_id "
        "JOIN issues o ON o.id = r.related_issue_id WHERE b.status = 'cancelled' AND o.status = 'todo'"
    )
    worked_on = board.sql("SELECT context_snapshot ->> 'issueId' FROM heartbeat_runs WHERE status = 'running'")
    assert open_children
    assert worked_on
    assert not archived & {task for (task,) in (*open_children, *blockers, *worked_on)}


def test_undo_gives_the_very_database_back(real: Deployment) -> None:
    board = Board(deployment=real)
    said = (
        "SELECT md5(string_agg(t::text, '|' ORDER BY id)) FROM activity_log t WHERE action NOT LIKE 'maintenance.%%'"
    )
    before, log = real.digest(without=("activity_log",)), board.sql(said)
    result, archived = _archived(board)
    undone = board.undo(result, company=())
    assert (undone["kept"], undone["rows"]) == (True, len(archived))
    assert real.digest(without=("activity_log",)) == before
    assert board.sql(said) == log
    companies = {one["company"] for one in result["tally"]}
    ((rows,),) = board.sql("SELECT count(*) FROM activity_log WHERE action LIKE 'maintenance.%%'")
    assert rows == 2 * len(companies)


def test_a_conversation_cannot_end_so_it_is_never_archived(real: Deployment) -> None:
    board = Board(deployment=real)
    talk = uuid4()
    board.sql(_CONVERSATION, task=talk)
    with pytest.raises(psycopg.errors.CheckViolation, match="issues_conversation_identity_check"):
        board.sql("UPDATE issues SET status = 'done', completed_at = updated_at WHERE id = %(task)s", task=talk)
    assert board.archive()["rows"] == 0
    assert not board.hidden(talk)


def test_the_guards_find_their_indexes(real: Deployment) -> None:
    """By the names that the comments of the guards rely on."""
    names = {name for (name,) in real.query("SELECT indexname FROM pg_indexes WHERE schemaname = 'public'")}
    assert names >= {
        "heartbeat_runs_company_ctx_issue_created_idx",
        "heartbeat_runs_company_ctx_task_created_idx",
        "heartbeat_runs_company_native_issue_id_uq",
        "issues_company_parent_idx",
        "issue_tree_hold_members_company_issue_idx",
        "decision_target_issues_issue_idx",
        "decisions_origin_issue_idx",
        "issue_relations_company_issue_idx",
    }
