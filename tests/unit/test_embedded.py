"""The embedded servers, for real: what they promise to a demo and to every test that kills one of them."""

from __future__ import annotations

import json
import os
import pwd
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING

import boto3
import psycopg
import pytest
from botocore.config import Config
from botocore.exceptions import ClientError
from redis import Redis
from redis import exceptions as redis_errors

from worker import embedded, processes
from worker.embedded import Embedded, stop_kept
from worker.errors import Refused, WorkerError

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

ROOT = Path(__file__).parents[2]
SITE = Path(sysconfig.get_path("purelib"))
IS_ROOT = os.geteuid() == 0

# Starts the servers, tells where they are, and waits for its standard input to end.
SCRIPT = """
import json, os, sys
from worker import embedded, processes
outlive = "outlive" in sys.argv
servers = embedded.start(outlive=outlive, keep=outlive)
told = {s.name: s.process.pid for s in (servers.postgres, servers.redis, servers.s3)}
print(json.dumps({"directory": str(servers.directory), "pids": told, "env": servers.environment()}), flush=True)
sys.stdin.read()
if not outlive:
    servers.stop()
"""


@pytest.fixture(scope="module")
def servers() -> Iterator[Embedded]:
    with embedded.start(postgres_settings={"fsync": "off", "max_connections": "40"}) as running:
        yield running


@pytest.fixture
def open_directory() -> Iterator[Path]:
    """A directory that the servers' user can enter, which pytest's own is not."""
    with tempfile.TemporaryDirectory(dir="/tmp") as name:
        Path(name).chmod(0o711)
        yield Path(name)


def client(env: Mapping[str, str], secret: str | None = None) -> S3Client:
    """A client made of nothing but the environment that a worker gets."""
    return boto3.session.Session().client(
        "s3",
        endpoint_url=env["PAPERCLIP_STORAGE_S3_ENDPOINT"],
        region_name=env["PAPERCLIP_STORAGE_S3_REGION"],
        aws_access_key_id=env["AWS_ACCESS_KEY_ID"],
        aws_secret_access_key=secret or env["AWS_SECRET_ACCESS_KEY"],
        config=Config(signature_version="s3v4", s3={"addressing_style": "path"}, retries={"total_max_attempts": 1}),
    )


def write(env: Mapping[str, str], mark: str) -> None:
    with psycopg.connect(env["DATABASE_URL"]) as connection:
        connection.execute("CREATE TABLE IF NOT EXISTS marks (mark text)")
        connection.execute("INSERT INTO marks VALUES (%s)", (mark,))
    with closing(Redis.from_url(env["PAPERCLIP_WORKER_BROKER_URL"])) as broker:
        broker.rpush("marks", mark)
    with closing(client(env)) as store:
        store.put_object(Bucket=env["PAPERCLIP_WORKER_S3_BUCKET"], Key=mark, Body=mark.encode())


def holds(env: Mapping[str, str], mark: str) -> bool:
    with psycopg.connect(env["DATABASE_URL"]) as connection:
        in_table = connection.execute("SELECT count(*) FROM marks WHERE mark = %s", (mark,)).fetchone() == (1,)
    with closing(Redis.from_url(env["PAPERCLIP_WORKER_BROKER_URL"])) as broker:
        in_queue = broker.lpos("marks", mark) is not None
    with closing(client(env)) as store:
        body = store.get_object(Bucket=env["PAPERCLIP_WORKER_S3_BUCKET"], Key=mark)["Body"].read()
    return in_table and in_queue and body == mark.encode()


def children() -> set[int]:
    return {pid for pid, (parent, _) in processes.process_table().items() if parent == os.getpid()}


def alive(pids: list[int]) -> list[int]:
    live = processes.process_table()
    return [pid for pid in pids if pid in live]


def gone(pids: list[int], seconds: float = 15) -> bool:
    deadline = time.monotonic() + seconds
    while alive(pids) and time.monotonic() < deadline:
        time.sleep(0.05)
    return not alive(pids)


def tree(running: Embedded) -> list[int]:
    """The servers' processes and their children."""
    roots = {one.process.pid for one in (running.postgres, running.redis, running.s3)}
    return [pid for pid, (parent, _) in processes.process_table().items() if pid in roots or parent in roots]


class Parent:
    """Another process that started servers."""

    def __init__(self, *words: str, python: str = sys.executable, path: Path = SITE, user: str | None = None) -> None:
        who = pwd.getpwnam(user) if user else None
        self.process = subprocess.Popen(
            [python, "-c", SCRIPT, *words],
            cwd="/",
            env={"PYTHONPATH": f"{ROOT}:{path}", "PATH": os.defpath, "PYTHONDONTWRITEBYTECODE": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            user=who.pw_uid if who else None,
            group=who.pw_gid if who else None,
            extra_groups=[] if who else None,
        )
        assert self.process.stdout is not None
        told = json.loads(self.process.stdout.readline())
        self.directory = Path(told["directory"])
        self.pids: dict[str, int] = told["pids"]
        self.env: dict[str, str] = told["env"]

    def finish(self) -> None:
        """Let it end by itself."""
        self.process.communicate(timeout=30)
        assert self.process.returncode == 0

    def killed(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        self.process.communicate(timeout=30)


def owner(pid: int) -> str:
    return Path(f"/proc/{pid}").owner()


def test_every_server_answers_what_the_environment_names(servers: Embedded) -> None:
    env = servers.environment()
    write(env, "first")
    assert holds(env, "first")


def test_the_settings_asked_for_hold_over_the_defaults(servers: Embedded) -> None:
    with psycopg.connect(servers.environment("postgres")["DATABASE_URL"]) as connection:
        found: dict[str, str] = dict(
            connection.execute(
                "SELECT name, setting FROM pg_settings"
                " WHERE name IN ('fsync', 'max_connections', 'wal_level', 'listen_addresses')"
            ).fetchall()
        )
    assert found == {"fsync": "off", "max_connections": "40", "wal_level": "replica", "listen_addresses": "127.0.0.1"}


def test_the_socket_is_in_the_private_directory(servers: Embedded) -> None:
    postgres = servers.postgres
    with psycopg.connect(
        host=str(postgres.data), port=postgres.port, user="paperclip", password=postgres.password, dbname="paperclip"
    ) as connection:
        assert connection.execute("SELECT inet_server_addr()").fetchone() == (None,)


def test_wrong_secrets_are_refused(servers: Embedded) -> None:
    env = servers.environment()
    with closing(client(env, "wrong")) as store, pytest.raises(ClientError, match="SignatureDoesNotMatch"):
        store.list_objects_v2(Bucket="paperclip")
    url = env["DATABASE_URL"].replace(servers.postgres.password, "wrong")
    with pytest.raises(psycopg.OperationalError, match="password authentication failed"):
        psycopg.connect(url)


def test_nothing_is_open_to_others(servers: Embedded) -> None:
    allowed = 0o711 if IS_ROOT else 0o700
    assert servers.directory.stat().st_mode & 0o777 == allowed
    for one in (servers.postgres, servers.redis, servers.s3):
        assert one.data.stat().st_mode & 0o777 == 0o700
        assert one.log.stat().st_mode & 0o777 == 0o600
    assert (servers.directory / "servers.json").stat().st_mode & 0o777 == 0o600
    assert not list(servers.directory.glob("*.pw"))


def test_no_server_listens_beyond_loopback(servers: Embedded) -> None:
    tables = Path("/proc/net/tcp"), Path("/proc/net/tcp6")
    if not tables[0].exists():
        pytest.skip("needs /proc/net/tcp")
    listening = [
        line.split()[1]
        for table in tables
        if table.exists()
        for line in table.read_text().splitlines()[1:]
        if line.split()[3] == "0A"
    ]
    ours = {f"{port:04X}" for port in servers.s3._ports + servers.redis._ports + servers.postgres._ports}
    found = [address for address in listening if address.split(":")[1] in ours]
    assert {address.split(":")[1] for address in found} >= {f"{servers.s3.port:04X}"}
    assert {address.split(":")[0] for address in found} == {"0100007F"}


def test_data_and_ports_survive_a_kill(servers: Embedded) -> None:
    env = servers.environment()
    write(env, "killed")
    for one in (servers.postgres, servers.redis, servers.s3):
        before, pids = one.process.pid, tree(servers)
        one.kill()
        assert one.process.returncode == -signal.SIGKILL
        assert before not in alive(pids)
        with pytest.raises(ConnectionRefusedError), socket.create_connection(("127.0.0.1", one.port), 2):
            pass
        one.start()
        assert one.process.pid != before
    assert servers.environment() == env
    assert holds(env, "killed")


def test_a_server_restarted_by_a_thread_outlives_the_thread(servers: Embedded) -> None:
    servers.redis.stop()
    with ThreadPoolExecutor(1) as pool:
        pool.submit(servers.redis.start).result()
    assert servers.redis.process.poll() is None
    with closing(Redis.from_url(servers.environment()["PAPERCLIP_WORKER_BROKER_URL"])) as broker:
        assert broker.ping()


def test_a_frozen_server_hangs_and_a_thawed_one_goes_on(servers: Embedded) -> None:
    env = servers.environment()
    with (
        psycopg.connect(env["DATABASE_URL"]) as connection,
        closing(Redis.from_url(env["PAPERCLIP_WORKER_BROKER_URL"], socket_timeout=0.3)) as broker,
        ThreadPoolExecutor(1) as pool,
    ):
        broker.ping()
        servers.postgres.freeze()
        servers.redis.freeze()
        asked = pool.submit(connection.execute, "SELECT 1")
        with pytest.raises(redis_errors.TimeoutError):
            broker.ping()
        assert not asked.done()
        servers.postgres.thaw()
        servers.redis.thaw()
        assert asked.result(10).fetchone() == (1,)
        assert broker.ping()


def test_stop_leaves_no_process_and_no_file() -> None:
    servers = embedded.start()
    pids = tree(servers)
    assert len(pids) > 3
    servers.postgres.freeze()  # a frozen server must not hold up the end
    servers.stop()
    servers.stop()
    assert gone(pids, 2)
    assert not servers.directory.exists()
    assert not [path for port in servers.s3._ports for path in Path("/tmp").glob(f"seaweedfs-*{port}.sock")]  # noqa: S108


def test_a_failed_start_says_why_and_leaves_nothing(open_directory: Path) -> None:
    before = children()
    with pytest.raises(WorkerError, match=r'invalid value for parameter "shared_buffers": "none at all"'):
        embedded.start(open_directory / "servers", postgres_settings={"shared_buffers": "none at all"})
    assert children() == before
    assert not list(open_directory.iterdir())


def test_a_directory_in_use_is_refused(tmp_path: Path) -> None:
    (tmp_path / "precious").touch()
    with pytest.raises(Refused, match="not empty"):
        embedded.start(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["precious"]


@pytest.mark.skipif(not IS_ROOT, reason="only root has to hand the servers to another user")
def test_a_closed_parent_is_refused_and_stays_closed(tmp_path: Path) -> None:
    tmp_path.chmod(0o700)
    with pytest.raises(Refused, match="cannot be entered by nobody"):
        embedded.start(tmp_path / "servers")
    assert tmp_path.stat().st_mode & 0o777 == 0o700
    assert not list(tmp_path.iterdir())


def test_a_wrong_binary_directory_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(embedded.PG_BIN, str(tmp_path))
    with pytest.raises(Refused, match="PostgreSQL 15 or later"):
        embedded.start()


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a child that its parent died")
def test_a_killed_parent_leaves_no_server() -> None:
    parent = Parent()
    assert sorted(alive(list(parent.pids.values()))) == sorted(parent.pids.values())
    parent.killed()
    assert gone(list(parent.pids.values()))
    stop_kept(parent.directory)  # finds nobody alive, and removes what is left in /tmp
    shutil.rmtree(parent.directory)


def test_kept_servers_outlive_their_parent_until_stopped() -> None:
    parent = Parent("outlive")
    parent.finish()
    pids = list(parent.pids.values())
    write(parent.env, "kept")
    assert holds(parent.env, "kept")

    record = parent.directory / "servers.json"
    entries = json.loads(record.read_text())
    entries["redis"]["pid"] = os.getpid()  # as if the number had passed to another process: us
    record.write_text(json.dumps(entries))
    stop_kept(parent.directory)
    assert alive(pids) == [parent.pids["redis"]]

    entries["redis"]["pid"] = parent.pids["redis"]
    record.write_text(json.dumps(entries))
    stop_kept(parent.directory)
    assert not alive(pids)
    assert (parent.directory / "postgres" / "PG_VERSION").exists()
    with pytest.raises(Refused, match="no servers were kept there"):
        stop_kept(parent.directory)
    shutil.rmtree(parent.directory)


@pytest.mark.skipif(not IS_ROOT, reason="only root has to hand the servers to another user")
def test_servers_from_a_venv_that_others_cannot_enter(tmp_path: Path) -> None:
    closed = tmp_path / "closed"
    site = closed / "lib" / "python3" / "site-packages"
    site.parent.mkdir(parents=True)
    site.symlink_to(SITE)
    (closed / "bin").symlink_to(sysconfig.get_path("scripts"))
    closed.chmod(0o700)
    parent = Parent(path=site)
    try:
        assert {owner(pid) for pid in parent.pids.values()} == {"nobody"}
        command = Path(f"/proc/{parent.pids['postgres']}/cmdline").read_text()
        assert command.startswith(str(parent.directory / "install"))
        write(parent.env, "closed")
        assert holds(parent.env, "closed")
    finally:
        parent.finish()
    assert closed.stat().st_mode & 0o777 == 0o700
    assert not parent.directory.exists()


@pytest.mark.skipif(not IS_ROOT, reason="the other tests already ran as a normal user")
def test_as_a_normal_user() -> None:
    python = _python_for("nobody")
    if python is None:
        pytest.skip("no interpreter with these packages is open to the user nobody")
    parent = Parent(python=python, user="nobody")
    try:
        assert {owner(pid) for pid in parent.pids.values()} == {"nobody"}
        assert parent.directory.owner() == "nobody"
        assert parent.directory.stat().st_mode & 0o777 == 0o700
        write(parent.env, "normal")
        assert holds(parent.env, "normal")
    finally:
        parent.finish()
    assert gone(list(parent.pids.values()), 2)
    assert not parent.directory.exists()


def _python_for(user: str) -> str | None:
    """An interpreter of this version that the user may run, with our packages on its path."""
    who = pwd.getpwnam(user)
    system = f"/usr/bin/python{sys.version_info.major}.{sys.version_info.minor}"
    for python in (sys.executable, system):
        tried = subprocess.run(
            ["/bin/sh", "-c", 'exec "$0" -c "import psycopg, boto3, worker.embedded"', python],
            cwd="/",
            env={"PYTHONPATH": f"{ROOT}:{SITE}", "PYTHONDONTWRITEBYTECODE": "1"},
            user=who.pw_uid,
            group=who.pw_gid,
            extra_groups=[],
            capture_output=True,
            check=False,
        )
        if tried.returncode == 0:
            return python
    return None
