"""Following a run: a progress bar that admits its estimate, drawn from the ledger."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any
from uuid import UUID

from worker import ledger, ledger_shards
from worker.errors import DatabaseGone
from worker.states import SETTLED, State

if TYPE_CHECKING:
    from worker.operations import Operations

_LOOK_EVERY = 0.3
# A database that restarts is back well within this; a longer absence ends the following, never the run.
_PATIENCE = 60.0
_ANCHORED_WITHIN = 3.0
# A worker that has nothing else in hand takes a run up within a moment.
_TAKEN_UP_WITHIN = 10.0
_NOT_TAKEN_UP = "no worker has taken it up; start one with `paperclip-worker worker`"


def follow(
    deployment: Operations, run: UUID, *, show: bool, leave: Callable[[], bool], tell: Callable[[str], None]
) -> bool:
    """Return once the run has settled, or False when `leave` says so.

    Without a bar (`show`) it tells once that no worker takes the run up: a script would wait and not know for what.
    Raises DatabaseGone when the database stays away for a minute.
    """
    bar, task = _bar() if show else (None, None)
    told = show
    started = gone_since = time.monotonic()
    if bar:
        bar.start()
    try:
        while not leave():
            try:
                state, done, planned, note = _look(deployment, run)
                gone_since = time.monotonic()
            except DatabaseGone:
                if time.monotonic() - gone_since > _PATIENCE:
                    raise
                time.sleep(1)
                continue
            if state is State.QUEUED and time.monotonic() - started > _TAKEN_UP_WITHIN:
                note = _NOT_TAKEN_UP
                if not told:
                    tell(f"run {run}: {note}")
                    told = True
            if bar and task is not None:
                bar.update(task, completed=done, total=planned, description=state.value, note=note)
            if state in SETTLED:
                _await_anchor(deployment, run)
                return True
            time.sleep(_LOOK_EVERY)
        return False
    finally:
        if bar:
            bar.stop()


def _await_anchor(deployment: Operations, run: UUID) -> None:
    """The receipt goes to the bucket just after the settlement: its result is worth a moment, not more."""
    if deployment.settings.s3_bucket is None:
        return
    until = time.monotonic() + _ANCHORED_WITHIN
    while deployment.result(run)["anchor"] is None and time.monotonic() < until:
        time.sleep(_LOOK_EVERY / 3)


def _look(deployment: Operations, run: UUID) -> tuple[State, int, int | None, str]:
    with deployment.transaction(read_only=True) as connection:
        found = ledger.find(connection, str(run), brief=True)
        rows, _ = ledger_shards.progress(connection, run)
        stage = ledger_shards.stage(connection, run)
    note = f"rests: {found.waiting}" if found.waiting else ("second sweep" if found.sweep > 1 else stage or "")
    return found.state, rows, found.planned_rows, note


def _bar() -> tuple[Any, Any]:
    from rich.console import Console  # noqa: PLC0415 - drawn on terminals only
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn  # noqa: PLC0415

    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
        console=Console(stderr=True),
        transient=True,
    )
    return bar, bar.add_task("queued", total=None, note="")
