"""Ciphertext that came to where no carrier is after it was looked for: in new tables, and in new rows of others.

A run may wait for days, and the host may copy what the cut-over replaces (a history kept by a trigger).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any
from uuid import UUID

import sqlalchemy as sa

from worker import discovery, ledger_shards
from worker.job import Batch, Shard

if TYPE_CHECKING:
    from worker.layouts.model import Layout

KEY = "look-again"
# Blocks a bite reads where it is asked only how old each row is, and so many times less where values are read.
_WINDOW, _DEAR = 32_768, 8
_WHOLE = {"part": 0, "parts": 1}


def shards(parts: int, *, stage: int) -> Iterator[Shard]:
    """The look in so many parts."""
    for part in range(parts):
        yield Shard(key=f"{KEY}:{part}", rows=0, spec={"part": part, "parts": parts}, stage=stage)


class Latecomers:
    """The look of one run, in one transaction, at what its discovery did not see."""

    def __init__(self, connection: sa.Connection, layout: Layout, run: UUID, allowed: tuple[str, ...]) -> None:
        self._connection = connection
        self._layout = layout
        self._run = run
        self._allowed = allowed

    def claim(self, spec: Mapping[str, int], after: Mapping[str, Any] | None) -> Batch:
        """Look into the next tables of a part; the cursor carries how many rows hold an envelope.

        Tables are taken in the order of their ids, whatever is made or dropped between two bites.
        """
        cursor = {"oid": 0, "block": 0, "found": {}, **(after or {})}
        seen, room = self._seen(), _WINDOW
        for table in sorted(self._tables(), key=lambda one: one["oid"]):
            if table["oid"] < cursor["oid"] or table["oid"] % spec["parts"] != spec["part"] or not table["blocks"]:
                continue
            if room <= 0:
                return Batch(after=cursor, exhausted=False)
            start = cursor["block"] if table["oid"] == cursor["oid"] else 0
            since = self._since(table, seen.get(table["oid"]))
            price = _DEAR if since is None else 1
            stop = start + max(1, room // price)
            end = stop if stop < table["blocks"] else None
            rows = dict(cursor["found"])
            rows |= discovery.look(
                self._connection, self._layout.scheme, table, rows, start=start, end=end, since=since
            )
            room -= max(1, (end or table["blocks"]) - start) * price
            cursor = {"oid": table["oid"] + (end is None), "block": end or 0, "found": rows}
            if end is not None:
                return Batch(after=cursor, exhausted=False)
        return Batch(after=cursor, exhausted=True)

    def found(self) -> dict[str, int]:
        """Look into all of them at once: rows that hold an envelope, by `schema.table.column`."""
        batch = self.claim(_WHOLE, None)
        while not batch.exhausted:
            batch = self.claim(_WHOLE, batch.after)
        rows: dict[str, int] = batch.after["found"]
        return rows

    def _tables(self) -> list[dict[str, Any]]:
        return discovery.tables(self._connection, self._layout, self._allowed)

    def _seen(self) -> dict[int, tuple[Mapping[str, Any], str]]:
        """The tables that were looked into, as they were then, and the horizon of that look."""
        found = ledger_shards.cursors(self._connection, self._run, f"{discovery.KEY}:")
        # An earlier release noted neither horizon nor id.
        looks = ((spec, cursor["horizon"]) for spec, cursor in found if cursor.get("horizon"))
        return {one["oid"]: (one, horizon) for spec, horizon in looks for one in spec["tables"] if "oid" in one}

    @staticmethod
    def _since(table: Mapping[str, Any], seen: tuple[Mapping[str, Any], str] | None) -> str | None:
        """Since when its rows are to be looked at; None for all of them, where they may be others or elsewhere."""
        if seen is None:
            return None
        before, horizon = seen
        same = before["file"] == table["file"] and set(table["columns"]) <= set(before["columns"])
        return horizon if same else None
