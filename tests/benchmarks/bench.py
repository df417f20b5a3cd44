"""What the benchmarks share: a large log in a template database, a worker, a writer that touches it, medians."""

from __future__ import annotations

import json
import math
import random
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

import boto3
import psycopg
import sqlalchemy as sa
from psycopg import sql

from tests.conftest import NOW, ROOT
from worker import embedded, ledger
from worker.layouts import demo_schema

MILLION = 1_000_000
REPEATS = 3
# Half of the rows are older than this many days.
DAYS = 200
EXPIRED = "100d"


class Bench:
    """One set of servers with production durability, and template databases of several sizes."""

    def __init__(self, servers: embedded.Embedded, key: Path) -> None:
        self._servers, self._key = servers, key
        self.admin = servers.environment()["DATABASE_URL"]
        self._made: list[str] = []
        self._copies = 0

    def database(self, rows: int) -> dict[str, str]:
        """The environment of a fresh copy of a log of so many rows."""
        return self.copy(f"log{rows}", "paperclip", lambda url: fill(url, rows))

    def copy(self, template: str, layout: str, fill_in: Callable[[str], None]) -> dict[str, str]:
        """The environment of a fresh copy of a seeded deployment of a layout, once filled by `fill_in`."""
        if template not in self._made:
            with psycopg.connect(self.admin, autocommit=True) as connection:
                connection.execute(f"CREATE DATABASE {template}".encode())
            url = self._servers.environment(template)["DATABASE_URL"]
            engine = sa.create_engine(url.replace("postgres://", "postgresql+psycopg://", 1))
            with engine.begin() as connection:
                demo_schema.create(connection, layout)
                demo_schema.seed(connection, layout, rows=1_000, now=NOW, companies=8)
            ledger.init(engine)
            engine.dispose()
            fill_in(url)
            self._made.append(template)
        copy_of(self.admin, template, "bench")
        self._copies += 1
        found = self._servers.environment("bench")
        broker = found["PAPERCLIP_WORKER_BROKER_URL"].rpartition("/")[0]
        return {
            **found,
            # Each template has a ledger of its own, whose claim on a database of Redis stays.
            "PAPERCLIP_WORKER_BROKER_URL": f"{broker}/{self._made.index(template)}",
            # A copy lacks the receipts of the one before it.
            "PAPERCLIP_WORKER_S3_PREFIX": f"copy-{self._copies}/",
            "PAPERCLIP_WORKER_SIGNING_KEY_FILE": str(self._key),
            "PATH": "/usr/bin:/bin",
        }


def cli(environment: dict[str, str], *words: str) -> dict[str, Any]:
    """What a command prints as JSON; it must succeed."""
    done = subprocess.run(
        [sys.executable, str(ROOT / "cli.py"), *words], capture_output=True, text=True, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


class Worker:
    """A real worker with its default two processes, up as long as the block lasts."""

    def __init__(self, environment: dict[str, str]) -> None:
        self._process = subprocess.Popen(
            [sys.executable, str(ROOT / "cli.py"), "worker"],
            env=environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        time.sleep(4)

    def peak(self) -> int:
        """Peak resident memory of the largest process of the worker, in MB."""
        children = Path(f"/proc/{self._process.pid}/task/{self._process.pid}/children").read_text().split()
        peaks = []
        for pid in [str(self._process.pid), *children]:
            for line in Path(f"/proc/{pid}/status").read_text().splitlines():
                if line.startswith("VmHWM"):
                    peaks.append(int(line.split()[1]) // 1024)
        return max(peaks)

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.terminate()
        self._process.wait(30)


def run_job(environment: dict[str, str], job: str, *words: str, worker: bool) -> tuple[int, float]:
    """Rows and seconds, entered to settled, of a run by a real worker with its default two processes, or inline."""
    where = [] if worker else ["--inline"]
    result = cli(environment, "run", job, "--yes", "--json", *where, *words)
    assert result["kept"]
    began, ended = (datetime.fromisoformat(result[name]) for name in ("created_at", "settled_at"))
    return result["rows"], (ended - began).total_seconds()


_ROWS = """
INSERT INTO activity_log (id, company_id, actor_type, actor_id, action, entity_type, entity_id, run_id, details,
                          created_at)
SELECT gen_random_uuid(), c.id, 'agent', md5((g % 97)::text), 'issue.updated',
       CASE WHEN g % 2 = 0 THEN 'issue' ELSE 'project' END,
       CASE WHEN g % 2 = 0 THEN i.id::text ELSE md5(g::text)::uuid::text END,
       CASE WHEN g % 3 = 0 THEN r.id END,
       -- About 700 bytes a row as JSON, like the rows of performance.md.
       jsonb_build_object('changes', jsonb_build_object('from', repeat(md5(g::text), (g % 14)::int), 'to', g),
                          'labels', jsonb_build_array('x', 'ü', g % 7)),
       now() - interval '200 days' + g * (interval '200 days' / %(rows)s)
FROM generate_series(1, %(rows)s) g
JOIN (SELECT id, row_number() OVER (ORDER BY id) - 1 AS n, count(*) OVER () AS m FROM companies) c ON c.n = g % c.m
JOIN (SELECT id, company_id, row_number() OVER (PARTITION BY company_id ORDER BY id) - 1 AS n,
             count(*) OVER (PARTITION BY company_id) AS m FROM heartbeat_runs) r
  ON r.company_id = c.id AND r.n = (g / 7) % r.m
JOIN (SELECT id, company_id, row_number() OVER (PARTITION BY company_id ORDER BY id) - 1 AS n,
             count(*) OVER (PARTITION BY company_id) AS m FROM issues) i
  ON i.company_id = c.id AND i.n = (g / 3) % i.m
ORDER BY g
"""


def fill(url: str, rows: int) -> None:
    """Put `rows` activity rows over 200 days, in the order of their time, companies interleaved."""
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute("TRUNCATE activity_log CASCADE")
        # A join key computed from g needs the small sides hashed; the planner's guess at g is far off.
        connection.execute("SET enable_nestloop = off")
        connection.execute(_ROWS.replace("%(rows)s", str(rows)).encode())
        connection.execute("VACUUM ANALYZE")


_GOING = "SELECT id::text FROM activity_log WHERE created_at < now() - '100 days'::interval"
_TOUCH = "SELECT 1 FROM activity_log WHERE id = %s FOR KEY SHARE"


@contextmanager
def writer(url: str, *, going: str = _GOING, touch: str = _TOUCH) -> Iterator[Callable[[], dict[str, float]]]:
    """A concurrent writer that locks (`touch`) rows that are `going`; gives p50, p99 and max wait in ms."""
    with psycopg.connect(url) as connection:
        ids = [row[0] for row in connection.execute(f"{going} ORDER BY random() LIMIT 20000".encode())]
    waits: list[float] = []
    stop = threading.Event()

    def write() -> None:
        chooser = random.Random(7)
        with psycopg.connect(url, autocommit=True) as connection:
            while not stop.is_set():
                began = time.perf_counter()
                connection.execute(touch.encode(), (chooser.choice(ids),))
                waits.append((time.perf_counter() - began) * 1000)
                time.sleep(0.002)

    thread = threading.Thread(target=write)
    thread.start()

    def report() -> dict[str, float]:
        ordered = sorted(waits)
        return {
            "p50": statistics.median(ordered),
            "p99": ordered[math.ceil(len(ordered) * 0.99) - 1],
            "max": ordered[-1],
        }

    try:
        yield report
    finally:
        stop.set()
        thread.join()


GIANT = """
WITH gone AS (
  DELETE FROM activity_log a WHERE created_at < now() - '100 days'::interval
    AND NOT EXISTS (SELECT 1 FROM heartbeat_runs r WHERE r.id = a.run_id
                    AND r.status NOT IN ('succeeded', 'interrupted', 'failed', 'cancelled', 'timed_out'))
    AND NOT EXISTS (SELECT 1 FROM issues i WHERE a.entity_type = 'issue' AND i.id::text = a.entity_id
                    AND i.company_id = a.company_id AND i.status NOT IN ('done', 'cancelled')
                    AND i.hidden_at IS NULL)
    AND NOT EXISTS (SELECT 1 FROM decision_effect_executions e WHERE e.activity_log_id = a.id)
  RETURNING 1)
SELECT count(*) FROM gone
"""


def giant(url: str) -> tuple[int, float]:
    """The limit: one DELETE of the same rows. Rows and seconds."""
    began = time.perf_counter()
    with psycopg.connect(url) as connection:
        (rows,) = connection.execute(GIANT.encode()).fetchone() or (0,)
    return rows, time.perf_counter() - began


def median(values: list[float]) -> float:
    return statistics.median(values)


def say(capsys: Any, text: str) -> None:
    """Print past pytest's capture: the numbers are the product of a benchmark."""
    with capsys.disabled():
        print("  " + text, flush=True)  # noqa: T201 - its product


def forget(environment: dict[str, str]) -> None:
    """Take the receipts out of the bucket: the database goes back to before them, and no run would begin."""
    found = boto3.resource(
        "s3",
        endpoint_url=environment["PAPERCLIP_STORAGE_S3_ENDPOINT"],
        region_name=environment["PAPERCLIP_STORAGE_S3_REGION"],
        aws_access_key_id=environment["AWS_ACCESS_KEY_ID"],
        aws_secret_access_key=environment["AWS_SECRET_ACCESS_KEY"],
    ).Bucket(environment["PAPERCLIP_WORKER_S3_BUCKET"])
    found.objects.filter(Prefix=f"{environment['PAPERCLIP_WORKER_S3_PREFIX']}receipts/").delete()


def copy_of(admin_url: str, template: str, name: str) -> None:
    with psycopg.connect(admin_url, autocommit=True) as connection:
        connection.execute(sql.SQL("DROP DATABASE IF EXISTS {} WITH (FORCE)").format(sql.Identifier(name)))
        query = "CREATE DATABASE {} TEMPLATE {} STRATEGY FILE_COPY"
        connection.execute(sql.SQL(query).format(sql.Identifier(name), sql.Identifier(template)))
        connection.execute("CHECKPOINT")
