"""Which key opens what: every ciphertext of the master key in the database, read and tried."""

from __future__ import annotations

import zlib
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import sqlalchemy as sa

from worker.aside import LOST, ODD
from worker.ciphertext import carried
from worker.plans import Left, Place, Target
from worker.reseal import Census

if TYPE_CHECKING:
    from worker.ciphertext import Part
    from worker.layouts.model import Carrier, Layout
    from worker.noted import Noted
    from worker.reseal import Resealer

_LISTED = 20
_SAMPLE = 200


@dataclass(kw_only=True)
class Counted:
    """Envelopes by key per carrier; rows with some under the old key, and rows with some that no key opens."""

    by_carrier: dict[str, Census] = field(default_factory=dict)
    # Rows, bytes, and their keys and versions mixed.
    old: dict[Place, tuple[int, int, int]] = field(default_factory=dict)
    lost: Counter[Place] = field(default_factory=Counter)
    # Of the envelopes that are lost or odd, by that word, those that were not noted before.
    news: Counter[str] = field(default_factory=Counter)
    listed: list[str] = field(default_factory=list)

    @property
    def total(self) -> Census:
        total = Census()
        for one in self.by_carrier.values():
            total += one
        return total

    @property
    def targets(self) -> tuple[Target, ...]:
        """The rows with ciphertext under the old key."""
        return tuple(
            Target(table=place[0], company=place[1], rows=rows, bytes=size, digest=f"{mixed:08x}")
            for place, (rows, size, mixed) in sorted(self.old.items(), key=str)
        )

    def left(self) -> tuple[Left, ...]:
        """The rows that no key opens, which stay byte for byte as they are."""
        places = sorted(self.lost, key=str)
        return tuple(Left(table=p[0], company=p[1], reason="undecryptable", rows=self.lost[p]) for p in places)

    def envelopes(self) -> dict[str, Any]:
        """By carrier and key."""
        return {name: one.to_json() for name, one in self.by_carrier.items()}

    def look(
        self, carrier: Carrier, part: Part, resealer: Resealer, *, new_first: bool, noted: Noted | None = None
    ) -> None:
        """Try the keys on these rows of a carrier; `noted`: what was known of them before."""
        total, table = self.by_carrier.setdefault(carrier.name, Census()), carrier.table.name
        old: dict[bytes, tuple[int, int, int]] = {}
        fresh = 0
        for number, one in enumerate(resealer.counted(part.texts, part.digests, new_first=new_first)):
            if one.old:
                company, mixed = part.companies[number], zlib.crc32(part.keys[number] + part.versions[number])
                rows, size, before = old.get(company, (0, 0, 0))
                old[company] = (rows + 1, size + len(part.texts[number]), before ^ mixed)
            elif one.new and not (one.lost or one.odd):
                # Nearly every row of a look afterwards, and there may be millions.
                fresh += one.new
                continue
            total += one
            if noted is not None and (one.lost or one.odd):
                for kind, many in ((LOST, one.lost), (ODD, one.odd)):
                    self.news[kind] += noted.more(kind, carrier, part.keys[number], many)
            if one.lost:
                self.lost[table, part.companies[number].decode() or None] += 1
                if len(self.listed) < _LISTED:
                    self.listed.append(f"{table} {part.keys[number].decode()}")
        total.new += fresh
        for company, counted in old.items():
            self._add((table, company.decode() or None), counted)

    def _add(self, place: Place, more: tuple[int, int, int]) -> None:
        rows, size, mixed = self.old.get(place, (0, 0, 0))
        self.old[place] = (rows + more[0], size + more[1], mixed ^ more[2])

    def to_json(self) -> dict[str, Any]:
        """For a cursor; without what is listed."""
        old = [[*place, *counted] for place, counted in self.old.items()]
        lost = [[*place, number] for place, number in self.lost.items()]
        return {"envelopes": self.envelopes(), "old": old, "lost": lost, "news": self.news}

    def add_json(self, found: Mapping[str, Any]) -> None:
        """Add what another look found."""
        for name, one in found["envelopes"].items():
            total = self.by_carrier.setdefault(name, Census())
            total += Census(**one)
        for table, company, *counted in found["old"]:
            self._add((table, company), (counted[0], counted[1], counted[2]))
        for table, company, number in found["lost"]:
            self.lost[table, company] += number
        self.news.update(found.get("news", {}))


def count(
    connection: sa.Connection, layout: Layout, resealer: Resealer, *, new_first: bool, noted: Noted | None = None
) -> Counted:
    """Read every ciphertext and try the keys on it, in a stream. What is `noted` must have been read before."""
    counted = Counted()
    for carrier, ciphertext in carried(connection, layout):
        for part in ciphertext.every():
            counted.look(carrier, part, resealer, new_first=new_first, noted=noted)
    return counted


def sampled(connection: sa.Connection, layout: Layout, resealer: Resealer) -> Census:
    """The same of the first few rows of each carrier only, until a key opens one."""
    total = Census()
    for _, ciphertext in carried(connection, layout):
        for part in ciphertext.rows(sa.true(), most=_SAMPLE):
            for one in resealer.counted(part.texts, part.digests):
                total += one
        if total.old or total.new:
            break
    return total
