"""A role with the grants that are printed for them can rotate, roll back and retire."""

from __future__ import annotations

from tests.rotation import steps
from tests.rotation.vault import Vault


def test_the_printed_grants_are_enough_for_a_rotation(vault: Vault) -> None:
    url = vault.deployment.environment["DATABASE_URL"]
    role = f"rotates_{url.rpartition('/')[2]}"
    vault.deployment.query(f"CREATE ROLE {role} LOGIN PASSWORD 'pw'")
    words = ("--job", "rotate-master-key", "--job", "retire-master-key")
    vault.deployment.query(vault.deployment.cli("db", "grants", "--role", role, *words).stdout)
    least = steps.with_environment(vault, DATABASE_URL=f"postgres://{role}:pw@{url.rpartition('@')[2]}")
    try:
        result = steps.work(least, steps.start(least, generate=True))
        assert result["kept"] is True
        assert vault.opened(vault.now) == vault.held
        back = least.run("--rollback", result["run"])
        assert back["kept"] is True
        gone = least.deployment.json("keys", "retire", result["receipt"]["evidence"]["new_key"], "--inline", "--yes")
        assert gone["kept"] is True
    finally:
        least.deployment.operations.engine.dispose()
        vault.deployment.query(f"DROP OWNED BY {role}; DROP ROLE {role}")
