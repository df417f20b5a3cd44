"""restore-logs against the limit, one plain COPY of the same rows into the same table: read the ratio."""

from __future__ import annotations

import time
from datetime import datetime
from pathlib import Path
from typing import Any

import psycopg
import pytest

from tests.benchmarks import bench

pytestmark = [pytest.mark.benchmark, pytest.mark.timeout(3600)]

# Of these more than half a million go: those older than 100 days, but for what guards hold back.
ROWS = 1_200_000
_GOING = bench.GIANT.split("RETURNING")[0].split("DELETE")[1]


def _dump(url: str, path: Path) -> None:
    """The rows that are about to go, in COPY's text format."""
    with (
        path.open("wb") as file,
        psycopg.connect(url) as connection,
        connection.cursor().copy(f"COPY (SELECT a.* {_GOING}) TO STDOUT".encode()) as copy,
    ):
        for data in copy:
            file.write(data)


def _load(url: str, path: Path) -> tuple[int, float]:
    """The limit: rows and seconds of putting them back by one COPY in one transaction."""
    began = time.perf_counter()
    with path.open("rb") as file, psycopg.connect(url) as connection:
        cursor = connection.cursor()
        with cursor.copy("COPY activity_log FROM STDIN") as copy:
            while data := file.read(1 << 20):
                copy.write(data)
        rows = cursor.rowcount
        connection.commit()
    return rows, time.perf_counter() - began


def test_restore(large: bench.Bench, tmp_path: Path, capsys: Any) -> None:
    """At least 0.5 of a plain COPY FROM, entered to settled, by a real worker; RSS under 250 MB."""
    environment = large.database(ROWS)
    url, dump = environment["DATABASE_URL"], tmp_path / "rows"
    _dump(url, dump)
    pruned = bench.cli(environment, "run", "prune-logs", "--older-than", bench.EXPIRED, "--yes", "--inline", "--json")
    bench.copy_of(large.admin, "bench", "pruned")
    limits, ours, whole, peaks = [], [], [], []
    for _ in range(bench.REPEATS):
        bench.copy_of(large.admin, "pruned", "bench")
        rows, seconds = _load(url, dump)
        assert rows >= bench.MILLION / 2
        limits.append(rows / seconds)
        bench.copy_of(large.admin, "pruned", "bench")
        bench.forget(environment)
        with bench.Worker(environment) as worker:
            began = time.perf_counter()
            result = bench.cli(environment, "run", "restore-logs", "--run", pruned["run"], "--json")
            whole.append(result["rows"] / (time.perf_counter() - began))
            peaks.append(worker.peak())
        assert result["rows"] == pruned["rows"]
        assert abs(result["rows"] - rows) < 1000  # the horizon moves on between the two
        begun, ended = (datetime.fromisoformat(result[name]) for name in ("created_at", "settled_at"))
        ours.append(result["rows"] / (ended - begun).total_seconds())
    limit = bench.median(limits)
    for name, rates in (("entered to settled", ours), ("the whole command", whole)):
        rate = bench.median(rates)
        bench.say(
            capsys,
            f"restore-logs, {name}: {rate:,.0f} rows/s = {rate / limit:.2f} x COPY FROM ({limit:,.0f}; 0.5 wanted)",
        )
    bench.say(capsys, f"peak RSS of a worker process {max(peaks)} MB (250 wanted)")
