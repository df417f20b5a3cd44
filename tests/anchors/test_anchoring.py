"""Receipts on their way into the bucket: after the commit, once, in their order, whatever goes wrong between."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psycopg
import pytest
from botocore.awsrequest import AWSResponse
from botocore.exceptions import ClientError

from tests.anchors.conftest import LOCKED, on
from tests.anchors.test_witness import rewritten
from tests.cli.helpers import INLINE, begin, check_refusal, complete, keys, start
from tests.conftest import Deployment
from tests.faults import doomed, evidence
from tests.faults.doomed import work_and_die
from tests.faults.evidence import check_anchored
from tests.faults.proxy import Fault, Proxy, proxy
from worker import anchors, app, audit, canonical, config, embedded, storage, timetable, witness
from worker.anchors import Signed
from worker.app import Site
from worker.errors import AnchorTampered, Refused, StorageFault
from worker.metrics import LedgerCollector
from worker.operations import Operations
from worker.storage import LARGEST, TooLarge

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client


def _pending(deployment: Deployment) -> int:
    with deployment.operations.transaction(read_only=True) as connection:
        return anchors.pending(connection)


def _in_bucket(deployment: Deployment) -> list[str]:
    return [key for key in keys(deployment) if key.startswith("receipts/")]


# -- what operators see -------------------------------------------------------------------------------


def test_a_settled_run_says_where_its_receipt_is(deployment: Deployment) -> None:
    """With and without an archive, in a bucket without Object Lock; and the database is not asked to verify."""
    for number, words in enumerate([INLINE, (*INLINE, "--without-archive", "--older-than", "30d")], 1):
        result = deployment.json(*words)
        key = f"receipts/{number:012d}-{result['receipt']['hash'][:16]}.json"
        assert result["anchor"] == {"key": key, "locked_until": None}
        assert deployment.json("runs", "show", "last")["anchor"] == result["anchor"]
        assert f"anchor {key}\n" in deployment.cli("runs", "show", "last").stdout
        listed = deployment.json("receipts", "list")["receipts"]
        assert (listed[0]["seq"], listed[0]["anchor"]) == (number, result["anchor"])
        assert key in deployment.cli("receipts", "list").stdout
        store = deployment.operations.store
        assert store is not None
        stored = Signed.decode(store.get(key).body)
        assert stored.body == deployment.cli("receipts", "show", str(number)).stdout
    assert _in_bucket(deployment) == sorted(
        [*(one["anchor"]["key"] for one in listed), *(anchors.head_key(seq) for seq in (1, 2))]
    )
    alone = {"DATABASE_URL": "", "PAPERCLIP_WORKER_BROKER_URL": ""}
    assert deployment.cli("receipts", "verify", "--from-s3", env=alone).stdout.startswith("2 receipts, chain intact")
    found = deployment.json("receipts", "verify", "--anchors")
    assert (found["receipts"], found["not_anchored"], found["bucket"]["receipts"]) == (2, 0, 2)
    again = deployment.json("receipts", "anchor")
    assert (again["anchored"], again["not_anchored"], again["locked"]) == (0, 0, False)


def test_without_a_bucket_nothing_is_anchored_and_that_is_said(released: Deployment) -> None:
    bare = on(released, s3_bucket="")
    result = bare.json(*INLINE, "--without-archive")
    assert result["kept"]
    assert result["anchor"] is None
    assert bare.json("receipts", "verify")["not_anchored"] == 1
    assert [
        sample.value
        for family in LedgerCollector(bare.operations, timetable.load(bare.operations.settings)).collect()
        for sample in family.samples
        if sample.name == "paperclip_worker_receipts_not_anchored"
    ] == [1]
    assert "\t-\n" in bare.cli("receipts", "list").stdout
    assert _in_bucket(released) == []
    assert released.json("receipts", "anchor") == {
        "anchored": 1,
        "not_anchored": 0,
        "locked": False,
        "location": f"s3://{embedded.BUCKET}/{released.environment['PAPERCLIP_WORKER_S3_PREFIX']}receipts/",
    }
    check_anchored(released)


def test_a_new_bucket_gets_every_receipt_once_asked(released: Deployment, locked_bucket: str) -> None:
    complete(released, archive=False)
    complete(released, archive=False)
    moved = on(released, s3_bucket=locked_bucket)
    check_refusal(moved.cli("receipts", "verify", "--anchors", ok=False), says="and it is not", status=1)
    assert moved.json("receipts", "anchor")["anchored"] == 0
    assert moved.json("receipts", "anchor", "--all")["anchored"] == 2
    assert moved.json("receipts", "verify", "--anchors")["bucket"]["locked"] is True
    # What operators are shown is of the bucket it was last written to.
    for now, locked in ((moved, True), (released, False)):
        now.cli("receipts", "anchor", "--all")
        anchor = now.json("runs", "show", "last")["anchor"]
        assert (anchor["locked_until"] is not None) is locked
        assert now.json("receipts", "list")["receipts"][0]["anchor"] == anchor


# -- Object Lock --------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["governance", "compliance"])
def test_object_lock_keeps_a_receipt_from_deletion(locked: Deployment, client: S3Client, mode: str) -> None:
    deployment = on(locked, receipt_lock_mode=mode)
    result = deployment.json(*INLINE)
    until = datetime.fromisoformat(result["anchor"]["locked_until"])
    assert abs(until - datetime.now(UTC) - timedelta(days=365)) < timedelta(minutes=5)
    assert f"locked until {result['anchor']['locked_until']}" in deployment.cli("runs", "show", "last").stdout
    assert deployment.json("receipts", "anchor")["locked"] is True
    assert deployment.cli("receipts", "anchor").stdout.endswith(", locked\n")
    found = deployment.json("receipts", "verify", "--from-s3")
    assert (found["locked"], found["locked_until"]) == (True, result["anchor"]["locked_until"])
    assert f"locked until {found['locked_until']}; head 1" in deployment.cli("receipts", "verify", "--from-s3").stdout
    prefix = deployment.environment["PAPERCLIP_WORKER_S3_PREFIX"]
    for key in (result["anchor"]["key"], anchors.head_key(1)):
        where: dict[str, Any] = {"Bucket": LOCKED, "Key": prefix + key}
        answer = client.head_object(**where)
        assert answer["ObjectLockMode"] == mode.upper()
        version: dict[str, Any] = {"VersionId": answer["VersionId"]}
        bypass: dict[str, Any] = {"BypassGovernanceRetention": True} if mode == "compliance" else {}
        with pytest.raises(ClientError, match="AccessDenied"):
            client.delete_object(**where, **version, **bypass)
        soon: Any = {"Mode": mode.upper(), "RetainUntilDate": datetime.now(UTC) + timedelta(seconds=1)}
        with pytest.raises(ClientError, match="AccessDenied"):
            client.put_object_retention(**where, **version, Retention=soon)
        # Without the version's name a delete only hides it, and that is found.
        client.delete_object(**where)
        told = deployment.cli("receipts", "verify", "--from-s3", ok=False)
        check_refusal(told, says=f"{key} was deleted", status=1)
        assert client.get_object(**where, **version)["Body"].read()


def _answer(operations: Operations, operation: str, status: int, *bodies: str) -> None:
    """Have the store answer so when asked for this, one body after the other; nothing else of it changes."""
    store = operations.store
    assert store is not None
    answers = itertools.cycle(bodies)

    class Raw:
        def stream(self) -> Iterator[bytes]:
            yield next(answers).encode()

    store._client.meta.events.register(
        f"before-send.s3.{operation}",
        lambda request, **_: AWSResponse(request.url, status, {}, Raw()),  # type: ignore[arg-type]  # all botocore reads of a body
    )


_ERROR = "<Error><Code>{}</Code><Message>no</Message></Error>"
_LOCKLESS = [
    (404, _ERROR.format("ObjectLockConfigurationNotFoundError")),
    (404, _ERROR.format("NoSuchObjectLockConfiguration")),
    (400, _ERROR.format("InvalidRequest")),
    (405, _ERROR.format("MethodNotAllowed")),
    (501, _ERROR.format("NotImplemented")),
    (200, "<ObjectLockConfiguration></ObjectLockConfiguration>"),
]


@pytest.mark.parametrize(("status", "body"), _LOCKLESS, ids=[f"{a} {b[13:30]}" for a, b in _LOCKLESS])
def test_stores_without_object_lock_have_many_ways_to_say_so(released: Deployment, status: int, body: str) -> None:
    _answer(released.operations, "GetObjectLockConfiguration", status, body)
    complete(released, archive=False)
    check_anchored(released)


def test_whoever_may_not_ask_for_object_lock_anchors_nothing_unlocked(released: Deployment) -> None:
    _answer(released.operations, "GetObjectLockConfiguration", 403, _ERROR.format("AccessDenied"))
    complete(released, archive=False)
    assert (_pending(released), _in_bucket(released)) == (1, [])
    with pytest.raises(Refused, match="s3:GetBucketObjectLockConfiguration"):
        released.operations.anchor()


# -- faults -------------------------------------------------------------------------------------------


@pytest.mark.faults
@pytest.mark.parametrize("step", ["receipt written", "before commit of the settlement"])
def test_a_settlement_that_did_not_commit_leaves_nothing(released: Deployment, step: str) -> None:
    run = start(released.operations)
    work_and_die(released.environment, step, run, bite_rows=200)
    assert _in_bucket(released) == []
    evidence.complete(released.operations, run)
    check_anchored(released)


def _next_settlement(deployment: Deployment) -> None:
    complete(deployment, table="heartbeat_run_events")


def _rescue(deployment: Deployment) -> None:
    settings = deployment.operations.settings
    celery = app.make(settings)
    site = Site(settings, timetable.load(settings), celery)
    site.rescue()
    site.operations.close()
    celery.close()


def _command(deployment: Deployment) -> None:
    deployment.cli("receipts", "anchor")


_AFTER = "after commit of the settlement"
_HEALED = [
    *((_AFTER, heal) for heal in (_next_settlement, _rescue, _command)),
    *((step, _rescue) for step in doomed.ANCHORING),
]


@pytest.mark.faults
@pytest.mark.parametrize(("step", "heal"), _HEALED, ids=[f"{step}, {heal.__name__}" for step, heal in _HEALED])
def test_killed_before_the_receipt_is_anchored_another_does_it(
    released: Deployment, step: str, heal: Callable[[Deployment], None]
) -> None:
    run = start(released.operations)
    work_and_die(released.environment, step, run, bite_rows=200)
    result = released.operations.result(run)
    assert (result["kept"], result["anchor"], _pending(released)) == (True, None, 1)
    heal(released)
    assert _pending(released) == 0
    check_anchored(released)


@pytest.fixture
def network(servers: embedded.Embedded, monkeypatch: pytest.MonkeyPatch) -> Iterator[Proxy]:
    monkeypatch.setattr("botocore.retries.standard.ExponentialBackoff.delay_amount", lambda *_: 0.01)
    with proxy(servers.s3.port) as way:
        yield way


@pytest.mark.faults
@pytest.mark.parametrize(
    ("method", "fault"),
    [("PUT", Fault.DROP), ("PUT", Fault.BUSY), ("PUT", Fault.SWALLOW), ("GET", Fault.FLIP), ("GET", Fault.CUT)],
    ids=lambda one: getattr(one, "value", one),
)
def test_a_store_that_fails_while_a_run_settles_leaves_the_receipt_pending(
    released: Deployment, network: Proxy, method: str, fault: Fault
) -> None:
    """The run is kept all the same; what is pending shows, and goes when the store is well."""
    environment = {**released.environment, "PAPERCLIP_STORAGE_S3_ENDPOINT": network.url}
    behind = Operations(config.load(environment))
    released.opened.append(behind)
    network.fault = lambda asked, path: fault if asked == method and "/receipts/0" in path else None
    run = start(behind)
    behind.runner().work(run, seconds=math.inf)
    assert network.faults
    result = behind.result(run)
    assert (result["kept"], result["anchor"]) == (True, None)
    assert released.json("receipts", "verify")["not_anchored"] == 1
    assert released.json("receipts", "list")["receipts"][0]["anchor"] is None
    with pytest.raises((StorageFault, AnchorTampered)):
        behind.anchor()
    network.fault = lambda *_: None
    behind.runner().anchor()
    assert _pending(released) == 0
    check_anchored(released)


def test_two_at_once_write_the_same_and_once(locked: Deployment, client: S3Client) -> None:
    bare = on(locked, s3_bucket="")
    for _ in range(12):
        complete(bare, archive=False)
    assert _pending(locked) == 12
    both = [on(locked), on(locked)]
    with ThreadPoolExecutor(2) as pool:
        done = list(pool.map(lambda one: one.operations.anchor(), both))
    assert {anchor.seq for one in done for anchor in one} == set(range(1, 13))
    check_anchored(locked)
    prefix = locked.environment["PAPERCLIP_WORKER_S3_PREFIX"]
    versions = client.list_object_versions(Bucket=LOCKED, Prefix=prefix)["Versions"]
    assert len(versions) == len({one["Key"] for one in versions}) == 24


def _taken(deployment: Deployment, client: S3Client, *seqs: int) -> None:
    """Have something else under the names of these receipts, which are pending."""
    prefix = deployment.environment["PAPERCLIP_WORKER_S3_PREFIX"]
    with deployment.operations.transaction(read_only=True) as connection:
        for seq in seqs:
            key = prefix + anchors.key_of(audit.get(connection, seq))
            client.put_object(Bucket=embedded.BUCKET, Key=key, Body=b"mine")


def test_a_name_that_is_taken_is_told_and_keeps_no_other_out(released: Deployment, client: S3Client) -> None:
    complete(released, archive=False)
    complete(on(released, s3_bucket=""), archive=False)
    _taken(released, client, 2)
    complete(released, archive=False)
    assert [one["anchor"] is None for one in released.json("receipts", "list")["receipts"]] == [False, True, False]
    check_refusal(released.cli("receipts", "anchor", ok=False), says="0+2-.*.json: .*something else", status=1)
    check_refusal(released.cli("receipts", "verify", "--from-s3", ok=False), says="receipt 2: .*0+2-", status=1)


def test_names_that_are_taken_keep_no_other_out_however_many(
    released: Deployment, client: S3Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each settlement meets all of them before its own receipt."""
    monkeypatch.setattr("worker.runner.MOST_ANCHORED", 2)
    for _ in range(3):
        complete(on(released, s3_bucket=""), archive=False)
    _taken(released, client, 1, 2, 3)
    complete(released, archive=False)
    assert [one["anchor"] is None for one in released.json("receipts", "list")["receipts"]] == [False, *[True] * 3]


_CHANGES = {
    "the body was changed": f"body = replace(body, 'tester', 'nobody'), signature = '{'00' * 64}'",
    "the body is not JSON": "body = repeat('[', 9999), hash = encode(sha256(repeat('[', 9999)::bytea), 'hex')",
    "the body is not a JSON object": "body = '[]', hash = encode(sha256('[]'), 'hex')",
    "the body belongs to another place": "body = '{}', hash = encode(sha256('{}'), 'hex')",
    "the signature does not fit": f"signature = '{'00' * 64}'",
    "the signature does not fit ": "signature = upper(signature) || ' '",
    "the body names another signer": "signer = repeat('0', 16)",
}


def test_a_pending_receipt_that_was_changed_is_not_written(released: Deployment) -> None:
    """Under its name, which nobody gets twice, only what was signed may be; what is whole is written all the same."""
    complete(on(released, s3_bucket=""), archive=False)
    ((body, digest, signer, signature),) = released.query(f"SELECT body, hash, signer, signature FROM {_RECEIPTS}")
    back = f"UPDATE {_RECEIPTS} SET body = %s, hash = %s, signer = %s, signature = %s WHERE seq = 1"
    for says, change in _CHANGES.items():
        released.query(f"UPDATE {_RECEIPTS} SET {change}")
        with pytest.raises(AnchorTampered, match=f"receipt 1 is not what was signed: {says.strip()}"):
            released.operations.anchor()
        released.query(back, body, digest, signer, signature)
    # Made whole in itself by somebody, of a key that nobody knows here: then it must at least follow the one before.
    stranger = canonical.encode(json.loads(body) | {"signer": "0" * 16, "prev": "1" * 64}).decode()
    released.query(back, stranger, anchors.sha256(stranger), "0" * 16, signature)
    told = released.cli("receipts", "anchor", ok=False)
    check_refusal(told, says="receipt 1 is not what was signed: it does not follow the receipt before it", status=1)
    assert _in_bucket(released) == []
    complete(released, archive=False)
    assert (_pending(released), len(_in_bucket(released))) == (1, 2)
    released.query(back, body, digest, signer, signature)
    check_anchored(released)


@pytest.mark.parametrize("values", [{"hash": "0" * 64}, {"signature": "00" * 64}], ids=["hash", "signature"])
def test_a_head_that_nobody_signed_is_not_taken_for_ours(
    released: Deployment, signing_key: Path, values: dict[str, str]
) -> None:
    complete(on(released, s3_bucket=""), archive=False)
    store = released.operations.store
    assert store is not None
    with released.operations.transaction(read_only=True) as connection:
        head = anchors.head_of(audit.get(connection, 1), audit.Signer.load(signing_key))
    store.put_once(anchors.head_key(1), replace(head, **values).encode(), lock=None)
    check_refusal(released.cli("receipts", "anchor", ok=False), says="heads/0+1.json: .*something else", status=1)
    assert _pending(released) == 1


@pytest.mark.parametrize(
    "key", ["receipts/heads/{0:012d}.json", "receipts/{0:012d}-{1}.json"], ids=["head", "receipt"]
)
def test_what_is_too_large_for_a_receipt_is_not_read(released: Deployment, key: str) -> None:
    complete(on(released, s3_bucket=""), archive=False)
    store = released.operations.store
    assert store is not None
    ((start,),) = released.query(f"SELECT left(hash, 16) FROM {_RECEIPTS}")
    store.put_once(key.format(1, start), b" " * (LARGEST + 1), lock=None)
    with pytest.raises(TooLarge, match="larger than a receipt"):
        store.get(key.format(1, start))
    says = "the bucket holds something else under this name|the bucket has receipt 1 and the database has another"
    with pytest.raises((AnchorTampered, Refused), match=says):
        released.operations.anchor()


def test_a_head_by_an_earlier_key_is_as_good(released: Deployment, tmp_path: Path, signing_key: Path) -> None:
    """The key changed between the writing of a head and the note of it; an auditor has both public keys."""
    complete(on(released, s3_bucket=""), archive=False)
    store = released.operations.store
    assert store is not None
    with released.operations.transaction(read_only=True) as connection:
        receipt = audit.get(connection, 1)
    store.put_once(anchors.head_key(1), anchors.head_of(receipt, audit.Signer.load(signing_key)).encode(), lock=None)
    later = tmp_path / "later.pem"
    audit.keygen(later)
    assert [one.seq for one in on(released, signing_key_file=str(later)).operations.anchor()] == [1]
    check_anchored(released)


def test_a_settlement_waits_for_few_receipts_only(released: Deployment, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("worker.runner.MOST_ANCHORED", 2)
    for _ in range(4):
        complete(on(released, s3_bucket=""), archive=False)
    complete(released, archive=False)
    assert _pending(released) == 3
    assert sorted(anchor.seq for anchor in released.operations.anchor()) == [3, 4, 5]
    check_anchored(released)


def _verify(deployment: Deployment, beside: witness.Comparison | None = None) -> witness.Testimony:
    store = deployment.operations.store
    key = deployment.operations.settings.signing_key_file
    assert store is not None
    assert key is not None
    return witness.verify(store, [audit.Signer.load(key).public], beside=beside)


def test_an_object_that_goes_while_the_bucket_is_read_is_told(released: Deployment) -> None:
    complete(released, archive=False)
    _answer(released.operations, "GetObject", 404, _ERROR.format("NoSuchKey"))
    assert "cannot be read back" in _verify(released).flaws[0].what


def test_a_store_that_lists_in_no_order_is_not_believed(released: Deployment) -> None:
    prefix = released.environment["PAPERCLIP_WORKER_S3_PREFIX"] + "receipts/"
    version = "<VersionId>null</VersionId><Size>1</Size><LastModified>2026-01-01T00:00:00Z</LastModified>"
    pages = [
        f"<ListVersionsResult><IsTruncated>{more}</IsTruncated><NextKeyMarker>{name}</NextKeyMarker>"
        f"<Version><Key>{prefix}{name}</Key>{version}</Version></ListVersionsResult>"
        for name, more in (("b", "true"), ("a", "false"))
    ]
    store = released.operations.store
    assert store is not None
    _answer(released.operations, "ListObjectVersions", 200, *pages)
    with pytest.raises(StorageFault, match="does not list by name"):
        list(store.history("receipts/"))


# -- database against bucket --------------------------------------------------------------------------


@pytest.fixture
def four(released: Deployment) -> Deployment:
    for _ in range(4):
        complete(released, archive=False)
    released.cli("receipts", "verify", "--anchors")
    return released


def _disagree(deployment: Deployment, says: str) -> None:
    check_refusal(deployment.cli("receipts", "verify", "--anchors", ok=False), says=says, status=1)


def test_a_chain_rewritten_with_the_true_key_is_found(four: Deployment, signing_key: Path) -> None:
    """Whoever holds database and key can make one that `verify` cannot fault; the bucket remembers the first."""
    store = four.operations.store
    assert store is not None
    found = {key: store.get(key).body for key in _in_bucket(four)}
    made = rewritten(found, audit.Signer.load(signing_key))
    with psycopg.connect(four.environment["DATABASE_URL"]) as connection:
        for key, raw in made.items():
            one = Signed.decode(raw)
            if "heads" not in key:
                query = "UPDATE paperclip_worker.receipts SET body = %s, hash = %s, signature = %s WHERE seq = %s"
                seq = json.loads(one.body)["seq"]
                connection.execute(query, (one.body, one.hash, one.signature, seq))
        connection.execute("UPDATE paperclip_worker.chain SET hash = %s", (_last_hash(made),))
    told = four.cli("receipts", "verify", ok=False)
    check_refusal(told, says="receipt 1: the database says .* as receipts/0+1-.*, and has no such receipt", status=1)
    _disagree(four, "receipt 1: the database has another receipt 1 than the bucket")
    four.query("DELETE FROM paperclip_worker.anchors")
    assert four.json("receipts", "verify")["intact"] is True
    _disagree(four, "receipt 1: the database has another receipt 1 than the bucket")


def _last_hash(made: dict[str, bytes]) -> str:
    """The hash of the last of four receipts."""
    return next(Signed.decode(raw).hash for key, raw in made.items() if key.startswith(f"receipts/{4:012d}-"))


def test_receipts_cut_off_or_out_of_the_database_are_found(four: Deployment) -> None:
    four.query("DELETE FROM paperclip_worker.receipts WHERE seq = 4")
    _disagree(four, "the database lacks receipt 4")
    four.query("DELETE FROM paperclip_worker.receipts WHERE seq = 2")
    found = four.json("receipts", "verify", "--anchors", ok=False)
    told = [one["what"] for one in found["flaws"]]
    assert [one for one in told if "the database lacks" in one] == [
        "the database lacks receipt 2, which the bucket has",
        "the database lacks receipt 4, which the bucket has",
    ]


def test_the_database_must_not_claim_what_the_bucket_has_not(four: Deployment, client: S3Client) -> None:
    four.query("UPDATE paperclip_worker.anchors SET key = 'receipts/elsewhere.json' WHERE seq = 3")
    _disagree(four, "receipt 3: the database says that it is in the bucket as receipts/elsewhere.json")
    prefix = four.environment["PAPERCLIP_WORKER_S3_PREFIX"]
    gone = next(key for key in _in_bucket(four) if key.startswith(f"receipts/{4:012d}-"))
    client.delete_object(Bucket=embedded.BUCKET, Key=prefix + gone)
    client.delete_object(Bucket=embedded.BUCKET, Key=prefix + anchors.head_key(4))
    # Cut off with its head, the bucket alone cannot tell; the database can.
    assert four.cli("receipts", "verify", "--from-s3").returncode == 0
    found = four.json("receipts", "verify", "--anchors", ok=False)
    assert any(f"in the bucket as {gone}, and it is not" in one["what"] for one in found["flaws"])


def test_a_receipt_settled_while_the_bucket_is_read_is_no_flaw(
    four: Deployment, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The database is read in one snapshot; what came after it is looked up again."""
    history = storage.S3Store.history
    late = iter([lambda: complete(four, archive=False)])

    def settle_first(self: storage.S3Store, prefix: str) -> Iterator[storage.History]:
        next(late, lambda: None)()
        return history(self, prefix)

    monkeypatch.setattr(storage.S3Store, "history", settle_first)
    with four.operations.transaction(read_only=True) as connection:
        comparison = witness.Comparison(anchors.books(connection))
        found = _verify(four, comparison)
    assert (found.flaws, list(comparison.beyond)) == ([], [5])
    with four.operations.transaction(read_only=True) as connection:
        comparison.catch_up(anchors.hashes(connection, comparison.beyond))
    assert comparison.flaws == []


@pytest.mark.parametrize("late", [False, True], ids=["its head too", "its head a moment later"])
def test_a_receipt_that_comes_after_the_heads_were_listed_is_no_flaw(
    four: Deployment, monkeypatch: pytest.MonkeyPatch, late: bool
) -> None:
    history, put_once = storage.S3Store.history, storage.S3Store.put_once
    settle = iter([lambda: complete(four, archive=False)])
    held: list[Callable[[], None]] = []

    def settle_after_the_heads(self: storage.S3Store, prefix: str) -> Iterator[storage.History]:
        if prefix == anchors.PREFIX:
            next(settle, lambda: None)()
        yield from history(self, prefix)
        while prefix == anchors.head_key(5) and held:
            held.pop()()

    def hold(self: storage.S3Store, key: str, body: bytes, *, lock: storage.Lock | None) -> None:
        if late and key == anchors.head_key(5):
            held.append(lambda: put_once(self, key, body, lock=lock))
        else:
            put_once(self, key, body, lock=lock)

    monkeypatch.setattr(storage.S3Store, "history", settle_after_the_heads)
    monkeypatch.setattr(storage.S3Store, "put_once", hold)
    monkeypatch.setattr("worker.witness.MOMENT", 0)
    found = _verify(four)
    assert (found.receipts, found.heads, found.flaws) == (5, 5, [])


def test_retention_that_has_ended_keeps_nothing(locked: Deployment, monkeypatch: pytest.MonkeyPatch) -> None:
    complete(locked, archive=False)
    assert _verify(locked).locked
    get = storage.S3Store.get

    def old(self: storage.S3Store, key: str, *, version: str | None = None) -> storage.Stored:
        return replace(get(self, key, version=version), locked_until=datetime.now(UTC) - timedelta(seconds=1))

    monkeypatch.setattr(storage.S3Store, "get", old)
    found = _verify(locked)
    assert (found.flaws, found.locked, found.to_json()["locked_until"]) == ([], False, None)


def test_nothing_on_both_sides_is_no_flaw_and_what_is_pending_is_said(released: Deployment) -> None:
    assert (
        released.cli("receipts", "verify", "--anchors").stdout == "0 receipts, chain intact, and the bucket agrees\n"
    )
    told = released.cli("receipts", "verify", "--from-s3", ok=False)
    check_refusal(told, says="there is no receipt", status=1)
    complete(released, archive=False)
    complete(on(released, s3_bucket=""), archive=False)
    said = "2 receipts, chain intact, 1 not in the bucket yet\n"
    assert released.cli("receipts", "verify", "--anchors").stdout == said


# -- receipts cut off the end ---------------------------------------------------------------------------


def _cut(deployment: Deployment, *, run: bool = False, anchor: bool = False) -> None:
    """Take the last receipt out of the database and set the chain back, as somebody who owns it could."""
    ((seq, whose),) = deployment.query("SELECT max(seq), (array_agg(run_id ORDER BY seq DESC))[1] FROM " + _RECEIPTS)
    deployment.query(f"DELETE FROM {_RECEIPTS} WHERE seq = %s", seq)
    back = f"FROM {_RECEIPTS} AS last WHERE last.seq = %s"
    deployment.query(f"UPDATE paperclip_worker.chain SET seq = last.seq, hash = last.hash {back}", seq - 1)
    if anchor:
        deployment.query("DELETE FROM paperclip_worker.anchors WHERE seq = %s", seq)
    for table in ("bites", "objects", "shards") * run:
        deployment.query(f"DELETE FROM paperclip_worker.{table} WHERE run_id = %s", whose)
    if run:
        deployment.query("DELETE FROM paperclip_worker.runs WHERE id = %s", whose)


_RECEIPTS = "paperclip_worker.receipts"


def test_the_last_receipt_of_a_resumed_run_is_missed(released: Deployment) -> None:
    """It has an earlier one, which says that it was stopped."""
    run = begin(released)
    released.cli("runs", "stop", str(run))
    released.cli("runs", "resume", str(run), "--inline")
    assert released.cli("receipts", "verify").stdout == "2 receipts, chain intact\n"
    _cut(released, anchor=True)
    told = released.cli("receipts", "verify", ok=False)
    check_refusal(
        told, says=f"receipt 1: run {run} is settled as kept, and its newest receipt says otherwise", status=1
    )


def test_a_run_that_ended_otherwise_than_its_receipt_says_is_found(released: Deployment) -> None:
    complete(released, archive=False)
    for change in ("state = 'unkept'", "settled_at = settled_at + interval '1 us'", "settled_at = 'infinity'"):
        released.query(f"UPDATE paperclip_worker.runs SET {change}")
        told = released.cli("receipts", "verify", ok=False)
        check_refusal(told, says="and its newest receipt says otherwise", status=1)


def test_an_anchor_tells_that_its_receipt_is_gone(released: Deployment) -> None:
    """Also when the run went with it; without the anchor only the bucket knows."""
    for _ in range(3):
        complete(released, archive=False)
    _cut(released, run=True)
    says = r"receipt 3: the database says that it is in the bucket as receipts/0+3-\S+, and has no such receipt"
    check_refusal(released.cli("receipts", "verify", ok=False), says=says, status=1)
    released.query("UPDATE paperclip_worker.anchors SET key = 'receipts/0\x1b.json' WHERE seq = 2")
    told = released.cli("receipts", "verify", ok=False)
    check_refusal(
        told, says=r"receipt 2: .* as receipts/0\\x1b\.json, and has no such receipt \(and 1 more\)", status=1
    )
    released.query("DELETE FROM paperclip_worker.anchors")
    assert released.cli("receipts", "verify").returncode == 0
    _disagree(released, "the database lacks receipt 3, which the bucket has")


def _only_the_chain(deployment: Deployment) -> None:
    deployment.query(
        f"UPDATE paperclip_worker.chain SET seq = 1, hash = (SELECT hash FROM {_RECEIPTS} WHERE seq = 1)"
    )


def _no_chain(deployment: Deployment) -> None:
    deployment.query("DELETE FROM paperclip_worker.chain")


def _other_hash(deployment: Deployment) -> None:
    deployment.query("UPDATE paperclip_worker.chain SET hash = repeat('0', 64)")


def _only_the_receipt(deployment: Deployment) -> None:
    deployment.query(f"DELETE FROM {_RECEIPTS} WHERE seq = 2")


@pytest.mark.parametrize(
    ("cut", "finds"),
    [
        (_cut, "receipt 2 is missing"),
        (lambda one: _cut(one, run=True), "receipt 2 is missing"),
        (_only_the_receipt, "receipt 2 is missing"),
        (_only_the_chain, None),
        (_other_hash, None),
        (_no_chain, "the chain does not end where its head says"),
    ],
    ids=["set back", "with its run", "not set back", "the chain's row alone", "its hash", "no such row"],
)
def test_no_receipt_takes_the_place_of_one_that_was_cut_off(
    released: Deployment, cut: Callable[[Deployment], None], finds: str | None
) -> None:
    """Later runs settle and are anchored beyond it, and its number stays missing. A row set back alone is mended."""
    for _ in range(2):
        complete(released, archive=False)
    run = start(released.operations)
    cut(released)
    if finds == "receipt 2 is missing":
        # The bucket tells, and a run that was entered before goes no further.
        with pytest.raises(Refused, match="the bucket has receipt 2 and the database lacks it"):
            released.operations.runner().work(run, seconds=math.inf)
    else:
        released.operations.runner().work(run, seconds=math.inf)
    result = released.operations.result(run)
    assert result["receipt"]["seq"] == 3
    assert result["anchor"]["key"].startswith(f"receipts/{3:012d}-")
    assert len(_in_bucket(released)) == 6
    done = released.json("receipts", "verify", ok=False)
    assert finds is None or finds in [one["what"] for one in done["flaws"]]
    assert done["intact"] is (finds is None)
    if finds is None:
        check_anchored(released)


def test_an_anchor_of_another_receipt_anchors_nothing(released: Deployment) -> None:
    complete(released, archive=False)
    released.query("UPDATE paperclip_worker.anchors SET key = 'receipts/000000000001-0123456789abcdef.json'")
    assert (_pending(released), released.json("receipts", "list")["receipts"][0]["anchor"]) == (1, None)
