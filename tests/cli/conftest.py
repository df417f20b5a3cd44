"""A deployment that a whole module shares, for tests in which nothing may change."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest
from psycopg import sql

from tests.conftest import Deployment
from worker import config, embedded
from worker.operations import Operations


@pytest.fixture(scope="module")
def standing(
    servers: embedded.Embedded,
    _admin: psycopg.Connection[Any],
    template: Callable[[str], str],
    signing_key: Path,
    request: pytest.FixtureRequest,
) -> Iterator[Deployment]:
    """A seeded deployment on the released layout that tests look at and must leave as it is."""
    name = f"standing_{os.getpid()}_{request.module.__name__.rpartition('.')[2]}"
    source = template("paperclip")
    _admin.execute(sql.SQL("CREATE DATABASE {} TEMPLATE {}").format(sql.Identifier(name), sql.Identifier(source)))
    environment = {
        **servers.environment(name),
        "PAPERCLIP_WORKER_S3_PREFIX": f"{name}/",
        "PAPERCLIP_WORKER_SIGNING_KEY_FILE": str(signing_key),
    }
    # boto3 finds credentials by its own chain.
    os.environ.update({key: value for key, value in environment.items() if key.startswith("AWS_")})
    operations = Operations(config.load(environment))
    yield Deployment(layout="paperclip", environment=environment, operations=operations, opened=[operations])
    operations.engine.dispose()
    _admin.execute(sql.SQL("DROP DATABASE {} WITH (FORCE)").format(sql.Identifier(name)))
