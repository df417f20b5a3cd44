"""The bucket as a witness: the chain of receipts judged from its objects alone, or against the database.

Needs the bucket and public keys, no database. Every version of every object is read: what was overwritten, or
hidden by a delete marker, is there still where the bucket keeps versions, and is told. Receipts are held in memory
a few dozen at a time.
"""

from __future__ import annotations

import json
import re
import time
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any
from uuid import UUID

from worker import anchors, chains
from worker.anchors import HEADS, PREFIX, Signed
from worker.chains import Flaw, Receipt
from worker.storage import LARGEST, Missing, TooLarge

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

    from worker.storage import History, S3Store, Stored

# Objects are read at the same time, and so many are read ahead, of no more than so many bytes.
_READERS = 8
_AHEAD = 32
_AHEAD_BYTES = 16 << 20
# Seconds between a worker's receipt and its head are fewer.
MOMENT = 1.0
_RECEIPT = re.compile(r"receipts/([0-9]{12})-([0-9a-f]{16})\.json")
_HEAD = re.compile(r"receipts/heads/([0-9]{12})\.json")


@dataclass(kw_only=True)
class Testimony:
    """What the bucket says: its receipts and heads, the end of the chain, of which ledger, retention, flaws."""

    receipts: int = 0
    heads: int = 0
    head: tuple[int, str] = (0, chains.GENESIS)
    ledger: str | None = None
    unlocked: int = 0
    locked_until: datetime | None = None
    flaws: list[Flaw] = field(default_factory=list)

    @property
    def locked(self) -> bool:
        """Whether the store confirms for every object a retention that has not ended."""
        return self.locked_until is not None and not self.unlocked

    def to_json(self) -> dict[str, Any]:
        return {
            "receipts": self.receipts,
            "heads": self.heads,
            "head": {"seq": self.head[0], "hash": self.head[1]},
            "ledger": self.ledger,
            "locked": self.locked,
            "locked_until": self.locked_until.isoformat() if self.locked_until and self.locked else None,
        }


@dataclass(frozen=True, kw_only=True)
class _Object:
    """An object whose name is right: the number in it, and the bytes first written."""

    seq: int
    key: str
    body: bytes


class _Reader:
    """Reads the receipts of one bucket in their order, with the head of each beside it."""

    def __init__(self, store: S3Store, trusted: Sequence[Ed25519PublicKey], found: Testimony) -> None:
        self._store = store
        self._keys = chains.by_fingerprint(trusted)
        self._found = found
        # To be looked at once more, at the end.
        self._headless: list[Receipt] = []

    def _flaw(self, seq: int, what: str) -> None:
        self._found.flaws.append(Flaw(seq=seq, what=what))

    def receipts(self, pool: ThreadPoolExecutor) -> Iterator[Receipt]:
        """Every receipt that can be read as one; what is wrong with objects, names and heads goes to the flaws."""
        heads = self._objects(pool, HEADS, _HEAD)
        head = next(heads, None)
        before = 0
        for item in self._objects(pool, PREFIX, _RECEIPT):
            receipt = self._receipt(item)
            if receipt is None:
                continue
            if item.seq == before:
                # Which of them comes first is chance: both are judged by their signature.
                self._flaw(item.seq, f"there is another receipt {item.seq}, {item.key}")
                self._check_signature(item, receipt)
                continue
            before = item.seq
            while head is not None and head.seq < item.seq:
                self._flaw(head.seq, f"{head.key} is there and its receipt is not")
                head = next(heads, None)
            if head is None or head.seq > item.seq:
                self._look_for_head(receipt)
            else:
                self._check_head(head, receipt)
                head = next(heads, None)
            yield receipt
        while head is not None:
            self._flaw(head.seq, f"{head.key} is there and its receipt is not")
            head = next(heads, None)
        if self._headless:
            time.sleep(MOMENT)
        for receipt in self._headless:
            self._look_for_head(receipt, last=True)

    def _look_for_head(self, receipt: Receipt, *, last: bool = False) -> None:
        """Judge a head that was written since the heads were listed. A worker may be just about to."""
        key = anchors.head_key(receipt.seq)
        history = next((one for one in self._store.history(key) if one.key == key), None)
        stored = self._read(history) if history and not history.deleted else None
        if history and stored and (body := self._judge(receipt.seq, history, stored)) is not None:
            self._check_head(_Object(seq=receipt.seq, key=key, body=body), receipt)
        elif last or len(self._headless) >= _AHEAD:
            what = "its head is missing: removed, or anchoring was cut short (look again in a minute)"
            self._flaw(receipt.seq, what)
        else:
            self._headless.append(receipt)

    def _receipt(self, item: _Object) -> Receipt | None:
        try:
            signed = Signed.decode(item.body)
        except ValueError:
            self._flaw(item.seq, f"{item.key} holds other bytes than a receipt's")
            return None
        receipt = Receipt(
            seq=item.seq,
            run_id=_run_in(signed.body),
            body=signed.body,
            hash=signed.hash,
            signer=signed.signer,
            signature=signed.signature,
        )
        if anchors.key_of(receipt) != item.key:
            self._flaw(item.seq, f"{item.key} holds a receipt of another name: renamed, or swapped")
        return receipt

    def _check_head(self, head: _Object, receipt: Receipt) -> None:
        self._found.heads += 1
        try:
            matches = anchors.says(head.body, receipt)
        except (ValueError, AttributeError, RecursionError):
            matches = False  # the receipt is no JSON object, and is told to be none
        if not matches:
            self._flaw(receipt.seq, f"{head.key} does not name this receipt")
            return
        self._check_signature(head, Signed.decode(head.body))

    def _check_signature(self, item: _Object, signed: Signed | Receipt) -> None:
        """Judge what an object holds by itself: its hash, and the signature of that."""
        flaws = chains.signature_flaws(signed.hash, signed.signer, signed.signature, self._keys)
        if anchors.sha256(signed.body) != signed.hash:
            flaws.insert(0, "it does not have its hash")
        for what in flaws:
            self._flaw(item.seq, f"{item.key}: {what}")

    def _objects(self, pool: ThreadPoolExecutor, prefix: str, pattern: re.Pattern[str]) -> Iterator[_Object]:
        """The objects below a prefix by name, read ahead of their use."""
        waiting: deque[tuple[History, Future[list[Stored] | None]]] = deque()
        names = (one for one in self._store.history(prefix) if prefix == HEADS or not one.key.startswith(HEADS))
        last = ahead = 0
        more = True
        while more or waiting:
            while more and len(waiting) < _AHEAD and ahead < _AHEAD_BYTES:
                one = next(names, None)
                more = one is not None
                if one is not None:
                    waiting.append((one, pool.submit(self._read, one)))
                    ahead += one.size
            if not waiting:
                return
            history, future = waiting.popleft()
            ahead -= history.size
            stored = future.result()
            name = pattern.fullmatch(history.key)
            if name is None:
                self._flaw(last, f"{history.key} is no name of ours")
                continue
            last = int(name[1])
            body = self._judge(last, history, stored)
            if body is not None:
                yield _Object(seq=last, key=history.key, body=body)

    def _read(self, history: History) -> list[Stored] | None:
        """Every version, the oldest first; None when one is gone since it was listed, or too large."""
        if any(version.size > LARGEST for version in history.versions):
            return None
        plain = len(history.versions) == 1 and not history.deleted
        try:
            return [
                self._store.get(history.key, version=None if plain else version.id) for version in history.versions
            ]
        except (Missing, TooLarge):
            return None

    def _judge(self, seq: int, history: History, stored: list[Stored] | None) -> bytes | None:
        """The bytes first written under a name; a later history is a flaw."""
        if history.deleted:
            self._flaw(seq, f"{history.key} was deleted: the bucket has a delete marker for it")
        if stored is None:
            self._flaw(seq, f"{history.key} cannot be read back, or is too large")
        if not stored:
            return None
        if any(one.body != stored[0].body for one in stored):
            self._flaw(seq, f"{history.key} was written again with other bytes")
        until = stored[0].locked_until
        if until is None or until <= datetime.now(UTC):
            self._found.unlocked += 1
        elif self._found.locked_until is None or until < self._found.locked_until:
            self._found.locked_until = until
        return stored[0].body


def _run_in(body: str) -> UUID:
    """The run a receipt names; where it names none, one that fits no body."""
    try:
        return UUID(json.loads(body)["run"])
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return UUID(int=0)


class Comparison:
    """The receipts of the database beside those of the bucket, both read once, in their order."""

    def __init__(self, books: Iterator[tuple[Receipt, str | None]]) -> None:
        self._books = books
        self.flaws: list[Flaw] = []
        # Whether the database has no receipt at all.
        self.empty = False
        # Beyond the end of the database as it was when the reading began.
        self.beyond: dict[int, str] = {}

    def through(self, receipts: Iterable[Receipt]) -> Iterator[Receipt]:
        """Pass the bucket's receipts on and note where the database has others."""
        own = next(self._books, None)
        self.empty = own is None
        for receipt in receipts:
            while own is not None and own[0].seq < receipt.seq:
                self._only_here(*own)
                own = next(self._books, None)
            if own is None:
                self.beyond[receipt.seq] = receipt.hash
            elif own[0].seq > receipt.seq:
                self._flaw(receipt.seq, f"the database lacks receipt {receipt.seq}, which the bucket has")
            else:
                self._hold_beside(receipt, own[0])
                own = next(self._books, None)
            yield receipt
        while own is not None:
            self._only_here(*own)
            own = next(self._books, None)

    def _hold_beside(self, receipt: Receipt, own: Receipt) -> None:
        if anchors.signed(own) != anchors.signed(receipt):
            self._flaw(receipt.seq, f"the database has another receipt {receipt.seq} than the bucket")

    def _only_here(self, receipt: Receipt, key: str | None) -> None:
        if key is not None:
            self._flaw(receipt.seq, f"the database says that it is in the bucket as {key}, and it is not")

    def _flaw(self, seq: int, what: str) -> None:
        self.flaws.append(Flaw(seq=seq, what=what))

    def catch_up(self, now: Mapping[int, str]) -> None:
        """Judge receipts settled since the reading began, given the hashes the database has of them now."""
        for seq, digest in self.beyond.items():
            if now.get(seq) != digest:
                self._flaw(seq, f"the database lacks receipt {seq}, which the bucket has")


def verify(
    store: S3Store,
    trusted: Sequence[Ed25519PublicKey],
    *,
    of: str | None = None,
    beside: Comparison | None = None,
) -> Testimony:
    """Judge the chain in the bucket, as `of` this ledger, and hold it beside the database's, where these are given.

    No receipt at all is a flaw unless the database has none either: found nothing is suspicious.
    """
    found = Testimony()
    with ThreadPoolExecutor(_READERS) as pool:
        receipts = _Reader(store, trusted, found).receipts(pool)
        chain = beside.through(receipts) if beside else receipts
        judged = chains.verify(chain, trusted, of=of)
    found.receipts, found.head, found.ledger = judged.receipts, judged.head, judged.ledger
    found.flaws += judged.flaws
    if not found.receipts and not found.flaws and not (beside and beside.empty):
        found.flaws.append(Flaw(seq=0, what="there is no receipt: another prefix, or all of them are gone"))
    found.flaws.sort(key=lambda flaw: flaw.seq)
    return found
