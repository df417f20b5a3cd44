"""Back to the key a run replaced, as long as it is under seal; and rotations after rotations."""

from __future__ import annotations

from collections.abc import Callable
from uuid import UUID

import pytest

from tests.cli.helpers import refused
from tests.faults.evidence import check_anchored
from tests.rotation import steps
from tests.rotation.vault import Vault
from worker import keyring
from worker.errors import Refused, UnderWay

RUN = ("run", "rotate-master-key", "--inline", "--yes")


def _fails_after_its_cut_over(vault: Vault, **fields: object) -> UUID:
    """A rotation that exchanged the key and then came to an end it was not made for."""
    run = steps.start(vault, **fields)
    steps.work_until(vault, run, steps.SWEEP)
    vault.deployment.operations.runner().give_up(run, "the test said so")
    assert vault.deployment.operations.result(run)["state"] == "failed"
    assert vault.now != vault.key
    return run


def test_back_and_forth_and_back_again(vault: Vault) -> None:
    rest = vault.rest()
    first = vault.run("--generate")
    second_key = vault.now
    back = vault.run("--rollback", first["run"][:8])
    assert back["kept"] is True
    assert vault.now == vault.key
    assert vault.opened(vault.key) == vault.held
    refused(vault.deployment, *RUN, "--rollback", first["run"], says="the key in use is .*, not .* of run")
    again = vault.run("--rollback", back["run"])
    assert again["kept"] is True
    assert vault.now == second_key
    assert vault.opened(second_key) == vault.held
    assert vault.rest() == rest
    actions = vault.deployment.query(
        "SELECT DISTINCT action FROM activity_log WHERE action LIKE 'maintenance.master%'"
    )
    assert {one for (one,) in actions} == {"maintenance.master_key_rotated", "maintenance.master_key_rolled_back"}


def test_a_way_back_while_the_bucket_is_down(vault: Vault) -> None:
    """As docs/rotate-master-key.md says: without a bucket, and the receipt goes there with the next run's."""
    words = (*RUN, "--rollback", vault.run("--generate")["run"])
    refused(
        vault.deployment,
        *words,
        says="cannot be reached",
        env={"PAPERCLIP_STORAGE_S3_ENDPOINT": "http://127.0.0.1:9"},
    )
    vault.deployment.cli(*words, env={"PAPERCLIP_WORKER_S3_BUCKET": ""})
    assert vault.now == vault.key
    assert vault.opened(vault.key) == vault.held
    vault.run("--generate")
    check_anchored(vault.deployment)


def test_two_rotations_are_undone_in_their_order(vault: Vault) -> None:
    first = vault.run("--generate")
    between = vault.now
    second = vault.run("--generate")
    assert len({vault.key, between, vault.now}) == 3
    assert vault.opened(vault.now) == vault.held
    refused(vault.deployment, *RUN, "--rollback", first["run"], says="the key in use is")
    assert vault.run("--rollback", second["run"])["kept"] is True
    assert vault.now == between
    assert vault.run("--rollback", first["run"])["kept"] is True
    assert vault.now == vault.key
    assert vault.opened(vault.key) == vault.held


def _retire(vault: Vault, run: str) -> None:
    vault.deployment.query("UPDATE paperclip_worker.rotations SET sealed = NULL WHERE run_id = %s", UUID(run))


def _third_key(vault: Vault, run: str) -> None:
    del run
    vault.file.write_text(keyring.generate().text)


def _damage(vault: Vault, run: str) -> None:
    query = 'UPDATE paperclip_worker.rotations SET sealed = sealed || \'{"tag": "AAAA"}\' WHERE run_id = %s'
    vault.deployment.query(query, UUID(run))


@pytest.mark.parametrize(
    ("spoil", "says"),
    [(_retire, "was retired for good"), (_third_key, "the key in use is"), (_damage, "sealed master key is damaged")],
)
def test_no_way_back(released_vault: Vault, spoil: Callable[[Vault, str], None], says: str) -> None:
    vault = released_vault
    run = vault.run("--generate")["run"]
    spoil(vault, run)
    before = steps.everything(vault)
    refused(vault.deployment, *RUN, "--rollback", run, says=says)
    assert steps.everything(vault) == before


def test_a_run_that_exchanged_nothing_cannot_be_rolled_back(released_vault: Vault) -> None:
    vault = released_vault
    run = steps.start(vault, generate=True)
    steps.work_until(vault, run, steps.CUT_OVER)
    vault.deployment.operations.stop(str(run))
    before = steps.everything(vault)
    refused(vault.deployment, *RUN, "--rollback", str(run), says=f"run {run} exchanged no master key")
    assert steps.everything(vault) == before


@pytest.mark.parametrize("stage", [steps.MAKE_READY, steps.CATCH_UP, steps.CUT_OVER, steps.SWEEP])
def test_a_stopped_run_goes_on_to_the_same_key(vault: Vault, stage: int) -> None:
    run = steps.start(vault, generate=True)
    steps.work_until(vault, run, stage)
    vault.deployment.operations.stop(str(run))
    key = vault.now
    assert (key != vault.key) is (stage == steps.SWEEP)
    assert vault.opened(key) == vault.held
    (staged,) = (keyring.read(one) for one in vault.file.parent.iterdir() if one.name != "master.key")
    with vault.connect() as connection:
        vault.add_version(connection, "written while it was stopped", key=key)
    vault.deployment.operations.resume(str(run))
    assert steps.work(vault, run)["kept"] is True
    assert vault.now == staged
    assert vault.opened(staged) == vault.held
    assert [one.name for one in vault.file.parent.iterdir()] == ["master.key"]


def test_a_rotation_that_failed_after_its_cut_over_blocks_another(vault: Vault) -> None:
    run = _fails_after_its_cut_over(vault, generate=True)
    before = steps.everything(vault)
    refused(vault.deployment, *RUN, "--generate", says=f"run {run} exchanged the key and did not end", status=3)
    assert steps.everything(vault) == before
    vault.deployment.operations.resume(str(run))
    assert steps.work(vault, run)["kept"] is True
    assert vault.run("--generate")["kept"] is True


def test_a_failed_rotation_that_was_rolled_back_does_not_come_back(vault: Vault) -> None:
    # Its key is still at hand, so that nothing else stops it.
    path, _ = steps.key_file(vault)
    run = _fails_after_its_cut_over(vault, new_key_file=str(path))
    assert vault.run("--rollback", str(run))["kept"] is True
    assert vault.now == vault.key
    before = steps.everything(vault)
    with pytest.raises(Refused, match="was rolled back; start a new run"):
        vault.deployment.operations.resume(str(run))
    assert steps.everything(vault) == before
    assert vault.opened(vault.key) == vault.held
    assert vault.run("--generate")["kept"] is True


def test_a_sweep_does_not_seal_with_a_key_that_is_not_in_use(vault: Vault) -> None:
    """Somebody put the old key back by hand: to go on would hide what servers write from them."""
    run = steps.start(vault, generate=True)
    steps.work_until(vault, run, steps.SWEEP)
    vault.file.write_text(vault.key.text)
    with vault.connect() as connection:
        row = vault.add_version(connection, "written with the old key")
    query = "SELECT xmin::text FROM company_secret_versions WHERE id = %s"
    before = vault.deployment.query(query, row)
    with pytest.raises(Refused, match=f"the key file holds {vault.key.fingerprint}"):
        steps.work(vault, run)
    assert vault.deployment.query(query, row) == before
    with pytest.raises(Refused, match="the key file holds"):
        vault.deployment.operations.resume(str(run))


def test_a_key_file_that_changes_before_the_cut_over_is_not_replaced(vault: Vault) -> None:
    run = steps.start(vault, generate=True)
    steps.work_until(vault, run, steps.CUT_OVER)
    other = keyring.generate()
    vault.file.write_text(other.text)
    with pytest.raises(Refused, match=other.fingerprint):
        steps.work(vault, run)
    assert vault.now == other
    assert vault.opened(vault.key) == vault.held
    with pytest.raises(Refused, match=other.fingerprint):
        vault.deployment.operations.resume(str(run))


def test_two_rotations_are_never_under_way_together(vault: Vault) -> None:
    steps.start(vault, generate=True)
    with pytest.raises(UnderWay, match="master-key is already under way"):
        steps.start(vault, generate=True)


@pytest.mark.parametrize("statement", ["VACUUM FULL company_secret_versions", "TRUNCATE paperclip_worker.resealed"])
def test_what_was_made_ready_and_is_no_longer_so_is_made_ready_again(vault: Vault, statement: str) -> None:
    """After VACUUM FULL no place is right; after a crash of the server the unlogged table is empty."""
    run = steps.start(vault, generate=True)
    steps.work_until(vault, run, steps.CUT_OVER)
    with vault.connect() as connection:
        connection.autocommit = True
        # Rows change their places.
        connection.execute("DELETE FROM company_secret_versions WHERE id = ANY(%s)", [[_first(vault)]])
        connection.execute(statement.encode())
    steps.work_until(vault, run, steps.SWEEP)
    assert vault.opened(vault.now) == vault.held
    assert steps.work(vault, run)["kept"] is True


def _first(vault: Vault) -> UUID:
    ((row,),) = vault.deployment.query("SELECT id FROM company_secret_versions ORDER BY ctid LIMIT 1")
    del vault.held["company_secret_versions", str(row)]
    return UUID(str(row))
