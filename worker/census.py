"""Which key opens what: every ciphertext of the master key in the database, read and tried."""

from __future__ import annotations

import zlib
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import sqlalchemy as sa

from worker.ciphertext import Ciphertext
from worker.job import Left, Place, Target
from worker.reseal import Census

if TYPE_CHECKING:
    from worker.layouts.model import Layout
    from worker.reseal import Resealer

_LISTED = 20
_SAMPLE = 200


@dataclass(frozen=True, kw_only=True)
class Counted:
    """Envelopes by key per carrier; the rows to be changed, and those no key opens, per table and company."""

    by_carrier: dict[str, Census]
    rows: dict[Place, Target]
    lost: dict[Place, int]
    listed: tuple[str, ...]

    @property
    def total(self) -> Census:
        total = Census()
        for one in self.by_carrier.values():
            total += one
        return total

    @property
    def targets(self) -> tuple[Target, ...]:
        return tuple(self.rows[place] for place in sorted(self.rows, key=str))

    def left(self) -> tuple[Left, ...]:
        """The rows that no key opens, which stay byte for byte as they are."""
        places = sorted(self.lost, key=str)
        return tuple(Left(table=p[0], company=p[1], reason="undecryptable", rows=self.lost[p]) for p in places)

    def to_json(self) -> dict[str, Any]:
        return {name: one.to_json() for name, one in self.by_carrier.items()}


def count(connection: sa.Connection, layout: Layout, resealer: Resealer, *, new_first: bool) -> Counted:
    """Read every ciphertext and try the keys on it, in a stream."""
    census: dict[str, Census] = {}
    rows: dict[Place, list[int]] = {}
    lost: Counter[Place] = Counter()
    listed: list[str] = []
    for carrier in layout.carriers:
        total = census.setdefault(carrier.name, Census())
        ciphertext = Ciphertext(connection, carrier, layout.scheme)
        for key, _, version, _, company, digest, text in ciphertext.every(company=True):
            one = resealer.count(text, digest, new_first=new_first)
            total += one
            if one.old:
                counted = rows.setdefault((carrier.table.name, company.decode() or None), [0, 0, 0])
                counted[0] += 1
                counted[1] += len(text)
                counted[2] ^= zlib.crc32(key + version)
            if one.lost:
                lost[carrier.table.name, company.decode() or None] += 1
                if len(listed) < _LISTED:
                    listed.append(f"{carrier.table.name} {key.decode()}")
    targets = {
        place: Target(table=place[0], company=place[1], rows=number, bytes=size, digest=f"{mixed:08x}")
        for place, (number, size, mixed) in rows.items()
    }
    return Counted(by_carrier=census, rows=targets, lost=dict(lost), listed=tuple(listed))


def sampled(connection: sa.Connection, layout: Layout, resealer: Resealer) -> Census:
    """The same of the first few rows of each carrier only, until a key opens one."""
    total = Census()
    for carrier in layout.carriers:
        ciphertext = Ciphertext(connection, carrier, layout.scheme)
        for *_, digest, text in ciphertext.rows(sa.true(), most=_SAMPLE):
            total += resealer.count(text, digest)
        if total.old or total.new:
            break
    return total
