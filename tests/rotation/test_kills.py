"""A worker killed at every step of a rotation: the run goes on, and at no moment is a key or a value lost."""

from __future__ import annotations

from typing import Any
from uuid import UUID

import pytest

from tasks.rotate_master_key import RotateMasterKey
from tests.faults import doomed
from tests.faults.doomed import AFTER, BEFORE, COMMITTED, UNCOMMITTED, Step
from tests.faults.evidence import check_anchored, complete, thinned
from tests.rotation.vault import Vault
from worker import audit, cutover, discovery, keyfile, keyring, ledger_shards, masterkeys
from worker.aside import Aside
from worker.keyring import MasterKey
from worker.latecomers import Latecomers
from worker.readying import Readying
from worker.rotation import Rotating

pytestmark = pytest.mark.faults

BEGIN: dict[str, Step] = {
    "new key being staged": (keyfile, "_write_new", 1, AFTER),
    "new key staged, no journal": (masterkeys, "begin", 1, BEFORE),
    "journal written": (masterkeys, "begin", 1, UNCOMMITTED),
    "laid out": (ledger_shards, "add_shards", 1, COMMITTED),
}
READY: dict[str, Step] = {
    "read, nothing made ready": (Aside, "_put", 1, BEFORE),
    "made ready, uncommitted": (Readying, "window", 1, UNCOMMITTED),
    "made ready, committed": (Readying, "window", 1, COMMITTED),
    "after a look elsewhere": (discovery, "claim", 1, COMMITTED),
    "after the catch-up": (Rotating, "claim_catch_up", 1, COMMITTED),
}
CUT_OVER: dict[str, Step] = {
    "writers wait": (cutover, "hold_off_writers", 1, AFTER),
    "swapped": (Rotating, "_swap", 1, AFTER),
    "readers wait": (cutover, "hold_off_readers", 1, AFTER),
    "noted": (cutover, "swap_file", 1, BEFORE),
    "new key file written, not renamed": (keyfile, "_write_new", 2, AFTER),
}
RENAMED: dict[str, Step] = {
    "renamed": (keyfile, "_write", 2, AFTER),
    "renamed, uncommitted": (cutover, "swap_file", 1, UNCOMMITTED),
}
LATER: dict[str, Step] = {
    "cut over": (cutover, "swap_file", 1, COMMITTED),
    "in the first sweep": (Rotating, "sweep", 1, AFTER),
    "after the second sweep": (Rotating, "sweep", 2, COMMITTED),
    "after the last look elsewhere": (Latecomers, "claim", 1, COMMITTED),
    "verified": (RotateMasterKey, "verify", 1, COMMITTED),
    "finishing, staged key there": (RotateMasterKey, "finish", 1, BEFORE),
    "finishing, staged key gone": (RotateMasterKey, "finish", 1, AFTER),
    "receipt written": (audit, "append", 1, UNCOMMITTED),
}
# While what a killed cut-over did to the file is undone.
SETTLE: dict[str, Step] = {
    "old key staged": (keyfile, "stage", 1, AFTER),
    "old key file written, not renamed": (keyfile, "_write_new", 2, AFTER),
    "old key back": (keyfile, "swap", 1, AFTER),
}
STEPS = BEGIN | READY | CUT_OVER | RENAMED | LATER | SETTLE


def work_and_die(vault: Vault, step: str, run: UUID) -> None:
    """Let a worker process work on the run until it is killed at the step."""
    doomed.work_and_die(vault.deployment.environment, step, run, table=__name__)


def begin(vault: Vault) -> UUID:
    return vault.deployment.operations.start(RotateMasterKey(generate=True), actor="tester", via="test")


def staged(vault: Vault, run: UUID) -> MasterKey | None:
    """The generated key beside the key file."""
    path = keyfile.staged_path(vault.file, masterkeys.staged_name(run))
    return keyring.read(path) if path.exists() else None


def cut_over(vault: Vault) -> bool:
    """Whether the database says that the new key is the one."""
    return bool(vault.deployment.query("SELECT count(cut_over_at) FROM paperclip_worker.rotations")[0][0])


def check_kept(vault: Vault, run: UUID, rest: dict[str, list[Any]]) -> None:
    """The rotation kept its promise, and nothing tells of the kill."""
    result = vault.deployment.operations.result(run)
    assert result["state"] == "kept", result
    assert vault.now != vault.key
    assert vault.opened(vault.now) == vault.held
    assert vault.rest() == rest
    assert [one.name for one in vault.file.parent.iterdir()] == ["master.key"]
    assert result["rows"] == len(vault.held)
    assert vault.deployment.query("SELECT count(*) FROM paperclip_worker.resealed") == [(0,)]
    check_anchored(vault.deployment)


# One of each kind: nothing yet, made ready, the rename and what is around it, the end.
_ALWAYS = {"journal written", "made ready, committed", "swapped", *RENAMED, "cut over", "receipt written"}


@pytest.mark.parametrize("step", thinned([*BEGIN, *READY, *CUT_OVER, *RENAMED, *LATER], _ALWAYS))
def test_killed_at_any_step_a_rotation_goes_on(released_vault: Vault, step: str) -> None:
    """At the kill, file and database agree, but right after the rename; a generated key is the same afterwards."""
    vault = released_vault
    rest, run = vault.rest(), begin(vault)
    work_and_die(vault, step, run)
    vault.wait_for_nobody()
    new = staged(vault, run)
    assert (vault.now != vault.key) is (cut_over(vault) or step in RENAMED)
    assert vault.opened(*{vault.key, vault.now, new or vault.now}) == vault.held
    complete(vault.deployment.operations, run)
    assert new in {None, vault.now}
    check_kept(vault, run, rest)


@pytest.mark.parametrize("step", ["renamed"])
def test_on_each_layout(vault: Vault, step: str) -> None:
    rest, run = vault.rest(), begin(vault)
    work_and_die(vault, step, run)
    complete(vault.deployment.operations, run)
    check_kept(vault, run, rest)


@pytest.mark.parametrize("step", [*RENAMED, "new key file written, not renamed"])
def test_a_run_stopped_instead_has_its_old_key_back(released_vault: Vault, step: str) -> None:
    """Killed before or after the rename, then not resumed: the database opens, and one file has the new key."""
    vault = released_vault
    rest, run = vault.rest(), begin(vault)
    work_and_die(vault, step, run)
    vault.wait_for_nobody()
    assert (vault.now != vault.key) is (step in RENAMED)
    vault.deployment.cli("runs", "stop", str(run))
    assert vault.deployment.operations.find(str(run)).state.value == "stopped"
    assert vault.now == vault.key
    assert vault.opened(vault.now) == vault.held
    names = sorted(one.name for one in vault.file.parent.iterdir())
    assert names == ["master.key", masterkeys.staged_name(run)]
    new = staged(vault, run)
    vault.deployment.cli("runs", "resume", str(run), "--inline")
    assert vault.now == new
    check_kept(vault, run, rest)


@pytest.mark.parametrize("step", SETTLE)
def test_killed_again_while_the_old_key_is_put_back(released_vault: Vault, step: str) -> None:
    vault = released_vault
    rest, run = vault.rest(), begin(vault)
    work_and_die(vault, "renamed, uncommitted", run)
    vault.wait_for_nobody()
    work_and_die(vault, step, run)
    vault.wait_for_nobody()
    assert not cut_over(vault)
    complete(vault.deployment.operations, run)
    check_kept(vault, run, rest)


@pytest.mark.parametrize("step", ["new key staged, no journal", "journal written"])
def test_stopped_before_there_is_a_journal_no_key_is_left(released_vault: Vault, step: str) -> None:
    vault = released_vault
    rest, run = vault.rest(), begin(vault)
    work_and_die(vault, step, run)
    vault.wait_for_nobody()
    assert staged(vault, run) is not None
    vault.deployment.cli("runs", "stop", str(run))
    assert [one.name for one in vault.file.parent.iterdir()] == ["master.key"]
    assert vault.opened(vault.now) == vault.held
    vault.deployment.cli("runs", "resume", str(run), "--inline")
    check_kept(vault, run, rest)
