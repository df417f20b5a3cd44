"""What must hold after any fault, read from the database and the bucket themselves."""

from __future__ import annotations

import json
import math
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping
from contextlib import suppress
from typing import Any
from uuid import UUID

import pytest
import sqlalchemy as sa
import zstandard

from tasks.prune_logs import PruneLogs
from tests.conftest import Deployment
from worker import anchors, audit, books, ledger, ledger_shards, sums, witness
from worker.errors import Transient
from worker.job import Job
from worker.operations import Operations
from worker.runner import Outcome
from worker.states import SETTLED
from worker.storage import Store, read_digest

Rows = Mapping[str, str]


def begin(operations: Operations, job: Job | None = None) -> UUID:
    """Enter a run, of the log's pruning unless it is to be another."""
    return operations.start(job or PruneLogs(), actor="tester", via="test")


def rows(deployment: Deployment) -> dict[str, str]:
    """The company of each row of the log, but for the rows by which runs say what they did."""
    query = "SELECT id::text, company_id::text FROM activity_log WHERE action <> %s"
    return dict(deployment.query(query, PruneLogs.action))


def archived(store: Store, keys: list[str]) -> list[tuple[str, str]]:
    """Id and company of every row in these objects, as often as they hold it."""
    found = []
    for key in keys:
        body = zstandard.ZstdDecompressor().decompressobj().decompress(b"".join(store.read(key)))
        lines = [json.loads(line) for line in body.splitlines()]
        found += [(one["id"], one["company_id"]) for one in lines]
        assert all(f"/company={one['company_id']}/" in key for one in lines)
    return found


def complete(operations: Operations, run: UUID, *, seconds: float = 30) -> None:
    """Work until the run is settled, however long a dead worker's transaction or a dying server stands in the way."""
    wait(lambda: operations.runner().work(run, seconds=math.inf) is Outcome.SETTLED, seconds=seconds)


def wait(until: Callable[[], Any], *, seconds: float = 30) -> None:
    """Ask until the answer is yes; an error that passes counts as no."""
    deadline = time.monotonic() + seconds
    while True:
        with suppress(Transient):
            if until():
                return
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.02)


def check_exact(deployment: Deployment, run: UUID, before: Rows) -> None:
    """At this instant ledger, table and archive agree: nothing is gone that is not tallied and kept whole."""
    gone = set(before.items()) - set(rows(deployment).items())
    tally = {one["company"]: one["rows"] for one in deployment.operations.result(run)["tally"]}
    assert tally == Counter(company for _, company in gone)
    with deployment.operations.transaction(read_only=True) as connection:
        objects = ledger_shards.objects(connection, run)
    assert sum(one.rows for one in objects) == len(gone)
    assert sorted(archived(_store(deployment), [one.key for one in objects])) == sorted(gone)


def check_kept(deployment: Deployment, run: UUID, before: Rows, *, archive: bool = True) -> None:
    """The run kept its promise exactly: tally, rows, archive, bucket, bites and receipts all say the same."""
    result = deployment.operations.result(run)
    after = rows(deployment)
    gone = set(before.items()) - set(after.items())
    assert result["state"] == "kept", result
    assert not set(after.items()) - set(before.items())
    assert len(gone) == result["rows"] == result["planned"] > 0
    counted = {one["company"]: one["rows"] for one in result["tally"]}
    assert counted == Counter(company for _, company in gone)
    _check_archive(deployment, run, gone if archive else set())
    _check_bites(deployment, run, len(gone))
    _check_receipts(deployment, run, counted)
    check_anchored(deployment)
    check_sums(deployment)


def check_sums(deployment: Deployment) -> None:
    """What is summed of the runs that have settled, and the others, say what a look at every run says."""
    outside = "SELECT count(*) FROM paperclip_worker.runs WHERE in_sums <> (state = ANY (%s))"
    assert deployment.query(outside, list(SETTLED)) == [(0,)]
    with deployment.operations.engine.connect() as connection:
        kept = sums.read(connection)
        connection.execute(sa.delete(sums.SUMS))
        connection.execute(sa.update(ledger.RUNS).values(in_sums=False))
        looked = sums.read(connection)
        connection.rollback()
    # Of a run that was taken up again nothing is left in the state that it had.
    assert [one for one in kept if one.amount] == [one for one in looked if one.amount]


def check_anchored(deployment: Deployment) -> None:
    """Every receipt is in the bucket, once what an interrupted worker left pending is written, and all agree."""
    operations, store = deployment.operations, deployment.operations.store
    key = operations.settings.signing_key_file
    assert store is not None
    assert key is not None
    operations.anchor()
    with operations.transaction(read_only=True) as connection:
        assert anchors.pending(connection) == 0
        comparison = witness.Comparison(anchors.books(connection))
        found = witness.verify(store, [audit.Signer.load(key).public], beside=comparison)
    assert found.receipts == found.heads > 0
    assert (found.flaws, comparison.flaws, comparison.beyond) == ([], [], {})


def _check_archive(deployment: Deployment, run: UUID, gone: set[tuple[str, str]]) -> None:
    store = _store(deployment)
    if not gone:
        assert store.keys("archive/") == []
        return
    manifests = check_manifests(deployment, run)
    objects = json.loads(b"".join(store.read(manifests[-1])))["objects"]
    assert sorted(store.keys("archive/")) == sorted([*set(manifests), *(one["key"] for one in objects)])
    assert sum(one["rows"] for one in objects) == len(gone)
    assert sorted(archived(store, [one["key"] for one in objects])) == sorted(gone)


def check_manifests(deployment: Deployment, run: UUID) -> list[str]:
    """Every receipt of the run, the last too, has the very manifest that it names; their keys in that order."""
    store = _store(deployment)
    bodies = deployment.query("SELECT body FROM paperclip_worker.receipts WHERE run_id = %s ORDER BY seq", run)
    evidence = [json.loads(body)["evidence"].get("archive", {}) for (body,) in bodies]
    assert "manifest" in evidence[-1]
    named = [(one["manifest"], one["sha256"]) for one in evidence if "manifest" in one]
    assert all(read_digest(store, key) == sha256 for key, sha256 in named)
    return [key for key, _ in named]


def _check_bites(deployment: Deployment, run: UUID, total: int) -> None:
    shards = deployment.query(
        """
        SELECT s.done, s.bites, s.rows, count(b.number), coalesce(max(b.number), 0), coalesce(sum(b.rows), 0)::bigint
        FROM paperclip_worker.shards s
        LEFT JOIN paperclip_worker.bites b ON (b.run_id, b.sweep, b.shard) = (s.run_id, s.sweep, s.number)
        WHERE s.run_id = %s GROUP BY s.sweep, s.number, s.done, s.bites, s.rows
        """,
        run,
    )
    for done, bites, rows_done, recorded, last, rows_recorded in shards:
        assert done
        assert bites == recorded == last
        assert rows_done == rows_recorded
    assert sum(one[2] for one in shards) == total


def _check_receipts(deployment: Deployment, run: UUID, counted: Mapping[str, int]) -> None:
    operations = deployment.operations
    key = operations.settings.signing_key_file
    assert key is not None
    with operations.transaction(read_only=True) as connection:
        count, flaws = books.verify(connection, [audit.Signer.load(key).public])
    assert count >= 1
    assert flaws == []
    query = "SELECT company_id::text FROM activity_log WHERE action = %s"
    assert Counter(row[0] for row in deployment.query(query, PruneLogs.action)) == Counter(counted.keys())


def _store(deployment: Deployment) -> Store:
    store = deployment.operations.store
    assert store is not None
    return store


def thinned(every: Iterable[Any], always: Collection[Any]) -> list[Any]:
    """Parameters of a matrix: those that are `always` run, and the others marked `long`."""
    return [pytest.param(one, marks=[] if one in always else [pytest.mark.long]) for one in every]
