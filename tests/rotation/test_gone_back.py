"""A database that goes back to what it was before the cut-over, or on to another server, while the key file stays."""

from __future__ import annotations

import pytest

from tests.rotation import steps
from tests.rotation.vault import Vault
from worker import keyfile, keyring, masterkeys

pytestmark = pytest.mark.faults


def test_a_key_that_is_in_the_key_file_alone_is_kept_when_the_old_one_is_put_back(released_vault: Vault) -> None:
    """A restore, or a standby that had not got the cut-over; servers have sealed with the new key since."""
    vault = released_vault
    run = steps.start(vault, generate=True)
    steps.work_until(vault, run, steps.CUT_OVER)
    staged = keyfile.staged_path(vault.file, masterkeys.staged_name(run))
    new = keyring.read(staged)
    # As the end of the run left it.
    keyfile.swap(vault.file, staged, expected=vault.key)
    keyfile.unstage(staged)
    with vault.connect() as connection:
        vault.add_version(connection, "by a server", key=new)
    vault.deployment.operations.stop(str(run))
    assert vault.now == vault.key
    assert keyring.read(staged) == new
    assert vault.opened(vault.key, new) == vault.held
    vault.deployment.operations.resume(str(run))
    assert steps.work(vault, run)["kept"] is True
    assert vault.now == new
    assert vault.opened(new) == vault.held
