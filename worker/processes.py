"""Processes of the embedded servers: whom they run as, how they end with their parent, how they are told apart."""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import pwd
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from threading import Lock

from worker.errors import Refused

RECORD = "servers.json"
PATIENCE = 60.0
EXTRA = "install the extra: paperclip-worker[embedded]"
LOCK = Lock()  # over the record and the ports already handed out
_LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None
# Linux reports the death of the thread that started a server: this one lives as long as the process.
_SPAWNER = ThreadPoolExecutor(1, thread_name_prefix="embedded-servers")


@dataclass(frozen=True, kw_only=True)
class Place:
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

    def spawn(
        self, command: list[str | Path], *, data: Path, log: Path, orphaned: signal.Signals, env: dict[str, str]
    ) -> subprocess.Popen[bytes]:
        """Run a command as the account; it gets the signal `orphaned` when this process dies, unless outliving."""
        base = {"PATH": os.defpath, "HOME": str(data), "TMPDIR": str(data), "TZ": "UTC", "LC_ALL": "C"}
        dies_with = None if self.outlive or _LIBC is None else partial(_die_with, _LIBC, os.getpid(), orphaned)

        def run() -> subprocess.Popen[bytes]:
            with os.fdopen(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600), "ab") as output:
                return subprocess.Popen(  # noqa: S603  (a binary found by us, words made by us)
                    command,
                    cwd=data,
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
        if self.account is None or may(self.account, binary):
            return binary
        if not trees:
            raise Refused(f"the user {self.account.pw_name} may not execute {binary}; {EXTRA}")
        into = self.directory / "install"
        for tree in trees:
            copy_open(tree, into / tree.name)
        return into / binary.relative_to(trees[0].parent)


def may(account: pwd.struct_passwd | None, path: Path) -> bool:
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


def copy_open(source: Path, target: Path) -> None:
    """Copy a file or a tree so that everyone can use it, whatever the mask of its installer was."""
    target.parent.mkdir(exist_ok=True)
    if source.is_dir():
        shutil.copytree(source, target, ignore=shutil.ignore_patterns("include", "__pycache__"))
    else:
        shutil.copy2(source, target)
    for path in (target.parent, target, *target.rglob("*")):
        path.chmod(0o755 if path.stat().st_mode & 0o100 else 0o644)


def weed_sockets(port: int) -> list[Path]:
    """What weed leaves in /tmp whatever TMPDIR says; another user's would keep it from serving on that port."""
    return list(Path("/tmp").glob(f"seaweedfs-*-grpc-{port}.sock"))  # noqa: S108


def sweep(ports: list[int]) -> None:
    for port in ports:
        for path in weed_sockets(port):
            path.unlink(missing_ok=True)


def _die_with(libc: ctypes.CDLL, parent: int, number: int) -> None:
    """In the child, before it becomes a server: ask the kernel for a signal when the parent dies."""
    libc.prctl(1, number, 0, 0, 0)  # PR_SET_PDEATHSIG
    if os.getppid() != parent:
        os._exit(1)


def note(record: Path, name: str, pid: int, ports: list[int]) -> None:
    """Write down a running server for `stop_kept`."""
    with LOCK:
        servers = json.loads(record.read_text()) if record.exists() else {}
        servers[name] = {"pid": pid, "started": process_table()[pid][1], "ports": ports}
        fresh = record.with_suffix(".new")
        with os.fdopen(os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as stream:
            json.dump(servers, stream)
        fresh.replace(record)


def process_table() -> dict[int, tuple[int, str]]:
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


def send(pid: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


def send_family(pid: int, number: signal.Signals) -> dict[int, str]:
    """Signal a process and then its children, those born meanwhile too; returns whom, and when each started."""
    sent: dict[int, str] = {}
    while True:
        live = process_table()
        family = {pid: live[pid][1]} if pid in live else {}
        family |= {child: started for child, (parent, started) in live.items() if parent == pid}
        if not (fresh := family.keys() - sent.keys()):
            return sent
        for member in sorted(fresh, key=lambda one: one != pid):
            send(member, number)
        sent |= family


def ended(processes: Mapping[int, str]) -> bool:
    """Wait until the processes are gone; False when they are not in time."""
    deadline = time.monotonic() + PATIENCE
    while any(process_table().get(pid, (0, ""))[1] == started for pid, started in processes.items()):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True
