"""Receipts as they are kept, and a chain of them judged: by themselves and public keys, without the database."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any
from uuid import UUID

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from worker.errors import Refused

GENESIS = "0" * 64
_SIGNATURE = re.compile("[0-9a-f]{128}")
# The app's own dumps, where it has no pg_dump as new as the server, cut times off behind the milliseconds. No run
# ends twice in one.
_CUT = timedelta(milliseconds=1)


@dataclass(frozen=True, kw_only=True)
class Receipt:
    """One receipt as it is stored. `body` is the signed text itself."""

    seq: int
    run_id: UUID
    body: str
    hash: str
    signer: str
    signature: str

    def to_json(self) -> dict[str, Any]:
        """All of it as one object. Refused when somebody has made the body something else."""
        try:
            body = json.loads(self.body)
        except (ValueError, RecursionError):
            body = None
        signed = hashlib.sha256(self.body.encode()).hexdigest() == self.hash
        if not isinstance(body, dict) or body.get("seq") != self.seq or not signed:
            raise Refused(f"receipt {self.seq} is not what was signed; see `receipts verify`")
        return {**body, "hash": self.hash, "signature": self.signature}


@dataclass(frozen=True, kw_only=True)
class Flaw:
    """One thing wrong with the chain."""

    seq: int
    what: str

    def to_json(self) -> dict[str, Any]:
        return {"seq": self.seq, "what": self.what}


@dataclass(kw_only=True)
class Chain:
    """What receipts in their order amount to: how many, the last (seq, hash), of which ledger, what is wrong."""

    receipts: int = 0
    head: tuple[int, str] = (0, GENESIS)
    ledger: str | None = None
    flaws: list[Flaw] = field(default_factory=list)


def fingerprint(key: Ed25519PublicKey) -> str:
    """Sixteen hex digits of the SHA-256 of the raw public key."""
    raw = key.public_bytes(serialization.Encoding.Raw, serialization.PublicFormat.Raw)
    return hashlib.sha256(raw).hexdigest()[:16]


def by_fingerprint(keys: Iterable[Ed25519PublicKey]) -> dict[str, Ed25519PublicKey]:
    """Keys as receipts name them."""
    return {fingerprint(key): key for key in keys}


def tells_end(body: str, state: str, settled_at: datetime | None) -> bool:
    """Whether a receipt's body says that its run ended in this state at this moment."""
    if settled_at is None:
        return False
    try:
        facts = json.loads(body)
        return bool(facts["state"] == state and abs(datetime.fromisoformat(facts["settled_at"]) - settled_at) < _CUT)
    except (ValueError, TypeError, KeyError, RecursionError):
        return False


def verify(receipts: Iterable[Receipt], trusted: Sequence[Ed25519PublicKey], *, of: str | None = None) -> Chain:
    """Judge receipts in order of seq, all `of` one ledger: of the first that any names, where None is given.

    Needs no database.
    """
    keys = by_fingerprint(trusted)
    found = Chain(ledger=of)
    named = False
    for receipt in receipts:
        found.receipts += 1
        if receipt.seq != found.head[0] + 1:
            found.flaws.append(Flaw(seq=receipt.seq, what=f"receipt {found.head[0] + 1} is missing"))
        before = found.head[1] if receipt.seq == found.head[0] + 1 else None
        found.flaws += [Flaw(seq=receipt.seq, what=what) for what in flaws_of(receipt, before, keys, of=found.ledger)]
        said = _ledger_of(receipt)
        if named and said is None:
            found.flaws.append(Flaw(seq=receipt.seq, what="it names no ledger, and earlier ones do"))
        named = named or said is not None
        found.ledger = found.ledger or said
        found.head = (receipt.seq, receipt.hash)
    return found


def _ledger_of(receipt: Receipt) -> str | None:
    """The ledger that a receipt says it is of; releases before 0.7.0 did not say."""
    try:
        said = json.loads(receipt.body)["ledger"]
    except (ValueError, TypeError, KeyError, RecursionError):
        return None
    return said if isinstance(said, str) else None


def flaws_of(
    receipt: Receipt,
    before: str | None,
    keys: Mapping[str, Ed25519PublicKey],
    *,
    of: str | None = None,
    strangers: bool = False,
) -> list[str]:
    """What is wrong with a receipt, given the hash of the one before it (None: not known) and keys by fingerprint.

    Where it says of which ledger it is, that must be the one given. With `strangers` a key that is not among them is
    no flaw: what it signed cannot be judged by its signature.
    """
    found = []
    if hashlib.sha256(receipt.body.encode()).hexdigest() != receipt.hash:
        found.append("the body was changed: it does not have its hash")
    try:
        body = json.loads(receipt.body)
    except (ValueError, RecursionError):
        return [*found, "the body is not JSON"]
    if not isinstance(body, dict):
        return [*found, "the body is not a JSON object"]
    if body.get("seq") != receipt.seq or body.get("run") != str(receipt.run_id):
        found.append("the body belongs to another place in the chain")
    if of is not None and body.get("ledger", of) != of:
        found.append("it is of another ledger: another deployment's")
    if before is not None and body.get("prev") != before:
        found.append("it does not follow the receipt before it")
    if receipt.signer in keys or not strangers:
        found += signature_flaws(receipt.hash, receipt.signer, receipt.signature, keys)
    return found if body.get("signer") == receipt.signer else [*found, "the body names another signer"]


def signature_flaws(digest: str, signer: str, signature: str, keys: Mapping[str, Ed25519PublicKey]) -> list[str]:
    """What is wrong with a signature (hex) of a hash (hex) by the key of that fingerprint: nothing, or one thing."""
    key = keys.get(signer)
    if key is None:
        return [f"signed by {signer}, a key that is not trusted"]
    try:
        key.verify(bytes.fromhex(signature), bytes.fromhex(digest))
    except (InvalidSignature, ValueError):
        return ["the signature does not fit"]
    # `fromhex` takes capitals and blanks too, and so would let one signature be many texts.
    return [] if _SIGNATURE.fullmatch(signature) else ["the signature does not fit as it is written"]
