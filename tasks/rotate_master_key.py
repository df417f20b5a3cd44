"""All ciphertext sealed anew under another master key, and the key exchanged. See docs/rotate-master-key.md."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Self

from worker.errors import Refused, Waits
from worker.job import Batch, Job, Right, Shard, Verdict
from worker.params import RunId, param, to_json
from worker.plans import Plan, Tally

if TYPE_CHECKING:
    import sqlalchemy as sa

    from worker.layouts.model import Layout
    from worker.means import Means
    from worker.rotation import Rotating

_LONGEST = timedelta(days=3650)
# Discovery and making ready go on side by side, and the proof beside the sweep, whose rests it fills; each later
# stage waits for the one before.
_READY, _CATCH_UP, _CUT_OVER, _SWEEP, _LATE, _LAST = range(6)
CUT_OVER, _SWEEP_KEY = "cut-over", "sweep"
# What a server was about to write comes at once, and nobody can read it until it is swept: so first looks are quick,
# and the rests between clean ones add up to more than half a second.
_REST = 0.05
_QUICK_SWEEPS = 20
_CLEAN_SWEEPS = 5
# Two minutes of servers that still write with the old key are no stragglers.
_MOST_SWEEPS = 140


@dataclass(frozen=True, kw_only=True)
class RotateMasterKey(Job):
    """Seal every secret under a new master key, on a live deployment, and leave nothing under the old one.

    All ciphertext is made ready beside the tables, then swapped in one transaction with the key file. Stragglers are
    swept up, everything is opened again, and the old key is kept under seal until --retire-after.
    """

    name = "rotate-master-key"
    action = "maintenance.master_key_rotated"
    read_committed = True
    reads_everything = True

    new_key_file: str | None = param(
        None, metavar="PATH", help="The new key is in this file, which only you can read."
    )
    generate: bool = param(False, help="Make a new key, beside the old one.")
    cutover: str = param(
        "file",
        metavar="file|manual",
        help="file: rename the new key over the key file. manual: wait for `keys switch`; for a key in the "
        "environment, and for several hosts.",
    )
    retire_after: timedelta = param(
        timedelta(days=30), metavar="AGE", help="So long the old key stays under seal, for a rollback."
    )
    allow_undecryptable: int = param(
        0, metavar="N", help="Go on although up to N ciphertexts open with no key; they are left as they are."
    )
    allow_column: tuple[str, ...] = param(
        (), metavar="TABLE.COLUMN", help="Go on although ciphertext is found in this unknown column; repeatable."
    )
    rollback: RunId | None = param(None, metavar="RUN", help="Return to the key that this run replaced.")

    def __post_init__(self) -> None:
        if self.cutover not in {"file", "manual"}:
            raise Refused("--cutover must be file or manual")
        if (self.new_key_file is not None) + self.generate + (self.rollback is not None) != 1:
            raise Refused("give just one of --new-key-file, --generate and --rollback")
        if self.generate and self.cutover == "manual":
            raise Refused("--generate writes beside the key file; with --cutover manual give --new-key-file")
        if not timedelta(0) < self.retire_after <= _LONGEST:
            raise Refused("--retire-after must be above zero and at most 3650d")

    @classmethod
    def usual(cls) -> Self:
        return cls(generate=True)

    @property
    def activity(self) -> str:
        return self.action if self.rollback is None else "maintenance.master_key_rolled_back"

    @property
    def subject(self) -> str:
        return "master key"

    @property
    def exclusion(self) -> str:
        return "master-key"

    @property
    def file(self) -> bool:
        return self.cutover == "file"

    def may_rest(self, stage: int) -> bool:
        # What is still under the old key nobody can read, and little is written.
        return stage < _SWEEP

    def needs(self, layout: Layout) -> Iterable[sa.Table]:
        for carrier in layout.carriers:
            yield from carrier.reads

    @classmethod
    def rights(cls, layout: Layout) -> Iterable[Right]:
        for carrier in layout.carriers:
            # Of the whole table: PostgreSQL asks for no less of who locks it, though one column is all we change.
            yield Right(verb="UPDATE", table=carrier.table)

    def check(self, means: Means) -> None:
        # Not of a run that an earlier release entered: it may have cut over.
        if means.run is None and self.new_key_file is not None and not self.new_key_file.startswith("/"):
            raise Refused("--new-key-file must be an absolute path: the workers start from other directories")
        means.rotating(self).require_possible(self)

    def foresee(self, means: Means) -> None:
        means.rotating(self).require_proven()

    def admit(self, means: Means) -> None:
        from worker import prerequisites  # noqa: PLC0415 - reads the database, which `--help` must not pay for

        lost = means.rotating(self).counted_before().total.lost
        prerequisites.require_allowed(lost, self.allow_undecryptable)

    def plan(self, means: Means) -> Plan:
        from worker import prerequisites  # noqa: PLC0415 - reads the database, which `--help` must not pay for

        rotating = means.rotating(self)
        counted = rotating.counted_before()
        return Plan(
            job=self.name,
            params=to_json(self),
            layout=means.layout.name,
            now=means.now,
            targets=counted.targets,
            left=counted.left(),
            notes=tuple(prerequisites.notes(rotating.keys, counted)),
        )

    def outline(self, means: Means) -> Plan:
        # Which key opens what was counted before the run was entered, and is again while all is made ready.
        held = means.rotating(self).held()
        return Plan(
            job=self.name, params=to_json(self), layout=means.layout.name, now=means.now, targets=held, left=()
        )

    def shards(self, means: Means, plan: Plan) -> Iterator[Shard]:
        rotating = means.rotating(self)
        if means.run is not None and rotating.journal is None:
            rotating = rotating.begin(self)
        if rotating.journal is None or rotating.journal.cut_over_at is None:
            yield from rotating.ready_shards(stage=_READY)
            if rotating.journal is None:
                return
            yield from rotating.discovery_shards(self.allow_column, stage=_READY)
            yield Shard(key="catch-up", rows=0, spec={}, stage=_CATCH_UP)
            yield Shard(key=CUT_OVER, rows=plan.tally.total.rows, spec={}, stage=_CUT_OVER)
        # A second sweep looks at everything once: what the first did not find may be anywhere.
        full = rotating.journal is not None and rotating.journal.cut_over_at is not None
        yield Shard(key=_SWEEP_KEY, rows=0, spec={"everything": full}, stage=_SWEEP)
        yield from rotating.proof_shards(stage=_SWEEP)
        # When nothing is swapped any more: the host may copy what a swap replaces.
        yield from rotating.late_shards(stage=_LATE)
        # That may take long, and a server write back what it read before: it is swept before anybody judges.
        yield Shard(key=_SWEEP_KEY, rows=0, spec={"everything": False, "clean": 1}, stage=_LAST)

    def claim(self, means: Means, shard: Shard, after: Mapping[str, Any] | None, limit: int) -> Batch | None:  # noqa: ARG002 - shards fit in memory
        rotating = means.rotating(self)
        if shard.stage == _READY:
            return rotating.claim_ready(shard, after)
        if shard.stage == _CATCH_UP:
            return rotating.claim_catch_up(after)
        if shard.stage == _CUT_OVER:
            return rotating.claim_cut_over(after, allowed=self.allow_undecryptable, allowed_columns=self.allow_column)
        if shard.stage == _LATE:
            return rotating.claim_late(self.allow_column, shard.spec, after)
        if shard.key != _SWEEP_KEY:
            return rotating.claim_proof(shard, after)
        return self._claim_sweep(rotating, shard, after or {})

    def _claim_sweep(self, rotating: Rotating, shard: Shard, after: Mapping[str, Any]) -> Batch:
        # A run that was settled and taken up again has all of its sweeps before it.
        taken_up = rotating.settlements()
        if after.get("settlements") != taken_up:
            after = {"sweeps": 0, "clean": 0, "found": False}
        sweeps, clean = after["sweeps"], after["clean"]
        if sweeps > _MOST_SWEEPS and after["found"]:
            # Only now, when what the last of them found is swapped.
            raise Refused(
                "a server still seals with the old key: give every server the new one and resume, or roll back"
            )
        if sweeps:
            time.sleep(_REST * (clean + 1) if sweeps < _QUICK_SWEEPS else 1.0)
        swept = rotating.sweep(everything=bool(shard.spec["everything"]) and not sweeps)
        clean = clean + 1 if swept.stands and not swept.ready else 0
        enough = clean >= shard.spec.get("clean", _CLEAN_SWEEPS)
        if not self.file and enough and not swept.proved:
            raise Waits("start the servers with the new key; once one of them has sealed a secret, the run goes on")
        found = bool(swept.ready)
        return Batch(
            after={"sweeps": sweeps + 1, "clean": clean, "found": found, "settlements": taken_up},
            exhausted=enough,
            spec={"swap": found},
        )

    def apply(self, means: Means, batch: Batch) -> Tally:
        return means.rotating(self).apply(batch)

    def verify(self, means: Means) -> Verdict:
        return means.rotating(self).judge()

    def index(self, means: Means) -> Mapping[str, Any]:
        return means.rotating(self).evidence()

    def finish(self, means: Means) -> Mapping[str, Any]:
        return means.rotating(self).finish(self.retire_after)
