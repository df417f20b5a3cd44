"""A worker held up between two statements of a bite, while the run it works on ends."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any
from uuid import UUID

import pytest

from tasks.prune_logs import PruneLogs
from tests.conftest import Deployment
from tests.faults.evidence import begin, rows
from worker import ledger_shards
from worker.operations import Operations

pytestmark = pytest.mark.faults


def _stop(other: Operations, run: UUID) -> None:
    assert other.stop(str(run)).state.value == "stopped"


def _give_up(other: Operations, run: UUID) -> None:
    other.runner().give_up(run, "a fault of another worker's")


@pytest.mark.parametrize("ends", [_stop, _give_up])
def test_it_takes_nothing_of_a_run_that_has_ended(
    released: Deployment, monkeypatch: pytest.MonkeyPatch, ends: Callable[[Operations, UUID], None]
) -> None:
    """Its snapshot says still that the run is under way; what it took would be in no receipt."""
    before = rows(released)
    worker, other = (released.with_settings(bite_rows="200") for _ in range(2))
    run = begin(worker, PruneLogs(archive=False))
    left = iter(range(3))
    worker.runner().work(run, seconds=math.inf, leave=lambda: next(left, None) is None)
    take = ledger_shards.take_shard

    def late(*given: Any) -> Any:
        monkeypatch.setattr(ledger_shards, "take_shard", take)
        ends(other, run)
        return take(*given)

    monkeypatch.setattr(ledger_shards, "take_shard", late)
    worker.runner().work(run, seconds=math.inf)
    result = other.result(run)
    assert result["state"] in {"stopped", "failed"}
    assert result["receipt"]["tally"] == result["tally"]
    assert 0 < len(before) - len(rows(released)) == result["rows"]
