"""The promise of rotate-master-key: everything opens with the new key, nothing with the old, nothing else changed."""

from __future__ import annotations

from tests.rotation.vault import Vault


def test_a_rotation_leaves_nothing_behind(vault: Vault) -> None:
    rest = vault.rest()
    assert vault.opened(vault.key) == vault.held
    result = vault.run("--generate")
    assert result["kept"] is True
    assert vault.now != vault.key
    assert vault.opened(vault.now) == vault.held
    assert vault.rest() == rest
    assert sorted(one.name for one in vault.file.parent.iterdir()) == ["master.key"]
