"""A database that goes back to what it was before the cut-over, or on to another server, while the key file stays."""

from __future__ import annotations

import psycopg
import pytest

from tests.rotation import steps
from tests.rotation.test_faults import crash, mortal, mortal_vault  # noqa: F401
from tests.rotation.test_manual import _begin, _journal, _permit, _work, _work_until_it_waits, by_hand  # noqa: F401
from tests.rotation.test_writers import begin, finish, once
from tests.rotation.vault import Vault
from worker import embedded, keyfile, keyring, masterkeys
from worker.rotation import Rotating
from worker.runner import Outcome

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


@pytest.mark.long
def test_the_seal_of_the_old_key_is_on_the_disk_before_the_key_file_has_another(
    mortal_vault: Vault,  # noqa: F811
    mortal: embedded.Embedded,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Where commits need not wait for the disk, a crash would take the seal, and with it all secrets."""
    vault = mortal_vault
    url = vault.deployment.environment["DATABASE_URL"]
    with psycopg.connect(url, autocommit=True) as admin:
        admin.execute(f"ALTER DATABASE {url.rpartition('/')[2]} SET synchronous_commit = off".encode())
        for one in ("wal_writer_delay = '10s'", "wal_writer_flush_after = '1GB'"):
            admin.execute(f"ALTER SYSTEM SET {one}".encode())
        admin.execute("SELECT pg_reload_conf()")
    vault.deployment.operations.engine.dispose()
    done = once(monkeypatch, Rotating, "sweep", crash(mortal))
    run = begin(vault)
    finish(vault, run)
    assert done


@pytest.mark.long
def test_a_run_whose_database_was_dumped_and_restored_goes_on(by_hand: Vault) -> None:  # noqa: F811
    """Into a server that has had fewer transactions: none of its rows is younger than what was looked at before."""
    vault = by_hand
    run, key = _begin(vault)
    _work_until_it_waits(vault, run, "keys switch")
    _permit(vault, run)
    _work_until_it_waits(vault, run, "start the servers")
    horizon = "UPDATE paperclip_worker.rotations SET horizon = '1000000000', cut_over_by = '1000000001'"
    vault.deployment.query(horizon)
    with psycopg.connect(vault.deployment.environment["DATABASE_URL"], autocommit=True) as admin:
        for table in {table for table, _ in vault.held}:
            admin.execute(f"VACUUM FULL {table}".encode())
    assert _work(vault, run, 1.5) is Outcome.MORE
    with vault.connect() as connection:
        vault.add_version(connection, "straggler")
        vault.add_version(connection, "proof", key=key)
    assert _work(vault, run, 10) is Outcome.SETTLED
    assert vault.deployment.operations.result(run)["kept"] is True
    assert _journal(vault, run, "proved_at") is not None
    assert vault.opened(key) == vault.held
