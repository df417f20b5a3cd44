"""archive-tasks against one giant UPDATE of the same rows: read the ratios, not the seconds."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID

import psycopg
import pytest
import sqlalchemy as sa

from tests.benchmarks import bench
from tests.benchmarks.bench import Bench
from worker import config, layouts
from worker.means import Means
from worker.operations import Operations

pytestmark = [pytest.mark.benchmark, pytest.mark.timeout(3600)]

# Of 200 days; the seeded tasks of the demo are among them. A released task takes ten times as long as a guide one.
TASKS = {"guide": 1_000_000, "paperclip": 100_000}
_AGE = "t.updated_at < now() - '30 days'::interval"
_BODY = "repeat(md5(g::text) || ' ', 5 + g % 25)"
_AT = "now() - g * (interval '200 days' / %(tasks)s)"
_PLACES = """
FROM generate_series(1, %(tasks)s) g
JOIN (SELECT id, row_number() OVER (ORDER BY id) - 1 AS n, count(*) OVER () AS m FROM companies) c ON c.n = g % c.m
"""
_FILL = {
    "guide": (
        f"INSERT INTO tasks (id, company_id, title, description, status, created_at, updated_at) "
        f"SELECT md5('t' || g)::uuid, c.id, 'Task ' || g, {_BODY}, "
        f"CASE WHEN g % 12 = 0 THEN 'todo' ELSE 'completed' END, {_AT} - interval '9 days', {_AT} {_PLACES} "
        f"ORDER BY g",
    ),
    # A tenth are children, a few are open; runs of half of the tasks, blockers, answered and open questions.
    "paperclip": (
        f"INSERT INTO issues (id, company_id, title, description, status, identifier, parent_id, completed_at, "
        f"created_at, updated_at) "
        f"SELECT md5('t' || g)::uuid, c.id, 'Task ' || md5(g::text), {_BODY}, "
        f"CASE WHEN g % 12 = 0 THEN 'todo' ELSE 'done' END, 'B-' || g, "
        f"CASE WHEN g % 10 = 9 AND g > 9 THEN md5('t' || g - 8)::uuid END, "
        f"CASE WHEN g % 12 > 0 THEN {_AT} END, {_AT} - interval '9 days', {_AT} {_PLACES} ORDER BY g",
        f"INSERT INTO heartbeat_runs (company_id, agent_id, status, context_snapshot, created_at) "
        f"SELECT c.id, (SELECT id FROM agents WHERE company_id = c.id LIMIT 1), "
        f"CASE WHEN g % 2000 = 1 THEN 'running' ELSE 'succeeded' END, "
        f"jsonb_build_object('issueId', md5('t' || g), 'taskId', md5('t' || g)), {_AT} {_PLACES} WHERE g % 2 = 1",
        f"INSERT INTO issue_thread_interactions (company_id, issue_id, kind, status, payload) "
        f"SELECT c.id, md5('t' || g)::uuid, 'ask_user_questions', "
        f"CASE WHEN g % 500 = 0 THEN 'pending' ELSE 'answered' END, '{{}}' {_PLACES} WHERE g % 5 = 0",
        f"INSERT INTO issue_relations (id, company_id, issue_id, related_issue_id, type, created_at, updated_at) "
        f"SELECT gen_random_uuid(), c.id, md5('t' || g)::uuid, md5('t' || g - 8)::uuid, 'blocks', now(), now() "
        f"{_PLACES} WHERE g % 7 = 0 AND g > 8",
    ),
}
_GOING = {
    "guide": f"SELECT id::text FROM tasks t WHERE status = 'completed' AND {_AGE}",
    "paperclip": f"SELECT id::text FROM issues t WHERE status = 'done' AND hidden_at IS NULL AND {_AGE}",
}
# What an UPDATE of the app locks.
_TOUCH = {
    "guide": "SELECT 1 FROM tasks WHERE id = %s FOR NO KEY UPDATE",
    "paperclip": "SELECT 1 FROM issues WHERE id = %s FOR NO KEY UPDATE",
}
WANTED = {"guide": 0.8, "paperclip": 0.6}


def _deployment(large: Bench, layout: str) -> dict[str, str]:
    """The environment of a fresh copy of a deployment with so many tasks."""

    def fill_in(url: str) -> None:
        with psycopg.connect(url, autocommit=True) as connection:
            for statement in _FILL[layout]:
                connection.execute(statement.replace("%(tasks)s", str(TASKS[layout])).encode())
            connection.execute("VACUUM ANALYZE")

    return large.copy(f"tasks_{layout}", layout, fill_in)


def _run(environment: dict[str, str], *words: str) -> tuple[dict[str, Any], float]:
    """A run by a real worker with its default two processes: its result, and rows/s from entered to settled."""
    result = bench.cli(environment, "run", "archive-tasks", "--yes", "--json", *words)
    assert result["kept"]
    began, ended = (datetime.fromisoformat(result[name]) for name in ("created_at", "settled_at"))
    return result, result["rows"] / (ended - began).total_seconds()


def _archived(environment: dict[str, str], run: str) -> list[UUID]:
    with psycopg.connect(environment["DATABASE_URL"]) as connection:
        query = "SELECT task FROM paperclip_worker.archived_tasks WHERE run_id = %s"
        return [row[0] for row in connection.execute(query, (run,))]


def _by_ids(environment: dict[str, str], layout: str, ids: list[UUID]) -> float:
    """Rows/s of one UPDATE of these rows, without a guard or a note."""
    what = "issues SET hidden_at = now()" if layout == "paperclip" else "tasks SET archived = true"
    with psycopg.connect(environment["DATABASE_URL"]) as connection:
        connection.execute("CREATE TEMP TABLE going (key uuid PRIMARY KEY)")
        with connection.cursor().copy("COPY going FROM STDIN") as copy:
            for one in ids:
                copy.write_row((one,))
        connection.execute("ANALYZE going")
        connection.commit()
        began = time.perf_counter()
        done = connection.execute(f"UPDATE {what} FROM going WHERE going.key = id".encode()).rowcount
        connection.commit()
    assert done == len(ids)
    return done / (time.perf_counter() - began)


def _with_guards(environment: dict[str, str], layout: str) -> tuple[int, float]:
    """Rows, and rows/s, of one UPDATE of every row the job's own predicate allows."""
    operations = Operations(config.load(environment))
    with operations.transaction(scan=True) as connection:
        means = Means(
            connection=connection,
            now=datetime.now(UTC),
            layout=layouts.LAYOUTS[layout],
            settings=operations.settings,
        )
        tasks = means.layout.tasks
        cutoffs = means.cutoffs(tasks.name, asked=timedelta(days=30), default=timedelta(days=30))
        rows = means.rows(tasks, cutoffs=cutoffs, companies=(), keeps=tasks.keeps)
        began = time.perf_counter()
        done = connection.execute(
            sa.update(tasks.table).where(rows.eligible).values(dict(tasks.archived(means.now)))
        ).rowcount
        connection.commit()
        seconds = time.perf_counter() - began
    operations.close()
    return done, done / seconds


def _writer(environment: dict[str, str], layout: str) -> AbstractContextManager[Callable[[], dict[str, float]]]:
    return bench.writer(environment["DATABASE_URL"], going=_GOING[layout], touch=_TOUCH[layout])


@pytest.mark.parametrize("layout", ["guide", "paperclip"])
def test_rate(large: Bench, capsys: Any, layout: str) -> None:
    """At least 0.8 (guide) and 0.6 (released) of a giant UPDATE, while a writer waits under 50 ms at p99."""
    rates: dict[str, list[float]] = {"worker": [], "undo": [], "giant by ids": [], "giant with guards": []}
    waits: list[dict[str, float]] = []
    for _ in range(bench.REPEATS):
        environment = _deployment(large, layout)
        with bench.Worker(environment), _writer(environment, layout) as report:
            result, rate = _run(environment)
            waits.append(report())
            rates["worker"].append(rate)
            ids = _archived(environment, result["run"])
            rates["undo"].append(_run(environment, "--undo", result["run"])[1])
        environment = _deployment(large, layout)
        with _writer(environment, layout):
            rates["giant by ids"].append(_by_ids(environment, layout, ids))
        environment = _deployment(large, layout)
        with _writer(environment, layout):
            rows, rate = _with_guards(environment, layout)
        assert abs(rows - len(ids)) < 100  # the horizon moves on by a few rows between the two
        rates["giant with guards"].append(rate)
    limits = {name: bench.median(rates[name]) for name in ("giant by ids", "giant with guards")}
    left = ", ".join(sorted({one["reason"] for one in result["left"]})) or "nothing"
    bench.say(capsys, f"{layout}: {len(ids):,} of {TASKS[layout]:,} tasks go, left: {left}")
    for name in ("worker", "undo"):
        rate = bench.median(rates[name])
        each = ", ".join(f"{rate / limit:.2f} x {what} ({limit:,.0f})" for what, limit in limits.items())
        wanted = f"; {WANTED[layout]} wanted" if name == "worker" else ""
        bench.say(capsys, f"{layout}, {name}: {rate:,.0f} rows/s = {each}{wanted}")
    p99, worst = bench.median([one["p99"] for one in waits]), max(one["max"] for one in waits)
    bench.say(capsys, f"{layout}: a writer meanwhile waits p99 {p99:.1f} ms (50 wanted), max {worst:.0f} ms")
