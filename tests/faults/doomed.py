"""A worker in a process of its own that is killed at a chosen step.

It works inline, without a broker. The kill is SIGKILL to itself, so nothing after the step runs.
"""

from __future__ import annotations

import math
import multiprocessing
import os
import signal
from collections.abc import Callable, Mapping
from typing import Any
from uuid import UUID

import psycopg

from tasks.prune_logs import PruneLogs
from tasks.restore_logs import RestoreLogs
from worker import anchors, archive, audit, config, ledger, logs
from worker.operations import Operations
from worker.storage import S3Store

# Where to die: owner and name of a function, the call of it that is the last, and whether that call is still made.
BITE: dict[str, tuple[Any, str, int, bool]] = {
    "before claim": (PruneLogs, "claim", 3, False),
    "after claim": (PruneLogs, "claim", 3, True),
    "object written, not read back": (S3Store, "put", 3, True),
    "after preserve": (PruneLogs, "preserve", 3, True),
    "after apply": (PruneLogs, "apply", 3, True),
    "bite recorded": (ledger, "record_bite", 3, True),
}
FIRST = "first object written"
AROUND: dict[str, tuple[Any, str, int, bool]] = {
    FIRST: (S3Store, "put", 1, True),
    "after plan": (PruneLogs, "plan", 1, True),
    "shards laid out": (ledger, "add_shards", 1, True),
    "before verify": (PruneLogs, "verify", 1, False),
    "after verify": (PruneLogs, "verify", 1, True),
    "manifest written": (archive, "write_manifest", 1, True),
    "index written": (PruneLogs, "index", 1, True),
    "receipt written": (audit, "append", 1, True),
}
# Once the settlement has committed.
ANCHORING: dict[str, tuple[Any, str, int, bool]] = {
    "before the receipt's object": (S3Store, "put_once", 1, False),
    "receipt's object written": (S3Store, "put_once", 1, True),
    "head written": (S3Store, "put_once", 2, True),
    "before the anchor is noted": (anchors, "_record", 1, False),
}
# And at the commit that follows such a call: before PostgreSQL hears of it, or once it has answered.
COMMITS: dict[str, tuple[Any, str, int, bool]] = {
    f"{when} commit of {what}": (owner, name, number, when == "after")
    for when in ("before", "after")
    for what, owner, name, number in (
        ("the layout", ledger, "add_shards", 1),
        ("a bite", ledger, "record_bite", 3),
        ("the last bite", PruneLogs, "apply", 9),
        ("verify", PruneLogs, "verify", 1),
        ("the settlement", audit, "append", 1),
    )
}
# The same of a run of restore-logs, which has its own steps and no archive to write.
RESTORE: dict[str, tuple[Any, str, int, bool]] = {
    f"restore, {step}": where
    for step, where in {
        "after plan": (RestoreLogs, "plan", 1, True),
        "after claim": (RestoreLogs, "claim", 3, True),
        "after apply": (RestoreLogs, "apply", 3, True),
        "before commit of a bite": (RestoreLogs, "apply", 3, False),
        "after commit of a bite": (RestoreLogs, "apply", 3, True),
        "before verify": (RestoreLogs, "verify", 1, False),
        "receipt written": (audit, "append", 1, True),
    }.items()
}


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _wrap(owner: Any, name: str, before: Callable[[], None], after: Callable[[], None]) -> None:
    original = getattr(owner, name)

    def wrapper(*arguments: Any, **named: Any) -> Any:
        before()
        found = original(*arguments, **named)
        after()
        return found

    setattr(owner, name, wrapper)


def arm(step: str) -> None:
    """Make this process die at the step."""
    commit = " commit of " in step
    owner, name, number, late = (BITE | AROUND | COMMITS | ANCHORING | RESTORE)[step]
    calls = 0

    def count() -> None:
        nonlocal calls
        calls += 1
        if calls == number and not commit and not late:
            _die()

    def done() -> None:
        if calls == number and not commit:
            _die()

    def committing() -> None:
        if calls == number:
            _die()

    _wrap(owner, name, count, done)
    if commit:
        _wrap(psycopg.Connection, "commit", *((_pass, committing) if late else (committing, _pass)))


def _pass() -> None:
    pass


def _work(step: str, run: UUID, environment: Mapping[str, str]) -> None:
    logs.silence()
    os.environ.update(environment)
    arm(step)
    Operations(config.load()).runner().work(run, seconds=math.inf)


def work_and_die(environment: Mapping[str, str], step: str, run: UUID, *, bite_rows: int) -> None:
    """Let a worker process work on the run until it is killed at the step."""
    # A fork of a process that has done nothing but import: as good as a new one, and there at once.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    environment = {**environment, "PAPERCLIP_WORKER_BITE_ROWS": str(bite_rows)}
    process = context.Process(target=_work, args=(step, run, environment))
    process.start()
    process.join(60)
    code = process.exitcode
    process.kill()
    process.join()
    process.close()
    assert code == -signal.SIGKILL, f"{step}: ended with {code}"
