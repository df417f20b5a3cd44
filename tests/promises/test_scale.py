"""Deployments far from the tests' own in size: what is done and held grows with the rows that go, and no faster."""

from __future__ import annotations

from typing import Any
from uuid import UUID

from tasks.prune_logs import PruneLogs
from tests.conftest import Deployment
from worker import ledger, ledger_shards
from worker.job import Shard
from worker.operations import Operations
from worker.plans import Tally
from worker.states import State


def _start(operations: Operations, **fields: Any) -> UUID:
    return operations.start(PruneLogs(**fields), actor="tester", via="test")


def _shards(operations: Operations, number: int) -> UUID:
    """A run laid out in so many shards, of two stages."""
    run = _start(operations, archive=False)
    shards = (Shard(key=f"{at}:0", rows=1, spec={}, stage=at * 2 // number) for at in range(number))
    with operations.transaction() as connection:
        held = ledger.get(connection, run, hold=True)
        assert held is not None
        ledger_shards.add_shards(connection, run, held.sweep, shards)
        ledger.step(connection, held, State.RUNNING)
    return run


def test_a_shard_of_ten_thousand_is_taken_in_no_time(released: Deployment) -> None:
    """One for each company, or of a restore for each object. It took the square of their number, and never came."""
    operations = released.with_settings(statement_timeout="1")
    run = _shards(operations, 10_000)
    for _ in range(20):
        with operations.transaction() as connection:
            held = ledger_shards.take_shard(connection, run)
            assert held is not None
            # The others are of a later stage, or are held; each of these is still the first for everybody else.
            with operations.transaction() as beside:
                other = ledger_shards.take_shard(beside, run)
                assert other is not None
                assert (other.shard.stage, other.number) == (0, held.number + 1)
            ledger_shards.record_bite(connection, held, cursor=None, tally=Tally(), done=True, objects=(), seconds=0)
