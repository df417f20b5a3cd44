"""A role with the printed grants can rotate, once it may look into every column."""

from __future__ import annotations

from tests.rotation import steps
from tests.rotation.vault import Vault


def test_the_printed_grants_are_enough_for_a_rotation(vault: Vault) -> None:
    url = vault.deployment.environment["DATABASE_URL"]
    role = f"rotates_{url.rpartition('/')[2]}"
    vault.deployment.query(f"CREATE ROLE {role} LOGIN PASSWORD 'pw'")
    vault.deployment.query(vault.deployment.cli("db", "grants", "--role", role).stdout)
    vault.deployment.query(f"GRANT pg_read_all_data TO {role}")
    least = steps.with_environment(vault, DATABASE_URL=f"postgres://{role}:pw@{url.rpartition('@')[2]}")
    try:
        result = steps.work(least, steps.start(least, generate=True))
        assert result["kept"] is True
        assert vault.opened(vault.now) == vault.held
        back = least.run("--rollback", result["run"])
        assert back["kept"] is True
    finally:
        least.deployment.operations.engine.dispose()
        vault.deployment.query(f"DROP OWNED BY {role}; DROP ROLE {role}")
