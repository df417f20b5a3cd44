"""prune-logs against the limits of performance.md, in one run: read the ratios, not the seconds."""

from __future__ import annotations

import json
import multiprocessing
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from multiprocessing.queues import SimpleQueue
from typing import Any

import psycopg
import pytest
import zstandard

from tests.benchmarks import bench
from tests.benchmarks.bench import MILLION, Bench, Worker, run_job
from tests.conftest import ROOT

pytestmark = [pytest.mark.benchmark, pytest.mark.timeout(3600)]

# The rows that go, from FROM on.
_GOING = bench.GIANT.split("RETURNING")[0].split("DELETE")[1]
# About as many rows as a bite has.
_BLOCKS = 500


def _prune(environment: dict[str, str], *words: str, worker: bool) -> tuple[int, float]:
    return run_job(environment, "prune-logs", "--older-than", bench.EXPIRED, *words, worker=worker)


def test_without_archive(large: Bench, capsys: Any) -> None:
    """At least 0.7 of one giant DELETE, while a writer on the same rows waits under 50 ms at p99."""
    rates: dict[str, list[float]] = {"giant": [], "worker": [], "inline": []}
    waits: dict[str, list[dict[str, float]]] = {"giant": [], "worker": []}
    for _ in range(bench.REPEATS):
        environment = large.database(MILLION)
        with bench.writer(environment["DATABASE_URL"]) as report:
            rows, seconds = bench.giant(environment["DATABASE_URL"])
        rates["giant"].append(rows / seconds)
        waits["giant"].append(report())
        environment = large.database(MILLION)
        with Worker(environment), bench.writer(environment["DATABASE_URL"]) as report:
            done, seconds = _prune(environment, "--without-archive", worker=True)
        assert abs(done - rows) < 100  # the horizon moves on by a few rows between the two
        rates["worker"].append(done / seconds)
        waits["worker"].append(report())
        done, seconds = _prune(large.database(MILLION), "--without-archive", worker=False)
        rates["inline"].append(done / seconds)
    limit = bench.median(rates["giant"])
    bench.say(
        capsys,
        f"giant DELETE {limit:,.0f} rows/s; a writer waits p99 {waits['giant'][-1]['p99']:.0f} ms, max "
        f"{max(one['max'] for one in waits['giant']):.0f} ms",
    )
    for name in ("worker", "inline"):
        rate = bench.median(rates[name])
        bench.say(capsys, f"prune without archive, {name}: {rate:,.0f} rows/s = {rate / limit:.2f} x (0.7 wanted)")
    p99 = bench.median([one["p99"] for one in waits["worker"]])
    bench.say(
        capsys,
        f"a writer meanwhile waits p99 {p99:.1f} ms (50 wanted), max "
        f"{max(one['max'] for one in waits['worker']):.0f} ms",
    )


def _copy_through_zstd(environment: dict[str, str]) -> float:
    """Rows/s of streaming the same rows out with plain COPY (SELECT row_to_json...) through zstd-3."""
    statement = f"COPY (SELECT row_to_json(a) {_GOING}) TO STDOUT"
    compressor = zstandard.ZstdCompressor(level=3).compressobj()
    began, rows = time.perf_counter(), 0
    with psycopg.connect(environment["DATABASE_URL"]) as connection, connection.cursor().copy(statement) as copy:
        for data in copy:
            compressor.compress(data)
            rows += 1
    compressor.flush()
    return rows / (time.perf_counter() - began)


def _naive(environment: dict[str, str]) -> float:
    """Rows/s of what cleaners usually do with the same rows: fetch into Python, serialise, delete by id."""
    began, done = time.perf_counter(), 0
    with psycopg.connect(environment["DATABASE_URL"]) as connection:
        while True:
            found = connection.execute(
                "SELECT * FROM activity_log WHERE created_at < now() - '100 days'::interval LIMIT 1000"
            ).fetchall()
            if not found:
                return done / (time.perf_counter() - began)
            packed = zstandard.compress("\n".join(json.dumps(row, default=str) for row in found).encode())
            connection.execute("DELETE FROM activity_log WHERE id = ANY(%s)", ([row[0] for row in found],))
            connection.commit()
            assert packed
            done += len(found)


def _part(url: str, first: int, end: int, done: SimpleQueue[int]) -> None:
    """Copy out and delete the same rows, some hundred blocks at a time, and nothing else."""
    rows = 0
    with psycopg.connect(url, prepare_threshold=None) as connection:
        connection.isolation_level = psycopg.IsolationLevel.REPEATABLE_READ
        for block in range(first, end, _BLOCKS):
            window = f"{_GOING} AND a.ctid >= '({block},0)' AND a.ctid < '({min(block + _BLOCKS, end)},0)'"
            compressor = zstandard.ZstdCompressor(level=1).compressobj()
            statement = f"COPY (SELECT row_to_json(a) {window}) TO STDOUT WITH (FORMAT binary)"
            with connection.cursor().copy(statement.encode()) as copy:
                for data in copy:
                    compressor.compress(data)
            rows += connection.execute(f"DELETE {window}".encode()).rowcount
            connection.commit()
    done.put(rows)


def _floor(environment: dict[str, str]) -> float:
    """Rows/s of COPY, zstd and DELETE of the same rows by two processes: no object, no ledger, no proof."""
    url = environment["DATABASE_URL"]
    done: SimpleQueue[int] = multiprocessing.SimpleQueue()
    with psycopg.connect(url) as connection:
        (blocks,) = connection.execute("SELECT pg_relation_size('activity_log') / 8192").fetchone() or (0,)
    half = blocks // 4  # the old half of the table, between two
    parts = ((0, half), (half, blocks // 2 + _BLOCKS))
    began = time.perf_counter()
    processes = [multiprocessing.Process(target=_part, args=(url, *part, done)) for part in parts]
    for process in processes:
        process.start()
    rows = sum(done.get() for _ in processes)
    for process in processes:
        process.join()
    return rows / (time.perf_counter() - began)


def test_with_archive(large: Bench, capsys: Any) -> None:
    """At least 5 x fetching into Python and deleting by id, and 0.7 x plain COPY through zstd; RSS under 250 MB."""
    copies, naive, floors, ours, inline, peaks = [], [], [], [], [], []
    for _ in range(bench.REPEATS):
        environment = large.database(MILLION)
        copies.append(_copy_through_zstd(environment))
        naive.append(_naive(environment))
        floors.append(_floor(large.database(MILLION)))
        environment = large.database(MILLION)
        with Worker(environment) as worker:
            rows, seconds = _prune(environment, worker=True)
            peaks.append(worker.peak())
        ours.append(rows / seconds)
        rows, seconds = _prune(large.database(MILLION), worker=False)
        inline.append(rows / seconds)
    limit, slow = bench.median(copies), bench.median(naive)
    for name, rates in (("worker", ours), ("inline", inline)):
        rate = bench.median(rates)
        bench.say(
            capsys,
            f"archive + prune, {name}: {rate:,.0f} rows/s = {rate / limit:.2f} x COPY through zstd "
            f"({limit:,.0f}; 0.7 wanted), {rate / slow:.1f} x naive ({slow:,.0f}; 5 wanted)",
        )
    bare = bench.median(floors)
    bench.say(
        capsys,
        f"COPY, zstd and DELETE alone, two processes: {bare:,.0f} rows/s = {bare / limit:.2f} x COPY through zstd; "
        f"the worker is {bench.median(ours) / bare:.2f} x of that",
    )
    own = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss // 1024
    bench.say(capsys, f"peak RSS of a worker process {max(peaks)} MB, of any process started {own} MB (250 wanted)")


def test_cost_is_flat(large: Bench, capsys: Any) -> None:
    """Cost per row from 0.5 M to 4 M rows within 1.3 x."""
    costs: dict[int, float] = {}
    for rows in (MILLION // 2, MILLION, 4 * MILLION):
        each = []
        for _ in range(bench.REPEATS):
            done, seconds = _prune(large.database(rows), "--without-archive", worker=False)
            each.append(seconds / done * 1e6)
        costs[rows] = bench.median(each)
        bench.say(capsys, f"{rows / MILLION:.1f} M rows: {costs[rows]:.2f} us a row")
    bench.say(capsys, f"largest / smallest cost {max(costs.values()) / min(costs.values()):.2f} x (1.3 wanted)")


def test_overhead(large: Bench, capsys: Callable[..., Any]) -> None:
    """Ledger and Celery below 5 % of the run: the run's time outside statements on the host's tables."""
    shares = []
    for _ in range(bench.REPEATS):
        environment = large.database(MILLION)
        script = ROOT / "tests" / "benchmarks" / "overhead.py"
        done = subprocess.run(
            [sys.executable, str(script)],
            env={**environment, "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            check=True,
        )
        shares.append(json.loads(done.stdout.splitlines()[-1])["share"])
    bench.say(capsys, f"ledger statements are {bench.median(shares) * 100:.1f} % of an inline run (5 wanted)")
