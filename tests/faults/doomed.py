"""A worker, or a command, in a process of its own that is killed at a chosen step.

A worker works inline, without a broker. The kill is SIGKILL to itself, so nothing after the step runs.
"""

from __future__ import annotations

import importlib
import math
import multiprocessing
import os
import signal
from collections.abc import Callable, Mapping
from typing import Any
from uuid import UUID

import psycopg

from cli import cli
from tasks.prune_logs import PruneLogs
from tasks.restore_logs import RestoreLogs
from worker import anchors, archive, audit, config, ledger_shards, logs
from worker.operations import Operations
from worker.storage import S3Store

# Before the call, after it, or at the commit that follows it: before PostgreSQL hears of it, or once it has answered.
BEFORE, AFTER, UNCOMMITTED, COMMITTED = "before", "after", "uncommitted", "committed"
# Where to die: owner and name of a function, which call of it, and when.
Step = tuple[Any, str, int, str]
BITE: dict[str, Step] = {
    "before claim": (PruneLogs, "claim", 3, BEFORE),
    "after claim": (PruneLogs, "claim", 3, AFTER),
    "object written, not read back": (S3Store, "put", 3, AFTER),
    "after preserve": (PruneLogs, "preserve", 3, AFTER),
    "after apply": (PruneLogs, "apply", 3, AFTER),
    "bite recorded": (ledger_shards, "record_bite", 3, AFTER),
}
FIRST = "first object written"
AROUND: dict[str, Step] = {
    FIRST: (S3Store, "put", 1, AFTER),
    "after plan": (PruneLogs, "outline", 1, AFTER),
    "shards laid out": (ledger_shards, "add_shards", 1, AFTER),
    "before verify": (PruneLogs, "verify", 1, BEFORE),
    "after verify": (PruneLogs, "verify", 1, AFTER),
    "manifest written": (archive, "write_manifest", 1, AFTER),
    "index written": (PruneLogs, "index", 1, AFTER),
    "receipt written": (audit, "append", 1, AFTER),
}
# Once the settlement has committed.
ANCHORING: dict[str, Step] = {
    "before the receipt's object": (S3Store, "put_once", 1, BEFORE),
    "receipt's object written": (S3Store, "put_once", 1, AFTER),
    "head written": (S3Store, "put_once", 2, AFTER),
    "before the anchor is noted": (anchors, "_record", 1, BEFORE),
}
COMMITS: dict[str, Step] = {
    f"{when} commit of {what}": (owner, name, number, moment)
    for when, moment in (("before", UNCOMMITTED), ("after", COMMITTED))
    for what, owner, name, number in (
        ("the layout", ledger_shards, "add_shards", 1),
        ("a bite", ledger_shards, "record_bite", 3),
        ("the last bite", PruneLogs, "apply", 9),
        ("verify", PruneLogs, "verify", 1),
        ("the settlement", audit, "append", 1),
    )
}
# The same of a run of restore-logs, which has its own steps and no archive to write.
RESTORE: dict[str, Step] = {
    f"restore, {step}": where
    for step, where in {
        "after plan": (RestoreLogs, "outline", 1, AFTER),
        "after claim": (RestoreLogs, "claim", 3, AFTER),
        "after apply": (RestoreLogs, "apply", 3, AFTER),
        "before commit of a bite": (RestoreLogs, "apply", 3, UNCOMMITTED),
        "after commit of a bite": (RestoreLogs, "apply", 3, COMMITTED),
        "before verify": (RestoreLogs, "verify", 1, BEFORE),
        "receipt written": (audit, "append", 1, AFTER),
    }.items()
}
STEPS = BITE | AROUND | COMMITS | ANCHORING | RESTORE


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


def arm(step: Step) -> None:
    """Make this process die at the step."""
    owner, name, number, when = step
    calls = 0

    def enter() -> None:
        nonlocal calls
        calls += 1
        if calls == number and when == BEFORE:
            _die()

    def at(moment: str) -> Callable[[], None]:
        def perhaps() -> None:
            if calls >= number and when == moment:
                _die()

        return perhaps

    _wrap(owner, name, enter, at(AFTER))
    _wrap(psycopg.Connection, "commit", at(UNCOMMITTED), at(COMMITTED))


def _do(table: str, step: str, what: UUID | tuple[str, ...], environment: Mapping[str, str]) -> None:
    # First: the conftest that it may import clears the environment.
    where = importlib.import_module(table).STEPS[step]
    logs.silence()
    os.environ.update(environment)
    arm(where)
    if isinstance(what, UUID):
        Operations(config.load()).runner().work(what, seconds=math.inf)
    else:
        cli.main(what, standalone_mode=False)


def work_and_die(
    environment: Mapping[str, str], step: str, run: UUID, *, bite_rows: int | None = None, table: str = __name__
) -> None:
    """Let a worker process work on the run until it is killed at the step, which is one of a module's STEPS."""
    rows = {} if bite_rows is None else {"PAPERCLIP_WORKER_BITE_ROWS": str(bite_rows)}
    _die_doing(table, step, run, {**environment, **rows})


def command_and_die(environment: Mapping[str, str], step: str, *words: str, table: str) -> None:
    """Let a process run a command until it is killed at the step, which is one of a module's STEPS."""
    _die_doing(table, step, words, environment)


def _die_doing(table: str, step: str, what: UUID | tuple[str, ...], environment: Mapping[str, str]) -> None:
    # A fork of a process that has done nothing but import: as good as a new one, and there at once.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([table])
    process = context.Process(target=_do, args=(table, step, what, dict(environment)))
    process.start()
    process.join(60)
    code = process.exitcode
    process.kill()
    process.join()
    process.close()
    assert code == -signal.SIGKILL, f"{step}: ended with {code}"
