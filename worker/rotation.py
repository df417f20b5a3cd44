"""What a step can do to rotate the master key: count, make ready, cut over, sweep, judge, retire.

Until the cut-over commits the deployment has the old key and the old ciphertext, afterwards the new key and the new.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import UUID

import sqlalchemy as sa

from worker import (
    audit,
    census,
    cutover,
    discovery,
    keychain,
    keyfile,
    keyring,
    latecomers,
    livetable,
    masterkeys,
    prerequisites,
    proof,
    readiness,
    readying,
)
from worker.aside import RESEALED, asides
from worker.ciphertext import carried
from worker.envelopes import CODECS, ITERATIONS, Pbkdf2
from worker.errors import Refused, Waits
from worker.job import REHEARSAL, Batch, Shard
from worker.plans import Tally, Target
from worker.reseal import Resealer, resealer
from worker.sweeping import Sweeping, Swept

if TYPE_CHECKING:
    from collections.abc import Iterable
    from datetime import timedelta

    from tasks.rotate_master_key import RotateMasterKey
    from worker.aside import Aside
    from worker.census import Counted
    from worker.job import Verdict
    from worker.keychain import Keys
    from worker.keyring import MasterKey
    from worker.layouts.model import Carrier
    from worker.masterkeys import Rotation
    from worker.means import Means

# So many rows written meanwhile are few enough to be made ready while writers wait.
_FEW = 2_000
_MOST_ROUNDS = 20
SWITCH = "paperclip-worker keys switch"


class Rotating:
    """One rotation, in one transaction."""

    def __init__(self, means: Means, keys: Keys, journal: Rotation | None, *, file: bool) -> None:
        self._means = means
        self._connection = means.connection
        self._layout = means.layout
        self.keys = keys
        self.journal = journal
        # Whether the key file is ours to replace: with a manual cut-over it is the operator's.
        self._file = file

    @classmethod
    def of(cls, means: Means, job: RotateMasterKey) -> Rotating:
        """The rotation of a job, by its journal where there is one. Refused when a key cannot be found."""
        journal = masterkeys.of(means.connection, means.run)
        if journal is not None:
            keys = keychain.journalled(means, journal, new_key_file=job.new_key_file)
            return cls(means, keys, journal, file=job.file)
        source = keyring.locate(means.settings)
        if job.rollback is not None:
            parent = masterkeys.of(means.connection, job.rollback)
            return cls(means, keychain.returning(source, parent, job.rollback), None, file=job.file)
        new = keyring.read(Path(job.new_key_file)) if job.new_key_file is not None else None
        if new is None and means.run == REHEARSAL:
            new = keyring.generate()
        return cls(means, keychain.Keys(old=source.key, new=new, source=source), None, file=job.file)

    @cached_property
    def _resealer(self) -> Resealer:
        salt, rounds = (self.journal.salt, self.journal.iterations) if self.journal else (None, None)
        return resealer(self._layout.scheme, self.keys.old, self.keys.new, salt=salt, iterations=rounds)

    @property
    def _journal(self) -> Rotation:
        if self.journal is None:
            raise TypeError("this rotation has no journal yet")
        return self.journal

    def _asides(self) -> Iterator[tuple[Carrier, Aside]]:
        return asides(self._connection, self._layout, self._run)

    @property
    def _run(self) -> UUID:
        return self._means.entered

    # -- before -------------------------------------------------------------------------------------

    def require_possible(self, job: RotateMasterKey) -> None:
        """Refused when the keys are the same, the file cannot be exchanged, or another rotation is half done."""
        for carrier in self._layout.carriers:
            livetable.require_whole(self._connection, carrier.table.name)
        prerequisites.require_exchangeable(self.keys, self.journal, file=job.file)
        self._require_in_use()
        discovery.require_columns(self._connection, job.allow_column)
        prerequisites.require_none_half_done(self._connection, run=self._means.run, rollback=job.rollback)

    def _require_in_use(self) -> None:
        prerequisites.require_in_use(self._connection, self.keys, self.journal, file=self._file)

    def require_proven(self) -> None:
        """Refused when the key in use opens nothing of what it should."""
        seen = census.sampled(self._connection, self._layout, self._resealer)
        if not (seen.old or seen.new):
            # The first rows may be the ones that a lost key sealed.
            prerequisites.require_opened(self.keys, self._counted.total)

    def counted_before(self) -> Counted:
        """Every ciphertext by its key. Refused when there is none, or the key in use opens none."""
        prerequisites.require_opened(self.keys, self._counted.total)
        return self._counted

    @cached_property
    def _counted(self) -> Counted:
        return census.count(self._connection, self._layout, self._resealer, new_first=False)

    def held(self) -> tuple[Target, ...]:
        """The rows that hold ciphertext, whatever opens it. Refused when the key in use opens none."""
        self.require_proven()
        return tuple(one for _, ciphertext in carried(self._connection, self._layout) for one in ciphertext.held())

    # -- laying out ---------------------------------------------------------------------------------

    def begin(self, job: RotateMasterKey) -> Rotating:
        """Open the journal: new key staged beside the old, old key sealed under the new."""
        new = self.keys.new or self._generated()
        if job.file and self.keys.source.path is not None:
            keyfile.stage(self.keys.source.path, new, masterkeys.staged_name(self._run))
        self._connection.execute(sa.delete(RESEALED))
        derived = issubclass(CODECS[self._layout.scheme], Pbkdf2)
        masterkeys.begin(
            self._connection,
            self._run,
            old_key=self.keys.old.fingerprint,
            new_key=new.fingerprint,
            rolls_back=job.rollback,
            salt=os.urandom(16).hex() if derived else None,
            iterations=ITERATIONS if derived else None,
            sealed=keyring.seal_key(self.keys.old, under=new),
        )
        readiness.mark(self._connection, self._layout, self._run)
        journal = masterkeys.of(self._connection, self._run)
        return Rotating(self._means, replace(self.keys, new=new), journal, file=self._file)

    def _generated(self) -> MasterKey:
        """A new key; the one an interrupted start has staged already."""
        path = self.keys.source.path
        if path is None:
            raise Refused("a new key is written beside the key file, and there is none")
        staged = keyfile.staged_path(path, masterkeys.staged_name(self._run))
        return keyring.read(staged) if staged.exists() else keyring.generate()

    def ready_shards(self, *, stage: int) -> Iterator[Shard]:
        """Every carrier's table in ranges of blocks whose ciphertext fits in memory."""
        return readying.shards(self._means, stage=stage)

    def discovery_shards(self, allowed: Iterable[str], *, stage: int) -> Iterator[Shard]:
        """Every other text and JSON column of the database, to be looked into. Refused where one cannot be."""
        for shard in discovery.shards(self._connection, self._layout, tuple(allowed)):
            yield replace(shard, stage=stage)

    def late_shards(self, *, stage: int) -> Iterator[Shard]:
        """What the discovery did not see, in a part for each worker that may help."""
        return latecomers.shards(self._means.settings.parallel, stage=stage)

    def proof_shards(self, *, stage: int) -> Iterator[Shard]:
        """The proof at the end, in a part for each worker that may help."""
        return proof.shards(self._means.settings.parallel, stage=stage)

    # -- bites --------------------------------------------------------------------------------------

    def claim_ready(self, shard: Shard, after: Mapping[str, Any] | None) -> Batch:
        """Make a range ready, or look into the next window of another column's table."""
        if shard.key.startswith(discovery.KEY):
            return discovery.claim(self._connection, self._layout.scheme, shard, after)
        counted = self._readying.window(shard.spec["carrier"], shard.spec["first"], shard.spec["end"])
        # A rehearsal rolls every bite back, so what it would swap is swapped in this one.
        swap = self._run == REHEARSAL
        return Batch(after={"counted": counted.to_json()}, exhausted=True, spec={"swap": swap})

    def claim_catch_up(self, after: Mapping[str, Any] | None) -> Batch:
        """Make ready what was written meanwhile, until that is little."""
        rounds = after["rounds"] + 1 if after else 1
        ready = self._readying.catch_up()
        return Batch(after={"rounds": rounds, "ready": ready}, exhausted=ready <= _FEW or rounds >= _MOST_ROUNDS)

    @property
    def _readying(self) -> readying.Readying:
        return readying.Readying(self._means, self._run, self._resealer)

    def claim_late(self, allowed: tuple[str, ...], spec: Mapping[str, int], after: Mapping[str, Any] | None) -> Batch:
        """Look into tables and rows that the discovery did not see."""
        late = latecomers.Latecomers(self._connection, self._layout, self._run, allowed)
        return late.claim(spec, after)

    def claim_cut_over(
        self, after: Mapping[str, Any] | None, *, allowed: int, allowed_columns: tuple[str, ...]
    ) -> Batch:
        """Refused when unknown columns hold ciphertext, or more than allowed opens with no key.

        Raises Waits until an operator permits a manual cut-over.
        """
        self._require_in_use()
        if self._file:
            cutover.settle_file(self.keys, self._journal)
        self._require_none_found(discovery.found(self._connection, self._run))
        self._readying.note_counted(self.keys, allowed)
        if not (self._file or masterkeys.permitted(self._connection, self._journal)):
            raise Waits(f"ready for the cut-over: stop every server, then `{SWITCH} {self._run}`")
        after = after or {}
        # The run may have waited or been stopped for long.
        settled = self.settlements()
        looked = after.get("looked") if after.get("settlements") == settled else None
        if (settled or not self._file) and not (looked and looked["done"]):
            batch = self.claim_late(allowed_columns, {"part": 0, "parts": 1}, looked)
            self._require_none_found(batch.after["found"])
            looked = {**batch.after, "done": batch.exhausted}
            return Batch(after={**after, "looked": looked, "settlements": settled}, exhausted=False)
        # Nobody should wait for what can be made ready before. From here on no table can be rewritten, for this look
        # has locked them against that.
        rounds = after.get("rounds", 0) + 1
        after = {**after, "rounds": rounds}
        if self._readying.catch_up() > _FEW and rounds < _MOST_ROUNDS:
            return Batch(after=after, exhausted=False)
        return Batch(after=after, exhausted=True, spec={"cut over": True, "allowed": allowed})

    @staticmethod
    def _require_none_found(found: Mapping[str, int]) -> None:
        if found:
            named = ", ".join(f"{column} ({number})" for column, number in sorted(found.items()))
            raise Refused(f"columns this release does not know may hold ciphertext: {named}; see --allow-column")

    def apply(self, batch: Batch) -> Tally:
        """Cut over, or swap what was made ready."""
        if batch.spec.get("cut over"):
            return self._cut_over(batch.spec["allowed"])
        return self._swap() if batch.spec.get("swap") else Tally()

    def _swap(self) -> Tally:
        tally = sum((aside.swap() for _, aside in self._asides()), Tally())
        for _, aside in self._asides():
            aside.require_taken()
        return tally

    def _cut_over(self, allowed: int) -> Tally:
        cutover.hold_off_writers(self._connection, self._layout, seconds=self._means.settings.scan_timeout)
        locked = time.monotonic()
        self._readying.catch_up()
        self._readying.note_lost_since(allowed)
        tally = self._swap()
        waited = cutover.hold_off_readers(self._connection, self._layout)
        masterkeys.note(
            self._connection,
            self._run,
            cut_over_at=sa.func.clock_timestamp(),
            cut_over_by=sa.func.pg_current_xact_id(),
            lock_microseconds=round((time.monotonic() - locked) * 1e6),
            readers_waited=waited,
        )
        # Our note holds the journal's row: whoever retires a key from here on waits for our commit.
        prerequisites.require_way(self._connection, self.keys, self._journal)
        if self._file:
            cutover.swap_file(self.keys, self._journal)
        return tally

    def settlements(self) -> int:
        """How often the run was settled so far: stopped or failed, and then resumed."""
        return audit.number(self._connection, self._run)

    def sweep(self, *, everything: bool) -> Swept:
        """Make ready what came with the old key after all."""
        # Else rows of the key that is in use would be sealed with one that is not.
        self._require_in_use()
        return Sweeping(self._means, self._journal, self._resealer).sweep(everything=everything)

    # -- after --------------------------------------------------------------------------------------

    def claim_proof(self, shard: Shard, after: Mapping[str, Any] | None) -> Batch:
        """Look whether everything is as it must be, range by range."""
        return self._proving.claim(shard, after)

    def judge(self) -> Verdict:
        """Whether everything opens with the new key, to what it held, and nothing else of a row was changed."""
        return self._proving.judge()

    @property
    def _proving(self) -> proof.Proving:
        return proof.Proving(self._means, self.keys, self._journal, self._resealer, file=self._file)

    def evidence(self) -> dict[str, Any]:
        """What the receipt says: fingerprints, counts and times. Puts a half-exchanged file right."""
        path = self.keys.source.path
        if self.journal is None:
            # No journal, no use for what was staged: nothing is sealed with it.
            if self._file and path is not None:
                keyfile.unstage(keyfile.staged_path(path, masterkeys.staged_name(self._run)))
            return {}
        if self._file and masterkeys.superseded(self._connection, self.journal) is None:
            # Else the new key may be in the file because the run that overtook this one put it there.
            cutover.settle_file(self.keys, self.journal)
        if self.journal.cut_over_at is None:
            # The servers are started again when a run ends without: who resumes it is asked anew.
            masterkeys.forbid(self._connection, self.journal.run_id)
        return masterkeys.evidence(self.journal)

    def finish(self, retire_after: timedelta) -> dict[str, Any]:
        """Remove what was staged, forget what was made ready, and say until when the old key is kept.

        Refused when the verdict is not so any more.
        """
        self._proving.require_still()
        path, journal = self.keys.source.path, self._journal
        after = masterkeys.close(self._connection, journal, retire_after)
        self._connection.execute(sa.delete(RESEALED))
        lost = sum(one["lost"] for one in journal.envelopes.get("after", {}).values())
        if path is not None:
            # Runs that never came to their end left theirs; what opens with no key may be sealed with one of them.
            for one in masterkeys.every(self._connection):
                if one.run_id == journal.run_id or not lost:
                    keyfile.unstage(keyfile.staged_path(path, one.staged))
        return {"retire_after": after.isoformat()}
