"""The proof at the end: taken in bites, by however many workers, and still about every row there is."""

from __future__ import annotations

import math
from typing import Any
from uuid import UUID

import psycopg
import pytest

from tests.rotation import steps
from tests.rotation.vault import Vault
from worker.errors import Refused
from worker.latecomers import Latecomers
from worker.runner import Outcome
from worker.states import State


def _work_until(vault: Vault, run: UUID, condition: str) -> None:
    """Work on a run until what its shards say is so."""
    query = f"SELECT {condition} FROM paperclip_worker.shards WHERE run_id = %s"

    def reached() -> bool:
        ((found,),) = vault.deployment.query(query, run)
        return bool(found)

    assert vault.deployment.operations.runner().work(run, seconds=math.inf, leave=reached) is Outcome.MORE
    assert reached()


def _envelopes(result: dict[str, Any], key: str) -> int:
    after = result["receipt"]["evidence"]["envelopes"]["after"]
    return sum(one[key] for one in after.values())


def _held(vault: Vault) -> int:
    return sum(values.total() for values in vault.held.values())


def test_what_comes_after_the_last_bite_is_seen_and_swept(vault: Vault) -> None:
    run = steps.start(vault, generate=True)
    _work_until(vault, run, "bool_and(done)")
    with vault.connect() as connection:
        vault.add_version(connection, "late")
    result = steps.work(vault, run)
    assert result["state"] == "kept"
    ((sweeps,),) = vault.deployment.query("SELECT max(sweep) FROM paperclip_worker.shards WHERE run_id = %s", run)
    assert sweeps == 2
    assert _envelopes(result, "new") == _held(vault)
    assert vault.opened(vault.now) == vault.held


def test_what_is_written_back_while_it_is_looked_elsewhere_is_swept(
    released_vault: Vault, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a large database that takes long, and agents that were at work before write back what they read then."""
    vault, original = released_vault, Latecomers.claim

    def beside_a_writer(self: Latecomers, *words: Any) -> Any:
        with vault.connect() as connection:
            vault.add_run(connection, ["written back"], key=vault.key)
        return original(self, *words)

    monkeypatch.setattr(Latecomers, "claim", beside_a_writer)
    result = steps.work(vault, steps.start(vault, generate=True))
    assert result["state"] == "kept", result["findings"]
    assert vault.opened(vault.now) == vault.held


def test_a_verdict_of_long_ago_is_given_anew(released_vault: Vault) -> None:
    """Its worker was killed, and no other came for an hour."""
    vault = released_vault
    run = steps.start(vault, generate=True)
    operations = vault.deployment.operations

    def finishing() -> bool:
        return operations.find(str(run)).state is State.FINISHING

    assert operations.runner().work(run, seconds=math.inf, leave=finishing) is Outcome.MORE
    vault.deployment.query("UPDATE paperclip_worker.rotations SET swept_at = swept_at - interval '1 hour'")
    with vault.connect() as connection:
        vault.add_version(connection, "written back")
    says = "since the run was judged: 1 rows of company_secret_versions still sealed with the old key; resume it"
    with pytest.raises(Refused, match=says):
        steps.work(vault, run)
    operations.resume(str(run))
    assert steps.work(vault, run)["kept"] is True
    assert vault.opened(vault.now) == vault.held


def test_a_row_that_no_longer_opens_after_its_bite_breaks_the_promise(vault: Vault) -> None:
    run = steps.start(vault, generate=True)
    _work_until(vault, run, "bool_and(done)")
    # One of ours: two rows in 42 are other schemes' values, which no rotation opens.
    ours = next(row for table, row in vault.held if table == "company_secret_versions")
    vault.deployment.query(
        "UPDATE company_secret_versions SET material = jsonb_set(material, '{tag}', '\"AAAAAAAAAAAAAAAAAAAAAA==\"') "
        "WHERE id = %s",
        ours,
    )
    result = steps.work(vault, run)
    assert result["state"] == "unkept"
    assert {one["what"] for one in result["findings"]} == {"sealed with neither key, and was not when the run began"}


def test_rows_that_are_moved_between_two_bites_are_seen(vault: Vault, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("worker.proof._RANGE", 1)
    run = steps.start(vault, generate=True)
    _work_until(vault, run, "count(*) FILTER (WHERE key = 'prove:0' AND bites > 1) > 0")
    with psycopg.connect(vault.deployment.environment["DATABASE_URL"], autocommit=True) as connection:
        connection.execute("VACUUM FULL company_secret_versions")
    result = steps.work(vault, run)
    assert result["state"] == "kept"
    assert _envelopes(result, "new") == _held(vault)


def test_progress_is_measured_against_what_is_ours(vault: Vault) -> None:
    """The vault has values of other schemes as well, which nobody rotates."""
    run = steps.start(vault, generate=True)
    result = steps.work(vault, run)
    found = vault.deployment.operations.find(str(run))
    assert found.planned_rows == result["rows"] == len(vault.held)


def test_help_is_called_for_again_when_there_is_work_for_more(vault: Vault) -> None:
    called: list[tuple[int, int]] = []

    def call_help(number: int) -> None:
        query = "SELECT min(stage) FROM paperclip_worker.shards WHERE run_id = %s AND NOT done"
        ((stage,),) = vault.deployment.query(query, run)
        called.append((stage, number))

    run = steps.start(vault, generate=True)
    runner = vault.deployment.operations.runner()
    assert runner.work(run, seconds=math.inf, call_help=call_help) is Outcome.SETTLED
    # Who lays the run out has help at once; between, there is one thing to do at a time.
    assert called == [(steps.MAKE_READY, 1), (steps.SWEEP, 1), (steps.LOOK_AGAIN, 1)]
