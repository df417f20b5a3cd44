"""Ctrl-C, closed streams and bytes that are no text: what is said is so, and nothing is lost."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import Thread
from urllib.parse import urlsplit

import psycopg
import pytest

from tests.cli.helpers import INLINE, PRUNE, check_refusal, world
from tests.conftest import ROOT, Deployment
from tests.faults.evidence import check_kept, rows, wait
from worker import embedded
from worker.runner import Outcome

CLI = (sys.executable, str(ROOT / "cli.py"))


@contextmanager
def _started(
    deployment: Deployment, *words: str, env: Mapping[str, str] = {}, **settings: str
) -> Iterator[subprocess.Popen[str]]:
    """The command line as a process of its own, without a terminal."""
    extra = {f"PAPERCLIP_WORKER_{name.upper()}": value for name, value in settings.items()}
    with subprocess.Popen(
        [*CLI, *words],
        env=deployment.process_environment() | extra | dict(env),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            yield process
        finally:
            process.kill()


class _Relay:
    """A way to PostgreSQL that can be shut, or that loses the answer to the commit after some statement."""

    def __init__(self, url: str, statement: bytes | None) -> None:
        parts = urlsplit(url)
        self._to, self._statement = (parts.hostname, parts.port), statement
        self._listener = socket.create_server(("127.0.0.1", 0))
        login = parts.netloc.rpartition("@")[0]
        self.url = parts._replace(netloc=f"{login}@127.0.0.1:{self._listener.getsockname()[1]}").geturl()
        self._open: list[socket.socket] = [self._listener]
        Thread(target=self._accept, daemon=True).start()

    def shut(self) -> None:
        for one in self._open:
            with suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
            one.close()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                server = socket.create_connection(self._to)
                self._open += [client, server]
                Thread(target=self._ask, args=(client, server), daemon=True).start()

    def _ask(self, client: socket.socket, server: socket.socket) -> None:
        Thread(target=self._answer, args=(server, client), daemon=True).start()
        seen = False
        with suppress(OSError):
            while data := client.recv(65_536):
                seen = seen or (self._statement is not None and self._statement in data)
                if seen and b"COMMIT" in data:
                    client.shutdown(socket.SHUT_RDWR)
                server.sendall(data)
        with suppress(OSError):
            server.shutdown(socket.SHUT_WR)

    @staticmethod
    def _answer(server: socket.socket, client: socket.socket) -> None:
        with suppress(OSError):
            while data := server.recv(65_536):
                client.sendall(data)
        with suppress(OSError):
            client.shutdown(socket.SHUT_RDWR)


@contextmanager
def _relay(deployment: Deployment, statement: str | None = None) -> Iterator[tuple[dict[str, str], _Relay]]:
    made = _Relay(deployment.environment["DATABASE_URL"], statement.encode() if statement else None)
    try:
        yield {"DATABASE_URL": made.url}, made
    finally:
        made.shut()


def _bites(deployment: Deployment) -> int:
    ((found,),) = deployment.query("SELECT coalesce(sum(bites), 0) FROM paperclip_worker.shards")
    return int(found)


def test_ctrl_c_leaves_an_inline_run_after_the_batch_and_says_how_it_stands(released: Deployment) -> None:
    before = rows(released)
    with _started(released, *INLINE, "--json", bite_rows="5") as process:
        wait(lambda: _bites(released) > 2)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=30)
    result = json.loads(out)
    assert process.returncode == 1
    assert (result["state"], result["kept"]) == ("running", False)
    assert len(before) - len(rows(released)) == result["rows"] > 0
    run = result["run"]
    assert err == (
        f"paperclip-worker: run {run} is running: `runs resume {run} --inline` goes on, as workers do after 180 s; "
        f"`runs stop {run}` ends it\n"
    )
    released.cli("runs", "resume", run, "--inline")
    check_kept(released, released.operations.find(run).id, before)


def test_a_script_is_told_that_no_worker_takes_its_run_up(released: Deployment) -> None:
    with _started(released, *PRUNE, "--yes", "--json") as process:
        assert process.stderr is not None
        told = process.stderr.readline()
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=30)
    found = json.loads(out)
    assert told == (
        f"paperclip-worker: run {found['run']}: no worker has taken it up; start one with `paperclip-worker worker`\n"
    )
    assert (process.returncode, found["state"], err.count("\n")) == (0, "queued", 1)


def test_a_second_ctrl_c_cuts_the_batch_off_and_it_is_rolled_back(released: Deployment) -> None:
    before = rows(released)
    with psycopg.connect(released.environment["DATABASE_URL"]) as holder:
        holder.execute("LOCK TABLE paperclip_worker.holds IN EXCLUSIVE MODE")
        with _started(released, *INLINE) as process:
            waits = "SELECT count(*) > 0 FROM pg_locks WHERE relation = 'paperclip_worker.holds'::regclass "
            wait(lambda: released.query(waits + "AND NOT granted")[0][0])
            process.send_signal(signal.SIGINT)
            with pytest.raises(subprocess.TimeoutExpired):
                process.wait(1)
            process.send_signal(signal.SIGINT)
            out, err = process.communicate(timeout=30)
    ((run,),) = released.query("SELECT id FROM paperclip_worker.runs")
    assert (process.returncode, out) == (1, "")
    assert err.startswith(
        f"paperclip-worker: run {run} was cut off within a batch, which is rolled back; `runs resume "
    )
    assert len(err.splitlines()) == 1
    assert rows(released) == before
    released.cli("runs", "resume", str(run), "--inline")
    check_kept(released, run, before)


def test_ctrl_c_while_following_says_that_the_run_goes_on(released: Deployment) -> None:
    with _started(released, *PRUNE, "--yes", "--json") as process:
        wait(lambda: released.query("SELECT count(*) FROM paperclip_worker.runs")[0][0])
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(1)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=30)
    result = json.loads(out)
    assert (process.returncode, result["state"], result["kept"]) == (0, "queued", False)
    assert err == f"detached; the run goes on: paperclip-worker runs watch {result['run']}\n"
    run = released.operations.find(result["run"]).id
    assert released.operations.runner().work(run, seconds=60) is Outcome.SETTLED


def test_ctrl_c_while_a_run_is_sent_does_not_say_that_nothing_was_started(
    released: Deployment, servers: embedded.Embedded
) -> None:
    """Redis hangs, and the run is in the ledger already: workers would take it up."""
    # Which of the two depends on what was cut off: to close a connection asks a Redis that hangs, and fails.
    says = r"run \S+ is entered, (and workers take it up; `runs watch|but the broker took no message of it).* ends "
    with psycopg.connect(released.environment["DATABASE_URL"]) as holder:
        holder.execute("SELECT pg_advisory_xact_lock(hashtextextended('paperclip-worker:runs', 0))")
        with _started(released, *PRUNE, "--yes", "--detach") as process:
            waits = "SELECT count(*) > 0 FROM pg_locks WHERE locktype = 'advisory' AND NOT granted"
            wait(lambda: released.query(waits)[0][0])
            servers.redis.freeze()
            try:
                holder.rollback()
                wait(lambda: released.query("SELECT count(*) > 0 FROM paperclip_worker.runs")[0][0])
                time.sleep(0.5)
                process.send_signal(signal.SIGINT)
                out, err = process.communicate(timeout=30)
            finally:
                servers.redis.thaw()
    ((run,),) = released.query("SELECT id::text FROM paperclip_worker.runs")
    done = subprocess.CompletedProcess([], process.returncode, out, err.lstrip("\n"))
    line = check_refusal(done, says=says, status=1)
    assert line.count(run) >= 2


@pytest.mark.long
def test_a_database_that_goes_while_a_run_is_followed_is_no_refusal(released: Deployment) -> None:
    """Status 2 says that nothing was changed. A minute each: so long it may stay away."""
    for words in ((*PRUNE, "--yes"), INLINE):
        with _relay(released) as (env, relay), _started(released, *words, env=env, bite_rows="5") as process:
            wait(lambda: released.query("SELECT count(*) > 0 FROM paperclip_worker.runs")[0][0])
            relay.shut()
            out, err = process.communicate(timeout=120)
        ((run,),) = released.query("SELECT id::text FROM paperclip_worker.runs")
        done = subprocess.CompletedProcess([], process.returncode, out, err)
        check_refusal(done, says=f"run {run} is entered, and `runs show {run}` says how it stands: ", status=1)
        released.query("DELETE FROM paperclip_worker.bites; DELETE FROM paperclip_worker.shards")
        released.query("DELETE FROM paperclip_worker.objects; DELETE FROM paperclip_worker.runs")


def test_a_commit_whose_answer_is_lost_is_no_refusal(released: Deployment) -> None:
    """What was asked for is done, and who asked hears that it may be."""
    for words, table in (
        ((*PRUNE, "--yes", "--detach"), "runs"),
        (("holds", "add", "--table", "activity_log", "--reason", "r"), "holds"),
    ):
        with _relay(released, f"INSERT INTO paperclip_worker.{table}") as (env, _):
            done = released.cli(*words, ok=False, env=env)
        ((found,),) = released.query(f"SELECT id::text FROM paperclip_worker.{table}")
        says = f"run {found} .*may be done; `runs show {found}`" if table == "runs" else "may be done; look before"
        check_refusal(done, says=says, status=1)


@contextmanager
def _standby_that_is_gone(deployment: Deployment) -> Iterator[None]:
    """Every commit waits for a synchronous standby, and there is none."""
    name = urlsplit(deployment.environment["DATABASE_URL"]).path.removeprefix("/")
    with psycopg.connect(deployment.environment["DATABASE_URL"], autocommit=True) as admin:
        admin.execute("SET synchronous_commit = local")
        admin.execute(f"ALTER DATABASE {name} SET synchronous_commit = on".encode())
        admin.execute("ALTER SYSTEM SET synchronous_standby_names = 'gone'")
        admin.execute("SELECT pg_reload_conf()")
        try:
            yield
        finally:
            admin.execute("ALTER SYSTEM RESET synchronous_standby_names")
            admin.execute("SELECT pg_reload_conf()")


def test_ctrl_c_in_the_midst_of_a_commit_does_not_say_that_nothing_was_done(released: Deployment) -> None:
    """The policy is in force, whatever commits wait for; one that keeps shorter would delete rows tonight."""
    words = ("policy", "set", "--table", "activity_log", "--keep", "400d", "--reason", "r")
    with _standby_that_is_gone(released), _started(released, *words) as process:
        waits = (
            "SELECT count(*) > 0 FROM pg_stat_activity WHERE wait_event = 'SyncRep' AND datname = current_database()"
        )
        wait(lambda: released.query(waits)[0][0])
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=30)
    assert released.query("SELECT keep_seconds FROM paperclip_worker.policies") == [(400 * 86400,)]
    done = subprocess.CompletedProcess([], process.returncode, out, err.lstrip("\n"))
    check_refusal(done, says="cut off in the midst of a commit: what was asked for may be done", status=1)


def test_a_reader_that_goes_ends_a_command_as_other_tools_end(released: Deployment) -> None:
    for words in (("runs", "list"), ("--help",), ("db", "check", "--json"), ("runs", "show", "none")):
        reader, writer = os.pipe()
        os.close(reader)
        with os.fdopen(writer, "wb") as gone:
            done = subprocess.run(
                [*CLI, *words],
                env=released.process_environment(),
                stdin=subprocess.DEVNULL,
                stdout=gone if words[-1] != "none" else subprocess.DEVNULL,
                stderr=subprocess.PIPE if words[-1] != "none" else gone,
                check=False,
            )
        assert (done.returncode, done.stderr or b"") == (-signal.SIGPIPE, b""), words


def test_without_a_stdout_commands_do_what_they_do(released: Deployment) -> None:
    released.cli(*INLINE)
    for words in (("receipts", "show", "1"), ("runs", "list"), ("keys", "list"), ("receipts", "verify")):
        done = subprocess.run(
            ["/bin/sh", "-c", 'exec "$@" >&-', "sh", *CLI, *words],
            env=released.process_environment(),
            stdin=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            check=False,
        )
        assert (done.returncode, done.stderr) == (0, b""), words


def test_without_a_stdin_there_is_nobody_to_ask(released: Deployment) -> None:
    before = world(released)
    done = subprocess.run(
        ["/bin/sh", "-c", 'exec "$@" <&-', "sh", *CLI, *PRUNE, "--inline"],
        env=released.process_environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    check_refusal(done, says="destructive.*--yes", status=2)
    assert world(released) == before


@pytest.mark.parametrize("words", [("runs", "show"), ("holds", "add", "--table", "activity_log", "--reason")])
def test_an_argument_that_is_no_text(released: Deployment, words: tuple[str, ...]) -> None:
    before = world(released)
    done = subprocess.run(
        [*map(str.encode, (*CLI, *words)), b"\xff"],
        env=released.process_environment(),
        capture_output=True,
        check=False,
    )
    assert (done.returncode, done.stdout) == (2, b"")
    assert done.stderr == b"paperclip-worker: an argument is not UTF-8\n"
    assert world(released) == before


def test_what_somebody_entered_fakes_no_line_of_a_table(released: Deployment) -> None:
    released.cli(*INLINE, "--actor", "x\ty\nz\x1b[31m")
    header, *lines = released.cli("runs", "list").stdout.splitlines()
    assert len(lines) == 1
    found = dict(zip(header.split("\t"), lines[0].split("\t"), strict=True))
    assert found["actor"] == r"x\ty\nz\x1b[31m"


@pytest.fixture
def public() -> Iterator[Path]:
    """A directory that servers can go to, which do not run as root; what pytest gives is closed to them."""
    with tempfile.TemporaryDirectory() as directory:
        Path(directory).chmod(0o755)
        yield Path(directory)


def test_sigterm_ends_a_demo_with_its_servers_and_their_directory(public: Path) -> None:
    with subprocess.Popen(
        [*CLI, "demo", "--rows", "20000"],
        env={**os.environ, "TMPDIR": str(public)},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            wait(lambda: any(public.glob("*/worker.log")), seconds=60)
            process.terminate()
            _, err = process.communicate(timeout=60)
        finally:
            process.kill()
    assert (process.returncode, err) == (128 + signal.SIGTERM, "")
    assert list(public.iterdir()) == []
    commands = [one.read_bytes() for one in Path("/proc").glob("[0-9]*/cmdline") if one.exists()]
    assert not [one for one in commands if str(public).encode() in one]
