"""What must be so after a rotation: everything opens with the new key, to what it held, and nothing else was changed.

Looked at in bites, by however many workers there are. The judge adds what was written meanwhile.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from datetime import timedelta
from functools import cached_property
from typing import TYPE_CHECKING, Any

import sqlalchemy as sa

from worker import blocks, census, cutover, discovery, latecomers, ledger_shards, masterkeys, readiness
from worker.aside import asides
from worker.census import Counted
from worker.ciphertext import Ciphertext, carried, since, windows
from worker.errors import Refused
from worker.job import Batch, Finding, Shard, Verdict
from worker.noted import Noted

if TYPE_CHECKING:
    from worker.keychain import Keys
    from worker.layouts.model import Carrier
    from worker.masterkeys import Rotation
    from worker.means import Means
    from worker.reseal import Resealer

KEY = "prove"
# Blocks a bite looks at. Fixed places, so that parts laid out at different moments leave nothing between them.
_RANGE = 2_048
# From the verdict to the end it is a moment, unless a worker is killed in between.
_FRESH = timedelta(minutes=1)


class Proving:
    """The proof of one rotation, in one transaction."""

    def __init__(self, means: Means, keys: Keys, journal: Rotation, resealer: Resealer, *, file: bool) -> None:
        self._means = means
        self._connection = means.connection
        self._layout = means.layout
        self._keys = keys
        self._journal = journal
        self._resealer = resealer
        self._file = file

    def claim(self, shard: Shard, after: Mapping[str, Any] | None) -> Batch:
        """Look at the part's next range; the cursor carries what was found so far."""
        if shard.spec.get("altered"):
            cutover.allow(self._connection, seconds=self._means.settings.scan_timeout)
            return Batch(after={"altered": self._altered()}, exhausted=True)
        own, parts = shard.spec["part"], shard.spec["parts"]
        cursor = dict(after) if after else self._start(own)
        counted, carriers, room = Counted(), self._layout.carriers, _RANGE
        counted.add_json(cursor["found"])
        while cursor["carrier"] < len(carriers) and room > 0:
            carrier, begin = carriers[cursor["carrier"]], cursor["range"] * _RANGE
            there = blocks.number(self._connection, carrier.table) - begin
            if there > 0:
                self._look(counted, carrier, begin)
                cursor["range"] += parts
            else:
                cursor |= {"carrier": cursor["carrier"] + 1, "range": own}
            room -= max(there, 0)
        cursor["found"] = counted.to_json()
        return Batch(after=cursor, exhausted=cursor["carrier"] == len(carriers))

    def _look(self, counted: Counted, carrier: Carrier, begin: int) -> None:
        ciphertext = Ciphertext(self._connection, carrier, self._layout.scheme)
        for first, end in windows(self._connection, carrier, begin=begin, end=begin + _RANGE):
            part = ciphertext.window(first, end, company=True)
            counted.look(carrier, part, self._resealer, new_first=True, noted=self._noted)

    @cached_property
    def _noted(self) -> Noted:
        return Noted(self._connection, self._layout, self._journal.run_id)

    def _start(self, part: int) -> dict[str, Any]:
        # What is written by transactions that are not over now is for the judge, whether the bites see it or not.
        horizon = self._connection.scalar(sa.select(sa.cast(masterkeys.HORIZON, sa.Text)))
        files = readiness.files(self._connection, self._layout)
        return {"horizon": horizon, "files": files, "carrier": 0, "range": part, "found": Counted().to_json()}

    def _altered(self) -> dict[str, int]:
        by, run = self._journal.cut_over_by, self._journal.run_id
        columns = readiness.columns(self._connection, run)
        each = asides(self._connection, self._layout, run)
        return {one.table.name: aside.altered(by, columns.get(one.name)) for one, aside in each} if by else {}

    def judge(self) -> Verdict:
        """Whether the rotation did what it promises."""
        counted, altered = self._found()
        if counted is None or self._faults(counted):
            # A straggler may have been put right, and only a look at all there is can say what is so now. What is
            # noted is read before, for that look has the connection to itself.
            _ = self._noted.found
            counted = census.count(self._connection, self._layout, self._resealer, new_first=True, noted=self._noted)
        findings = self._faults(counted)
        what = "another column than the ciphertext was changed with it"
        findings += [
            Finding(table=name, company=None, rows=rows, what=what) for name, rows in altered.items() if rows
        ]
        late = discovery.found(self._connection, self._journal.run_id, latecomers.KEY)
        findings += [
            Finding(table=table, company=None, rows=rows, what=f"ciphertext in the unknown column {column}")
            for (table, _, column), rows in ((name.rpartition("."), late[name]) for name in sorted(late))
        ]
        source = self._keys.source
        if self._file and source.key != self._keys.new:
            findings.append(self._finding(1, f"the key file holds {source.key.fingerprint}, not the new key"))
        envelopes = {**self._journal.envelopes, "after": counted.envelopes()}
        run = self._journal.run_id
        masterkeys.note(self._connection, run, envelopes=envelopes, swept_at=sa.func.clock_timestamp())
        return Verdict(findings=tuple(findings), left=counted.left())

    def require_still(self) -> None:
        """Refused when the verdict is of some time ago and is not so any more: who gave it was killed, perhaps."""
        fresh = sa.func.clock_timestamp() - self._journal.swept_at < _FRESH
        if self._connection.scalar(sa.select(fresh)):
            return
        if found := self.judge().findings:
            what = f"{found[0].rows} rows of {found[0].table} {found[0].what}"
            raise Refused(f"since the run was judged: {what}; resume it")

    def _found(self) -> tuple[Counted | None, dict[str, int]]:
        """What the bites found and what was written since, where they saw every row; and what was altered."""
        counted, altered, horizons = Counted(), dict[str, int](), list[int]()
        moved, files = False, readiness.files(self._connection, self._layout)
        for _, cursor in ledger_shards.cursors(self._connection, self._journal.run_id, f"{KEY}:"):
            altered |= cursor.get("altered", {})
            if "found" in cursor:
                counted.add_json(cursor["found"])
                horizons.append(int(cursor["horizon"]))
                moved = moved or cursor.get("files") != files
        # Rows that were moved may have slipped from a range before its turn to one after it.
        if not horizons or moved:
            return None, altered
        for carrier, ciphertext in carried(self._connection, self._layout):
            for part in ciphertext.rows(since(str(min(horizons))), company=True):
                counted.look(carrier, part, self._resealer, new_first=True, noted=self._noted)
        return counted, altered

    def _faults(self, counted: Counted) -> list[Finding]:
        before = self._journal.envelopes["before"].values()
        found = [
            Finding(table=one.table, company=one.company, rows=one.rows, what="still sealed with the old key")
            for one in counted.targets
        ]
        for kind, what in (("lost", "sealed with neither key"), ("odd", "opens to other bytes than its digest says")):
            # One may have gone and another come. Where what was noted is gone, only the numbers are left.
            more = max(counted.news[kind], getattr(counted.total, kind) - sum(one[kind] for one in before))
            if more > 0:
                found.append(self._finding(more, f"{what}, and was not when the run began"))
        return found

    def _finding(self, rows: int, what: str) -> Finding:
        return Finding(table=self._layout.carriers[0].table.name, company=None, rows=rows, what=what)


def shards(parts: int, *, stage: int) -> Iterator[Shard]:
    """The proof in so many parts."""
    yield Shard(key=f"{KEY}:altered", rows=0, spec={"altered": True}, stage=stage)
    for part in range(parts):
        yield Shard(key=f"{KEY}:{part}", rows=0, spec={"part": part, "parts": parts}, stage=stage)
