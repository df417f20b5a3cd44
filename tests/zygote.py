"""The command line as processes that share their imports.

Most of what a command costs here is starting Python and importing. One process for each process of pytest has done
both, and forks for each command a child with arguments, environment, working directory and output of its own, which
then is `python cli.py ...` in all else: it runs that file and ends as an interpreter ends.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import gc
import importlib
import json
import os
import pkgutil
import runpy
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
CLI = ROOT / "cli.py"
# What libraries import only when they are used.
_LATE = ("botocore.httpsession", "botocore.handlers", "celery.app.amqp", "kombu.transport.redis", "redbeat")
_NUMBER = struct.Struct("!i")


def inherited() -> dict[str, str]:
    """What a command has of our environment, and that a warning is an error."""
    keep = {name: os.environ[name] for name in ("PATH", "HOME", "LANG", "TMPDIR") if name in os.environ}
    return {**keep, "PYTHONWARNINGS": "error"}


class Zygote:
    """Our end of the process; one command at a time."""

    def __init__(self) -> None:
        self._ours, theirs = socket.socketpair()
        self._one = threading.Lock()
        with theirs:
            # Nothing of a deployment is in its environment: a module that read a setting at import would show.
            self._process = subprocess.Popen(
                [sys.executable, __file__, str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                env=inherited(),
            )

    @property
    def pid(self) -> int:
        return self._process.pid

    def run(self, *words: str, env: Mapping[str, str], timeout: float = 120) -> subprocess.CompletedProcess[str]:
        """What `run_alone` returns. TimeoutExpired when it takes longer; it is killed then."""
        if env.get("PYTHONWARNINGS") != "error" or any(name in env for name in ("PYTHONPATH", "PYTHONUTF8")):
            raise ValueError("the interpreter is started already: its own settings cannot be chosen")
        with self._one, tempfile.TemporaryDirectory() as place:
            out, err = Path(place, "stdout"), Path(place, "stderr")
            request = {
                "words": [str(CLI), *words],
                "env": dict(env),
                "cwd": str(Path.cwd()),
                "out": str(out),
                "err": str(err),
            }
            self._ours.sendall(json.dumps(request).encode() + b"\n")
            pid = self._number(None)
            try:
                status = self._number(timeout)
            except BaseException as error:
                # Its status must not be taken for the next one's.
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
                self._number(None)
                if isinstance(error, TimeoutError):
                    raise subprocess.TimeoutExpired([str(CLI), *words], timeout) from None
                raise
            return subprocess.CompletedProcess([str(CLI), *words], status, out.read_text(), err.read_text())

    def _number(self, timeout: float | None) -> int:
        self._ours.settimeout(timeout)
        found = self._ours.recv(_NUMBER.size, socket.MSG_WAITALL)
        if not found:
            raise RuntimeError("the process that commands are forked from is gone")
        (number,) = _NUMBER.unpack(found)
        return int(number)

    def close(self) -> None:
        self._ours.close()
        self._process.wait(10)


def run_alone(*words: str, env: Mapping[str, str], timeout: float = 120) -> subprocess.CompletedProcess[str]:
    """The same in a process that starts from nothing."""
    return subprocess.run(
        [sys.executable, str(CLI), *words],
        capture_output=True,
        text=True,
        check=False,
        stdin=subprocess.DEVNULL,
        timeout=timeout,
        env=env,
    )


@functools.cache
def zygote() -> Zygote:
    """The one of this process, started when it is first asked for."""
    started = Zygote()
    atexit.register(started.close)
    return started


def _load() -> None:
    """Import what commands use, and open nothing."""
    # As Python sets it for a script: its directory, not that of this file.
    sys.path[0] = str(ROOT)
    for package in map(importlib.import_module, ("worker", "tasks", "schedules")):
        for module in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
            if not module.name.startswith("worker.migrations"):
                importlib.import_module(module.name)
    for name in _LATE:
        importlib.import_module(name)
    # The children would copy every page that the collector marks.
    gc.collect()
    gc.freeze()


def _serve(channel: socket.socket) -> list[str]:
    """Fork a child for each request until there are no more. Returns in the child, with its arguments."""
    with channel, channel.makefile("rb") as requests:
        for line in requests:
            request = json.loads(line)
            pid = os.fork()
            if pid == 0:
                _become(request)
                return list(request["words"])
            channel.sendall(_NUMBER.pack(pid))
            channel.sendall(_NUMBER.pack(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])))
    sys.exit()


def _become(request: dict[str, Any]) -> None:
    """Be the command's own process: nothing of the one before it is in reach."""
    os.chdir(request["cwd"])
    os.environ.clear()
    os.environ.update(request["env"])
    time.tzset()
    for stream, path in enumerate((request["out"], request["err"]), start=1):
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        os.dup2(file, stream)
        os.close(file)


def main() -> None:
    """Load, serve, and in a child run the file that an operator runs, to whatever end it comes."""
    _load()
    words = _serve(socket.socket(fileno=int(sys.argv[1])))
    sys.argv = words
    runpy.run_path(words[0], run_name="__main__")


if __name__ == "__main__":
    main()
