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
FROM unnest(%(kinds)s::text[]) AS kind,
     generate_series(1, CASE kind WHEN 'company' THEN 10 ELSE %(named)s END) AS n
"""
# For every company but two its own policy, to the moment the benchmark's own age.
_POLICIES = """
INSERT INTO paperclip_worker.policies ("table", company, version, keep_seconds, reason, actor, created_at)
SELECT 'activity_log', id, 1, 100 * 86400, 'law', 'officer', now() - interval '1 day'
FROM (SELECT id FROM companies ORDER BY id OFFSET 2) AS later
"""
# The kinds of holds, and how many there are on users and on tasks.
SETTINGS: dict[str, tuple[tuple[str, ...], int]] = {
    "policies of 6 companies, holds on 10 companies": (("company",), 0),
    "the same, and holds on a user and a task": (("company", "user", "task"), 1),
    "the same, and holds on 10 users and 10 tasks": (("company", "user", "task"), 10),
}
MODES = {
    "inline, without archive": ("--without-archive",),
    "worker, without archive": ("--without-archive",),
    "worker": (),
}


@pytest.mark.parametrize("mode", MODES)
def test_rules(large: Bench, capsys: Any, mode: str) -> None:
    """Under 10 % of a prune."""
    worker = mode.startswith("worker")
    seconds: dict[str, list[float]] = {"none": [], **{name: [] for name in SETTINGS}}
    rows = 0
    for _ in range(bench.REPEATS):
        for name, taken in seconds.items():
            environment = large.database(MILLION)
            if found := SETTINGS.get(name):
                with psycopg.connect(environment["DATABASE_URL"]) as connection:
                    connection.execute(_HOLDS.encode(), {"kinds": list(found[0]), "named": found[1]})
                    connection.execute(_POLICIES.encode())
            with Worker(environment) if worker else nullcontext():
                done, spent = run_job(
                    environment, "prune-logs", "--older-than", bench.EXPIRED, *MODES[mode], worker=worker
                )
            assert rows in (0, done) or abs(rows - done) < 100
            rows = done
            taken.append(spent)
    free = bench.median(seconds["none"])
    for name in SETTINGS:
        more = bench.median(seconds[name]) / free - 1
        bench.say(capsys, f"{mode}, {name}: {more * 100:+.1f} % (10 wanted)")
