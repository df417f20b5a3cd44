"""A run rests while a replica is behind or WAL cannot be archived: on a server of its own that has both."""

from __future__ import annotations

import math
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from uuid import UUID

import psycopg
import pytest
import sqlalchemy as sa

from tests.cli.helpers import INLINE, refused
from tests.conftest import NOW, ROWS, Deployment
from tests.faults.evidence import begin, check_kept, rows, wait
from worker import embedded, ledger
from worker.layouts import demo_schema
from worker.operations import Operations
from worker.processes import Place
from worker.servers import Postgres

pytestmark = pytest.mark.faults


class Standby(Postgres):
    """A hot standby that streams from a running primary, made of a copy of its files."""

    name = "standby"

    def __init__(self, place: Place, port: int, primary: Postgres) -> None:
        conninfo = f"host=127.0.0.1 port={primary.port} user=paperclip password={primary.password}"
        super().__init__(place, [port], embedded._find_postgres(), {"primary_conninfo": conninfo})
        self.password, self._made = primary.password, True
        # As PostgreSQL's manual has it for a copy with other tools than its own.
        with psycopg.connect(primary.url("postgres"), autocommit=True) as connection:
            connection.execute("SELECT pg_backup_start('standby', true)")
            shutil.copytree(primary.data, self.data, dirs_exist_ok=True, ignore=_left_out)
            row = connection.execute("SELECT labelfile FROM pg_backup_stop(wait_for_archive => false)").fetchone()
            assert row is not None
        (self.data / "backup_label").write_text(row[0])
        (self.data / "standby.signal").touch()
        for path in self.data.rglob("*"):
            place.own(path)


def _left_out(directory: str, names: list[str]) -> set[str]:
    """Files of a running server that its standby makes for itself."""
    inside = {"pg_wal", "pg_replslot", "pg_dynshmem", "pg_notify", "pg_stat_tmp"}
    if Path(directory).name in inside:
        return {name for name in names if not (Path(directory) / name).is_dir()}
    return {name for name in names if name.startswith(("postmaster.", ".s.PGSQL"))}


@pytest.fixture(scope="module")
def primary() -> Iterator[Postgres]:
    settings = {"archive_mode": "on", "wal_keep_size": "64MB"}
    with embedded.start(postgres_settings=settings) as servers:
        engine = sa.create_engine(
            servers.environment()["DATABASE_URL"].replace("postgres:", "postgresql+psycopg:", 1)
        )
        with engine.begin() as connection:
            demo_schema.create(connection, "paperclip")
            demo_schema.seed(connection, "paperclip", rows=ROWS, now=NOW)
        ledger.init(engine)
        engine.dispose()
        with psycopg.connect(servers.postgres.url("postgres"), autocommit=True) as connection:
            connection.execute("CREATE DATABASE seeded TEMPLATE paperclip STRATEGY FILE_COPY")
        yield servers.postgres


@pytest.fixture
def watched(primary: Postgres, make_deployment: Callable[..., Deployment]) -> Iterator[Deployment]:
    """A deployment on that server."""
    with psycopg.connect(primary.url("postgres"), autocommit=True) as connection:
        connection.execute("CREATE DATABASE watched TEMPLATE seeded STRATEGY FILE_COPY")
        deployment = make_deployment(primary.url("watched"), "paperclip")
        yield deployment
        for one in deployment.opened:
            one.close()
        connection.execute("DROP DATABASE watched WITH (FORCE)")


@pytest.fixture
def standby(primary: Postgres) -> Iterator[Postgres]:
    directory = embedded._private(None, embedded._account())
    place = Place(directory=directory, account=embedded._account(), outlive=False)
    server = Standby(place, embedded._free_ports(1)[0], primary)
    try:
        server.start()
        yield server
    finally:
        server.kill()
        shutil.rmtree(directory)


def _rests(tight: Operations, run: UUID, *, kind: str, says: str, relieve: Callable[[], Any]) -> None:
    """The run begins under pressure, says so and moves nothing; it goes on once that is gone."""
    worker = threading.Thread(target=lambda: tight.runner().work(run, seconds=math.inf))
    worker.start()
    try:
        wait(lambda: tight.result(run)["waits"].get(kind, 0) >= 2)
        assert says in tight.result(run)["waiting"]
        assert tight.result(run)["rows"] == 0
    finally:
        relieve()
        worker.join(60)
    assert tight.result(run)["waiting"] is None


def test_a_run_rests_while_a_replica_is_behind(watched: Deployment, standby: Postgres) -> None:
    before = rows(watched)
    tight = watched.with_settings(max_replica_lag="1")
    lag = "SELECT coalesce(max(extract(epoch FROM replay_lag)), 0) > 2 FROM pg_stat_replication"

    def behind() -> Any:
        watched.query("SELECT pg_logical_emit_message(true, 'x', 'x')")
        time.sleep(0.1)
        return watched.query(lag)[0][0]

    with psycopg.connect(standby.url("postgres"), autocommit=True) as replica:
        wait(lambda: watched.query("SELECT count(*) = 1 FROM pg_stat_replication WHERE state = 'streaming'")[0][0])
        replica.execute("SELECT pg_wal_replay_pause()")
        wait(behind)
        run = begin(tight)
        _rests(
            tight,
            run,
            kind="replica_lag",
            says="a replica is ",
            relieve=lambda: replica.execute("SELECT pg_wal_replay_resume()"),
        )
        check_kept(watched, run, before)


def test_a_run_rests_while_wal_is_not_archived(watched: Deployment) -> None:
    before = rows(watched)
    with psycopg.connect(watched.environment["DATABASE_URL"], autocommit=True) as admin:

        def archive_by(command: str) -> None:
            admin.execute(f"ALTER SYSTEM SET archive_command = '{command}'".encode())
            admin.execute("SELECT pg_reload_conf()")
            admin.execute("SELECT pg_logical_emit_message(true, 'x', 'x')")
            admin.execute("SELECT pg_switch_wal()")

        archive_by("false")
        wait(lambda: watched.query("SELECT failed_count > 0 FROM pg_stat_archiver")[0][0])
        run = begin(watched.operations)
        _rests(
            watched.operations,
            run,
            kind="wal_archiver",
            says="the WAL archiver is failing",
            relieve=lambda: archive_by("true"),
        )
    check_kept(watched, run, before)


def test_a_standby_is_refused_by_whatever_would_write(watched: Deployment, standby: Postgres) -> None:
    env = {"DATABASE_URL": standby.url("watched")}
    with psycopg.connect(standby.url("postgres"), autocommit=True) as replica:
        wait(
            lambda: (
                replica.execute("SELECT count(*) = 1 FROM pg_database WHERE datname = 'watched'").fetchone()
                == (True,)
            )
        )
    hold = ("holds", "add", "--table", "activity_log", "--reason", "x")
    for words in (INLINE, hold, ("db", "init"), ("worker",), ("beat",), ("runs", "stop", "last")):
        refused(watched, *words, says="DATABASE_URL: the server is a standby and takes no change", env=env)
    # To look is no change.
    watched.cli("plan", "prune-logs", env=env)
    watched.cli("runs", "list", env=env)
