"""Ciphertext made ready for a cut-over: all of it once, then what was written meanwhile, until that is little."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING
from uuid import UUID

import sqlalchemy as sa

from worker import cutover, ledger_shards, masterkeys, prerequisites, readiness
from worker.aside import LOST, ODD, asides
from worker.ciphertext import since, windows
from worker.errors import Refused
from worker.job import Shard
from worker.noted import Noted
from worker.reseal import Census

if TYPE_CHECKING:
    from worker.keychain import Keys
    from worker.means import Means
    from worker.reseal import Resealer

KEY = "make-ready"


class Readying:
    """What one rotation makes ready, in one transaction."""

    def __init__(self, means: Means, run: UUID, resealer: Resealer) -> None:
        self._means = means
        self._connection = means.connection
        self._layout = means.layout
        self._run = run
        self._resealer = resealer

    def window(self, name: str, first: int, end: int | None) -> Census:
        """Make these blocks of a carrier ready. Refused where this release does not know it."""
        for carrier, aside in asides(self._connection, self._layout, self._run):
            if carrier.name == name:
                return aside.take_window(first, end, self._resealer)
        raise Refused(f"this release does not know {name}; resume with the release that began the rotation")

    def catch_up(self) -> int:
        """Make ready what was written since the last look; everything, where what was ready no longer stands."""
        journal = masterkeys.of(self._connection, self._run)
        if journal is None:
            raise TypeError("this rotation has no journal yet")
        everything = masterkeys.ahead(self._connection, journal.horizon) or not self._stands()
        masterkeys.look_from_here(self._connection, self._run)
        cutover.allow(self._connection, seconds=self._means.settings.scan_timeout)
        if everything:
            readiness.mark(self._connection, self._layout, self._run)
        where = sa.true() if everything else since(journal.horizon)
        each = asides(self._connection, self._layout, self._run)
        return sum(aside.take(where, self._resealer, noting=True).ready for _, aside in each)

    def _stands(self) -> bool:
        asked = (self._connection, self._layout, self._run)
        return readiness.stands(*asked) and readiness.fits(*asked)

    def note_counted(self, keys: Keys, allowed: int) -> None:
        """Say in the journal which key opened what when it was made ready. Refused when more is lost than allowed."""
        found, total = self._counted(), Census()
        for one in found.values():
            total += one
        prerequisites.require_opened(keys, total)
        prerequisites.require_allowed(total.lost, allowed)
        masterkeys.seen(self._connection, keys.old.fingerprint, found=total.old, current=True)
        self._note(found)

    def note_lost_since(self, allowed: int) -> None:
        """The same with what became lost or odd since, once nobody can write; what was deleted is counted on."""
        found, notes = self._counted(), Noted(self._connection, self._layout, self._run)
        for carrier in self._layout.carriers:
            one = found.setdefault(carrier.name, Census())
            one.lost, one.odd = notes.number(LOST, carrier), notes.number(ODD, carrier)
        prerequisites.require_allowed(sum(one.lost for one in found.values()), allowed)
        self._note(found)

    def _counted(self) -> dict[str, Census]:
        found: dict[str, Census] = {}
        for spec, cursor in ledger_shards.cursors(self._connection, self._run, f"{KEY}:"):
            if "counted" not in cursor:
                raise Refused("the run was begun by an earlier release, which did not count; start a new run")
            one = found.setdefault(spec["carrier"], Census())
            one += Census(**cursor["counted"])
        return found

    def _note(self, found: dict[str, Census]) -> None:
        before = {name: one.to_json() for name, one in found.items()}
        masterkeys.note(self._connection, self._run, envelopes={"before": before})


def shards(means: Means, *, stage: int) -> Iterator[Shard]:
    """Every carrier's table in ranges of blocks whose ciphertext fits in memory."""
    for carrier in means.layout.carriers:
        for first, end in windows(means.connection, carrier):
            spec = {"carrier": carrier.name, "first": first, "end": end}
            yield Shard(key=f"{KEY}:{carrier.name}:{first}", rows=0, spec=spec, stage=stage)
