"""The manual cut-over: the worker waits for an operator's word, and then for a server that uses the new key."""

from __future__ import annotations

import threading
from typing import Any
from uuid import UUID

import psycopg
import pytest

from tests.cli.helpers import refused
from tests.rotation import steps
from tests.rotation.vault import Vault
from worker.errors import Refused
from worker.keyring import MasterKey
from worker.runner import Outcome


@pytest.fixture
def by_hand(vault: Vault) -> Vault:
    """A deployment whose servers have the key in their environment."""
    return steps.with_environment(
        vault, PAPERCLIP_SECRETS_MASTER_KEY_FILE="", PAPERCLIP_SECRETS_MASTER_KEY=vault.key.text
    )


def _begin(vault: Vault) -> tuple[UUID, MasterKey]:
    path, key = steps.key_file(vault)
    return steps.start(vault, new_key_file=str(path), cutover="manual"), key


def _work(vault: Vault, run: UUID, seconds: float) -> Outcome:
    return vault.deployment.operations.runner().work(run, seconds=seconds)


def _work_until_it_waits(vault: Vault, run: UUID, what: str) -> None:
    def waits() -> bool:
        return what in (vault.deployment.operations.find(str(run)).waiting or "")

    assert vault.deployment.operations.runner().work(run, seconds=60, leave=waits) is Outcome.MORE
    assert waits()


def _permit(vault: Vault, run: UUID) -> None:
    vault.deployment.query(
        "UPDATE paperclip_worker.rotations SET permitted_at = now(), permitted_by = 'tester' WHERE run_id = %s", run
    )


def _journal(vault: Vault, run: UUID, column: str) -> Any:
    ((found,),) = vault.deployment.query(f"SELECT {column} FROM paperclip_worker.rotations WHERE run_id = %s", run)
    return found


def test_it_waits_for_permission_and_then_for_proof(by_hand: Vault) -> None:
    vault = by_hand
    rest = vault.rest()
    run, key = _begin(vault)
    _work_until_it_waits(vault, run, f"paperclip-worker keys switch {run}")
    result = vault.deployment.operations.result(run)
    assert result["state"] == "running"
    assert result["waits"]["operator"] >= 1
    assert vault.opened(vault.key) == vault.held
    _permit(vault, run)
    _work_until_it_waits(vault, run, "start the servers with the new key")
    assert vault.deployment.operations.result(run)["state"] == "running"
    assert vault.opened(key) == vault.held
    assert vault.rest() == rest
    assert _journal(vault, run, "proved_at") is None
    # A server that was not restarted still writes with the old key: swept, and no proof.
    with vault.connect() as connection:
        vault.add_version(connection, "straggler")
    assert _work(vault, run, 4) is Outcome.MORE
    assert vault.opened(key) == vault.held
    assert _journal(vault, run, "proved_at") is None
    with vault.connect() as connection:
        vault.add_version(connection, "first of the new key", key=key)
    result = steps.work(vault, run)
    assert result["kept"] is True
    assert _journal(vault, run, "proved_at") is not None
    assert vault.opened(key) == vault.held


def test_what_it_waits_for_stands_all_the_while(by_hand: Vault) -> None:
    vault = by_hand
    run, _ = _begin(vault)
    _work_until_it_waits(vault, run, "keys switch")
    runner = vault.deployment.operations.runner()
    # A runner that has just come to the run says so first.
    runner.work(run, seconds=0)
    thread = threading.Thread(target=runner.work, args=(run,), kwargs={"seconds": 3})
    thread.start()
    seen = set()
    while thread.is_alive():
        seen.add(vault.deployment.operations.find(str(run)).waiting)
    thread.join()
    assert len(seen) == 1
    assert None not in seen


def test_what_no_key_opens_is_no_proof(by_hand: Vault) -> None:
    vault = by_hand
    run, key = _begin(vault)
    _work(vault, run, 0)
    _permit(vault, run)
    steps.work_until(vault, run, steps.SWEEP)
    with vault.connect() as connection:
        row = vault.add_version(connection, "x", key=MasterKey(bytes(32)))
    assert _work(vault, run, 4) is Outcome.MORE
    assert _journal(vault, run, "proved_at") is None
    vault.deployment.query("DELETE FROM company_secret_versions WHERE id = %s", row)
    del vault.held["company_secret_versions", str(row)]
    with vault.connect() as connection:
        vault.add_version(connection, "proof", key=key)
    assert steps.work(vault, run)["kept"] is True


def test_a_changed_copy_of_what_we_sealed_is_no_proof(by_hand: Vault) -> None:
    vault = by_hand
    run, _ = _begin(vault)
    _work(vault, run, 0)
    _permit(vault, run)
    steps.work_until(vault, run, steps.SWEEP)
    vault.deployment.query("UPDATE company_secret_versions SET version = version + 20000000")
    assert _work(vault, run, 4) is Outcome.MORE
    assert _journal(vault, run, "proved_at") is None


@pytest.mark.parametrize(
    "what",
    [
        pytest.param("VACUUM FULL company_secret_versions", id="rewritten"),
        pytest.param("TRUNCATE paperclip_worker.resealed", id="emptied by a crash"),
    ],
)
def test_it_goes_on_after_what_it_knew_no_longer_stands(by_hand: Vault, what: str) -> None:
    """Clean sweeps came before: it looks at everything once, and then for proof again."""
    vault = by_hand
    run, key = _begin(vault)
    _work_until_it_waits(vault, run, "keys switch")
    _permit(vault, run)
    _work_until_it_waits(vault, run, "start the servers")
    with psycopg.connect(vault.deployment.environment["DATABASE_URL"], autocommit=True) as admin:
        admin.execute(what.encode())
    assert _work(vault, run, 1.5) is Outcome.MORE
    assert _journal(vault, run, "proved_at") is None
    with vault.connect() as connection:
        vault.add_version(connection, "proof", key=key)
    assert _work(vault, run, 10) is Outcome.SETTLED
    assert vault.deployment.operations.result(run)["kept"] is True
    assert vault.opened(key) == vault.held


def test_what_was_under_the_new_key_before_is_no_proof(by_hand: Vault) -> None:
    """Some server was tried with the new key; another, with the old one, touches what it wrote, and copies it."""
    vault = by_hand
    path, key = steps.key_file(vault)
    with vault.connect() as connection:
        vault.add_version(connection, "early", key=key)
    run = steps.start(vault, new_key_file=str(path), cutover="manual")
    steps.work_until(vault, run, steps.CUT_OVER)
    with vault.connect() as connection:
        vault.add_version(connection, "early as well", key=key)
    _work_until_it_waits(vault, run, "keys switch")
    _permit(vault, run)
    steps.work_until(vault, run, steps.SWEEP)
    vault.deployment.query("UPDATE company_secret_versions SET version = version + 20000000")
    assert _work(vault, run, 2) is Outcome.MORE
    assert _journal(vault, run, "proved_at") is None
    with vault.connect() as connection:
        vault.add_version(connection, "proof", key=key)
    assert steps.work(vault, run)["kept"] is True
    assert vault.opened(key) == vault.held


def test_only_a_run_that_waits_for_it_is_permitted_to_cut_over(by_hand: Vault) -> None:
    vault = by_hand
    run, key = _begin(vault)
    switch = ("keys", "switch", str(run), "--yes")
    refused(vault.deployment, *switch, says="is no rotation with --cutover manual that was laid out")
    steps.work_until(vault, run, steps.CATCH_UP)
    refused(vault.deployment, *switch, says=f"run {run} is not ready for the cut-over")
    _work_until_it_waits(vault, run, "keys switch")
    vault.deployment.operations.stop(str(run))
    refused(vault.deployment, *switch, says=f"run {run} is stopped")
    vault.deployment.operations.resume(str(run))
    assert _journal(vault, run, "permitted_at") is None
    vault.deployment.cli(*switch)
    steps.work_until(vault, run, steps.SWEEP)
    assert vault.opened(key) == vault.held


def test_it_is_stopped_while_it_waits_and_goes_on(by_hand: Vault) -> None:
    vault = by_hand
    run, key = _begin(vault)
    _work_until_it_waits(vault, run, "keys switch")
    assert vault.deployment.operations.stop(str(run)).state == "stopped"
    assert vault.opened(vault.key) == vault.held
    vault.deployment.operations.resume(str(run))
    _permit(vault, run)
    steps.work_until(vault, run, steps.SWEEP)
    with vault.connect() as connection:
        vault.add_version(connection, "proof", key=key)
    assert steps.work(vault, run)["kept"] is True
    assert vault.opened(key) == vault.held


def test_a_key_file_that_its_operator_replaced_stays_replaced(vault: Vault) -> None:
    """With several hosts the operator puts the file in place, maybe before saying so; it is never put back."""
    run, key = _begin(vault)
    _work_until_it_waits(vault, run, "keys switch")
    vault.file.write_text(key.text)
    assert _work(vault, run, 2) is Outcome.MORE
    assert vault.now == key
    vault.deployment.operations.stop(str(run))
    assert vault.now == key
    vault.deployment.operations.resume(str(run))
    _permit(vault, run)
    steps.work_until(vault, run, steps.SWEEP)
    with vault.connect() as connection:
        vault.add_version(connection, "proof", key=key)
    assert steps.work(vault, run)["kept"] is True
    assert vault.now == key
    assert vault.opened(key) == vault.held


def test_a_manual_run_never_touches_the_key_file(vault: Vault) -> None:
    run, key = _begin(vault)
    _permit_when_ready(vault, run)
    with vault.connect() as connection:
        vault.add_version(connection, "proof", key=key)
    assert steps.work(vault, run)["kept"] is True
    assert vault.now == vault.key
    assert [one.name for one in vault.file.parent.iterdir()] == ["master.key"]


def test_a_new_key_that_is_nowhere_stops_it(by_hand: Vault) -> None:
    vault = by_hand
    run, key = _begin(vault)
    _work(vault, run, 0)
    (vault.file.parent.parent / "new.key").unlink()
    with pytest.raises(Refused, match=f"the new master key {key.fingerprint} is nowhere to be found"):
        _work(vault, run, 5)
    assert vault.opened(vault.key) == vault.held


def test_a_permission_ends_with_a_run_that_fails_however_it_does(by_hand: Vault) -> None:
    """Without the new key nothing can be taken back; the servers are started again all the same."""
    vault = by_hand
    run, key = _begin(vault)
    _work_until_it_waits(vault, run, "keys switch")
    _permit(vault, run)
    (vault.file.parent.parent / "new.key").unlink()
    with pytest.raises(Refused, match="is nowhere to be found"):
        _work(vault, run, 5)
    steps.key_file(vault, key=key)
    vault.deployment.operations.resume(str(run))
    _work_until_it_waits(vault, run, "keys switch")
    assert vault.opened(vault.key) == vault.held
    vault.deployment.cli("keys", "switch", str(run), "--yes")
    steps.work_until(vault, run, steps.SWEEP)
    assert vault.opened(key) == vault.held


def _permit_when_ready(vault: Vault, run: UUID) -> None:
    _work(vault, run, 0)
    _permit(vault, run)
    steps.work_until(vault, run, steps.SWEEP)
