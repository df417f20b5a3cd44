"""The three servers that `embedded` starts: each can be ended, frozen and started again on its port and data."""

from __future__ import annotations

import contextlib
import json
import secrets
import signal
import socket
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar

from worker.errors import Refused, WorkerError
from worker.processes import PATIENCE, RECORD, Place, ended, note, send, send_family, sweep

BUCKET, REGION = "paperclip", "us-east-1"


class Server:
    """One server that can be started, ended and frozen again and again on one port with one data directory.

    Methods raise WorkerError, with the tail of the server's log, when the server does not do as told.
    """

    name: ClassVar[str]
    quit_by: ClassVar[signal.Signals] = signal.SIGTERM
    orphaned: ClassVar[signal.Signals] = signal.SIGKILL

    def __init__(self, place: Place, ports: list[int]) -> None:
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
        deadline = time.monotonic() + PATIENCE
        while not self._answers():
            if not self.running:
                raise self._failure(f"ended with status {self.process.returncode} before it answered")
            if time.monotonic() > deadline:
                raise self._failure(f"did not answer within {PATIENCE:.0f} s")
            time.sleep(0.02)
        note(self._place.directory / RECORD, self.name, self.process.pid, self._ports)

    def ask(self) -> None:
        """Tell the server to end cleanly, without waiting."""
        if self.running:
            self.thaw()
            send(self.process.pid, self.quit_by)

    def stop(self) -> None:
        """End the server cleanly and keep its data; one that does not obey is killed, and that is an error."""
        if self.running:
            self.ask()
            try:
                self.process.wait(PATIENCE)
            except subprocess.TimeoutExpired:
                self.kill()
                raise self._failure(f"did not stop within {PATIENCE:.0f} s and was killed") from None
        sweep(self._ports)

    def kill(self) -> None:
        """SIGKILL the server and all its processes, as a crash would; returns when they are gone."""
        family = self._each(signal.SIGSTOP)  # so that none is born between the look and the kill
        for pid in family:
            send(pid, signal.SIGKILL)
        if family:
            self.process.wait()
        ended(family)
        sweep(self._ports)

    def freeze(self) -> None:
        """Stop the server and all its processes where they stand: connections stay open and nothing answers."""
        self._each(signal.SIGSTOP)

    def thaw(self) -> None:
        """Let a frozen server go on."""
        self._each(signal.SIGCONT)

    def _each(self, number: signal.Signals) -> dict[int, str]:
        return send_family(self.process.pid, number) if self.running else {}

    def _run(self) -> subprocess.Popen[bytes]:
        raise NotImplementedError

    def _spawn(self, command: list[str | Path], **env: str) -> subprocess.Popen[bytes]:
        return self._place.spawn(command, data=self.data, log=self.log, orphaned=self.orphaned, env=env)

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
        self, place: Place, ports: list[int], binaries: tuple[Path, ...], settings: Mapping[str, str]
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
            return self._spawn([self._bin / "initdb", "-D", self.data, "-U", "paperclip", *how])
        settings = [word for key, value in self._settings.items() for word in ("-c", f"{key}={value}")]
        return self._spawn([self._bin / "postgres", "-D", self.data, *settings])

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

    def __init__(self, place: Place, ports: list[int], binary: Path) -> None:
        super().__init__(place, ports)
        self._binary = place.reachable(binary, binary)

    def _run(self) -> subprocess.Popen[bytes]:
        listen = ["--bind", "127.0.0.1", "--port", str(self.port), "--dir", str(self.data)]
        return self._spawn([self._binary, *listen, "--appendonly", "yes", "--save", ""])

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

    def __init__(self, place: Place, ports: list[int], binary: Path) -> None:
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
        return self._spawn(command, GOMEMLIMIT="512MiB", GOGC="100", WEED_S3_SSE_KEY=self._sse_key)

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
