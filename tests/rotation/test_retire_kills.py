"""A command that retires an old key, killed at every step: the seal is there or a receipt says that it is gone."""

from __future__ import annotations

from typing import Any
from uuid import UUID

import pytest

from tasks.retire_master_key import RetireMasterKey
from tests.faults import doomed
from tests.faults.doomed import AFTER, BEFORE, COMMITTED, UNCOMMITTED, Step
from tests.faults.evidence import check_anchored
from tests.rotation import steps
from tests.rotation.vault import Vault
from worker import audit, keychain, masterkeys
from worker.keyring import MasterKey
from worker.masterkeys import Rotation
from worker.retirement import Retiring

pytestmark = pytest.mark.faults

SWEPT, VERIFIED, DROPPED, SETTLED = "what was left is sealed anew", "verified", "a seal is dropped", "settled"
BEFORE_IT: dict[str, Step] = {
    "before the seal is dropped": (masterkeys, "destroy", 1, BEFORE),
    DROPPED: (masterkeys, "destroy", 1, AFTER),
    "receipt written, uncommitted": (audit, "append", 1, UNCOMMITTED),
}
STEPS = {
    **BEFORE_IT,
    SWEPT: (Retiring, "swap", 1, COMMITTED),
    VERIFIED: (RetireMasterKey, "verify", 1, COMMITTED),
    SETTLED: (audit, "append", 1, COMMITTED),
}


def _rotate(vault: Vault) -> UUID:
    run = steps.start(vault, generate=True)
    assert steps.work(vault, run)["kept"] is True
    return run


def _leave_behind(vault: Vault, key: MasterKey) -> None:
    """A secret that somebody put back from a copy."""
    with vault.connect() as connection:
        vault.add_version(connection, "left under an old key", key=key)


def _retire_and_die(vault: Vault, step: str, *words: str) -> UUID:
    """The run of a command that was killed at the step."""
    doomed.command_and_die(vault.deployment.environment, step, "--debug", *words, "--inline", "--yes", table=__name__)
    vault.wait_for_nobody()
    return vault.deployment.operations.find("last").id


def _journals(vault: Vault) -> list[Rotation]:
    with vault.deployment.operations.transaction(read_only=True) as connection:
        return masterkeys.every(connection)


def _receipts(vault: Vault, run: UUID) -> list[Any]:
    with vault.deployment.operations.transaction(read_only=True) as connection:
        return [one.to_json() for one in audit.recent(connection, limit=10, run=run)]


def _check_under_seal(vault: Vault, run: UUID, *keys: MasterKey) -> None:
    """Each of these keys comes out of its seal, and no receipt says that one is gone."""
    found = {vault.now.fingerprint: vault.now}
    with vault.deployment.operations.transaction(read_only=True) as connection:
        assert len(masterkeys.under_seal(connection)) == len(keys)
        keychain.unseal(connection, found)
    assert list(found.values()) == [vault.now, *keys]
    assert not any("retired" in one["evidence"] for one in _receipts(vault, run))


def _check_retired(vault: Vault, run: UUID, *keys: MasterKey) -> None:
    """Nothing is left of these keys, one receipt says so, and nothing opens with any but the key in use."""
    for one in _journals(vault):
        assert (one.sealed, one.retired_by) == (None, str(run))
        assert one.retired_at is not None
    (receipt,) = (one for one in _receipts(vault, run) if "retired" in one["evidence"])
    assert receipt["state"] == "kept"
    assert sorted(receipt["evidence"]["retired"]) == sorted(one.fingerprint for one in keys)
    result = vault.deployment.operations.result(run)
    assert (result["state"], result["rows"]) == ("kept", 1)
    assert vault.opened(vault.now) == vault.held
    assert vault.deployment.query("SELECT count(*) FROM paperclip_worker.resealed") == [(0,)]
    check_anchored(vault.deployment)


@pytest.mark.parametrize("step", BEFORE_IT)
def test_killed_before_it_settles_the_key_is_still_under_seal(released_vault: Vault, step: str) -> None:
    vault = released_vault
    _rotate(vault)
    _leave_behind(vault, vault.key)
    run = _retire_and_die(vault, step, "keys", "retire", vault.key.fingerprint)
    _check_under_seal(vault, run, vault.key)
    assert vault.opened(vault.key, vault.now) == vault.held
    vault.deployment.operations.resume(str(run))
    steps.work(vault, run)
    _check_retired(vault, run, vault.key)


def test_killed_once_it_has_settled_the_key_is_gone_and_a_receipt_says_so(released_vault: Vault) -> None:
    """What the killed one did not write to the bucket, the next writes."""
    vault = released_vault
    _rotate(vault)
    _leave_behind(vault, vault.key)
    run = _retire_and_die(vault, SETTLED, "keys", "retire", vault.key.fingerprint)
    _check_retired(vault, run, vault.key)


def test_what_comes_between_the_verdict_and_the_end_is_not_lost(released_vault: Vault) -> None:
    """Killed in between, it may be long until the run is taken up again, and much is put back until then."""
    vault = released_vault
    _rotate(vault)
    run = _retire_and_die(vault, VERIFIED, "keys", "retire", vault.key.fingerprint)
    _leave_behind(vault, vault.key)
    done = vault.deployment.cli("runs", "resume", str(run), "--inline", ok=False)
    assert done.returncode == 1
    assert (
        f"1 ciphertexts came under {vault.key.fingerprint} since they were looked for; resume the run" in done.stderr
    )
    assert vault.deployment.operations.result(run)["receipt"]["state"] == "failed"
    _check_under_seal(vault, run, vault.key)
    assert vault.opened(vault.key, vault.now) == vault.held
    vault.deployment.cli("runs", "resume", str(run), "--inline")
    _check_retired(vault, run, vault.key)


def test_of_two_keys_both_go_or_none(released_vault: Vault) -> None:
    """The older lies under the seal of the other, so that losing just that one would be losing both."""
    vault = released_vault
    _rotate(vault)
    between = vault.now
    _rotate(vault)
    _leave_behind(vault, between)
    vault.deployment.query("UPDATE paperclip_worker.rotations SET retire_after = now() - interval '1 minute'")
    run = _retire_and_die(vault, DROPPED, "run", "retire-master-key")
    _check_under_seal(vault, run, between, vault.key)
    done = vault.deployment.json("runs", "resume", str(run), "--inline")
    assert done["kept"] is True
    _check_retired(vault, run, vault.key, between)


def test_killed_and_then_stopped_there_is_still_a_way_back(released_vault: Vault) -> None:
    vault = released_vault
    rotation = _rotate(vault)
    new = vault.now
    _leave_behind(vault, vault.key)
    run = _retire_and_die(vault, SWEPT, "keys", "retire", vault.key.fingerprint)
    vault.deployment.cli("runs", "stop", str(run))
    (receipt,) = _receipts(vault, run)
    assert receipt["state"] == "stopped"
    _check_under_seal(vault, run, vault.key)
    assert vault.opened(new) == vault.held
    back = steps.start(vault, rollback=rotation)
    assert steps.work(vault, back)["kept"] is True
    assert vault.now == vault.key
    assert vault.opened(vault.key) == vault.held
