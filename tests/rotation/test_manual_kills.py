"""Workers and commands killed around and inside a manual cut-over: ciphertext is all under one key at any time.

The key is its operator's to put in place, before the kill's consequences are put right or after.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any
from uuid import UUID

import pytest

from tests.cli.helpers import refused
from tests.faults import doomed
from tests.faults.doomed import AFTER, COMMITTED, UNCOMMITTED, Step
from tests.faults.evidence import check_anchored
from tests.rotation import steps, test_kills
from tests.rotation.vault import Vault
from worker import ledger, masterkeys
from worker.keyring import MasterKey
from worker.rotation import Rotating
from worker.runner import Outcome

pytestmark = pytest.mark.faults

ASKED, UNDONE, CUT = "an operator was asked", "cut over, uncommitted", "cut over"
SWITCH: dict[str, Step] = {
    "permit uncommitted": (masterkeys, "permit", 1, UNCOMMITTED),
    "permit committed": (masterkeys, "permit", 1, COMMITTED),
}
CUT_OVER: dict[str, Step] = {
    "swapped": (Rotating, "_swap", 1, AFTER),
    UNDONE: (Rotating, "_cut_over", 1, UNCOMMITTED),
}
PROVED = "a server has used the new key"
STEPS = {
    ASKED: (ledger, "note_wait", 1, COMMITTED),
    **SWITCH,
    **CUT_OVER,
    CUT: (Rotating, "_cut_over", 1, COMMITTED),
    PROVED: (Rotating, "sweep", 1, COMMITTED),
}


@pytest.fixture
def by_hand(released_vault: Vault) -> Vault:
    """A deployment whose servers have the key in their environment."""
    return steps.with_environment(
        released_vault,
        PAPERCLIP_SECRETS_MASTER_KEY_FILE="",
        PAPERCLIP_SECRETS_MASTER_KEY=released_vault.key.text,
    )


class _Rotation:
    """A manual one, made ready, with what must be as it was."""

    def __init__(self, vault: Vault) -> None:
        self.vault, self.rest = vault, vault.rest()
        self.file, self.key = steps.key_file(vault)
        self.run = steps.start(vault, new_key_file=str(self.file), cutover="manual")

    def until(self, stage: int) -> None:
        steps.work_until(self.vault, self.run, stage)

    def die(self, step: str) -> None:
        doomed.work_and_die(self.vault.deployment.environment, step, self.run, table=__name__)
        self.vault.wait_for_nobody()

    def permit(self) -> None:
        done = self.vault.deployment.json("keys", "switch", str(self.run), "--yes")
        assert done["new_key"] == self.key.fingerprint

    @property
    def permitted(self) -> bool:
        query = "SELECT permitted_at IS NOT NULL FROM paperclip_worker.rotations WHERE run_id = %s"
        return bool(self.vault.deployment.query(query, self.run)[0][0])

    def check_all_under(self, key: MasterKey) -> None:
        """Every value opens with this key, none with the other; the journal says the same, and the rest stands."""
        vault = self.vault
        assert test_kills.cut_over(vault) is (key == self.key)
        assert vault.opened(key) == vault.opened(vault.key, self.key) == vault.held
        assert vault.rest() == self.rest

    def start_the_servers(self) -> None:
        """The operator gives the new key to servers and worker, and to nobody else; a server seals with it."""
        self.file.unlink()
        self.vault = steps.with_environment(self.vault, PAPERCLIP_SECRETS_MASTER_KEY=self.key.text)
        with self.vault.connect() as connection:
            self.vault.add_version(connection, "by a server", key=self.key)

    def cut_over_and_end(self) -> None:
        self.until(steps.SWEEP)
        self.check_all_under(self.key)
        self.start_the_servers()
        self.end()

    def end(self) -> None:
        vault, rows = self.vault, len(self.vault.held)
        result = steps.work(vault, self.run)
        assert (result["state"], result["rows"]) == ("kept", rows - 1)
        evidence = result["receipt"]["evidence"]
        assert (evidence["old_key"], evidence["new_key"]) == (vault.key.fingerprint, self.key.fingerprint)
        assert evidence["proved_at"]
        assert vault.opened(self.key) == vault.opened(vault.key, self.key) == vault.held
        assert vault.deployment.query("SELECT count(*) FROM paperclip_worker.resealed") == [(0,)]
        check_anchored(vault.deployment)


def test_killed_while_it_waits_to_be_permitted(by_hand: Vault) -> None:
    rotation = _Rotation(by_hand)
    rotation.die(ASKED)
    rotation.check_all_under(by_hand.key)
    rotation.permit()
    rotation.cut_over_and_end()


@pytest.mark.parametrize("step", SWITCH)
def test_the_permission_is_given_whole_or_not_at_all(by_hand: Vault, step: str) -> None:
    """The operator's own command dies: the worker waits on, or goes on, as the command says if given again."""
    rotation = _Rotation(by_hand)
    rotation.until(steps.CUT_OVER)
    words = ("keys", "switch", str(rotation.run), "--yes")
    doomed.command_and_die(by_hand.deployment.environment, step, *words, table=__name__)
    by_hand.wait_for_nobody()
    rotation.check_all_under(by_hand.key)
    assert rotation.permitted is (step == "permit committed")
    if rotation.permitted:
        refused(by_hand.deployment, *words, says="was permitted to cut over already")
    else:
        assert by_hand.deployment.operations.runner().work(rotation.run, seconds=0) is Outcome.MORE
        rotation.check_all_under(by_hand.key)
        rotation.permit()
    rotation.cut_over_and_end()


@pytest.mark.parametrize("step", [*CUT_OVER, CUT])
def test_killed_in_the_cut_over(by_hand: Vault, step: str) -> None:
    """All ciphertext is under the old key until the commit, and all under the new from then on."""
    rotation = _Rotation(by_hand)
    rotation.until(steps.CUT_OVER)
    rotation.permit()
    rotation.die(step)
    rotation.check_all_under(rotation.key if step == CUT else by_hand.key)
    assert rotation.permitted
    if step != CUT:
        rotation.until(steps.SWEEP)
        rotation.check_all_under(rotation.key)
    # The worker still has the old key, or has got the new one with the servers: it finds the other.
    rotation.start_the_servers()
    rotation.end()


def test_killed_once_a_server_was_started(by_hand: Vault) -> None:
    rotation = _Rotation(by_hand)
    rotation.until(steps.CUT_OVER)
    rotation.permit()
    rotation.until(steps.SWEEP)
    rotation.start_the_servers()
    rotation.die(PROVED)
    assert by_hand.opened(rotation.key) == by_hand.held
    rotation.end()


def test_the_key_file_is_its_operator_s_before_and_after_a_kill(released_vault: Vault) -> None:
    vault = released_vault
    rotation = _Rotation(vault)
    rotation.until(steps.CUT_OVER)
    rotation.permit()
    before = _entries(vault.file)
    rotation.die(UNDONE)
    assert _entries(vault.file) == before
    # Taken up with the old key still in the file: ciphertext goes forward, the file stays, and nothing is proved.
    _work_until_it_waits(vault, rotation.run, "start the servers with the new key")
    rotation.check_all_under(rotation.key)
    assert _entries(vault.file) == before
    vault.file.write_text(rotation.key.text)
    with vault.connect() as connection:
        vault.add_version(connection, "by a server", key=rotation.key)
    before = _entries(vault.file)
    rotation.end()
    assert _entries(vault.file) == before


def _entries(file: Path) -> list[tuple[Any, ...]]:
    """What is in the key file's directory."""
    return [(one.name, one.stat().st_ino, one.stat().st_mtime_ns) for one in file.parent.iterdir()]


def _work_until_it_waits(vault: Vault, run: UUID, what: str) -> None:
    def waits() -> bool:
        return what in (vault.deployment.operations.find(str(run)).waiting or "")

    assert vault.deployment.operations.runner().work(run, seconds=60, leave=waits) is Outcome.MORE
    assert waits()
