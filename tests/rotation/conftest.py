"""A deployment with secrets and a key file, once on each layout."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from tests.conftest import Deployment
from tests.rotation.vault import Vault
from worker import config, keyring
from worker.operations import Operations


def equipped(deployment: Deployment, folder: Path) -> Vault:
    """The deployment with a key file such as the app makes."""
    folder.mkdir(mode=0o700)
    file, key = folder / "master.key", keyring.generate()
    file.write_text(key.text)
    file.chmod(0o600)
    environment = deployment.environment | {"PAPERCLIP_SECRETS_MASTER_KEY_FILE": str(file)}
    operations = Operations(config.load(environment))
    deployment.opened.append(operations)
    found = replace(deployment, environment=environment, operations=operations)
    return Vault(deployment=found, file=file, key=key)


@pytest.fixture
def vault(deployment: Deployment, tmp_path: Path) -> Vault:
    """Secrets of every kind, on each layout."""
    found = equipped(deployment, tmp_path / "secrets")
    found.plant()
    return found


@pytest.fixture
def released_vault(released: Deployment, tmp_path: Path) -> Vault:
    """The same on the released layout."""
    found = equipped(released, tmp_path / "secrets")
    found.plant()
    return found
