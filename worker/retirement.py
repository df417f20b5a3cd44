"""How old master keys under seal come to their end: swept for as long as they are there, then the seal is dropped."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any
from uuid import UUID

import sqlalchemy as sa

from worker import census, cutover, db, discovery, keychain, keyfile, keyring, masterkeys
from worker.aside import asides
from worker.ciphertext import carried, since
from worker.errors import Refused
from worker.job import REHEARSAL, Batch, Finding, Shard, Verdict
from worker.latecomers import Latecomers
from worker.plans import Tally
from worker.reseal import Resealer, resealer

if TYPE_CHECKING:
    from worker.census import Counted
    from worker.keyring import MasterKey, Source
    from worker.masterkeys import Rotation
    from worker.means import Means

# Who still seals with an old key after so many looks at everything is no straggler.
_MOST_SWEEPS = 5


class Retiring:
    """The old keys under seal, those whose time is over as of the run's start, or the one key that was named."""

    def __init__(self, means: Means, key: str | None, allowed: tuple[str, ...]) -> None:
        self._means = means
        self._connection = means.connection
        self._layout = means.layout
        self._key = key
        self._given = allowed

    @cached_property
    def swept(self) -> list[Rotation]:
        """The rotations whose old key is looked for, each key once."""
        if self._key is not None:
            return [one for one in masterkeys.under_seal(self._connection) if one.old_key == self._key][:1]
        return list({one.old_key: one for one in self._others}.values())

    @cached_property
    def _others(self) -> list[Rotation]:
        # After a rollback the key in use lies under a seal as well.
        held = masterkeys.under_seal(self._connection)
        return [one for one in held if one.old_key != self._current.fingerprint] if held else []

    @cached_property
    def due(self) -> list[Rotation]:
        """Those whose old key is to go: the one named, or each whose time is over under all of its seals.

        But for one without which another that is still to stay could be had no more: it goes with that one.
        """
        if self._key is not None or not self._others:
            return self.swept
        stay = {one.old_key for one in self._others if not self._over(one)}
        while lost := self._lost({one.old_key for one in self._others} - stay):
            stay |= {one.new_key for one in keychain.seals(self._connection) if one.old_key in lost}
        return [one for one in self.swept if one.old_key not in stay]

    def _over(self, one: Rotation) -> bool:
        return one.retire_after is not None and one.retire_after <= self._means.now

    def _lost(self, going: set[str]) -> set[str]:
        """The keys that nothing leads to from the key in use once these are destroyed."""
        start = self._current.fingerprint
        left = keychain.reachable(self._connection, start, without=going)
        return keychain.reachable(self._connection, start) - left - going

    @cached_property
    def _keys(self) -> dict[str, MasterKey]:
        found = {self._current.fingerprint: self._current}
        keychain.unseal(self._connection, found)
        return found

    @property
    def _current(self) -> MasterKey:
        return self._source.key

    @cached_property
    def _source(self) -> Source:
        return keyring.locate(self._means.settings)

    def require_columns(self) -> None:
        """Refused when a column to be left alone is none."""
        discovery.require_columns(self._connection, self._given)

    def require_possible(self) -> None:
        """Refused when the named key is under no seal, one is in use or wanted still, or another would be lost."""
        if self._key is not None and not self.due:
            raise Refused(f"--key: no key {self._key} is under seal; see `paperclip-worker keys list`")
        if half := masterkeys.unfinished(self._connection, but=None):
            raise Refused(
                f"run {half.run_id} exchanged the key and did not come to its end; resume it, or, where it "
                "ended unkept, roll it back"
            )
        self._require_in_use()
        going = {one.old_key for one in self.due}
        if not going:
            return
        if self._current.fingerprint in going:
            raise Refused(f"the key {self._current.fingerprint} is the one in use; it cannot be retired")
        if back := masterkeys.bringing(self._connection, going):
            raise Refused(
                f"run {back.run_id} may still be resumed and brings back the key {back.new_key}; resume it, or "
                "rotate to another key first"
            )
        lost = self._lost(going)
        for one in keychain.seals(self._connection):
            if one.old_key in lost and one.new_key in going:
                raise Refused(f"the key {one.old_key} is sealed under {one.new_key}; retire {one.old_key} first")

    def _require_in_use(self) -> None:
        """Refused when this worker has another key than the last rotation brought: it would seal with that."""
        newest = masterkeys.newest(self._connection) if masterkeys.under_seal(self._connection) else None
        if newest is not None and newest.new_key != self._current.fingerprint:
            raise Refused(
                f"this worker has the key {self._current.fingerprint}, not {newest.new_key} which run "
                f"{newest.run_id} brought; give it the key that the servers use"
            )

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

    # -- bites --------------------------------------------------------------------------------------

    def shards(self, rows: int) -> Iterator[Shard]:
        """A sweep for each key; where one is to go, every other text and JSON column too, to be looked into."""
        for rotation in self.swept:
            yield Shard(key=f"sweep:{rotation.old_key}", rows=rows, spec={"rotation": str(rotation.run_id)})
        if self.due:
            yield from discovery.shards(self._connection, self._layout, self._allowed())

    def _allowed(self) -> set[str]:
        """The columns that this run, or the rotations of each key that goes, were told to leave alone."""
        named = [masterkeys.allowed_columns(self._connection, one.old_key) for one in self.due]
        both = set.intersection(*({discovery.whole(name) for name in one} for one in named))
        return both | {discovery.whole(name) for name in self._given}

    def claim(self, shard: Shard, after: Mapping[str, Any] | None) -> Batch:
        """Look at everything of a key once, or into the next window of another column's table."""
        if shard.key.startswith(discovery.KEY):
            return discovery.claim(self._connection, self._layout.scheme, shard, after)
        sweeps = after.get("sweeps", 0) + 1 if after else 1
        found = self.sweep(UUID(shard.spec["rotation"]))
        # A rehearsal rolls back what it swept, and would find it for ever.
        last = not found or sweeps >= _MOST_SWEEPS or self._means.run == REHEARSAL
        return Batch(after={"sweeps": sweeps, "found": found}, exhausted=last, spec={"swap": bool(found)})

    def sweep(self, run: UUID) -> int:
        """Make ready, under the key in use, what is still under `run`'s old key; how many rows."""
        self._require_in_use()
        found = 0
        cutover.allow(self._connection, seconds=self._means.settings.scan_timeout)
        for one in (rotation for rotation in self.swept if rotation.run_id == run):
            resealer = self._resealer(one)
            for _, aside in asides(self._connection, self._layout, self._means.entered):
                found += aside.take(sa.true(), resealer).ready
        return found

    def swap(self) -> Tally:
        """Put what the sweep made ready in its place. Refused where a row does not take it."""
        tally = Tally()
        for _, aside in asides(self._connection, self._layout, self._means.entered):
            tally += aside.swap()
            aside.require_taken()
        return tally

    # -- the end ------------------------------------------------------------------------------------

    def verdict(self) -> Verdict:
        """Whether nothing at all is left under the old keys."""
        findings = tuple(
            Finding(table=one.table, company=one.company, rows=one.rows, what=f"still under {rotation.old_key}")
            for rotation, counted in self.counted()
            for one in counted.targets
        )
        return Verdict(findings=findings, left=())

    def destroy(self) -> dict[str, Any]:
        """Drop the seals, and every file of ours with one of these keys.

        Refused when there is ciphertext of theirs after all: it would be lost.
        """
        self.require_possible()
        due, removed = self.due, list[str]()
        if due:
            self._require_none_left(due)
            if self._source.path is not None:
                removed = keyfile.remove(self._source.path, [self._keys[one.old_key] for one in due])
        for one in due:
            masterkeys.destroy(self._connection, one, by=self._means.entered)
        if self.swept:
            # Else nothing was made ready, and the workers' own role may not even look where that would be.
            for _, aside in asides(self._connection, self._layout, self._means.entered):
                aside.clear()
        return {"retired": [one.old_key for one in due], "files_removed": removed}

    def _require_none_left(self, due: Sequence[Rotation]) -> None:
        """Look at everything, then hold off writers until the end and look at what they wrote meanwhile."""
        horizon = self._connection.scalar(sa.select(sa.cast(masterkeys.HORIZON, sa.Text)))
        for one in due:
            counted = census.count(self._connection, self._layout, self._resealer(one), new_first=True)
            self._require_none(one, counted.total.old)
        self._require_none_elsewhere(due)
        settings = self._means.settings
        cutover.hold_off_writers(self._connection, self._layout, seconds=settings.scan_timeout)
        # Of a snapshot of its own: that of this transaction is older than the lock.
        fresh = db.transaction(
            self._connection.engine, lock=settings.lock_timeout, statement=settings.scan_timeout, read_only=True
        )
        with fresh as connection:
            for one in due:
                self._require_none(one, self._written(connection, str(horizon), self._resealer(one)))

    def _written(self, connection: sa.Connection, horizon: str, resealer: Resealer) -> int:
        """How many ciphertexts under the old key came by transactions that were not over at the horizon."""
        return sum(
            one.old
            for _, ciphertext in carried(connection, self._layout)
            for part in ciphertext.rows(since(horizon))
            for one in resealer.counted(part.texts, part.digests, new_first=True)
        )

    @staticmethod
    def _require_none(rotation: Rotation, number: int) -> None:
        if number:
            raise Refused(
                f"{number} ciphertexts came under {rotation.old_key} since they were looked for; "
                "resume the run, which seals them anew"
            )

    def _require_none_elsewhere(self, due: Sequence[Rotation]) -> None:
        """Refused when a column of no carrier has anything that is not plainly under the key in use."""
        if not discovery.done(self._connection, self._means.entered):
            raise Refused("the run was begun by an earlier release, which did not look everywhere; start a new run")
        run, allowed = self._means.entered, tuple(self._allowed())
        # The run may have been stopped for long, and what was found have been put elsewhere meanwhile.
        late = Latecomers(self._connection, self._layout, run, allowed).found()
        there = {*discovery.found(self._connection, run), *late}
        opens, named = self._resealer(due[0]), Counter[str]()
        for column, text in discovery.texts(self._connection, self._layout, there, allowed):
            if not opens.all_new(text):
                named[column] += 1
        if named:
            columns = ", ".join(f"{column} ({number})" for column, number in sorted(named.items()))
            raise Refused(
                "columns this release does not know may hold ciphertext, in rows that are not under the key in use, "
                f"{self._current.fingerprint}: {columns}; put them right or remove them, and resume the run; or, "
                "where they are no ciphertext, start another with --allow-column"
            )
