"""The end of old master keys that rotations left under seal. See docs/rotate-master-key.md."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tasks.rotate_master_key import RotateMasterKey
from worker.job import Batch, Job, Overdue, Right, Shard, Verdict
from worker.params import param, to_json
from worker.plans import Plan, Tally, Target

if TYPE_CHECKING:
    import sqlalchemy as sa

    from worker.layouts.model import Layout
    from worker.means import Means


@dataclass(frozen=True, kw_only=True)
class RetireMasterKey(Job):
    """Destroy old master keys under seal whose time is over, once nothing in the database is left under them.

    Until then each run seals anew what came with one of them after all. Afterwards no rollback to them is possible,
    and backups made under them need a copy of the key from elsewhere.
    """

    name = "retire-master-key"
    action = "maintenance.master_key_retired"
    read_committed = True
    reads_everything = True

    key: str | None = param(None, metavar="FINGERPRINT", help="This old key, though its time is not over.")
    allow_column: tuple[str, ...] = param(
        (), metavar="TABLE.COLUMN", help="Do not look for ciphertext in this unknown column; repeatable."
    )

    @property
    def subject(self) -> str:
        return self.key or "master key"

    @property
    def exclusion(self) -> str:
        return "master-key"

    def needs(self, layout: Layout) -> Iterable[sa.Table]:
        for carrier in layout.carriers:
            yield from carrier.reads

    @classmethod
    def rights(cls, layout: Layout) -> Iterable[Right]:
        return RotateMasterKey.rights(layout)

    def check(self, means: Means) -> None:
        retiring = means.retiring(self)
        retiring.require_possible()
        retiring.require_columns()

    def plan(self, means: Means) -> Plan:
        targets: list[Target] = []
        notes, retiring = [], means.retiring(self)
        due = {one.run_id for one in retiring.due}
        for rotation, counted in retiring.counted():
            targets += counted.targets
            then = "destroyed" if rotation.run_id in due else f"kept until {rotation.retire_after:%Y-%m-%d %H:%M %Z}"
            notes.append(f"{rotation.old_key}: replaced by {rotation.new_key} in run {rotation.run_id}; {then}")
        return Plan(
            job=self.name,
            params=to_json(self),
            layout=means.layout.name,
            now=means.now,
            targets=tuple(targets),
            left=(),
            notes=tuple(notes) or ("no key is under seal",),
        )

    def overdue(self, means: Means) -> tuple[Overdue, ...]:
        due = means.retiring(self).due
        oldest = min((one.retire_after for one in due if one.retire_after is not None), default=None)
        return (Overdue(table="rotations", rows=len(due), oldest=oldest),)

    def shards(self, means: Means, plan: Plan) -> Iterator[Shard]:
        yield from means.retiring(self).shards(plan.tally.total.rows)

    def claim(self, means: Means, shard: Shard, after: Mapping[str, Any] | None, limit: int) -> Batch | None:  # noqa: ARG002 - all there is, which is little
        return means.retiring(self).claim(shard, after)

    def apply(self, means: Means, batch: Batch) -> Tally:
        return means.retiring(self).swap() if batch.spec.get("swap") else Tally()

    def verify(self, means: Means) -> Verdict:
        return means.retiring(self).verdict()

    def finish(self, means: Means) -> Mapping[str, Any]:
        return means.retiring(self).destroy()
