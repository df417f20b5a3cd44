"""Whether the ledger is abreast of the bucket: one that came back from a backup lacks what was entered since.

The head of a receipt is written once its settlement has committed. So a head in the bucket whose receipt the ledger
has not is of a ledger that went back, and the legal holds and policies that were entered since went with it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import sqlalchemy as sa

from worker import anchors, ledger
from worker.audit import RECEIPTS
from worker.chains import GENESIS
from worker.errors import Refused, StorageFault
from worker.storage import Missing, TooLarge

if TYPE_CHECKING:
    from worker.db import Transaction
    from worker.storage import S3Store

# A receipt by its number and its hash.
_Named = tuple[int, str]


def require(transaction: Callable[[], Transaction], store: S3Store | None) -> None:
    """Refused where the bucket has a receipt that the ledger lacks, or has another of. Without a bucket nobody knows.

    Raises StorageFault or Refused as well where the bucket cannot be asked.
    """
    if store is None:
        return
    last: _Named | None = None
    while True:
        with transaction() as connection:
            ledger.require(connection)
            own = _own(connection)
        if (ahead := _ahead(store, own)) is None:
            return
        # Others may have settled between our look at the ledger and that at the bucket; then its end has moved.
        if own[-1] == last:
            raise Refused(_sentence(ahead, own[-1][0]))
        last = own[-1]


def _own(connection: sa.Connection) -> Sequence[_Named]:
    """The receipts that are not known to be in the bucket, in their order, and the last."""
    newest = sa.select(sa.func.max(RECEIPTS.c.seq)).scalar_subquery()
    what = sa.select(RECEIPTS.c.seq, RECEIPTS.c.hash).where(sa.or_(RECEIPTS.c.seq == newest, anchors.is_pending()))
    return [(row.seq, row.hash) for row in connection.execute(what.order_by(RECEIPTS.c.seq))] or [(0, GENESIS)]


def _ahead(store: S3Store, own: Sequence[_Named]) -> int | None:
    """The number of a receipt that the bucket has and the ledger has not; None where there is none."""
    *pending, last = own
    # Where a ledger that went back went on, its end may be beyond the bucket's: what finds its name taken stays
    # pending. Heads are written in their order: after one that is not there come no others.
    for one in pending:
        if (said := _said(store, one[0])) is None:
            break
        if said != one:
            return one[0]
    if _said(store, last[0]) not in (None, last):
        return last[0]
    return last[0] + 1 if _said(store, last[0] + 1) is not None else None


def _said(store: S3Store, seq: int) -> _Named | None:
    """The receipt that the head of this number names, (0, "") where it names none; None where there is no head."""
    if not seq:
        return None
    try:
        return anchors.named(store.get(anchors.head_key(seq)).body) or (0, "")
    except Missing:
        return None
    except TooLarge:
        return 0, ""
    except (StorageFault, Refused) as fault:
        why = "it must first say that it has no receipt which the database lacks"
        raise type(fault)(f"{fault}; {why}") from fault


def _sentence(seq: int, last: int) -> str:
    has = "has another" if seq <= last else "lacks it"
    return (
        f"the bucket has receipt {seq} and the database {has}: the database came from a backup, without the legal "
        "holds and policies entered since, or PAPERCLIP_WORKER_S3_PREFIX is another deployment's; no run goes on and "
        'no receipt is written there: see "After a restore from a backup" in docs/operations.md'
    )
