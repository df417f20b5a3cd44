"""A store so slow that a session which merely waited for it would be ended by the server."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tasks.prune_logs import PruneLogs
from tasks.restore_logs import RestoreLogs
from tests.conftest import Deployment
from tests.promises.archived import prune, store_of
from worker import db
from worker.runner import Outcome
from worker.storage import S3Store

Slow = Callable[[], Counter[str]]


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> Slow:
    """From when it is called on, objects come later than the server lets a session idle; how often each was read."""
    bounds, read, reads = db._bounds, S3Store.read, Counter[str]()

    def hasty(**given: Any) -> dict[str, str]:
        return {**bounds(**given), "idle_in_transaction_session_timeout": "2s"}

    def late(store: S3Store, key: str) -> Iterator[bytes]:
        reads[key] += 1
        time.sleep(3 if key.endswith(".zst") else 0)
        yield from read(store, key)

    def begin() -> Counter[str]:
        monkeypatch.setattr(db, "_bounds", hasty)
        monkeypatch.setattr(db, "AWAKE", 0.2)
        monkeypatch.setattr(S3Store, "read", late)
        return reads

    return begin


def test_a_plan_is_made_and_reads_each_object_once(released: Deployment, slow: Slow) -> None:
    run = prune(released, bite_rows="100000")
    # To make the client takes a while, too, the first time.
    store_of(released)
    reads = slow()
    assert released.operations.plan(RestoreLogs(run=run)).tally.total.rows > 0
    assert set(reads.values()) == {1}


def test_a_prune_is_verified(released: Deployment, slow: Slow) -> None:
    small = released.with_settings(bite_rows="100000")
    run = small.start(PruneLogs(), actor="tester", via="test")
    small.runner().work(run, seconds=math.inf, leave=lambda: small.result(run)["state"] == "verifying")
    slow()
    assert small.runner().work(run, seconds=math.inf) is Outcome.SETTLED
    assert small.result(run)["kept"]


def test_a_bite_is_taken(released: Deployment, slow: Slow) -> None:
    """However long its objects take to be written and read back."""
    run = released.operations.start(PruneLogs(), actor="tester", via="test")
    released.operations.runner().work(run, seconds=0)
    slow()
    released.operations.runner().work(run, seconds=0)
    assert released.operations.result(run)["rows"] > 0
