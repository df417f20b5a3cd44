"""Real workers that are killed or share a run, and real servers that are killed under them."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from uuid import UUID

import psycopg
import pytest
import redis
import sqlalchemy as sa

from tests.conftest import NOW, Deployment
from tests.faults.evidence import begin, check_exact, check_kept, complete, rows, wait
from tests.faults.wire import wire
from worker import app, brokers, config, db, embedded, ledger, liveness
from worker.errors import Transient, WorkerError
from worker.layouts import demo_schema
from worker.operations import Operations

pytestmark = pytest.mark.faults
ROWS, COMPANIES = 3_000, 5
# Bites so small that there is always one in flight when something is killed.
SMALL = {"bite_rows": "15", "slice_seconds": "2", "rescue_after": "1"}
WORKER = ("worker", "--concurrency=1")
# So many bites wait to begin, while somebody enters a hold.
_WAITING = "SELECT count(*) FROM pg_locks WHERE relation = 'paperclip_worker.holds'::regclass AND NOT granted"
ON_LINUX = pytest.mark.skipif(sys.platform != "linux", reason="what a connection does when it is dead is Linux's")


@pytest.fixture(scope="module")
def mortal() -> Iterator[embedded.Embedded]:
    """Servers of this module's own, to be killed; PostgreSQL as durable as in production."""
    with embedded.start() as started:
        engine = sa.create_engine(started.environment()["DATABASE_URL"].replace("postgres", "postgresql+psycopg", 1))
        with engine.begin() as connection:
            demo_schema.create(connection, "paperclip")
            demo_schema.seed(connection, "paperclip", rows=ROWS, now=NOW, companies=COMPANIES)
        ledger.init(engine)
        engine.dispose()
        yield started


@pytest.fixture
def site(
    mortal: embedded.Embedded, signing_key: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> Iterator[Deployment]:
    """A seeded deployment on the mortal servers, with a queue and a bucket prefix of its own."""
    number = sum(request.node.name.encode()) % 15 + 1
    name = f"site_{sum(request.node.name.encode())}"
    with psycopg.connect(mortal.postgres.url("postgres"), autocommit=True) as admin:
        admin.execute(f"CREATE DATABASE {name} TEMPLATE paperclip".encode())
    environment = {
        **mortal.environment(name),
        "PAPERCLIP_WORKER_BROKER_URL": f"redis://127.0.0.1:{mortal.redis.port}/{number}",
        "PAPERCLIP_WORKER_S3_PREFIX": f"{name}/",
        "PAPERCLIP_WORKER_SIGNING_KEY_FILE": str(signing_key),
        "PAPERCLIP_WORKER_PARALLEL": "4",
    }
    for key in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(key, environment[key])
    operations = Operations(config.load(environment))
    yield Deployment(layout="paperclip", environment=environment, operations=operations, opened=[operations])
    operations.engine.dispose()


def _bites(site: Deployment, run: UUID) -> int:
    with contextlib.suppress(psycopg.OperationalError):
        return int(site.query("SELECT count(*) FROM paperclip_worker.bites WHERE run_id = %s", run)[0][0])
    return 0


def _settled(site: Deployment, run: UUID) -> bool:
    with contextlib.suppress(Transient):
        return site.operations.find(str(run)).settled_at is not None
    return False


def _send(site: Deployment, run: UUID) -> None:
    with app.make(site.operations.settings) as celery:
        app.send_work(celery, run)


def _under_way(site: Deployment, run: UUID, *, bites: int = 20) -> None:
    """Wait until the run has some bites behind it and most of them still ahead."""
    wait(lambda: _bites(site, run) >= bites)
    assert not _settled(site, run)


def test_a_killed_worker_s_run_is_finished_by_the_next(site: Deployment) -> None:
    """SIGKILL to a worker and all its processes: one started later finds the stalled run by itself."""
    before = rows(site)
    run = begin(site.operations)
    with site.worker(*WORKER, **SMALL) as first:
        _send(site, run)
        _under_way(site, run)
        os.killpg(first.pid, signal.SIGKILL)
    at = _bites(site, run)
    wait(lambda: _nobody_connected(site))
    check_exact(site, run, before)
    stalled = "SELECT greatest(max(s.touched_at), max(r.touched_at)) < clock_timestamp() - interval '1.1 s' "
    stalled += "FROM paperclip_worker.runs r JOIN paperclip_worker.shards s ON s.run_id = r.id"
    wait(lambda: site.query(stalled)[0][0])
    with site.worker(*WORKER, **SMALL):
        wait(lambda: _settled(site, run))
    assert _bites(site, run) > at
    check_kept(site, run, before)


def test_a_worker_told_to_end_hands_its_run_to_the_next(site: Deployment) -> None:
    """SIGTERM in the middle of a run: the bite ends, then the worker, and another goes on with no need of rescue."""
    before = rows(site)
    run = begin(site.operations)
    # So long a slice that the first would do the whole run in it, and no rescue within the test's time.
    slow = {**SMALL, "slice_seconds": "120", "rescue_after": "3600"}
    with site.worker(*WORKER, **slow) as first:
        _send(site, run)
        _under_way(site, run)
        first.terminate()
        assert first.wait(10) == 0
    assert not _settled(site, run)
    check_exact(site, run, before)
    at = _bites(site, run)
    with site.worker(*WORKER, **slow):
        wait(lambda: _settled(site, run))
    assert _bites(site, run) > at
    check_kept(site, run, before)


def _nobody_connected(site: Deployment) -> bool:
    """Whether PostgreSQL has noticed that the worker is dead."""
    query = "SELECT count(*) FROM pg_stat_activity WHERE application_name = %s AND state <> 'idle' AND datname = "
    return bool(site.query(query + "current_database()", "paperclip-worker")[0][0] == 0)


def _kill(server: Callable[[embedded.Embedded], embedded.Server]) -> Callable[[embedded.Embedded], None]:
    def kill_and_start(servers: embedded.Embedded) -> None:
        server(servers).kill()
        server(servers).start()

    return kill_and_start


@pytest.mark.parametrize(
    "crash",
    [
        pytest.param(_kill(lambda one: one.redis), id="redis"),
        pytest.param(_kill(lambda one: one.postgres), id="postgres"),
        pytest.param(_kill(lambda one: one.s3), id="s3"),
    ],
)
def test_a_server_that_crashes_and_comes_back_costs_nothing(
    site: Deployment, mortal: embedded.Embedded, crash: Callable[[embedded.Embedded], None]
) -> None:
    """The worker rides it out: the run is kept, exact, and nobody had to do a thing."""
    before = rows(site)
    run = begin(site.operations)
    with site.worker(*WORKER, **SMALL):
        _send(site, run)
        _under_way(site, run)
        crash(mortal)
        wait(lambda: _settled(site, run), seconds=60)
    check_kept(site, run, before)


@ON_LINUX
def test_a_database_that_goes_silent_is_given_up(
    released: Deployment, make_deployment: Callable[..., Deployment]
) -> None:
    """No answer and no end of the connection either: the worker notices by itself and takes the run again."""
    before = rows(released)
    with wire(released.environment["DATABASE_URL"]) as line:
        quick = "keepalives_idle=1&keepalives_interval=1&keepalives_count=2&tcp_user_timeout=2000"
        site = make_deployment(line.url(quick), "paperclip")
        small = site.with_settings(bite_rows="50")
        run = begin(small)
        worker = threading.Thread(target=complete, args=(small, run), daemon=True)
        worker.start()
        _under_way(released, run, bites=5)
        line.cut()
        worker.join(30)
        assert not worker.is_alive()
        check_kept(site, run, before)


@ON_LINUX
@pytest.mark.parametrize(
    ("query", "expected"),
    [
        pytest.param("", (30, 10, 3, 60_000), id="ours"),
        pytest.param("?keepalives_idle=7&tcp_user_timeout=5000", (7, 10, 3, 5_000), id="the URL's"),
    ],
)
def test_connections_are_made_to_notice_it(servers: embedded.Embedded, query: str, expected: tuple[int, ...]) -> None:
    """What DATABASE_URL says goes before what is set otherwise."""
    names = (socket.TCP_KEEPIDLE, socket.TCP_KEEPINTVL, socket.TCP_KEEPCNT, socket.TCP_USER_TIMEOUT)
    with (
        _connected(servers.environment()["DATABASE_URL"] + query) as connection,
        socket.socket(fileno=os.dup(db.driver(connection).fileno())) as own,
    ):
        assert own.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1
        assert tuple(own.getsockopt(socket.IPPROTO_TCP, name) for name in names) == expected


def test_a_socket_of_the_same_machine_does_as_well(servers: embedded.Embedded) -> None:
    one = servers.postgres
    with _connected(f"postgres://paperclip:{one.password}@/paperclip?host={one.data}&port={one.port}") as connection:
        assert connection.exec_driver_sql("SELECT inet_server_addr()").scalar_one() is None


@contextlib.contextmanager
def _connected(url: str) -> Iterator[sa.Connection]:
    engine = db.engine(config.load({"DATABASE_URL": url}))
    try:
        with engine.connect() as connection:
            yield connection
    finally:
        engine.dispose()


def test_beats_ride_out_a_redis_that_crashes_and_comes_back(site: Deployment, mortal: embedded.Embedded) -> None:
    """The one at work and those that wait; and one of them is told to end meanwhile."""

    def at_work() -> bool:
        with contextlib.suppress(WorkerError):
            return liveness.ask(site.operations.settings, timeout=1, beat=True).beat
        return False

    with contextlib.ExitStack() as stack:
        beats = [stack.enter_context(site.worker("beat", beat_seconds="1")) for _ in range(3)]
        with redis.Redis.from_url(site.environment["PAPERCLIP_WORKER_BROKER_URL"]) as client:
            # Those that wait have asked last which schedule is at work.
            wait(lambda: at_work() and [one["cmd"] for one in client.client_list()].count("hget") == 2)
        mortal.redis.kill()
        try:
            time.sleep(2)
            beats[0].terminate()
            assert beats[0].wait(30) == 0
        finally:
            mortal.redis.start()
        wait(at_work, seconds=60)
        assert [beat.poll() for beat in beats] == [0, None, None]
    assert [beat.returncode for beat in beats] == [0, 0, 0]


@pytest.mark.long
def test_a_worker_that_came_up_before_its_broker_leaves_that_of_another_deployment(
    site: Deployment, mortal: embedded.Embedded
) -> None:
    """Nobody was there to ask whose it is when the worker began."""
    run = begin(site.operations)
    mortal.redis.kill()
    try:
        with site.worker(*WORKER) as worker:
            time.sleep(8)
            assert worker.poll() is None
            mortal.redis.start()
            with redis.Redis.from_url(site.environment["PAPERCLIP_WORKER_BROKER_URL"]) as client:
                client.set(brokers.CLAIM, "another")
                _send(site, run)
                assert worker.wait(30) == 2
                assert _bites(site, run) == 0
                client.flushdb()
    finally:
        mortal.redis.start()


@pytest.mark.parametrize("workers", [2, 4])
def test_workers_that_share_a_run_add_up(site: Deployment, workers: int) -> None:
    """All of them have a bite in flight at the same time, and still each row goes once and is archived once."""
    before = rows(site)
    run = begin(site.operations)
    with contextlib.ExitStack() as stack:
        for _ in range(2):
            stack.enter_context(site.worker("worker", f"--concurrency={workers // 2}", **SMALL))
        with app.make(site.operations.settings) as celery:
            wait(lambda: len(celery.control.ping(timeout=0.3) or ()) == 2)
            with psycopg.connect(site.environment["DATABASE_URL"]) as holder:
                holder.execute("LOCK TABLE paperclip_worker.holds IN EXCLUSIVE MODE")
                app.send_work(celery, run)
                wait(lambda: site.query(_WAITING)[0][0] == workers)
        wait(lambda: _settled(site, run))
    check_kept(site, run, before)
