"""How prune-logs copies rows out before they go: many lines at once, and never more than fit."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta
from typing import Any
from uuid import UUID

import pytest
import sqlalchemy as sa

from tasks.prune_logs import PruneLogs
from tests.conftest import Deployment
from worker import audit, copies, copyout, layouts, rules
from worker.archive import ArchivedObject
from worker.errors import WorkerError
from worker.job import Batch
from worker.means import Means
from worker.plans import Tally

JOB = PruneLogs()


@contextmanager
def _means(deployment: Deployment) -> Iterator[Means]:
    operations = deployment.operations
    now = operations.plan(JOB).now
    with operations.transaction(scan=True) as connection:
        layout = layouts.LAYOUTS[deployment.layout]
        yield Means(
            connection=connection,
            now=now,
            layout=layout,
            settings=operations.settings,
            run=UUID(int=0),
            store=operations.store,
        )
        connection.rollback()


def _bites(means: Means, limit: int) -> Iterator[tuple[Batch, tuple[ArchivedObject, ...], Tally]]:
    """Every bite of a run of at most about so many rows, with the objects it wrote and what it deleted."""
    for shard in JOB.shards(means, JOB.plan(means)):
        after = None
        while (batch := JOB.claim(means, shard, after, limit)) is not None:
            kept, objects = JOB.preserve(means, batch)
            yield batch, objects, JOB.apply(means, kept)
            after = batch.after
            if batch.exhausted:
                break


@pytest.mark.parametrize("unit", ["month", pytest.param("century", marks=pytest.mark.long)])
def test_rows_of_one_moment_are_never_one_bite(deployment: Deployment, unit: str) -> None:
    """Many rows of the very same age: the age alone does not say where a bite ends."""
    age = layouts.LAYOUTS[deployment.layout].log("activity_log").age.name
    deployment.query(f'UPDATE activity_log SET "{age}" = date_trunc(\'{unit}\', "{age}")')
    with _means(deployment) as means:
        planned = JOB.plan(means).tally
        bites = list(_bites(means, 5))
    assert sum((tally for _, _, tally in bites), Tally()) == planned
    assert max(tally.total.rows for _, _, tally in bites) < 10
    assert sum(one.rows for _, objects, _ in bites for one in objects) == planned.total.rows


@pytest.mark.parametrize("held", ["company", "user", "task"])
def test_what_remains_is_what_a_plan_would_say(deployment: Deployment, held: str) -> None:
    """Verify asks in another way than the plan, and must come to the same."""
    task = {
        "guide": "SELECT metadata->>'taskId' FROM activity_log ORDER BY timestamp LIMIT 1",
        "paperclip": "SELECT a.entity_id FROM activity_log a JOIN issues i ON i.id::text = a.entity_id "
        "AND i.status = 'done' ORDER BY a.created_at LIMIT 1",
    }
    ((name,),) = deployment.query(
        {
            "company": "SELECT id::text FROM companies ORDER BY 1 LIMIT 1",
            "user": "SELECT actor_id FROM activity_log WHERE actor_type = 'user' ORDER BY 1 LIMIT 1",
            "task": task[deployment.layout],
        }[held]
    )
    rules.add_hold(deployment.operations, kind=held, name=name, reason="case", actor="counsel", until=None)
    with _means(deployment) as means:
        rows = JOB._expired(means)
        targets, left = rows.count(means.connection)
        assert rows.remaining(means.connection) == (
            tuple(replace(one, bytes=0, digest="0" * 16) for one in targets),
            left,
        )
        assert {one.reason for one in left} >= {"legal_hold"}
        for _ in _bites(means, 1_000):
            pass
        assert rows.remaining(means.connection) == ((), left)
        assert rows.count(means.connection) == ((), left)


def test_a_row_that_a_trigger_keeps_undoes_the_bite(released: Deployment) -> None:
    """The archive would have a row that is still there."""
    released.query(
        "CREATE FUNCTION keep() RETURNS trigger LANGUAGE plpgsql AS "
        "$$ BEGIN RETURN CASE WHEN OLD.action <> 'issue.updated' THEN OLD END; END $$"
    )
    released.query("CREATE TRIGGER keep BEFORE DELETE ON activity_log FOR EACH ROW EXECUTE FUNCTION keep()")
    before = released.query("SELECT count(*) FROM activity_log")
    run = released.operations.start(JOB, actor="tester", via="test")
    with pytest.raises(WorkerError, match="as if a trigger kept the others; nothing was deleted"):
        released.operations.runner().work(run, seconds=math.inf)
    assert released.query("SELECT count(*) FROM activity_log") == before
    assert released.query("SELECT state FROM paperclip_worker.runs") == [("failed",)]
    assert released.query("SELECT count(*) FROM paperclip_worker.objects") == [(0,)]


def test_a_query_is_filled_with_a_term(released: Deployment) -> None:
    """Each counts its parameters from one, and a term may be an OR and have a percent sign."""
    number = sa.func.generate_series(1, 9).column_valued("n")
    with released.operations.transaction() as connection:
        query = copyout.compiled(sa.select(number).where(number > 2, copyout.HOLE), connection.dialect)
        for term, expected in ((sa.or_(number % 2 == 1, number == 2), [3, 5, 7, 9]), (number < 5, [3, 4])):
            found = copyout.rows(connection, copyout.filled(query, term, connection.dialect))
            assert [int.from_bytes(value) for (value,) in found] == expected


def test_a_large_row_is_not_put_together_with_others(released: Deployment) -> None:
    released.query(
        "UPDATE activity_log SET details = to_jsonb(array(SELECT md5(random()::text) FROM generate_series(1, 500))) "
        "WHERE id IN (SELECT id FROM activity_log ORDER BY created_at LIMIT 20)"
    )
    with _means(released) as means:
        rows = JOB._expired(means)
        batch = Batch(after={}, exhausted=True, window=sa.true())
        query = copies.query(rows, means.columns(rows.what), means.connection.dialect, batch)
        chunks = copyout.rows(means.connection, query)
        sizes = [(int.from_bytes(number), len(text)) for _, number, _, _, _, _, text in chunks]
    large = [number for number, length in sizes if length > 15_000 and number == 1]
    assert len(large) >= 1
    assert max(length / number for number, length in sizes if number > 1) < 5_000
    assert max(number for number, _ in sizes) > 10


@pytest.mark.parametrize(("setting", "waits"), [("on", "on"), ("remote_apply", "remote_apply"), ("off", "local")])
def test_bites_do_not_wait_for_the_disk_and_the_receipt_does(
    released: Deployment, monkeypatch: pytest.MonkeyPatch, setting: str, waits: str
) -> None:
    """Whatever the database has for others: an anchor of a receipt that a crash takes back is never good again."""
    seen: dict[str, set[str]] = {"claim": set(), "append": set()}

    def note(owner: Any, name: str, connection: Callable[..., sa.Connection]) -> None:
        original = getattr(owner, name)

        def noting(*args: Any, **more: Any) -> Any:
            seen[name].add(connection(*args).scalar(sa.text("SHOW synchronous_commit")))
            return original(*args, **more)

        monkeypatch.setattr(owner, name, noting)

    note(PruneLogs, "claim", lambda _, means, *_more: means.connection)
    note(audit, "append", lambda connection, *_more: connection)
    # The servers of the tests never wait.
    released.query(
        "DO $$ BEGIN EXECUTE "
        f"format('ALTER DATABASE %I SET synchronous_commit = {setting}', current_database()); END $$"
    )
    operations = released.with_settings()
    operations.runner().work(operations.start(JOB, actor="tester", via="test"), seconds=math.inf)
    assert seen == {"claim": {"off"}, "append": {waits}}


def test_security_events_stay_where_that_was_asked_for(deployment: Deployment) -> None:
    age = layouts.LAYOUTS[deployment.layout].log("activity_log").age.name
    stays = ("auth.login", "secret.read", "company.updated", "company_member.removed", "board_api_key.created")
    goes = ("authx", "companyx.updated", "issue.updated")
    free = ""
    if deployment.layout == "paperclip":
        deployment.query("DELETE FROM decision_effect_executions")
        free = ", entity_type = 'x', run_id = NULL"
    deployment.query(f"UPDATE activity_log SET action = 'other'{free}")
    for number, action in enumerate((*stays, *goes)):
        deployment.query(
            f'UPDATE activity_log SET action = %s WHERE id = (SELECT id FROM activity_log ORDER BY "{age}" '
            f"OFFSET {number * 3} LIMIT 1)",
            action,
        )
    job = PruneLogs(older_than=timedelta(days=20), keep_security=True)
    found = deployment.query("SELECT action FROM activity_log WHERE action = ANY(%s)", [*stays, *goes])
    assert set(found) == {(one,) for one in (*stays, *goes)}
    run = deployment.operations.start(job, actor="tester", via="test")
    deployment.operations.runner().work(run, seconds=math.inf)
    result = deployment.operations.result(run)
    assert result["kept"]
    assert sum(one["rows"] for one in result["left"] if one["reason"] == "security") == len(stays)
    assert set(deployment.query("SELECT action FROM activity_log WHERE action = ANY(%s)", [*stays, *goes])) == {
        (one,) for one in stays
    }
