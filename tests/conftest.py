"""Real servers for the whole session, a fresh database for each test."""

from __future__ import annotations

import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psycopg
import pytest
import redis
import sqlalchemy as sa
from psycopg import sql

from tests.zygote import inherited, run_alone, zygote
from worker import audit, config, embedded, ledger, logs
from worker.layouts import LAYOUTS, demo_schema
from worker.operations import Operations

ROOT = Path(__file__).resolve().parents[1]
NOW = datetime.now(UTC)
ROWS = 3_000
# What four processes of tests and their servers need, with room to spare.
_SHM, _OURS, _ROOM = Path("/dev/shm"), "paperclip-worker-tests-", 4 << 30  # noqa: S108 - files that must be in memory
_numbers = itertools.count()

# No test may read the settings or credentials of the machine it runs on.
for _name in [name for name in os.environ if name.startswith(("PAPERCLIP_", "AWS_", "DATABASE_URL"))]:
    del os.environ[_name]
os.environ["AWS_EC2_METADATA_DISABLED"] = "true"
# Tests begun in the background may have been told to ignore Ctrl-C, and so would be all that they start.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


# Faults that take long to bring about, and meet no change but one of the rotation: for `-m long`.
_LONG = {
    *("test_carriers", "test_full_disk", "test_manual_kills", "test_overtaken", "test_permissions"),
    *("test_retire_kills", "test_undecryptable"),
}
# What these ask does not differ by layout: on the second one they are for `-m long` as well.
_ON_ONE_LAYOUT = {
    *("anchors/test_anchoring", "rotation/test_clauses", "rotation/test_discovery", "rotation/test_keys"),
    *("rotation/test_manual", "rotation/test_refusals", "rotation/test_rollback"),
}


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        known = f"{item.path.parent.name}/{item.path.stem}"
        if item.path.stem in _LONG or (known in _ON_ONE_LAYOUT and "guide" in item.name):
            item.add_marker(pytest.mark.long)


@pytest.fixture(scope="session")
def servers() -> Iterator[embedded.Embedded]:
    """PostgreSQL, Redis and S3, started once."""
    settings = {"fsync": "off", "synchronous_commit": "off", "full_page_writes": "off", "max_wal_size": "256MB"}
    with embedded.start(_in_memory(), postgres_settings=settings) as started:
        yield started


def _in_memory() -> Path | None:
    """A directory for the servers that is not on a disk, where there is the room; else None.

    A database is a thousand files: a file system on a disk takes twenty times as long to make them, half of a test.
    """
    if not _SHM.is_dir() or not os.access(_SHM, os.W_OK):
        return None
    for left in _SHM.glob(f"{_OURS}*"):
        # Memory that a killed run did not give back.
        if not Path("/proc", left.name.removeprefix(_OURS)).exists():
            shutil.rmtree(left, ignore_errors=True)
    available = re.search(r"MemAvailable: *(\d+) kB", Path("/proc/meminfo").read_text(encoding="ascii"))
    free = min(shutil.disk_usage(_SHM).free, int(available[1]) << 10 if available else 0)
    if free < _ROOM or os.statvfs(_SHM).f_flag & os.ST_NOEXEC:
        return None
    return _SHM / f"{_OURS}{os.getpid()}"


@pytest.fixture(scope="session")
def signing_key(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("keys") / "signing.pem"
    audit.keygen(path)
    return path


@pytest.fixture(scope="session")
def _admin(servers: embedded.Embedded) -> Iterator[psycopg.Connection[Any]]:
    with psycopg.connect(servers.environment()["DATABASE_URL"], autocommit=True) as connection:
        yield connection


@pytest.fixture
def fresh_database(servers: embedded.Embedded, _admin: psycopg.Connection[Any]) -> Iterator[Callable[..., str]]:
    """A function that makes an empty database (or a copy of `template`) and returns its URL."""
    made: list[str] = []

    def make(template: str = "template1") -> str:
        name = f"t{os.getpid()}_{next(_numbers)}"
        query = "CREATE DATABASE {} TEMPLATE {} STRATEGY FILE_COPY"
        _admin.execute(sql.SQL(query).format(sql.Identifier(name), sql.Identifier(template)))
        made.append(name)
        return servers.environment(name)["DATABASE_URL"]

    yield make
    for name in made:
        _admin.execute(sql.SQL("DROP DATABASE {} WITH (FORCE)").format(sql.Identifier(name)))


@pytest.fixture(scope="session")
def template(servers: embedded.Embedded, _admin: psycopg.Connection[Any], signing_key: Path) -> Callable[[str], str]:
    """The name of a seeded database of a layout, with a ledger; made once each."""
    made: dict[str, str] = {}

    def make(layout: str) -> str:
        if layout not in made:
            name = f"template_{layout}_{os.getpid()}"
            _admin.execute(sql.SQL("CREATE DATABASE {}").format(sql.Identifier(name)))
            engine = sa.create_engine(_sqlalchemy(servers.environment(name)["DATABASE_URL"]))
            with engine.begin() as connection:
                demo_schema.create(connection, layout)
                demo_schema.seed(connection, layout, rows=ROWS, now=NOW)
            ledger.init(engine)
            engine.dispose()
            made[layout] = name
        return made[layout]

    return make


def _sqlalchemy(url: str) -> str:
    return url.replace("postgres://", "postgresql+psycopg://", 1)


@dataclass(frozen=True, kw_only=True)
class Deployment:
    """One seeded database with the session's Redis and S3."""

    layout: str
    environment: dict[str, str]
    operations: Operations
    # Whatever holds connections for this deployment; closed at the end of the test.
    opened: list[Operations]

    def cli(
        self, *words: str, ok: bool = True, env: dict[str, str] | None = None, alone: bool = False
    ) -> subprocess.CompletedProcess[str]:
        """Run the command line as its own process; with `ok`, demand exit status 0.

        Its imports are shared with other commands, unless it is to stand `alone`.
        """
        environment = self.process_environment() | (env or {})
        done = run_alone(*words, env=environment) if alone else zygote().run(*words, env=environment)
        if ok:
            assert done.returncode == 0, done.stderr
        return done

    def json(self, *words: str, ok: bool = True) -> Any:
        return json.loads(self.cli(*words, "--json", ok=ok).stdout)

    def process_environment(self) -> dict[str, str]:
        return {**inherited(), **self.environment, "AWS_EC2_METADATA_DISABLED": "true"}

    def with_settings(self, **values: str) -> Operations:
        """The same deployment with other settings (environment names without their prefix)."""
        extra = {f"PAPERCLIP_WORKER_{name.upper()}": value for name, value in values.items()}
        self.opened.append(Operations(config.load({**self.environment, **extra})))
        return self.opened[-1]

    @contextmanager
    def worker(self, *words: str, **settings: str) -> Iterator[subprocess.Popen[str]]:
        """A real worker process (or another service) with these settings, terminated at the end."""
        extra = {f"PAPERCLIP_WORKER_{name.upper()}": value for name, value in settings.items()}
        process = subprocess.Popen(
            [sys.executable, str(ROOT / "cli.py"), *(words or ("worker", "--concurrency=1"))],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            text=True,
            env={key: value for key, value in self.process_environment().items() if key != "PYTHONWARNINGS"} | extra,
            start_new_session=True,
        )
        try:
            yield process
        finally:
            process.terminate()
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait(5)

    def query(self, statement: str, *values: Any) -> list[tuple[Any, ...]]:
        """Rows of a statement, in its own connection, committed."""
        with psycopg.connect(self.environment["DATABASE_URL"]) as connection:
            cursor = connection.execute(statement.encode(), values or None)
            return cursor.fetchall() if cursor.description else []

    def digest(self, *, without: tuple[str, ...] = ()) -> dict[str, tuple[int, str]]:
        """Rows and content hash of every host table: what must not change."""
        with psycopg.connect(self.environment["DATABASE_URL"]) as connection:
            tables = connection.execute(
                "SELECT schemaname, tablename FROM pg_tables WHERE schemaname NOT IN "
                "('pg_catalog', 'information_schema', 'paperclip_worker', 'drizzle') AND NOT tablename = ANY(%s) "
                "ORDER BY 1, 2",
                (list(without),),
            ).fetchall()
            one = sql.SQL("SELECT {}, count(*), md5(string_agg(md5(t::text), '' ORDER BY md5(t::text))) FROM {} t")
            every = sql.SQL(" UNION ALL ").join(
                one.format(sql.Literal(".".join(place)), sql.Identifier(*place)) for place in tables
            )
            return {name: (rows, content) for name, rows, content in connection.execute(every)}


@pytest.fixture
def make_deployment(
    servers: embedded.Embedded, fresh_database: Callable[..., str], signing_key: Path
) -> Iterator[Callable[..., Deployment]]:
    """A function that turns a database's URL into a deployment, with a bucket prefix of its own."""
    made: list[Deployment] = []

    def make(url: str, layout: str) -> Deployment:
        environment = {
            **servers.environment(),
            "DATABASE_URL": url,
            # A queue of its own for each test: Redis has 16 databases, and a key prefix is not Celery's to give.
            "PAPERCLIP_WORKER_BROKER_URL": servers.environment()["PAPERCLIP_WORKER_BROKER_URL"].replace(
                "/0", f"/{next(_numbers) % 15 + 1}"
            ),
            "PAPERCLIP_WORKER_S3_PREFIX": f"test-{os.getpid()}-{next(_numbers)}/",
            "PAPERCLIP_WORKER_SIGNING_KEY_FILE": str(signing_key),
        }
        os.environ["AWS_ACCESS_KEY_ID"] = environment["AWS_ACCESS_KEY_ID"]
        os.environ["AWS_SECRET_ACCESS_KEY"] = environment["AWS_SECRET_ACCESS_KEY"]
        # It may have been another test's, and have its messages, and the claim of its ledger.
        with redis.Redis.from_url(environment["PAPERCLIP_WORKER_BROKER_URL"]) as client:
            client.flushdb()
        operations = Operations(config.load(environment))
        deployment = Deployment(layout=layout, environment=environment, operations=operations, opened=[operations])
        made.append(deployment)
        return deployment

    yield make
    for deployment in made:
        for operations in deployment.opened:
            operations.engine.dispose()


@pytest.fixture(params=sorted(LAYOUTS))
def deployment(
    request: pytest.FixtureRequest,
    make_deployment: Callable[..., Deployment],
    fresh_database: Callable[..., str],
    template: Callable[[str], str],
) -> Deployment:
    """A seeded deployment, once on each layout."""
    return make_deployment(fresh_database(template(request.param)), request.param)


@pytest.fixture
def released(
    make_deployment: Callable[..., Deployment], fresh_database: Callable[..., str], template: Callable[[str], str]
) -> Deployment:
    """A seeded deployment on the released layout."""
    return make_deployment(fresh_database(template("paperclip")), "paperclip")


@pytest.fixture(scope="module")
def standing(
    servers: embedded.Embedded,
    _admin: psycopg.Connection[Any],
    template: Callable[[str], str],
    signing_key: Path,
    request: pytest.FixtureRequest,
) -> Iterator[Deployment]:
    """A seeded deployment on the released layout for a whole module, whose tests leave it as it is."""
    name = f"standing_{os.getpid()}_{request.module.__name__.rpartition('.')[2]}"
    source = template("paperclip")
    _admin.execute(sql.SQL("CREATE DATABASE {} TEMPLATE {}").format(sql.Identifier(name), sql.Identifier(source)))
    environment = {
        **servers.environment(name),
        # Where tests of several modules take turns, the next of that name must not find the receipts of this one.
        "PAPERCLIP_WORKER_S3_PREFIX": f"{name}-{next(_numbers)}/",
        "PAPERCLIP_WORKER_SIGNING_KEY_FILE": str(signing_key),
    }
    # boto3 finds credentials by its own chain.
    os.environ.update({key: value for key, value in environment.items() if key.startswith("AWS_")})
    operations = Operations(config.load(environment))
    yield Deployment(layout="paperclip", environment=environment, operations=operations, opened=[operations])
    operations.engine.dispose()
    _admin.execute(sql.SQL("DROP DATABASE {} WITH (FORCE)").format(sql.Identifier(name)))


@pytest.fixture(autouse=True, scope="session")
def _quiet() -> None:
    logs.silence()
