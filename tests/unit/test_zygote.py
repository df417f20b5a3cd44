"""A command forked from shared imports is the command that an operator starts."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import zygote
from tests.zygote import Zygote, inherited, run_alone

_ENVIRONMENT = inherited()
_SAYS = """
import json, os, sys, threading
state = {
    "argv": sys.argv[1:], "cwd": os.getcwd(), "env": dict(os.environ), "path": sys.path[0], "name": __name__,
    "warnings": sys.warnoptions, "encodings": [one.encoding for one in (sys.stdin, sys.stdout, sys.stderr)],
    "ttys": [os.isatty(number) for number in range(3)], "threads": threading.active_count(),
    "files": sorted(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else [],
    "left": getattr(json, "left", None), "pid": os.getpid(),
}
json.left = True
os.environ["LEFT"] = "yes"
print(json.dumps(state))
"""
_ENDS = {
    "a status": "import sys; sys.exit(7)",
    "a sentence": "raise SystemExit('a sentence')",
    "a traceback": "1 / 0",
    "a warning": "import warnings; warnings.warn('deprecated', DeprecationWarning)",
    "a file left open": "import sys; open(sys.argv[0]); print('said')",
    "a call at exit": "import atexit; atexit.register(print, 'last')",
    "a thread that goes on": "import threading, time; threading.Timer(0.2, print, ['later']).start()",
    "Ctrl-C": "import os, signal; os.kill(os.getpid(), signal.SIGINT)",
    "a kill": "import os, signal; os.kill(os.getpid(), signal.SIGKILL)",
}


@pytest.fixture
def fresh() -> Iterator[Zygote]:
    started = Zygote()
    yield started
    started.close()


@pytest.fixture
def program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """In place of cli.py, a file that a test writes."""
    place = tmp_path / "cli.py"
    monkeypatch.setattr(zygote, "CLI", place)
    return place


@pytest.mark.parametrize(
    "words",
    [(), ("--version",), ("plan",), ("plan", "prune-logs"), ("ping",), ("schedule", "list", "--json"), ("nonsense",)],
    ids=" ".join,
)
def test_a_command_says_and_returns_the_same(words: tuple[str, ...]) -> None:
    alone, forked = (run(*words, env=_ENVIRONMENT) for run in (run_alone, zygote.zygote().run))
    assert (forked.returncode, forked.stdout, forked.stderr) == (alone.returncode, alone.stdout, alone.stderr)
    assert forked.stdout + forked.stderr


@pytest.mark.parametrize("end", _ENDS)
def test_it_ends_as_an_interpreter_ends(fresh: Zygote, program: Path, end: str) -> None:
    program.write_text(_ENDS[end])
    alone, forked = (run(env=_ENVIRONMENT) for run in (run_alone, fresh.run))
    assert (forked.returncode, forked.stdout) == (alone.returncode, alone.stdout)
    assert forked.stderr.splitlines()[-1:] == alone.stderr.splitlines()[-1:]


def test_each_is_in_its_own_world_and_leaves_nothing_to_the_next(
    fresh: Zygote, program: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program.write_text(_SAYS)
    monkeypatch.chdir(tmp_path)
    seen = []
    for number in ("1", "2"):
        environment = {**_ENVIRONMENT, f"PAPERCLIP_WORKER_{number}": "ä"}
        alone, forked = (json.loads(run(number, "x", env=environment).stdout) for run in (run_alone, fresh.run))
        seen.append(forked.pop("pid"))
        del alone["pid"]
        # The directory of the file itself: runpy leaves it to us, and cli.py's is the project's.
        assert (forked.pop("path"), alone.pop("path")) == (str(zygote.ROOT), str(tmp_path))
        # Python puts it there when no locale is chosen.
        alone["env"].pop("LC_CTYPE", None)
        assert forked == alone
        assert forked["left"] is None
    assert len({*seen, fresh.pid, os.getpid()}) == 4


def test_the_time_is_bounded_and_the_next_has_its_own_status(fresh: Zygote, program: Path) -> None:
    program.write_text("import sys, time; sys.argv[1:] and time.sleep(60); sys.exit(5)")
    started = time.monotonic()
    with pytest.raises(subprocess.TimeoutExpired):
        fresh.run("long", env=_ENVIRONMENT, timeout=0.2)
    assert time.monotonic() - started < 10
    assert fresh.run(env=_ENVIRONMENT).returncode == 5


@pytest.mark.skipif(sys.platform != "linux", reason="threads and files are read from /proc")
def test_what_is_shared_has_no_thread_no_file_and_no_setting(fresh: Zygote) -> None:
    fresh.run("--version", env=_ENVIRONMENT)
    place = Path("/proc", str(fresh.pid))
    assert len(list((place / "task").iterdir())) == 1
    opened = [one.readlink().name for one in (place / "fd").iterdir() if int(one.name) > 2]
    assert [one for one in opened if not one.startswith("socket:")] == []
    names = {one.partition(b"=")[0].decode() for one in (place / "environ").read_bytes().split(b"\0")}
    assert not [one for one in names if one.startswith(("PAPERCLIP_", "AWS_", "DATABASE_URL"))]


@pytest.mark.parametrize("more", [{"PYTHONWARNINGS": "ignore"}, {"PYTHONPATH": "."}], ids=list)
def test_what_an_interpreter_reads_at_its_start_cannot_be_chosen(more: dict[str, str]) -> None:
    with pytest.raises(ValueError, match="started already"):
        zygote.zygote().run("--version", env=_ENVIRONMENT | more)
