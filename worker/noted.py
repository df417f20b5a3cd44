"""What was noted of rows before the key was exchanged, so that what is so afterwards can be told from what became so.

It lies beside what is ready, and a crash of PostgreSQL empties that: then the numbers in the journal alone are left.
"""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING
from uuid import UUID

import sqlalchemy as sa

from worker import readiness
from worker.aside import LOST, ODD, RESEALED, SEEN, label

if TYPE_CHECKING:
    from worker.layouts.model import Carrier, Layout

_KINDS = (LOST, ODD)


class Noted:
    """The notes of one run about rows that open with no key, or to other bytes than their digest says."""

    def __init__(self, connection: sa.Connection, layout: Layout, run: UUID) -> None:
        self._connection = connection
        self._layout = layout
        self._run = run

    @cached_property
    def found(self) -> dict[tuple[str, str], int] | None:
        """Envelopes by label and row; None where what was noted is gone."""
        if not readiness.kept(self._connection, self._run):
            return None
        labels = [label(kind, one) for kind in _KINDS for one in self._layout.carriers]
        # A row that moved while it was looked for is there twice.
        query = (
            sa.select(RESEALED.c.carrier, sa.cast(RESEALED.c.key, sa.Text), sa.func.max(RESEALED.c.rest))
            .where(RESEALED.c.run_id == self._run, RESEALED.c.carrier.in_(labels))
            .group_by(RESEALED.c.carrier, RESEALED.c.key)
        )
        return {(name, key): int(number) for name, key, number in self._connection.execute(query)}

    def number(self, kind: str, carrier: Carrier) -> int:
        """How many envelopes of a carrier were noted."""
        return sum(number for (name, _), number in (self.found or {}).items() if name == label(kind, carrier))

    def more(self, kind: str, carrier: Carrier, key: bytes, number: int) -> int:
        """Of so many envelopes of a row those that were not noted; none where nobody can tell."""
        if self.found is None:
            return 0
        return max(0, number - self.found.get((label(kind, carrier), key.decode()), 0))


def sealed_by_others(connection: sa.Connection, layout: Layout, run: UUID, ivs: list[str]) -> bool:
    """Whether one of these envelopes, all under the new key, is neither ours nor was there before."""
    labels = [one for carrier in layout.carriers if carrier.fresh for one in (carrier.name, label(SEEN, carrier))]
    iv = RESEALED.c.value["iv"].astext
    among = iv == sa.any_(sa.literal(ivs, sa.ARRAY(sa.Text)))
    known = sa.select(iv).where(RESEALED.c.run_id == run, RESEALED.c.carrier.in_(labels), among)
    return bool(set(ivs).difference(connection.scalars(known))) if ivs else False
