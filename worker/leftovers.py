"""What bites that were rolled back left below a run's root is swept, once the run has ended for good.

Never under a lock: PostgreSQL may have ended the session of one that waits for the store, and another worker may
have gone on. In a state that a run never leaves no bite of it can commit any more: what the ledger names is all.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence, Set
from typing import TYPE_CHECKING
from uuid import UUID

import sqlalchemy as sa

from worker import archive, ledger, ledger_shards, params, registry
from worker.audit import RECEIPTS
from worker.states import FINAL
from worker.storage import Missing

if TYPE_CHECKING:
    from worker.db import Transaction
    from worker.storage import Store


def sweep(store: Store, run: UUID, transaction: Callable[[], Transaction]) -> int:
    """Remove the objects that nobody names, of a run that has ended for good; how many.

    Neither the ledger nor a receipt, nor a manifest of more than the ledger knows: that one is of receipts which this
    database has lost, or of the deployment that it is a copy of. Raises Refused when the credentials may not, and
    StorageFault; the objects stay, and do no harm.
    """
    with transaction() as connection:
        root = _root(connection, run)
    if root is None:
        return 0
    there = store.keys(root)
    # Asked after the listing: after a failover to a server that lags behind, the run may be under way again.
    with transaction() as connection:
        if _root(connection, run) is None:
            return 0
        named = {one.key for one in ledger_shards.objects(connection, run)}
        receipts = connection.scalars(sa.select(RECEIPTS.c.body).where(RECEIPTS.c.run_id == run)).all()
    # Each settlement has a manifest, and its receipt has to be true for good.
    nobodys = [key for key in there if key not in named and not any(key in body for body in receipts)]
    nobodys = sorted(set(nobodys) - _others(store, nobodys, named))
    if nobodys:
        store.delete(nobodys)
    return len(nobodys)


def _others(store: Store, keys: Sequence[str], named: Set[str]) -> set[str]:
    """Those of these keys that are manifests of more objects than were named, and what they name."""
    found = set[str]()
    for key in keys:
        if not archive.is_manifest(key):
            continue
        try:
            objects = archive.named_in(b"".join(store.read(key)))
        except Missing:
            # Another worker sweeps as well.
            continue
        if objects is None or objects - named:
            found |= {key, *(objects or ())}
    return found


def _root(connection: sa.Connection, run: UUID) -> str | None:
    """Where the archive is of a run that has one and can never go on."""
    found = ledger.get(connection, run)
    if found is None or found.state not in FINAL:
        return None
    table = params.from_json(registry.job(found.job), found.params).archived
    return archive.root(table, run) if table is not None else None
