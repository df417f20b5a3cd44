"""A database that came back from a backup: of receipts settled since then the bucket has the names."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import pytest

from tests.anchors.conftest import on
from tests.cli.helpers import check_refusal, complete, job, keys
from tests.conftest import Deployment
from tests.faults.evidence import check_manifests
from tests.faults.evidence import complete as take_up
from tests.promises.archived import half, restore, store_of
from worker import embedded
from worker.errors import Refused
from worker.runner import Outcome
from worker.storage import read_digest

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

AHEAD = "the bucket has receipt 2 and the database lacks it: the database came from a backup"


def test_the_archive_of_receipts_that_the_database_lost_is_not_swept(
    released: Deployment, back_up: Callable[[Deployment], Deployment]
) -> None:
    """A run ends in both, taken up in the backup before it ended in the other: what each manifest names stays."""
    run = half(released)
    back = back_up(released)
    first, second = released.with_settings(bite_rows="170"), back.with_settings(bite_rows="130")
    for one in (first, second):
        one.resume(str(run))

    def settle_first() -> bool:
        if first.result(run)["state"] == "running":
            take_up(first, run)
        return False

    assert second.runner().work(run, seconds=math.inf, leave=settle_first) is Outcome.SETTLED
    assert first.result(run)["kept"]
    assert second.result(run)["kept"]
    store = store_of(released)
    for deployment in (released, back):
        for manifest in check_manifests(deployment, run):
            objects = json.loads(b"".join(store.read(manifest)))["objects"]
            assert [each["key"] for each in objects if read_digest(store, each["key"]) != each["sha256"]] == []
    assert restore(released, run)["rows"] == released.operations.result(run)["rows"]


@pytest.mark.parametrize("noticed", [True, False], ids=["noticed at once", "noticed by a run"])
def test_the_chain_goes_on_below_a_new_prefix(
    released: Deployment, back_up: Callable[[Deployment], Deployment], client: S3Client, noticed: bool
) -> None:
    """As docs/operations.md says: archives that are copied come back, and the old prefix is left as it is."""
    archived = complete(released)["run"]
    small = released.with_settings(bite_rows="50")
    run = small.start(job(table="heartbeat_run_events"), actor="tester", via="test")
    bites = iter(range(4))
    small.runner().work(run, seconds=math.inf, leave=lambda: next(bites, None) is None)
    assert small.result(run)["rows"] > 0
    back = back_up(released)
    take_up(released.operations, run)
    says = "the database lacks receipt 2, which the bucket has"
    if not noticed:
        with pytest.raises(Refused, match=AHEAD):
            back.operations.runner().work(run, seconds=math.inf)
        says = "the database has another receipt 2 than the bucket"
    check_refusal(back.cli("receipts", "verify", "--anchors", ok=False), says=says, status=1)
    back.cli("receipts", "verify", "--from-s3")
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
    new.cli("holds", "add", "--table", "heartbeat_run_events", "--reason", "entered again")
    new.cli("receipts", "anchor", "--all")
    done = new.json("runs", "resume", str(run), "--inline")
    assert (done["kept"], done["receipt"]["holds"] != []) == (True, True)
    new.cli("run", "restore-logs", "--run", archived, "--inline", "--yes")
    assert new.cli("receipts", "verify", "--anchors").stdout.endswith(
        "receipts, chain intact, and the bucket agrees\n"
    )
    assert keys(back) == there
