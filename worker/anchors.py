"""Anchors: receipts and heads of their chain in the bucket too, where whoever holds the database cannot rewrite them.

An anchor is written after the settlement has committed, never before; what is pending is a receipt without a row
in `anchors`. Names and bytes follow from the receipt alone, so that any number of workers, killed at any instant,
write the same objects.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING, Any

import sqlalchemy as sa
from sqlalchemy.dialects.postgresql import insert

from worker import canonical, chains, db
from worker.audit import ANCHORS, RECEIPTS, STREAMED
from worker.chains import Receipt
from worker.errors import AnchorTampered
from worker.logs import log
from worker.storage import Lock, TooLarge

if TYPE_CHECKING:
    from worker.audit import Signer
    from worker.config import Settings
    from worker.storage import S3Store, Stored

PREFIX = "receipts/"
HEADS = PREFIX + "heads/"
# Receipts are read from the database so many at a time; one may have some megabytes.
_SLICE = 5

# The name of a receipt's object in SQL; as `key_of`.
KEY = sa.func.concat(
    PREFIX, sa.func.lpad(sa.cast(RECEIPTS.c.seq, sa.Text), 12, "0"), "-", sa.func.left(RECEIPTS.c.hash, 16), ".json"
)


@dataclass(frozen=True, kw_only=True)
class Anchor:
    """Where a receipt is in the bucket, and until when the store says that it cannot be deleted."""

    seq: int
    key: str
    locked_until: datetime | None

    def to_json(self) -> dict[str, Any]:
        return {"key": self.key, "locked_until": self.locked_until.isoformat() if self.locked_until else None}


@dataclass(frozen=True, kw_only=True)
class Signed:
    """A signed text as an object holds it: `body` byte for byte, its SHA-256 (hex), and who signed that."""

    body: str
    hash: str
    signer: str
    signature: str

    def encode(self) -> bytes:
        return canonical.encode(vars(self))

    @classmethod
    def decode(cls, raw: bytes) -> Signed:
        """The signed text in an object. Raises ValueError for any bytes that `encode` does not make."""
        try:
            value = json.loads(raw)
            if isinstance(value, dict) and all(isinstance(item, str) for item in value.values()):
                found = cls(**value)
                if found.encode() == raw:
                    return found
        except (TypeError, RecursionError) as error:
            raise ValueError("not an object of ours") from error
        raise ValueError("not an object of ours")


def sha256(text: str) -> str:
    """SHA-256 (hex) of a text in UTF-8."""
    return hashlib.sha256(text.encode()).hexdigest()


def key_of(receipt: Receipt) -> str:
    """The name of a receipt's object."""
    return f"{PREFIX}{receipt.seq:012d}-{receipt.hash[:16]}.json"


def head_key(seq: int) -> str:
    """The name of the head that says the chain has reached `seq`."""
    return f"{HEADS}{seq:012d}.json"


def signed(receipt: Receipt) -> Signed:
    """A receipt as its object holds it."""
    return Signed(body=receipt.body, hash=receipt.hash, signer=receipt.signer, signature=receipt.signature)


def head_facts(receipt: Receipt) -> dict[str, Any]:
    """What a head says. The time is the settlement's: another would differ with each attempt to write it."""
    time = json.loads(receipt.body).get("settled_at")
    time = time if isinstance(time, str) else None
    return {"v": 1, "head": True, "seq": receipt.seq, "hash": receipt.hash, "time": time}


def head_of(receipt: Receipt, signer: Signer) -> Signed:
    """The signed head of a chain that has reached this receipt."""
    body = canonical.encode({**head_facts(receipt), "signer": signer.fingerprint}).decode()
    digest = sha256(body)
    return Signed(body=body, hash=digest, signer=signer.fingerprint, signature=signer.sign(digest))


def write(
    settings: Settings,
    engine: sa.Engine,
    store: S3Store,
    signer: Signer,
    *,
    most: int | None = None,
    every: bool = False,
) -> list[Anchor]:
    """Write pending receipts (with `every` all of them) to the bucket in their order, each read back; those written.

    Raises StorageFault or Refused at the first the store does not take, and AnchorTampered, after the others,
    for one that was changed, or when something else has its name. What was written until then stays and is recorded.
    `most` bounds what is written, not what cannot be: that would keep later receipts out for good.
    """
    done: list[Anchor] = []
    tampered: AnchorTampered | None = None
    lock: Lock | None = None
    for number, (receipt, before) in enumerate(_receipts(engine, settings, every=every)):
        if len(done) == most:
            break
        if number == 0 and store.lockable():
            lock = Lock(mode=settings.receipt_lock_mode, until=_now(engine, settings) + settings.receipt_lock)
        try:
            _require_signed(receipt, before, signer)
            anchor = _write_one(store, receipt, signer, lock)
        except AnchorTampered as error:
            # One that somebody changed, or whose name is taken, must not keep later receipts out of the bucket.
            tampered = tampered or error
            continue
        _record(engine, settings, anchor)
        done.append(anchor)
    if done:
        log.info("receipts anchored", receipts=len(done), last=done[-1].seq, locked=done[-1].locked_until is not None)
    if tampered:
        raise tampered
    return done


def _require_signed(receipt: Receipt, before: str | None, signer: Signer) -> None:
    """Raise AnchorTampered for a receipt that was changed: once written, the true one could never have its name.

    One that a known key signed says itself what it follows; whether that is there is for `verify` to judge.
    """
    keys = chains.by_fingerprint(signer.trusted)
    before = None if receipt.signer in keys else before
    if flaws := chains.flaws_of(receipt, before, keys, strangers=True):
        raise AnchorTampered(
            f"receipt {receipt.seq} is not what was signed: {flaws[0]}; it is not written to the bucket; "
            "see `receipts verify`"
        )


def _write_one(store: S3Store, receipt: Receipt, signer: Signer, lock: Lock | None) -> Anchor:
    """The receipt first: a head must never name what is not there."""
    key, body = key_of(receipt), signed(receipt).encode()
    store.put_once(key, body, lock=lock)
    found = _get(store, key)
    if found.body != body:
        raise _tampered(key)
    head = head_key(receipt.seq)
    store.put_once(head, head_of(receipt, signer).encode(), lock=lock)
    # A worker with an earlier signing key may have written it: its word is as good, and `verify` judges it.
    there = _get(store, head).body
    if not says(there, receipt) or not _holds(Signed.decode(there), signer):
        raise _tampered(head)
    return Anchor(seq=receipt.seq, key=key, locked_until=found.locked_until)


def _get(store: S3Store, key: str) -> Stored:
    try:
        return store.get(key)
    except TooLarge:
        raise _tampered(key) from None


def _holds(head: Signed, signer: Signer) -> bool:
    """Whether a head has its hash, and a signature that fits where it says that this is the key."""
    keys = chains.by_fingerprint(signer.trusted)
    fits = head.signer not in keys or not chains.signature_flaws(head.hash, head.signer, head.signature, keys)
    return fits and sha256(head.body) == head.hash


def says(head: bytes, receipt: Receipt) -> bool:
    """Whether these bytes are a head that names this receipt, whoever signed it."""
    try:
        found = Signed.decode(head)
    except ValueError:
        return False
    return found.body.encode() == canonical.encode({**head_facts(receipt), "signer": found.signer})


def named(head: bytes) -> tuple[int, str] | None:
    """The receipt that a head names, by number and hash, whoever signed it; None for other bytes."""
    try:
        found = json.loads(Signed.decode(head).body)
        seq, digest = found["seq"], found["hash"]
    except (ValueError, TypeError, KeyError, RecursionError):
        return None
    return (seq, digest) if isinstance(seq, int) and isinstance(digest, str) else None


def _tampered(key: str) -> AnchorTampered:
    return AnchorTampered(
        f"{key}: the bucket holds something else under this name; is the prefix another deployment's?"
    )


def _receipts(engine: sa.Engine, settings: Settings, *, every: bool) -> Iterator[tuple[Receipt, str | None]]:
    """Receipts in their order, each with the hash of the one before it; None where that is missing."""
    before = RECEIPTS.alias("before")
    what = sa.select(RECEIPTS, before.c.hash.label("before"))
    what = what.join(before, before.c.seq == RECEIPTS.c.seq - 1, isouter=True).order_by(RECEIPTS.c.seq).limit(_SLICE)
    if not every:
        what = what.where(is_pending())
    after = 0
    while True:
        with _transaction(engine, settings) as connection:
            rows = [row._asdict() for row in connection.execute(what.where(RECEIPTS.c.seq > after))]
        for row in rows:
            hash_before = row.pop("before")
            yield Receipt(**row), chains.GENESIS if row["seq"] == 1 else hash_before
        if len(rows) < _SLICE:
            return
        after = rows[-1]["seq"]


def _now(engine: sa.Engine, settings: Settings) -> datetime:
    """The database's clock: a worker's own may be wrong."""
    with _transaction(engine, settings) as connection:
        found: datetime = connection.execute(sa.select(sa.func.clock_timestamp())).scalar_one()
        return found


def is_pending() -> sa.ColumnElement[bool]:
    """Whether a receipt is in the database only, as far as that knows."""
    return ~sa.exists().where(ANCHORS.c.seq == RECEIPTS.c.seq, ANCHORS.c.key == KEY)


def _record(engine: sa.Engine, settings: Settings, anchor: Anchor) -> None:
    """Note that a receipt is in the bucket, and until when it is locked there now: the bucket may be another."""
    # In REPEATABLE READ the row of another worker who wrote the same would be an error.
    relaxed = engine.execution_options(isolation_level="READ COMMITTED")
    row = sa.and_(ANCHORS.c.seq == anchor.seq, ANCHORS.c.key == anchor.key)
    with _transaction(relaxed, settings) as connection:
        connection.execute(insert(ANCHORS).values(vars(anchor)).on_conflict_do_nothing())
        if connection.scalar(sa.select(ANCHORS.c.locked_until).where(row)) != anchor.locked_until:
            connection.execute(sa.update(ANCHORS).where(row).values(locked_until=anchor.locked_until))


def _transaction(engine: sa.Engine, settings: Settings) -> db.Transaction:
    return db.transaction(engine, lock=2, statement=settings.statement_timeout)


def of(connection: sa.Connection, seqs: Collection[int]) -> dict[int, Anchor]:
    """The anchors of those of these receipts that have one."""
    own = sa.and_(RECEIPTS.c.seq == ANCHORS.c.seq, ANCHORS.c.key == KEY)
    rows = connection.execute(sa.select(ANCHORS).join(RECEIPTS, own).where(ANCHORS.c.seq.in_(seqs)))
    return {row.seq: Anchor(**row._asdict()) for row in rows}


def pending(connection: sa.Connection) -> int:
    """How many receipts are in the database only."""
    query = sa.select(sa.func.count()).select_from(RECEIPTS).where(is_pending())
    return connection.execute(query).scalar_one()


def books(connection: sa.Connection) -> Iterator[tuple[Receipt, str | None]]:
    """Every receipt of the database in its order, and the name it has in the bucket where it is anchored."""
    query = sa.select(RECEIPTS, ANCHORS.c.key.label("key")).join(
        ANCHORS, ANCHORS.c.seq == RECEIPTS.c.seq, isouter=True
    )
    rows = connection.execution_options(yield_per=STREAMED).execute(query.order_by(RECEIPTS.c.seq))
    for row in rows:
        values = row._asdict()
        key = values.pop("key")
        yield Receipt(**values), key


def hashes(connection: sa.Connection, seqs: Collection[int]) -> dict[int, str]:
    """The hashes of those of these receipts that the database has."""
    rows = connection.execute(sa.select(RECEIPTS.c.seq, RECEIPTS.c.hash).where(RECEIPTS.c.seq.in_(seqs)))
    return {row.seq: row.hash for row in rows}
