"""What servers still sealed with the old key after the cut-over: found by its age, and made ready."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import sqlalchemy as sa

from worker import cutover, masterkeys, noted, readiness
from worker.aside import asides
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
        forgotten = not readiness.kept(self._connection, self._run)
        forgotten = forgotten or masterkeys.ahead(self._connection, journal.horizon)
        lost = forgotten or not readiness.stands(self._connection, self._layout, self._run)
        if forgotten:
            # Which envelopes were ours nobody knows: only one that comes from here on can prove anything.
            masterkeys.look_from_here(self._connection, self._run)
        if lost:
            readiness.mark_again(self._connection, self._layout, self._run)
        cutover.allow(self._connection, seconds=self._means.settings.scan_timeout)
        where = sa.true() if everything or lost else since(journal.horizon, but=journal.cut_over_by)
        for _, aside in asides(self._connection, self._layout, self._run):
            taken = aside.take(where, self._resealer, noting=forgotten)
            ready += taken.ready
            fresh += taken.done
        proved = journal.proved_at is not None
        if not (proved or everything or lost):
            proved = noted.sealed_by_others(self._connection, self._layout, self._run, fresh)
            if proved:
                masterkeys.note(self._connection, self._run, proved_at=sa.func.clock_timestamp())
        return Swept(ready, proved, not lost)
