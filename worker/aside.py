"""New ciphertext beside the tables: made ready for rows as they are, and swapped in by one statement.

A row's place and version (ctid, xmin) name exactly one state of that row: what was made ready for it is swapped in
only while it lasts. Whoever changes a row makes it another, which is looked at again.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import IO, TYPE_CHECKING
from uuid import UUID

import sqlalchemy as sa
from pydantic_core import from_json
from sqlalchemy.dialects import postgresql

from worker import db
from worker.blocks import CTID
from worker.ciphertext import VERSION, Ciphertext, xid
from worker.errors import Refused
from worker.ledger import SCHEMA
from worker.pgtypes import Tid, Xid, of
from worker.plans import Amount, Tally
from worker.reseal import Census
from worker.spool import Spool

if TYPE_CHECKING:
    from worker.ciphertext import Part
    from worker.layouts.model import Carrier, Layout
    from worker.reseal import Resealer

_SPOOL = 16 << 20

RESEALED = sa.Table(
    "resealed",
    sa.MetaData(schema=SCHEMA),
    sa.Column("run_id", sa.Uuid),
    sa.Column("carrier", sa.Text),
    sa.Column("key", sa.Uuid),
    sa.Column("place", Tid()),
    sa.Column("version", Xid()),
    sa.Column("rest", sa.BigInteger),
    sa.Column("value", postgresql.JSONB),
)
# Beside what is ready lies what rows were like before the key was exchanged, in rows of no carrier: envelopes that
# were under the new key already, and how many open with no key or to other bytes than their digest says.
SEEN, LOST, ODD = "seen", "lost", "odd"
_COPY_IN = f"COPY {SCHEMA}.resealed FROM STDIN WITH (FORMAT csv, DELIMITER E'\\x02', QUOTE E'\\x01')".encode()


# Whether the host has something of its own happen when a row is updated.
_MEDDLED = sa.text(
    """
    SELECT c.relhasrules OR EXISTS (
        SELECT FROM pg_catalog.pg_trigger t WHERE t.tgrelid = c.oid AND NOT t.tgisinternal AND t.tgenabled <> 'D')
    FROM pg_catalog.pg_class c WHERE c.oid = to_regclass(format('public.%I', CAST(:name AS text)))
    """
)


@dataclass(frozen=True, kw_only=True)
class Taken:
    """What a look found: envelopes by key, rows made ready, and the IVs of values that are all under the new key."""

    counted: Census
    ready: int
    done: list[str]


def label(kind: str, carrier: Carrier) -> str:
    """What a note of that kind has in place of its carrier."""
    return f"{kind}:{carrier.name}"


class Aside:
    """What a run made ready of one carrier, in one transaction."""

    def __init__(self, ciphertext: Ciphertext, run: UUID) -> None:
        self._ciphertext = ciphertext
        self._connection = ciphertext.connection
        self._carrier = ciphertext.carrier
        self._run = run

    def take_window(self, first: int, end: int | None, resealer: Resealer) -> Census:
        """Seal anew, beside the table, what the old key opens in these blocks; note the rest. Nobody waits for it."""
        part = self._ciphertext.window(first, end, rest=True)
        return self._take([part], resealer, again=False, noting=True).counted

    def take(self, where: sa.ColumnElement[bool], resealer: Resealer, *, noting: bool = False) -> Taken:
        """The same for rows that may have been made ready before, in another state; `noting`: the rest is noted."""
        return self._take(self._ciphertext.rows(where, rest=True), resealer, again=True, noting=noting)

    def _take(self, parts: Iterable[Part], resealer: Resealer, *, again: bool, noting: bool) -> Taken:
        counted, ready, done, taken = Census(), 0, list[str](), list[str]()
        run, name = self._run.hex.encode(), self._carrier.name.encode()
        with Spool(_SPOOL) as spool:
            for part in parts:
                states = zip(part.keys, part.places, part.versions, part.rests, strict=True)
                sealed = resealer.resealed(part.texts, part.digests)
                for state, text, (value, one) in zip(states, part.texts, sealed, strict=True):
                    counted += one
                    lines = [] if value is None else [(name, state[3], value)]
                    ready += len(lines)
                    if self._carrier.fresh and value is None and one.new and not one.lost:
                        done += _iv(text)
                    if noting:
                        lines += self._notes(one, text if value is None else None)
                    if lines and again:
                        taken.append(state[0].decode())
                    for label_, rest, held in lines:
                        spool.write(b"\x02".join((run, label_, *state[:3], rest, held)) + b"\n")
            self._forget(taken, noting=noting)
            spool.seek(0)
            self._put(spool)
        return Taken(counted=counted, ready=ready, done=done)

    def _notes(self, one: Census, text: bytes | None) -> Iterator[tuple[bytes, bytes, bytes]]:
        """What is to be known of a row later; `text` is its value where that stays as it is."""
        if self._carrier.fresh and text is not None and one.new:
            yield label(SEEN, self._carrier).encode(), b"0", text
        for kind, number in ((LOST, one.lost), (ODD, one.odd)):
            if number:
                yield label(kind, self._carrier).encode(), b"%d" % number, b"null"

    def _forget(self, keys: list[str], *, noting: bool) -> None:
        """Drop what was made ready of these rows in a state they are no longer in, and what was noted of it."""
        if keys:
            labels = [self._carrier.name, *(label(one, self._carrier) for one in (SEEN, LOST, ODD) if noting)]
            of_carrier = sa.and_(RESEALED.c.run_id == self._run, RESEALED.c.carrier.in_(labels))
            which = sa.any_(sa.literal(keys, sa.ARRAY(sa.Uuid(as_uuid=False))))
            self._connection.execute(sa.delete(RESEALED).where(of_carrier, RESEALED.c.key == which))

    def _put(self, lines: IO[bytes]) -> None:
        with db.driver(self._connection).cursor() as cursor, cursor.copy(_COPY_IN) as copy:
            while chunk := lines.read(1 << 20):
                copy.write(chunk)

    def swap(self) -> Tally:
        """Put what was made ready in its place, wherever the row is still in that state."""
        carrier = self._carrier
        done = (
            sa.update(carrier.table)
            .values({carrier.column: RESEALED.c.value})
            .where(
                RESEALED.c.run_id == self._run,
                RESEALED.c.carrier == carrier.name,
                # Whose it is as well: after a rewrite of the table a row may be where another was that is gone since,
                # in the same version when one transaction wrote both.
                RESEALED.c.key == carrier.key,
                of(carrier.table, CTID) == RESEALED.c.place,
                of(carrier.table, VERSION) == RESEALED.c.version,
            )
            .returning(
                carrier.owner.label("owner"),
                sa.func.pg_column_size(carrier.column).label("size"),
            )
            .cte("done")
        )
        # First by owner: companies of so many rows would be looked up one by one.
        sums = (sa.func.count().label("rows"), sa.func.sum(done.c.size).label("size"))
        owned = sa.select(done.c.owner, *sums).group_by(done.c.owner).subquery("owned")
        source, company = carrier.whose(owned, owned.c.owner)
        whose = sa.cast(company, sa.Text)
        query = sa.select(whose, sa.func.sum(owned.c.rows), sa.func.sum(owned.c.size)).group_by(whose)
        found = self._connection.execute(query.select_from(source))
        name = carrier.table.name
        return Tally({(name, row[0]): Amount(int(row[1]), int(row[2])) for row in found})

    def require_taken(self) -> None:
        """Refused when a row does not hold what was put in: then the key must not be exchanged."""
        carrier = self._carrier
        if not self._connection.execute(_MEDDLED, {"name": carrier.table.name}).scalar_one():
            return
        mine = self._connection.execute(sa.select(sa.cast(sa.func.pg_current_xact_id(), sa.Text))).scalar_one()
        query = self._ready_rows().where(
            carrier.column.is_distinct_from(RESEALED.c.value),
            # In the state it was made ready for, or in one that this transaction made.
            sa.or_(
                sa.and_(
                    of(carrier.table, CTID) == RESEALED.c.place, of(carrier.table, VERSION) == RESEALED.c.version
                ),
                of(carrier.table, VERSION) == xid(mine),
            ),
        )
        if rows := self._connection.execute(query).scalar_one():
            raise Refused(
                f"{rows} rows of {carrier.table.name} do not take new ciphertext: a trigger or rule of the host's "
                "keeps them as they are; no key was exchanged or retired"
            )

    def _ready_rows(self) -> sa.Select[int]:
        """How many rows something was made ready of, whatever has become of them."""
        carrier = self._carrier
        rows = sa.select(sa.func.count()).select_from(carrier.table).join(RESEALED, RESEALED.c.key == carrier.key)
        return rows.where(RESEALED.c.run_id == self._run, RESEALED.c.carrier == carrier.name)

    def clear(self) -> None:
        """Forget what a run made ready."""
        self._connection.execute(sa.delete(RESEALED).where(RESEALED.c.run_id == self._run))

    def altered(self, by: str, columns: list[list[str]] | None) -> int:
        """Rows swapped by a transaction and untouched since whose other columns are not what they were.

        Of the columns there were then; where one of them is gone or of another type now, nobody can tell.
        """
        carrier, there = self._carrier, self._ciphertext.columns()
        if columns and not all(one in there for one in columns):
            return 0
        query = self._ready_rows().where(
            of(carrier.table, VERSION) == xid(by),
            RESEALED.c.rest != self._ciphertext.rest(columns),
        )
        return self._connection.execute(query).scalar_one()


def _iv(text: bytes) -> Iterator[str]:
    """The IV of a value that is an envelope: no two have the same."""
    try:
        value = from_json(text)
    except ValueError:
        return
    if isinstance(value, dict) and isinstance(value.get("iv"), str):
        yield value["iv"]


def asides(connection: sa.Connection, layout: Layout, run: UUID) -> Iterator[tuple[Carrier, Aside]]:
    """Every carrier of a layout, with what a run made ready of it."""
    for carrier in layout.carriers:
        yield carrier, Aside(Ciphertext(connection, carrier, layout.scheme), run)
