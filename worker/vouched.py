"""Whether the archive of a run is what was signed: from signature to manifest, and from that to each object."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from worker import archive, audit, chains, ledger
from worker.errors import ArchiveTampered, Refused

if TYPE_CHECKING:
    from pathlib import Path

    import sqlalchemy as sa

    from worker.archive import ArchivedObject
    from worker.chains import Receipt
    from worker.config import Settings
    from worker.ledger import Run
    from worker.storage import Store


def require(
    connection: sa.Connection,
    settings: Settings,
    store: Store,
    run: Run,
    objects: Sequence[ArchivedObject],
    *,
    companies: Collection[str],
) -> None:
    """The newest receipt that names a manifest vouches for it by its digest, and that for the objects.

    `objects` are all that the ledger has of these companies (empty: of every one). Refused when no receipt does: who
    can change an object can change what the ledger says of it as well. ArchiveTampered when a receipt, the manifest
    or an object is not what was written, or one is unknown to the ledger. The objects' bytes are not looked at.
    """
    own = str(ledger.identity(connection))
    signed = (_said(receipt, run, own, settings.signing_key_file) for receipt in _receipts(connection, run))
    newest = next(signed)
    named = newest if "manifest" in newest else next((one for one in signed if "manifest" in one), None)
    if named is None:
        raise _unvouched(run)
    body = archive.read_manifest(store, named["manifest"], named["sha256"])
    listed = [one for one in json.loads(body)["objects"] if not companies or one["company"] in companies]
    known = {one["key"]: (one["sha256"], one["rows"]) for one in listed}
    for one in objects:
        found = known.pop(one.key, None)
        if found is None and named is not newest:
            # Archived after that manifest; the bucket failed when the next was to be written.
            raise _unvouched(run)
        if found != (one.sha256, one.rows):
            raise ArchiveTampered(f"archive object {one.key} is not the one that the manifest names")
    if known:
        raise ArchiveTampered(
            f"the ledger lacks archive object {min(known)}, which the manifest of run {run.id} names: its rows "
            "would not come back"
        )


def _unvouched(run: Run) -> Refused:
    return Refused(
        f"no receipt of run {run.id} names the manifest of its archive, so nothing vouches for that; "
        "`runs resume` has one written, also when the run is stopped again"
    )


def _receipts(connection: sa.Connection, run: Run) -> list[Receipt]:
    """What was signed of the run, the newest first. ArchiveTampered when that is not of how it ended."""
    found = audit.recent(connection, run=run.id)
    if not found or not chains.tells_end(found[0].body, run.state, run.settled_at):
        raise ArchiveTampered(f"run {run.id} has no receipt of how it ended; see `receipts verify`")
    return found


def _said(receipt: Receipt, run: Run, own: str, key: Path | None) -> Mapping[str, Any]:
    """What a receipt says of the archive. ArchiveTampered when it was changed, or signed by a stranger."""
    # Whoever only plans need not have the key; a run is refused without.
    keys = chains.by_fingerprint(audit.Signer.load(key).trusted) if key else {}
    if flaws := chains.flaws_of(receipt, None, keys, of=own, strangers=key is None):
        hint = "; if it is of an earlier key of yours, put its public key into the file of the new"
        raise ArchiveTampered(
            f"receipt {receipt.seq} of run {run.id} does not prove the archive: {flaws[0]}"
            + ("" if receipt.signer in keys else hint)
        )
    said: Mapping[str, Any] = receipt.to_json()["evidence"].get("archive", {})
    return said
