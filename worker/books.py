"""The chain of receipts in the database, judged by what stands beside it: its end, the runs, the anchors."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import sqlalchemy as sa

from worker import chains, ledger
from worker.anchors import KEY
from worker.audit import ANCHORS, CHAIN, RECEIPTS, STREAMED
from worker.chains import Flaw, Receipt
from worker.ledger import RUNS
from worker.states import SETTLED

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

# A time that Python has no value for is none of ours; its driver fails on it.
_FIRST, _LAST = datetime(1, 1, 1, tzinfo=UTC), datetime(9999, 12, 30, tzinfo=UTC)


def verify(connection: sa.Connection, trusted: Sequence[Ed25519PublicKey]) -> tuple[int, list[Flaw]]:
    """How many receipts there are, and everything wrong with their chain.

    Checked beyond the chain itself, so that receipts cut off its end are missed: its recorded head, that the newest
    receipt of every settled run says how and when it ended, and that every anchor has its receipt.
    """
    rows = connection.execution_options(yield_per=STREAMED).execute(sa.select(RECEIPTS).order_by(RECEIPTS.c.seq))
    own = str(ledger.identity(connection))
    chain = chains.verify((Receipt(**row._asdict()) for row in rows), trusted, of=own)
    last, flaws = chain.head, chain.flaws
    head = connection.execute(sa.select(CHAIN.c.seq, CHAIN.c.hash)).one_or_none()
    if head is None or head.seq != last[0]:
        flaws.append(Flaw(seq=last[0], what="the chain does not end where its head says"))
    elif head.hash != last[1]:
        flaws.append(Flaw(seq=last[0], what="the last receipt is not the one the head names"))
    flaws += [*_runs(connection, last[0]), *_anchors(connection), *_times(connection)]
    return chain.receipts, flaws


def _runs(connection: sa.Connection, last: int) -> Iterator[Flaw]:
    """Settled runs without a receipt of how they ended."""
    newest = (
        sa.select(RECEIPTS.c.seq, RECEIPTS.c.body)
        .where(RECEIPTS.c.run_id == RUNS.c.id)
        .order_by(RECEIPTS.c.seq.desc())
        .limit(1)
        .lateral()
    )
    query = sa.select(RUNS.c.id, RUNS.c.state, _possible(RUNS.c.settled_at).label("settled_at"), newest)
    query = query.select_from(RUNS.outerjoin(newest, sa.true())).where(RUNS.c.state.in_(SETTLED))
    for run in connection.execution_options(yield_per=STREAMED).execute(query):
        if run.seq is None:
            yield Flaw(seq=last, what=f"run {run.id} is settled and has no receipt")
        elif not chains.tells_end(run.body, run.state, run.settled_at):
            what = (
                f"run {run.id} is settled as {run.state}, and its newest receipt says otherwise: a later one is gone"
            )
            yield Flaw(seq=run.seq, what=f"{what}, or the run was changed")


def _possible(time: sa.ColumnElement[Any]) -> sa.ColumnElement[Any]:
    return sa.case((time.between(_FIRST, _LAST), time))


def _anchors(connection: sa.Connection) -> Iterator[Flaw]:
    """Anchors whose receipt is gone, or another."""
    query = sa.select(ANCHORS.c.seq, ANCHORS.c.key).join(RECEIPTS, RECEIPTS.c.seq == ANCHORS.c.seq, isouter=True)
    for row in connection.execute(query.where(KEY.is_distinct_from(ANCHORS.c.key)).order_by(ANCHORS.c.seq)):
        what = f"the database says that it is in the bucket as {row.key}, and has no such receipt"
        yield Flaw(seq=row.seq, what=what)


def _times(connection: sa.Connection) -> Iterator[Flaw]:
    at = sa.column("at", sa.DateTime(timezone=True))
    for seq in connection.scalars(sa.select(RECEIPTS.c.seq).where(_possible(at).is_(None)).order_by(RECEIPTS.c.seq)):
        yield Flaw(seq=seq, what="it has a time in the database that none can have")
