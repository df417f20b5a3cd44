"""What servers still sealed with the old key after the cut-over: found by its age, and made ready."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import sqlalchemy as sa

from worker import cutover, masterkeys, readiness
from worker.aside import RESEALED, asides
from worker.ciphertext import since

if TYPE_CHECKING:
    from worker.masterkeys import Rotation
    from worker.means import Means
    from worker.reseal import Resealer


class Swept(NamedTuple):
    """What a sweep saw: rows made ready, whether a server has used the new key, whether what was ready still stands.

    Where it does not, the sweep looked at everything, and what comes after must be looked at before anything is said.
    """

    ready: int
    proved: bool
    stands: bool


class Sweeping:
    """The sweeps of one rotation, in one transaction."""

    def __init__(self, means: Means, journal: Rotation, resealer: Resealer) -> None:
        self._means = means
        self._connection = means.connection
        self._layout = means.layout
        self._journal = journal
        self._run = journal.run_id
        self._resealer = resealer

    def sweep(self, *, everything: bool) -> Swept:
        """Make ready what came with the old key after all."""
        journal, ready, fresh = self._journal, 0, list[str]()
        lost = not readiness.stands(self._connection, self._layout, self._run)
        if lost:
            # Which rows were ours is forgotten: only what comes from here on can prove anything.
            masterkeys.look_from_here(self._connection, self._run)
            readiness.mark(self._connection, self._layout, self._run)
        if everything or lost:
            cutover.allow(self._connection, seconds=self._means.settings.scan_timeout)
        where = sa.true() if everything or lost else since(journal.horizon, but=journal.cut_over_by)
        for carrier, aside in asides(self._connection, self._layout, self._run):
            taken = aside.take(where, self._resealer)
            ready += taken.ready
            fresh += taken.done if carrier.fresh else ()
        proved = journal.proved_at is not None
        if not (proved or everything or lost) and self._written_by_others(fresh):
            masterkeys.note(self._connection, self._run, proved_at=sa.func.clock_timestamp())
            proved = True
        return Swept(ready, proved, not lost)

    def _written_by_others(self, keys: list[str]) -> bool:
        """Whether one of these rows, all under the new key, was never resealed by us."""
        mine = sa.select(sa.cast(RESEALED.c.key, sa.Text)).where(RESEALED.c.run_id == self._run)
        return bool(set(keys).difference(self._connection.scalars(mine))) if keys else False
