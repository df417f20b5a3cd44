"""A worker that was cut off from the database while it settled, and does not know: others have worked on since."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import suppress
from typing import Any
from uuid import UUID

import pytest

from tasks.restore_logs import RestoreLogs
from tests.conftest import Deployment
from tests.faults.evidence import begin, check_exact, check_kept, complete, rows
from worker import archive
from worker.errors import StorageFault, WorkerError
from worker.operations import Operations
from worker.params import RunId
from worker.states import RESUMABLE, State
from worker.storage import S3Store

pytestmark = pytest.mark.faults
# What PostgreSQL does to a session that is idle in a transaction for too long.
_CUT_OFF = (
    "SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity WHERE application_name = 'paperclip-worker' "
    "AND state = 'idle in transaction' AND datname = current_database()"
)
BEFORE, AFTER = "before", "after"
# The call to the store that takes so long: its owner and name, and whether the store acts before or after all else.
PUTS: tuple[Any, str, str] = (archive, "write_manifest", BEFORE)
LISTS: tuple[Any, str, str] = (S3Store, "keys", AFTER)


def _fails(worker: Operations, run: UUID) -> None:
    with suppress(WorkerError):
        worker.runner().work(run, seconds=math.inf)


def _stops(worker: Operations, run: UUID) -> None:
    with suppress(WorkerError):
        worker.stop(str(run))


def _ends(worker: Operations, run: UUID) -> None:
    complete(worker, run)


def _to_its_end(operations: Operations, run: UUID) -> None:
    """As the rescue and an operator have a run go on: one that another settles as stopped is resumed."""
    while (state := operations.find(str(run)).state) is not State.KEPT:
        if state in RESUMABLE:
            operations.resume(str(run))
        complete(operations, run)


@pytest.mark.parametrize("hangs", [PUTS, LISTS], ids=["manifest", "listing"])
@pytest.mark.parametrize("settles", [_fails, _stops, _ends])
def test_it_harms_nothing_that_was_written_since(
    released: Deployment,
    monkeypatch: pytest.MonkeyPatch,
    settles: Callable[[Operations, UUID], None],
    hangs: tuple[Any, str, str],
) -> None:
    """Some bites are done, and one has left an object behind that was not read back: others write the same again."""
    monkeypatch.setattr("worker.runner.MOST_FAULTS", 1 if settles is _fails else 3)
    monkeypatch.setattr("worker.runner._LONGEST_REST", 0.0)
    before = rows(released)
    worker, other = (released.with_settings(bite_rows="200") for _ in range(2))
    run = begin(worker)
    left = iter(range(3))
    worker.runner().work(run, seconds=math.inf, leave=lambda: next(left, None) is None)
    _once(monkeypatch, archive, "_read_back", BEFORE, _not_read_back)
    if settles is _stops:
        worker.runner().work(run, seconds=0)

    def meanwhile() -> None:
        released.query(_CUT_OFF)
        _to_its_end(other, run)

    _once(monkeypatch, *hangs, meanwhile)
    settles(worker, run)
    _to_its_end(other, run)
    check_exact(released, run, before)
    check_kept(released, run, before)
    put_back = begin(other, RestoreLogs(run=RunId(str(run))))
    complete(other, put_back)
    assert other.result(put_back)["kept"]
    assert rows(released).items() >= before.items()


def _once(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, when: str, act: Callable[[], None]) -> None:
    """At the first call of a function, have something else happen first, or before it comes back."""
    original, left = getattr(owner, name), [act]

    def wrapper(*given: Any, **named: Any) -> Any:
        now = left.pop() if left else None
        if now and when == BEFORE:
            now()
        found = original(*given, **named)
        if now and when == AFTER:
            now()
        return found

    monkeypatch.setattr(owner, name, wrapper)


def _not_read_back() -> None:
    raise StorageFault("the store is ill")
