"""Rotations in this process, step by step, and the world as one value."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any
from uuid import UUID

from tasks.rotate_master_key import RotateMasterKey
from tests.cli.helpers import keys, world
from tests.conftest import Deployment
from tests.rotation.vault import Vault
from worker import config, keyring
from worker.keyring import MasterKey
from worker.operations import Operations
from worker.runner import Outcome

MAKE_READY, CATCH_UP, CUT_OVER, SWEEP, LOOK_AGAIN = range(5)


def key_file(vault: Vault, name: str = "new.key", key: MasterKey | None = None) -> tuple[Path, MasterKey]:
    """A file with another key, outside of the key file's directory."""
    key = key or keyring.generate()
    path = vault.file.parent.parent / name
    path.write_text(key.text)
    path.chmod(0o600)
    return path, key


def start(vault: Vault, **fields: Any) -> UUID:
    return vault.deployment.operations.start(RotateMasterKey(**fields), actor="tester", via="test")


def work(vault: Vault, run: UUID) -> dict[str, Any]:
    """Work on a run to its end."""
    assert vault.deployment.operations.runner().work(run, seconds=math.inf) is Outcome.SETTLED
    return vault.deployment.operations.result(run)


def work_until(vault: Vault, run: UUID, stage: int) -> None:
    """Work on a run until the next thing it would do is of this stage."""

    def reached() -> bool:
        query = "SELECT min(stage) FROM paperclip_worker.shards WHERE run_id = %s AND NOT done"
        ((found,),) = vault.deployment.query(query, run)
        return found is not None and found >= stage

    assert vault.deployment.operations.runner().work(run, seconds=math.inf, leave=reached) is Outcome.MORE
    assert reached()


def everything(vault: Vault) -> tuple[Any, ...]:
    """Every table, the ledger's too, every object in the bucket, and every file beside the key file."""
    files = sorted((one.name, one.read_bytes(), one.stat().st_mtime_ns) for one in vault.file.parent.iterdir())
    return world(vault.deployment), keys(vault.deployment), files


def with_environment(vault: Vault, **values: str) -> Vault:
    """The same deployment for a worker with other environment variables."""
    environment = {k: v for k, v in {**vault.deployment.environment, **values}.items() if v}
    operations = Operations(config.load(environment))
    vault.deployment.opened.append(operations)
    found: Deployment = replace(vault.deployment, environment=environment, operations=operations)
    return replace(vault, deployment=found)
