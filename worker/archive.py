"""Archive objects: JSON lines in zstd, one company each, read back before a row may go.

A key ends in the digest of its bytes, so a worker that lost its bite can only ever write the same bytes again
under the same key; what no manifest names is a leftover, for `leftovers` to sweep.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import IO, TYPE_CHECKING, Any
from uuid import UUID

import zstandard

from worker import canonical, copyout, db, needles
from worker.errors import ArchiveTampered, StorageFault, WorkerError
from worker.needles import Needles
from worker.pgtypes import Tids
from worker.plans import Amount
from worker.spool import IN_MEMORY, Spool
from worker.storage import Missing, Store, read_digest

if TYPE_CHECKING:
    import sqlalchemy as sa

    from worker.copyout import Query
    from worker.plans import Place, Tally

# Levels 1 and 3 pack JSON lines to the same size, and 1 takes two thirds of the time (performance.md).
_LEVEL = 1
# So many objects of a batch are packed as their rows come; each takes a megabyte to do so. Where a batch has rows of
# more companies than that, the others wait as they are, little of each in memory.
_PACKED_AT_ONCE = 32
_WAITING = 64 << 10
# So many bytes are unpacked at once: text of one letter becomes a thousand times as much.
_UNPACKED = 4 << 10
# Objects are written and read at the same time: a request waits more than it works.
_REQUESTS = 4
INSTANCE = "instance"


@dataclass(frozen=True, kw_only=True)
class ArchivedObject:
    """One object of an archive: rows of one table and company between two ages (PostgreSQL text, UTC)."""

    table: str
    company: str | None
    key: str
    rows: int
    bytes: int
    raw_bytes: int
    sha256: str
    first: str
    last: str


def root(table: str, run: UUID) -> str:
    """Where a run's archive of a table lives, below the worker's prefix."""
    return f"archive/{table}/run={run}/"


def write(
    store: Store,
    connection: sa.Connection,
    query: Query,
    *,
    doubted: Needles,
    again: Callable[[Tids], Query],
    table: str,
    run: UUID,
) -> tuple[tuple[ArchivedObject, ...], Tids, dict[str | None, Amount]]:
    """Stream `query` (of `copies.query`) into one object per company, and read each back.

    Lines put together with one that has something `doubted` are left out, and taken by the query that `again` makes
    of their addresses. Returns the objects, the addresses of their rows, and per company how many these are and the
    bytes they take in the table. Raises StorageFault when the store does not give back the very bytes; nothing may be
    deleted then.
    """
    drafts: dict[str | None, _Draft] = {}
    try:
        addresses, doubtful = _fill(drafts, connection, query, doubted)
        if doubtful.number:
            addresses.join(_fill(drafts, connection, again(doubtful), needles.of(()))[0])
        whole = [draft for _, draft in sorted(drafts.items(), key=_by_company)]
        # The session is kept awake meanwhile: each object takes as long as the store likes.
        objects = db.beside(connection, lambda: _store_all(store, whole, table, run))()
        return objects, addresses, {whose: Amount(draft.rows, draft.size) for whose, draft in drafts.items()}
    finally:
        for draft in drafts.values():
            draft.close()


def _by_company(item: tuple[str | None, _Draft]) -> str:
    return item[0] or ""


def _fill(
    drafts: dict[str | None, _Draft], connection: sa.Connection, query: Query, doubted: Needles
) -> tuple[Tids, Tids]:
    """The addresses of the rows that were taken, and of those in doubt."""
    addresses, doubtful = Tids(), Tids()
    for company, rows, size, first, last, places, lines in copyout.rows(connection, query):
        whose = company.decode() if company is not None else None
        number = int.from_bytes(rows)
        if doubted.any_in(lines):
            doubtful.add(places, number)
            continue
        addresses.add(places, number)
        draft = drafts.get(whose)
        if draft is None:
            draft = drafts[whose] = _Draft(whose, packed=len(drafts) < _PACKED_AT_ONCE)
        draft.add(lines, rows=number, size=int.from_bytes(size), first=first, last=last)
    return addresses, doubtful


class _Draft:
    """One object in the making: compressed on the way in (`packed`) or once it is whole, on disk when it grows."""

    def __init__(self, company: str | None, *, packed: bool) -> None:
        self.company = company
        self.body: IO[bytes] = Spool(IN_MEMORY if packed else _WAITING)
        self._zstd = _compressor() if packed else None
        # Of the rows: how many, their bytes in the table, and as lines.
        self.rows = self.size = self.raw_bytes = 0
        self.first = self.last = b""

    def add(self, lines: bytes, *, rows: int, size: int, first: bytes, last: bytes) -> None:
        """Some rows more: their lines, without a line break behind the last, and their first and last age."""
        line = lines + b"\n"
        self.body.write(line if self._zstd is None else self._zstd.compress(line))
        self.rows += rows
        self.size += size
        self.raw_bytes += len(lines) + 1
        self.first, self.last = min(self.first or first, first), max(self.last, last)

    def seal(self) -> tuple[str, int]:
        """Complete the object; its SHA-256 (hex) and size in bytes."""
        zstd = self._zstd or self._pack()
        self.body.write(zstd.flush())
        size = self.body.tell()
        self.body.seek(0)
        return hashlib.file_digest(self.body, "sha256").hexdigest(), size  # type: ignore[arg-type]

    def _pack(self) -> zstandard.ZstdCompressionObj:
        """Compress what came so far."""
        zstd, plain = _compressor(), self.body
        self.body = Spool(_WAITING)
        with plain:
            plain.seek(0)
            while chunk := plain.read(IN_MEMORY):
                self.body.write(zstd.compress(chunk))
        return zstd

    def close(self) -> None:
        self.body.close()


def _compressor() -> zstandard.ZstdCompressionObj:
    return zstandard.ZstdCompressor(level=_LEVEL, write_checksum=True).compressobj()


def _store_all(store: Store, drafts: Sequence[_Draft], table: str, run: UUID) -> tuple[ArchivedObject, ...]:
    with ThreadPoolExecutor(_REQUESTS) as pool:
        return tuple(pool.map(lambda draft: _store(store, draft, table, run), drafts))


def _store(store: Store, draft: _Draft, table: str, run: UUID) -> ArchivedObject:
    sha256, size = draft.seal()
    window = f"{_stamp(draft.first)}--{_stamp(draft.last)}--{sha256[:16]}"
    key = f"{root(table, run)}company={draft.company or INSTANCE}/{window}.jsonl.zst"
    store.put(key, draft.body, sha256=sha256)
    _read_back(store, key, sha256=sha256, raw_bytes=draft.raw_bytes)
    return ArchivedObject(
        table=table,
        company=draft.company,
        key=key,
        rows=draft.rows,
        bytes=size,
        raw_bytes=draft.raw_bytes,
        sha256=sha256,
        first=draft.first.decode(),
        last=draft.last.decode(),
    )


def _read_back(store: Store, key: str, *, sha256: str, raw_bytes: int) -> None:
    """The store's own bytes must have the digest, and unpack (zstd checks the frame's own checksum) to every line."""
    packed, plain = hashlib.sha256(), 0
    unpack = zstandard.ZstdDecompressor().decompressobj()
    try:
        for chunk in store.read(key):
            packed.update(chunk)
            for start in range(0, len(chunk), _UNPACKED):
                plain += len(unpack.decompress(chunk[start : start + _UNPACKED]))
    except zstandard.ZstdError as error:
        raise StorageFault(f"{key}: the store gave back other bytes than were written") from error
    if packed.hexdigest() != sha256 or plain != raw_bytes or not unpack.eof:
        raise StorageFault(f"{key}: the store gave back other bytes than were written")


def _stamp(age: bytes) -> str:
    """PostgreSQL's `2026-05-01 10:00:00.12+00` as `20260501T100000.12Z`."""
    return re.sub(r"[-:]", "", age.decode().removesuffix("+00")).replace(" ", "T") + "Z"


def check(store: Store, objects: Sequence[ArchivedObject]) -> list[str]:
    """The keys whose object is missing or no longer has its bytes. Reads every object whole."""
    with ThreadPoolExecutor(_REQUESTS) as pool:
        found = pool.map(lambda one: read_digest(store, one.key) == one.sha256, objects)
        return [one.key for one, intact in zip(objects, found, strict=True) if not intact]


def require_intact(store: Store, objects: list[ArchivedObject]) -> None:
    """Raise ArchiveTampered, naming the first object, when an archive is not what was written."""
    if damaged := check(store, objects):
        raise ArchiveTampered(
            f"archive object {damaged[0]} is missing or has other bytes than were written"
            + (f", and so have {len(damaged) - 1} more" if len(damaged) > 1 else "")
        )


def require_exact(objects: Sequence[ArchivedObject], tally: Tally) -> None:
    """Raise WorkerError unless the objects of a bite, if it has any, hold just the rows that it deleted."""
    kept: dict[Place, int] = {}
    for one in objects:
        kept[one.table, one.company] = kept.get((one.table, one.company), 0) + one.rows
    if objects and kept != {place: amount.rows for place, amount in tally.done.items() if amount.rows}:
        raise WorkerError("the archive does not hold exactly the rows that were to be deleted; nothing was deleted")


def manifest_key(root: str, sha256: str) -> str:
    """The name of a manifest: its digest's, so that none is ever written over another."""
    return f"{root}manifest-{sha256[:16]}.json"


def is_manifest(key: str) -> bool:
    """Whether a key is that of a manifest, of an earlier release too."""
    return key.rpartition("/")[2].startswith("manifest") and key.endswith(".json")


def named_in(manifest: bytes) -> set[str] | None:
    """The keys of the objects that a manifest names; None where it is none of ours."""
    try:
        return {str(one["key"]) for one in json.loads(manifest)["objects"]}
    except (ValueError, TypeError, KeyError, RecursionError):
        return None


def write_manifest(store: Store, root: str, facts: dict[str, Any], objects: list[ArchivedObject]) -> tuple[str, str]:
    """Write an index of the archive below `root`, and read it back; its key and SHA-256 (hex). Safe to repeat."""
    body = canonical.encode({**facts, "objects": [vars(one) for one in objects]})
    sha256 = hashlib.sha256(body).hexdigest()
    key = manifest_key(root, sha256)
    store.put(key, io.BytesIO(body), sha256=sha256)
    if read_digest(store, key) != sha256:
        raise StorageFault(f"{key}: the store gave back other bytes than were written")
    return key, sha256


def read_manifest(store: Store, key: str, sha256: str) -> bytes:
    """A manifest as it was written. ArchiveTampered when it is missing or has another digest."""
    try:
        body = b"".join(store.read(key))
    except Missing:
        body = b""
    if hashlib.sha256(body).hexdigest() != sha256:
        raise ArchiveTampered(f"{key} is missing or is not the manifest that the receipt names")
    return body
