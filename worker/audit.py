"""Receipts: canonical JSON, chained by hash, signed with Ed25519. What a run leaves as evidence.

A receipt's hash covers its body, and its body the hash before it; the signature is over the hash. So a change,
a gap, a swap or a forgery shows in `verify`, which needs nothing but the receipts and the public key.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from uuid import UUID

import sqlalchemy as sa
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from worker import canonical, chains, ledger
from worker.chains import Receipt
from worker.errors import Refused, SettingsError
from worker.logs import log

_PUBLIC = re.compile(b"-----BEGIN PUBLIC KEY-----.*?-----END PUBLIC KEY-----", re.DOTALL)

_meta = sa.MetaData(schema=ledger.SCHEMA)
RECEIPTS = sa.Table(
    "receipts",
    _meta,
    sa.Column("seq", sa.BigInteger),
    sa.Column("run_id", sa.Uuid),
    *(sa.Column(name, sa.Text) for name in ("body", "hash", "signer", "signature")),
)
# Which receipts are in the bucket too; see anchors.py. A row that outlives its receipt tells that one was removed.
ANCHORS = sa.Table(
    "anchors",
    _meta,
    sa.Column("seq", sa.BigInteger),
    sa.Column("key", sa.Text),
    sa.Column("locked_until", sa.DateTime(timezone=True)),
)
CHAIN = sa.Table("chain", _meta, sa.Column("seq", sa.BigInteger), sa.Column("hash", sa.Text))
# Who reads them all has so many in memory: SQLAlchemy by itself comes to hold a thousand, of some megabytes each.
STREAMED = 5


class Signer:
    """The deployment's signing key. Its fingerprint names it in receipts; the key itself goes nowhere.

    `trusted` is its public key and those of the keys before it, as far as the file has them.
    """

    def __init__(self, key: Ed25519PrivateKey, *, earlier: Sequence[Ed25519PublicKey] = ()) -> None:
        self._key = key
        self.public = key.public_key()
        self.fingerprint = chains.fingerprint(self.public)
        self.trusted = (self.public, *earlier)

    @classmethod
    def load(cls, path: Path) -> Signer:
        """The key in a PKCS#8 PEM file, and public keys beside it. Raises SettingsError for any other file."""
        try:
            pem = path.read_bytes()
            key = serialization.load_pem_private_key(pem, password=None)
            earlier = [serialization.load_pem_public_key(one) for one in _PUBLIC.findall(pem)]
        except OSError as error:
            raise SettingsError(f"PAPERCLIP_WORKER_SIGNING_KEY_FILE cannot be read: {error.strerror}") from error
        except (ValueError, TypeError, UnsupportedAlgorithm) as error:
            raise SettingsError(
                "PAPERCLIP_WORKER_SIGNING_KEY_FILE is not an Ed25519 key in PKCS#8 PEM; `keygen` makes one"
            ) from error
        public = [one for one in earlier if isinstance(one, Ed25519PublicKey)]
        if not isinstance(key, Ed25519PrivateKey) or len(public) < len(earlier):
            raise SettingsError("PAPERCLIP_WORKER_SIGNING_KEY_FILE holds a key that is not Ed25519")
        return cls(key, earlier=public)

    def sign(self, digest: str) -> str:
        """Signature (hex) of a hash given in hex."""
        return self._key.sign(bytes.fromhex(digest)).hex()


def keygen(path: Path) -> Signer:
    """Make a signing key in a new file that only its owner can read. Refused when the file exists."""
    key = Ed25519PrivateKey.generate()
    pem = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    try:
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        raise Refused(f"{path} exists; a signing key is never overwritten") from None
    except OSError as error:
        raise Refused(f"{path} cannot be written: {error.strerror}") from None
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(pem)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        # A file without its key would keep the next attempt from making one.
        path.unlink()
        raise Refused(f"{path} cannot be written: {error.strerror}") from None
    return Signer(key)


def public_pem(key: Ed25519PublicKey) -> str:
    """The public key as an auditor keeps it."""
    return key.public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo).decode()


def load_public(path: Path) -> list[Ed25519PublicKey]:
    """The public keys in a PEM file. Refused when it holds none, or another kind of key."""
    try:
        pem = path.read_bytes()
        keys = [serialization.load_pem_public_key(one) for one in _PUBLIC.findall(pem) or [pem]]
    except OSError as error:
        raise Refused(f"{path} cannot be read: {error.strerror}") from error
    except (ValueError, UnsupportedAlgorithm) as error:
        raise Refused(f"{path} is not a public key in PEM") from error
    found = [one for one in keys if isinstance(one, Ed25519PublicKey)]
    if len(found) < len(keys):
        raise Refused(f"{path} holds a key that is not Ed25519")
    return found


def append(connection: sa.Connection, signer: Signer, run: UUID, facts: Mapping[str, Any]) -> Receipt:
    """Add a receipt to the chain, in the transaction of what it attests.

    It takes no number that a receipt ever had, as far as the database knows: of one that was cut off the end the
    number stays missing, which `verify` tells. The run must end all the same: it keeps others from its table.
    """
    seq, previous = _end(connection, signer)
    place = {"v": 1, "ledger": str(ledger.identity(connection)), "seq": seq + 1, "prev": previous}
    body = canonical.encode({**place, "run": str(run), "signer": signer.fingerprint, **facts}).decode()
    digest = hashlib.sha256(body.encode()).hexdigest()
    values = {
        "seq": seq + 1,
        "run_id": run,
        "body": body,
        "hash": digest,
        "signer": signer.fingerprint,
        "signature": signer.sign(digest),
    }
    row = connection.execute(sa.insert(RECEIPTS).values(values).returning(RECEIPTS)).one()
    connection.execute(sa.update(CHAIN).values(seq=seq + 1, hash=digest))
    return Receipt(**row._asdict())


def _end(connection: sa.Connection, signer: Signer) -> tuple[int, str]:
    """The last number that is taken, and the hash to follow.

    The lock on the chain's one row puts receipts of concurrent runs in one order. Where that row and the newest
    receipt differ, what is signed counts.
    """
    chain = connection.execute(sa.select(CHAIN.c.seq, CHAIN.c.hash).with_for_update()).one_or_none()
    said = (chain.seq, chain.hash) if chain else (0, chains.GENESIS)
    newest = recent(connection, limit=1)
    found = (newest[0].seq, newest[0].hash) if newest else (0, chains.GENESIS)
    anchored = connection.scalar(sa.select(sa.func.max(ANCHORS.c.seq))) or 0
    if found == said and anchored <= said[0]:
        return said
    log.error("chain of receipts was changed", chain=said[0], receipts=found[0], anchors=anchored)
    if found[0] == said[0] and chains.flaws_of(newest[0], None, chains.by_fingerprint(signer.trusted)):
        found = said
    seq, digest = max(found, said, key=lambda one: one[0])
    return max(seq, anchored), digest


def recent(connection: sa.Connection, *, limit: int | None = None, run: UUID | None = None) -> list[Receipt]:
    """The newest receipts first, of one run or of all."""
    query = sa.select(RECEIPTS).order_by(RECEIPTS.c.seq.desc()).limit(limit)
    if run:
        query = query.where(RECEIPTS.c.run_id == run)
    return [Receipt(**row._asdict()) for row in connection.execute(query)]


def number(connection: sa.Connection, run: UUID) -> int:
    """How many receipts a run has: one for each time it was settled."""
    query = sa.select(sa.func.count()).select_from(RECEIPTS).where(RECEIPTS.c.run_id == run)
    return connection.execute(query).scalar_one()


def get(connection: sa.Connection, seq: int) -> Receipt:
    """The receipt with that number. Refused when there is none."""
    row = connection.execute(sa.select(RECEIPTS).where(RECEIPTS.c.seq == seq)).one_or_none()
    if row is None:
        raise Refused(f"there is no receipt {seq}")
    return Receipt(**row._asdict())
