"""Buckets with and without Object Lock, deployments on them, and a chain of receipts without its database."""

from __future__ import annotations

import itertools
import os
import subprocess
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import boto3
import pytest
from botocore.config import Config

from tests.cli.helpers import complete
from tests.conftest import Deployment
from worker import audit, config, embedded
from worker.operations import Operations
from worker.storage import S3Store

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

LOCKED = "locked"
_numbers = itertools.count()


@pytest.fixture(scope="session")
def client(servers: embedded.Embedded) -> S3Client:
    """The bucket as somebody with the store's own credentials has it."""
    return boto3.session.Session(servers.s3.access_key, servers.s3.secret_key).client(
        "s3",
        endpoint_url=servers.s3.endpoint,
        region_name=embedded.REGION,
        config=Config(signature_version="s3v4", s3={"addressing_style": "path"}, proxies={}),
    )


@pytest.fixture(scope="session")
def locked_bucket(client: S3Client) -> str:
    """A bucket with Object Lock, and so with versions."""
    client.create_bucket(Bucket=LOCKED, ObjectLockEnabledForBucket=True)
    return LOCKED


def on(deployment: Deployment, **values: str) -> Deployment:
    """The same deployment with other variables of its environment (names without their prefix)."""
    environment = deployment.environment | {f"PAPERCLIP_WORKER_{name.upper()}": text for name, text in values.items()}
    operations = Operations(config.load(environment))
    deployment.opened.append(operations)
    return replace(deployment, environment=environment, operations=operations)


@pytest.fixture
def back_up(fresh_database: Callable[..., str]) -> Callable[[Deployment], Deployment]:
    """A function that copies a deployment's database as it is now; the deployment as if restored from that."""

    def copy(deployment: Deployment) -> Deployment:
        for operations in deployment.opened:
            operations.close()
        url = fresh_database(deployment.environment["DATABASE_URL"].rpartition("/")[2])
        environment = deployment.environment | {"DATABASE_URL": url}
        deployment.opened.append(Operations(config.load(environment)))
        return replace(deployment, environment=environment, operations=deployment.opened[-1])

    return copy


@pytest.fixture
def locked(released: Deployment, locked_bucket: str) -> Deployment:
    """A seeded deployment whose bucket has Object Lock."""
    return on(released, s3_bucket=locked_bucket, receipt_lock="365d")


@dataclass(frozen=True, kw_only=True)
class Bucket:
    """A prefix of a bucket with a chain in it, and an auditor who has nothing else but the public key."""

    client: S3Client
    name: str
    prefix: str
    auditor: Deployment
    public: Path

    def put(self, key: str, body: bytes) -> None:
        self.client.put_object(Bucket=self.name, Key=self.prefix + key, Body=body)

    def delete(self, key: str) -> None:
        self.client.delete_object(Bucket=self.name, Key=self.prefix + key)

    def verify(self, *words: str) -> subprocess.CompletedProcess[str]:
        return self.auditor.cli("receipts", "verify", "--from-s3", "--public-key", str(self.public), *words, ok=False)


@pytest.fixture(scope="module")
def chain(standing: Deployment) -> dict[str, bytes]:
    """The objects that four runs of a deployment left in its bucket."""
    for _ in range(4):
        complete(standing, archive=False)
    store = S3Store(standing.operations.settings)
    return {key: store.get(key).body for key in store.keys("receipts/")}


@pytest.fixture(scope="session")
def public(signing_key: Path) -> Path:
    """The public half of the signing key, as an auditor has it."""
    path = signing_key.with_name("auditor.pem")
    path.write_text(audit.public_pem(audit.Signer.load(signing_key).public))
    return path


@pytest.fixture(params=["plain", "locked"])
def bucket(
    request: pytest.FixtureRequest,
    servers: embedded.Embedded,
    client: S3Client,
    chain: dict[str, bytes],
    public: Path,
) -> Bucket:
    """The chain at a fresh place, once in a bucket without versions and once in one with Object Lock."""
    name = embedded.BUCKET if request.param == "plain" else request.getfixturevalue("locked_bucket")
    prefix = f"audited-{os.getpid()}-{next(_numbers)}/"
    environment = servers.environment() | {"PAPERCLIP_WORKER_S3_BUCKET": name, "PAPERCLIP_WORKER_S3_PREFIX": prefix}
    del environment["DATABASE_URL"], environment["PAPERCLIP_WORKER_BROKER_URL"]
    operations = Operations(config.load(environment))
    auditor = Deployment(layout="paperclip", environment=environment, operations=operations, opened=[])
    found = Bucket(client=client, name=name, prefix=prefix, auditor=auditor, public=public)
    for key, body in chain.items():
        found.put(key, body)
    return found
