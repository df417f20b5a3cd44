"""keys list, switch and retire; and the job that retires old keys when their time is over."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.cli.helpers import refused
from tests.rotation.vault import Vault
from worker import keyring

RETIRE = ("run", "retire-master-key", "--inline", "--yes", "--json")


def rotated(vault: Vault) -> str:
    """A vault after a rotation; the old key's fingerprint."""
    assert vault.run("--generate")["kept"]
    return vault.key.fingerprint


def listed(vault: Vault) -> Any:
    return vault.deployment.json("keys", "list")


def test_the_list_tells_the_key_in_use_and_what_became_of_the_old(vault: Vault) -> None:
    assert listed(vault) == {
        "in_use": {"fingerprint": vault.key.fingerprint, "from": str(vault.file)},
        "rotations": [],
        "keys": [],
    }
    old = rotated(vault)
    found = listed(vault)
    assert found["in_use"]["fingerprint"] == vault.now.fingerprint
    (one,) = found["rotations"]
    assert (one["old"], one["new"], one["state"]) == (old, vault.now.fingerprint, "under seal")
    number = sum(sum(texts.values()) for texts in vault.held.values())
    counted = {key["fingerprint"]: (key["found"], key["current"]) for key in found["keys"]}
    assert counted == {old: (0, False), vault.now.fingerprint: (number, True)}
    text = vault.deployment.cli("keys", "list").stdout
    assert text.startswith(f"in use: {vault.now.fingerprint} (")
    assert "under seal" in text


def test_a_key_whose_time_is_not_over_stays(vault: Vault) -> None:
    rotated(vault)
    result = vault.deployment.json(*RETIRE[:-1])
    assert (result["kept"], result["rows"]) == (True, 0)
    assert listed(vault)["rotations"][0]["state"] == "under seal"


def test_stragglers_are_swept_long_before_the_time_of_their_key_is_over(vault: Vault) -> None:
    """A run that wrote back an old context would be unreadable until then."""
    old = rotated(vault)
    with vault.connect() as connection:
        vault.add_version(connection, "late", key=vault.key)
    plan = vault.deployment.json("plan", "retire-master-key")
    assert plan["rows"] == 1
    assert f"{old}: replaced by {vault.now.fingerprint}" in plan["notes"][0]
    assert "; kept until " in plan["notes"][0]
    result = vault.deployment.json(*RETIRE[:-1])
    assert (result["kept"], result["rows"]) == (True, 1)
    assert result["receipt"]["evidence"]["retired"] == []
    assert vault.opened(vault.now) == vault.held
    assert listed(vault)["rotations"][0]["state"] == "under seal"


def test_a_key_whose_time_is_over_goes_and_stragglers_are_swept(vault: Vault) -> None:
    old = rotated(vault)
    with vault.connect() as connection:
        vault.add_version(connection, "late", key=vault.key)
        connection.execute("UPDATE paperclip_worker.rotations SET retire_after = now() - interval '1 minute'")
    result = vault.deployment.json(*RETIRE[:-1])
    assert (result["kept"], result["rows"]) == (True, 1)
    assert result["receipt"]["evidence"]["retired"] == [old]
    assert vault.opened(vault.now) == vault.held
    assert listed(vault)["rotations"][0]["state"] == "retired"
    assert vault.deployment.query("SELECT sealed FROM paperclip_worker.rotations") == [(None,)]
    assert vault.deployment.query("SELECT count(*) FROM paperclip_worker.resealed") == [(0,)]


def test_keys_retire_ends_one_before_its_time(released_vault: Vault) -> None:
    vault = released_vault
    old = rotated(vault)
    assert vault.deployment.json("keys", "retire", old, "--inline", "--yes")["kept"] is True
    assert listed(vault)["rotations"][0]["state"] == "retired"
    refused(vault.deployment, "keys", "retire", old, "--inline", "--yes", says="no key .* is under seal")
    done = vault.deployment.json("runs", "list")
    run = next(one["run"] for one in done["runs"] if one["job"] == "rotate-master-key")
    words = ("run", "rotate-master-key", "--inline", "--yes", "--rollback", run)
    refused(vault.deployment, *words, says="retired for good")


def test_an_older_key_goes_before_the_one_it_is_sealed_under(released_vault: Vault) -> None:
    vault = released_vault
    first = rotated(vault)
    second = vault.now.fingerprint
    assert vault.run("--generate")["kept"]
    words = ("keys", "retire", second, "--inline", "--yes")
    refused(vault.deployment, *words, says=f"retire {first} first")
    for one in (first, second):
        assert vault.deployment.json("keys", "retire", one, "--inline", "--yes")["kept"] is True
    assert vault.opened(vault.now) == vault.held


@pytest.mark.parametrize(
    "words", [("keys", "retire", "0" * 12, "--inline", "--yes"), ("keys", "switch", "last", "--yes")]
)
def test_what_makes_no_sense_is_refused(released_vault: Vault, words: tuple[str, ...]) -> None:
    refused(released_vault.deployment, *words, says="no key|no run|is no rotation")


def test_a_key_nobody_can_open_is_said_so(released_vault: Vault) -> None:
    vault = released_vault
    rotated(vault)
    vault.file.write_text(keyring.generate().text)
    found = vault.deployment.cli(*RETIRE[:-3], "--key", vault.key.fingerprint, "--inline", "--yes", ok=False)
    assert found.returncode != 0
    assert "cannot be opened with the one in use" in found.stderr
    assert json.loads(vault.deployment.cli("keys", "list", "--json").stdout)["rotations"][0]["state"] == "under seal"
