"""Ctrl-C, closed streams and bytes that are no text: what is said is so, and nothing is lost."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psycopg
import pytest

from tests.cli.helpers import INLINE, PRUNE, check_refusal, world
from tests.conftest import ROOT, Deployment
from tests.faults.evidence import check_kept, rows, wait
from worker.runner import Outcome

CLI = (sys.executable, str(ROOT / "cli.py"))


@contextmanager
def _started(deployment: Deployment, *words: str, **settings: str) -> Iterator[subprocess.Popen[str]]:
    """The command line as a process of its own, without a terminal."""
    extra = {f"PAPERCLIP_WORKER_{name.upper()}": value for name, value in settings.items()}
    with subprocess.Popen(
        [*CLI, *words],
        env=deployment.process_environment() | extra,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            yield process
        finally:
            process.kill()


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
