"""The states of a run, and the one table of allowed steps between them."""

from __future__ import annotations

from enum import StrEnum


class State(StrEnum):
    """Where a run stands."""

    QUEUED = "queued"
    RUNNING = "running"
    VERIFYING = "verifying"
    FINISHING = "finishing"
    STOPPING = "stopping"
    STOPPED = "stopped"
    FAILED = "failed"
    KEPT = "kept"
    UNKEPT = "unkept"


ACTIVE = frozenset({State.QUEUED, State.RUNNING, State.VERIFYING, State.FINISHING, State.STOPPING})
SETTLED = frozenset(State) - ACTIVE
RESUMABLE = frozenset({State.STOPPED, State.FAILED})
# What a run never leaves.
FINAL = SETTLED - RESUMABLE

STEPS: dict[State, frozenset[State]] = {
    # A worker has planned the run and laid out its shards.
    State.QUEUED: frozenset({State.RUNNING, State.STOPPING, State.FAILED}),
    # Every shard of the sweep is done; or an operator wants it to end.
    State.RUNNING: frozenset({State.VERIFYING, State.STOPPING, State.FAILED}),
    # Findings of the first sweep cause one more; otherwise the promise is kept or not.
    State.VERIFYING: frozenset({State.RUNNING, State.FINISHING, State.STOPPING, State.FAILED}),
    State.FINISHING: frozenset({State.KEPT, State.UNKEPT, State.FAILED}),
    # No bite is in flight any more.
    State.STOPPING: frozenset({State.STOPPED, State.FAILED}),
    # An operator resumes: without shards it starts anew, with shards it goes on at its cursors.
    State.STOPPED: frozenset({State.QUEUED, State.RUNNING}),
    State.FAILED: frozenset({State.QUEUED, State.RUNNING}),
    State.KEPT: frozenset(),
    State.UNKEPT: frozenset(),
}
