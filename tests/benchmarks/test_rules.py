"""What legal holds and policies cost a prune: the same rows with none and with many, in turn, in one run."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import psycopg
import pytest

from tests.benchmarks import bench
from tests.benchmarks.bench import MILLION, Bench, Worker, run_job

pytestmark = [pytest.mark.benchmark, pytest.mark.timeout(3600)]

# Holds on users and tasks that no row names: each must be asked of every row, and holds nothing back.
_HOLDS = """
INSERT INTO paperclip_worker.holds (id, kind, target, reason, actor)
SELECT gen_random_uuid(), kind, CASE kind WHEN 'user' THEN md5('held' || n) ELSE gen_random_uuid()::text END,
       'case', 'counsel'
FROM unnest(%(kinds)s::text[]) AS kind, generate_series(1, 10) AS n
"""
# For every company but two its own policy, to the moment the benchmark's own age.
_POLICIES = """
INSERT INTO paperclip_worker.policies ("table", company, version, keep_seconds, reason, actor, created_at)
SELECT 'activity_log', id, 1, 100 * 86400, 'law', 'officer', now() - interval '1 day'
FROM (SELECT id FROM companies ORDER BY id OFFSET 2) AS later
"""
SETTINGS: dict[str, tuple[str, ...]] = {
    "policies of 6 companies, holds on 10 companies": ("company",),
    "the same, and holds on 10 users and 10 tasks": ("company", "user", "task"),
}


@pytest.mark.parametrize("worker", [False, True], ids=["inline", "worker"])
def test_rules(large: Bench, capsys: Any, worker: bool) -> None:
    """Under 10 % of a prune."""
    seconds: dict[str, list[float]] = {"none": [], **{name: [] for name in SETTINGS}}
    rows = 0
    for _ in range(bench.REPEATS):
        for name, taken in seconds.items():
            environment = large.database(MILLION)
            if kinds := SETTINGS.get(name):
                with psycopg.connect(environment["DATABASE_URL"]) as connection:
                    connection.execute(_HOLDS.encode(), {"kinds": list(kinds)})
                    connection.execute(_POLICIES.encode())
            with Worker(environment) if worker else nullcontext():
                done, spent = run_job(
                    environment, "prune-logs", "--older-than", bench.EXPIRED, "--without-archive", worker=worker
                )
            assert rows in (0, done) or abs(rows - done) < 100
            rows = done
            taken.append(spent)
    free = bench.median(seconds["none"])
    for name in SETTINGS:
        more = bench.median(seconds[name]) / free - 1
        bench.say(capsys, f"{'worker' if worker else 'inline'}, {name}: {more * 100:+.1f} % (10 wanted)")
