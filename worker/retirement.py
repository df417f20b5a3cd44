"""How old master keys under seal come to their end: swept for as long as they are there, then the seal is dropped."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from typing import TYPE_CHECKING, Any
from uuid import UUID

import sqlalchemy as sa

from worker import census, cutover, keyring, masterkeys
from worker.aside import asides
from worker.errors import Refused
from worker.job import Finding, Verdict
from worker.plans import Tally
from worker.reseal import Resealer, resealer

if TYPE_CHECKING:
    from worker.census import Counted
    from worker.keyring import MasterKey
    from worker.masterkeys import Rotation
    from worker.means import Means


class Retiring:
    """The old keys under seal, those whose time is over as of the run's start, or the one key that was named."""

    def __init__(self, means: Means, key: str | None) -> None:
        self._means = means
        self._connection = means.connection
        self._layout = means.layout
        self._key = key

    @cached_property
    def swept(self) -> list[Rotation]:
        """The rotations whose old key is looked for, each key once."""
        held = masterkeys.under_seal(self._connection)
        if self._key is not None:
            return [one for one in held if one.old_key == self._key][:1]
        # After a rollback the key in use lies under a seal as well.
        others = (one for one in held if one.old_key != self._current.fingerprint)
        return list({one.old_key: one for one in others}.values())

    @property
    def due(self) -> list[Rotation]:
        """Those whose old key is to go: the one named, or each whose time is over under all of its seals.

        But for one under which another lies that is still to stay: it goes with that one.
        """
        if self._key is not None:
            return self.swept
        held = [one for one in masterkeys.under_seal(self._connection) if one.old_key != self._current.fingerprint]
        stay = {one.old_key for one in held if not self._over(one)}
        while more := {one.new_key for one in held if one.old_key in stay} - stay:
            stay |= more
        return [one for one in self.swept if one.old_key not in stay]

    def _over(self, one: Rotation) -> bool:
        return one.retire_after is not None and one.retire_after <= self._means.now

    @cached_property
    def _keys(self) -> dict[str, MasterKey]:
        source = keyring.locate(self._means.settings)
        found = {source.key.fingerprint: source.key}
        masterkeys.unseal(self._connection, found)
        return found

    @cached_property
    def _current(self) -> MasterKey:
        return keyring.locate(self._means.settings).key

    def require_possible(self) -> None:
        """Refused when the named key is under no seal, one is in use, or another would be lost with it."""
        if self._key is not None and not self.due:
            raise Refused(f"--key: no key {self._key} is under seal; see `paperclip-worker keys list`")
        if half := masterkeys.unfinished(self._connection, but=None):
            raise Refused(f"run {half.run_id} exchanged the key and did not end; resume it, or roll it back first")
        going = {one.old_key for one in self.due}
        for one in self.due:
            if one.old_key == self._current.fingerprint:
                raise Refused(f"the key {one.old_key} is the one in use; it cannot be retired")
        if back := masterkeys.bringing(self._connection, going):
            raise Refused(
                f"run {back.run_id} may still be resumed and brings back the key {back.new_key}; resume it, or "
                "rotate to another key first"
            )
        for one in masterkeys.under_seal(self._connection):
            if one.new_key in going and one.old_key not in {*going, self._current.fingerprint}:
                raise Refused(f"the key {one.old_key} is sealed under {one.new_key}; retire {one.old_key} first")

    def _resealer(self, rotation: Rotation) -> Resealer:
        old = self._keys.get(rotation.old_key)
        if old is None:
            raise Refused(
                f"the key {rotation.old_key} cannot be opened with the one in use, {self._current.fingerprint}"
            )
        made_by = next(
            (o for o in masterkeys.every(self._connection) if o.new_key == self._current.fingerprint), None
        )
        salt, rounds = (made_by.salt, made_by.iterations) if made_by else (None, None)
        return resealer(self._layout.scheme, old, self._current, salt=salt, iterations=rounds)

    def counted(self) -> Iterator[tuple[Rotation, Counted]]:
        """For each key what is still sealed with it."""
        for one in self.swept:
            yield one, census.count(self._connection, self._layout, self._resealer(one), new_first=True)

    def sweep(self, run: UUID) -> int:
        """Make ready, under the key in use, what is still under `run`'s old key; how many rows."""
        found = 0
        cutover.allow(self._connection, seconds=self._means.settings.scan_timeout)
        for one in (rotation for rotation in self.swept if rotation.run_id == run):
            resealer = self._resealer(one)
            for _, aside in asides(self._connection, self._layout, self._means.entered):
                found += aside.take(sa.true(), resealer).ready
        return found

    def swap(self) -> Tally:
        """Put what the sweep made ready in its place."""
        return sum(
            (aside.swap() for _, aside in asides(self._connection, self._layout, self._means.entered)),
            Tally(),
        )

    def verdict(self) -> Verdict:
        """Whether nothing at all is left under the old keys."""
        findings = tuple(
            Finding(table=one.table, company=one.company, rows=one.rows, what=f"still under {rotation.old_key}")
            for rotation, counted in self.counted()
            for one in counted.targets
        )
        return Verdict(findings=findings, left=())

    def destroy(self) -> dict[str, Any]:
        """Drop the seals. Refused when there is ciphertext of theirs after all: it would be lost."""
        for one in self.due:
            counted = census.count(self._connection, self._layout, self._resealer(one), new_first=True)
            if number := counted.total.old:
                raise Refused(
                    f"{number} ciphertexts came under {one.old_key} since they were looked for; "
                    "resume the run, which seals them anew"
                )
        gone = [one.old_key for one in self.due]
        for one in self.due:
            masterkeys.destroy(self._connection, one, by=self._means.entered)
        for _, aside in asides(self._connection, self._layout, self._means.entered):
            aside.clear()
        return {"retired": gone}
