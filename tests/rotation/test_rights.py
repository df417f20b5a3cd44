"""A role with the grants that are printed for them can rotate, roll back and retire."""

from __future__ import annotations

from tests.cli.helpers import least
from tests.rotation import steps
from tests.rotation.vault import Vault


def test_the_printed_grants_are_enough_for_a_rotation(vault: Vault) -> None:
    with least(vault.deployment, "--job", "rotate-master-key", "--job", "retire-master-key") as login:
        humble = steps.with_environment(vault, **login)
        result = steps.work(humble, steps.start(humble, generate=True))
        assert result["kept"] is True
        assert vault.opened(vault.now) == vault.held
        back = humble.run("--rollback", result["run"])
        assert back["kept"] is True
        gone = humble.deployment.json("keys", "retire", result["receipt"]["evidence"]["new_key"], "--inline", "--yes")
        assert gone["kept"] is True
        humble.deployment.operations.close()
