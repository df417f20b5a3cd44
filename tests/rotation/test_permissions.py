"""What somebody does to the key file and its directory between the staging and the cut-over: nothing is switched."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest

from tests.cli.helpers import check_refusal
from tests.rotation import bound, steps, test_kills
from tests.rotation.test_faults import failed
from tests.rotation.test_writers import finish, once
from tests.rotation.vault import Vault
from worker import cutover, keyfile, keyring, masterkeys

pytestmark = pytest.mark.faults
needs_modes = pytest.mark.skipif(
    os.geteuid() == 0 and sys.platform != "linux", reason="no mode keeps root out, and only Linux can change that"
)


def _resume(vault: Vault, run: UUID) -> subprocess.CompletedProcess[str]:
    """`runs resume`, and all the work on the run, in a process that modes bind."""
    return subprocess.run(
        [sys.executable, bound.__file__, "runs", "resume", str(run), "--inline"],
        capture_output=True,
        text=True,
        check=False,
        stdin=subprocess.DEVNULL,
        timeout=120,
        env=vault.deployment.process_environment(),
    )


def _staged(vault: Vault, **fields: Any) -> tuple[UUID, Path]:
    """A rotation that will cut over next, and its staged key."""
    run = steps.start(vault, **fields or {"generate": True})
    steps.work_until(vault, run, steps.CUT_OVER)
    return run, keyfile.staged_path(vault.file, masterkeys.staged_name(run))


def _check_nothing_switched(vault: Vault, run: UUID) -> None:
    """The run failed; ciphertext and ledger are as before its cut-over, and its receipt says so."""
    result = vault.deployment.operations.result(run)
    assert result["state"] == "failed"
    assert (result["rows"], result["receipt"]["state"]) == (0, "failed")
    assert not test_kills.cut_over(vault)
    assert vault.opened(vault.key) == vault.held


@needs_modes
@pytest.mark.parametrize("again", ["the run is resumed", "a new run"])
def test_a_directory_made_read_only(released_vault: Vault, again: str) -> None:
    vault = released_vault
    rest = vault.rest()
    run, staged = _staged(vault)
    vault.file.parent.chmod(0o500)
    try:
        done = _resume(vault, run)
        assert done.returncode == 1, done.stderr
        (line,) = done.stderr.splitlines()
        assert line == f"paperclip-worker: run {run} is failed: {vault.file} cannot be written: Permission denied"
        _check_nothing_switched(vault, run)
        assert vault.now == vault.key
        assert {one.name for one in vault.file.parent.iterdir()} == {"master.key", staged.name}
        # Before anything is touched it is said what must be put right.
        done = _resume(vault, run)
        check_refusal(done, says=f"{vault.file.parent} cannot be written; the key file is replaced by", status=2)
    finally:
        vault.file.parent.chmod(0o700)
    if again == "a new run":
        run = steps.start(vault, generate=True)
    else:
        vault.deployment.operations.resume(str(run))
    finish(vault, run)
    test_kills.check_kept(vault, run, rest)


@needs_modes
def test_a_directory_made_read_only_after_the_rename(released_vault: Vault) -> None:
    """The cut-over died uncommitted, and the old key cannot be put back: it is said, and not gone on with."""
    vault = released_vault
    rest, run = vault.rest(), test_kills.begin(vault)
    test_kills.work_and_die(vault, "renamed, uncommitted", run)
    vault.wait_for_nobody()
    new = vault.now
    assert new != vault.key
    vault.file.parent.chmod(0o500)
    try:
        done = _resume(vault, run)
    finally:
        vault.file.parent.chmod(0o700)
    assert done.returncode == 1, done.stderr
    assert f"{vault.file}.paperclip-worker-{run}-old cannot be written: Permission denied" in done.stderr
    _check_nothing_switched(vault, run)
    assert vault.now == new
    vault.deployment.operations.resume(str(run))
    finish(vault, run)
    assert vault.now == new
    test_kills.check_kept(vault, run, rest)


@needs_modes
def test_a_key_file_that_can_be_read_no_more_and_then_read_only(released_vault: Vault) -> None:
    """The rename asks the directory alone; who made the file read-only wants the next one so, too."""
    vault = released_vault
    rest = vault.rest()
    run, _ = _staged(vault)
    vault.file.chmod(0)
    done = _resume(vault, run)
    assert stat.S_IMODE(vault.file.stat().st_mode) == 0
    vault.file.chmod(0o400)
    assert done.returncode == 1, done.stderr
    assert f"the master key file {vault.file} cannot be read: Permission denied" in done.stderr
    _check_nothing_switched(vault, run)
    assert vault.now == vault.key
    done = _resume(vault, run)
    assert done.returncode == 0, done.stderr
    assert stat.S_IMODE(vault.file.stat().st_mode) == 0o400
    test_kills.check_kept(vault, run, rest)


def test_a_generated_key_whose_file_is_gone(released_vault: Vault) -> None:
    """It is nowhere else: once the file is put back the run goes on to that very key."""
    vault = released_vault
    rest = vault.rest()
    run, staged = _staged(vault)
    aside = staged.rename(vault.file.parent.parent / "aside")
    assert f"the new master key {keyring.read(aside).fingerprint} is nowhere to be found" in failed(vault, run)
    _check_nothing_switched(vault, run)
    assert vault.now == vault.key
    new = keyring.read(aside.rename(staged))
    vault.deployment.operations.resume(str(run))
    finish(vault, run)
    assert vault.now == new
    test_kills.check_kept(vault, run, rest)


def test_a_key_staged_in_place_of_ours_never_becomes_the_key(
    released_vault: Vault, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ours is still in the file it was given in, so that nothing but the staged one is wrong."""
    vault, other = released_vault, keyring.generate()
    rest = vault.rest()
    path, new = steps.key_file(vault)
    run, staged = _staged(vault, new_key_file=str(path))
    done = once(monkeypatch, cutover, "hold_off_writers", lambda: _put(staged, other.text))
    assert failed(vault, run) == f"{staged} exists and is not the key {new.fingerprint}; find out whose it is first"
    assert done
    _check_nothing_switched(vault, run)
    assert (vault.now, keyring.read(staged)) == (vault.key, other)
    staged.unlink()
    vault.deployment.operations.resume(str(run))
    finish(vault, run)
    assert vault.now == new
    test_kills.check_kept(vault, run, rest)


def _put(path: Path, text: str) -> None:
    path.write_text(text)


def test_a_staged_key_that_was_removed_is_staged_again(
    released_vault: Vault, monkeypatch: pytest.MonkeyPatch
) -> None:
    vault = released_vault
    rest = vault.rest()
    run, staged = _staged(vault)
    new = keyring.read(staged)
    done = once(monkeypatch, cutover, "hold_off_writers", staged.unlink)
    finish(vault, run)
    assert done
    assert vault.now == new
    test_kills.check_kept(vault, run, rest)
