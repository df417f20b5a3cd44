"""A database that came back from a backup: of receipts settled since then the bucket has the names."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

from tests.anchors.conftest import on
from tests.cli.helpers import check_refusal, complete, keys
from tests.conftest import Deployment
from tests.faults.evidence import check_manifests
from tests.faults.evidence import complete as take_up
from tests.promises.archived import half, restore, store_of
from worker import config, embedded
from worker.operations import Operations
from worker.storage import read_digest

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client


def test_the_archive_of_receipts_that_the_database_lost_is_not_swept(
    released: Deployment, fresh_database: Callable[..., str]
) -> None:
    """A run that is under way in the backup ends once more; what the manifest of its first end names stays whole."""
    run = half(released)
    for operations in released.opened:
        operations.close()
    backup = fresh_database(released.environment["DATABASE_URL"].rpartition("/")[2])
    environment = released.environment | {"DATABASE_URL": backup}
    released.opened.append(Operations(config.load(environment)))
    back = replace(released, environment=environment, operations=released.opened[-1])
    for one, bite_rows in ((released, "170"), (back, "130")):
        small = one.with_settings(bite_rows=bite_rows)
        small.resume(str(run))
        take_up(small, run)
        assert small.result(run)["kept"]
    store = store_of(released)
    for one in (released, back):
        for manifest in check_manifests(one, run):
            objects = json.loads(b"".join(store.read(manifest)))["objects"]
            assert [each["key"] for each in objects if read_digest(store, each["key"]) != each["sha256"]] == []
    assert restore(released, run)["rows"] == released.operations.result(run)["rows"]


@pytest.mark.parametrize("noticed", [True, False], ids=["noticed at once", "noticed after a run"])
def test_the_chain_goes_on_below_a_new_prefix(
    released: Deployment, fresh_database: Callable[..., str], client: S3Client, noticed: bool
) -> None:
    """As docs/operations.md says: archives that are copied come back, and the old prefix is left as it is."""
    archived = complete(released)["run"]
    for operations in released.opened:
        operations.close()
    backup = fresh_database(released.environment["DATABASE_URL"].rpartition("/")[2])
    complete(released, archive=False)
    environment = released.environment | {"DATABASE_URL": backup}
    released.opened.append(Operations(config.load(environment)))
    back = replace(released, environment=environment, operations=released.opened[-1])
    says = "the database lacks receipt 2, which the bucket has"
    if not noticed:
        complete(back, archive=False)
        says = "the database has another receipt 2 than the bucket|its receipt is not|does not name"
        told = back.cli("receipts", "anchor", ok=False)
        check_refusal(told, says="heads/0+2.json: the bucket holds something else under this name", status=1)
    check_refusal(back.cli("receipts", "verify", "--anchors", ok=False), says=says, status=1)
    assert (back.cli("receipts", "verify", "--from-s3", ok=False).returncode == 0) is noticed

    old = back.environment["PAPERCLIP_WORKER_S3_PREFIX"]
    there = keys(back)
    for key in there:
        if key.startswith("archive/"):
            client.copy_object(
                Bucket=embedded.BUCKET,
                Key=f"again-{old}{key}",
                CopySource={"Bucket": embedded.BUCKET, "Key": old + key},
            )
    new = on(back, s3_prefix=f"again-{old}")
    new.cli("receipts", "anchor", "--all")
    new.cli("run", "restore-logs", "--run", archived, "--inline", "--yes")
    assert new.cli("receipts", "verify", "--anchors").stdout.endswith(
        "receipts, chain intact, and the bucket agrees\n"
    )
    assert keys(back) == there
