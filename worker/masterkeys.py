"""The ledger's memory of master keys: rotations and their journal, retired keys under seal, how much each has sealed.

Holds fingerprints and ciphertext, never a key.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any
from uuid import UUID

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql

from worker import keyfile
from worker.ledger import RUNS, SCHEMA
from worker.pgtypes import Xid8
from worker.states import ACTIVE, RESUMABLE

_TIME = sa.DateTime(timezone=True)
_META = sa.MetaData(schema=SCHEMA)
ROTATIONS = sa.Table(
    "rotations",
    _META,
    *(sa.Column(name, sa.Uuid) for name in ("run_id", "rolls_back")),
    *(sa.Column(name, sa.Text) for name in ("old_key", "new_key", "salt", "permitted_by", "retired_by")),
    *(sa.Column(name, sa.BigInteger) for name in ("iterations", "lock_microseconds")),
    *(sa.Column(name, Xid8()) for name in ("horizon", "cut_over_by")),
    *(sa.Column(name, postgresql.JSONB(none_as_null=True)) for name in ("sealed", "envelopes")),
    sa.Column("readers_waited", sa.Boolean),
    *(
        sa.Column(name, _TIME)
        for name in (
            "permitted_at",
            "cut_over_at",
            "proved_at",
            "swept_at",
            "finished_at",
            "retire_after",
            "retired_at",
        )
    ),
)
MASTER_KEYS = sa.Table(
    "master_keys",
    _META,
    sa.Column("fingerprint", sa.Text),
    *(sa.Column(name, sa.BigInteger) for name in ("sealed", "found")),
    *(sa.Column(name, _TIME) for name in ("first_seen", "counted_at")),
    sa.Column("current", sa.Boolean),
)
# What every server still running sees; row states of older transactions are known to whoever looks afterwards.
HORIZON: sa.ColumnElement[Any] = sa.func.pg_snapshot_xmin(sa.func.pg_current_snapshot())


@dataclass(frozen=True, kw_only=True)
class Rotation:
    """The journal of one rotation. `sealed` is the old key under the new one, None once it was retired."""

    run_id: UUID
    old_key: str
    new_key: str
    rolls_back: UUID | None
    salt: str | None
    iterations: int | None
    horizon: str
    sealed: dict[str, Any] | None
    envelopes: dict[str, Any]
    permitted_at: datetime | None
    permitted_by: str | None
    cut_over_at: datetime | None
    cut_over_by: str | None
    lock_microseconds: int | None
    readers_waited: bool | None
    proved_at: datetime | None
    swept_at: datetime | None
    finished_at: datetime | None
    retire_after: datetime | None
    retired_at: datetime | None
    retired_by: str | None

    @property
    def staged(self) -> str:
        """The name of the new key's file beside the key file."""
        return staged_name(self.run_id)


def staged_name(run: UUID) -> str:
    return f"{keyfile.STAGED}{run}"


def begin(connection: sa.Connection, run: UUID, **values: Any) -> None:
    """Open the journal of a rotation; row states from now on are looked at again."""
    connection.execute(sa.insert(ROTATIONS).values(run_id=run, horizon=HORIZON, **values))


def note(connection: sa.Connection, run: UUID, **values: Any) -> None:
    """Write to the journal."""
    connection.execute(sa.update(ROTATIONS).where(ROTATIONS.c.run_id == run).values(values))


def look_from_here(connection: sa.Connection, run: UUID) -> None:
    """Move the horizon to now: what was made ready from here on is known."""
    note(connection, run, horizon=HORIZON)


def ahead(connection: sa.Connection, horizon: str) -> bool:
    """Whether a horizon is of another server: the database was dumped, and restored where less had been done."""
    now = sa.func.pg_snapshot_xmax(sa.func.pg_current_snapshot())
    return bool(connection.scalar(sa.select(sa.cast(sa.literal(horizon), Xid8()) > now)))


def of(connection: sa.Connection, run: UUID | None) -> Rotation | None:
    """The journal of a run; None before it was opened."""
    row = connection.execute(sa.select(ROTATIONS).where(ROTATIONS.c.run_id == run)).one_or_none()
    return Rotation(**row._asdict()) if row else None


def every(connection: sa.Connection) -> list[Rotation]:
    """Every rotation whose journal was opened, the newest cut-over first, those without one last."""
    order = (ROTATIONS.c.cut_over_at.desc().nulls_last(), ROTATIONS.c.run_id)
    return [Rotation(**row._asdict()) for row in connection.execute(sa.select(ROTATIONS).order_by(*order))]


def unfinished(connection: sa.Connection, *, but: UUID | None) -> Rotation | None:
    """A rotation that cut over and did not come to its end, other than `but`, unless it was rolled back."""
    rotations = every(connection)
    undone = {one.rolls_back for one in rotations if one.finished_at}
    open_ones = (one for one in rotations if one.cut_over_at and not one.finished_at and one.run_id != but)
    return next((one for one in open_ones if one.run_id not in undone), None)


def superseded(connection: sa.Connection, rotation: Rotation) -> UUID | None:
    """A run that exchanged the key since this rotation began, which has not: it is about a world that is gone."""
    if rotation.cut_over_at is not None:
        return None
    began = sa.select(RUNS.c.created_at).where(RUNS.c.id == rotation.run_id).scalar_subquery()
    others = sa.select(ROTATIONS.c.run_id).where(
        ROTATIONS.c.run_id != rotation.run_id, ROTATIONS.c.cut_over_at > began
    )
    return connection.scalar(others.order_by(ROTATIONS.c.cut_over_at.desc()).limit(1))


def seen(
    connection: sa.Connection,
    fingerprint: str,
    *,
    found: int | None = None,
    sealed: int = 0,
    current: bool | None = None,
) -> None:
    """Keep what is known of a key: ciphertexts found under it, and how many more were sealed with it."""
    values: dict[str, Any] = {"fingerprint": fingerprint, "sealed": sealed}
    update: dict[str, Any] = {"sealed": MASTER_KEYS.c.sealed + sealed}
    if found is not None:
        extra = {"found": found, "counted_at": sa.func.clock_timestamp()}
        values |= extra
        update |= extra
    if current is not None:
        values["current"] = update["current"] = current
        if current:
            connection.execute(sa.update(MASTER_KEYS).values(current=False))
    statement = postgresql.insert(MASTER_KEYS).values(values)
    connection.execute(statement.on_conflict_do_update(index_elements=["fingerprint"], set_=update))


def close(connection: sa.Connection, rotation: Rotation, retire_after: timedelta) -> datetime:
    """End a rotation that kept its promise; until when its old key is kept under seal."""
    now = connection.execute(sa.select(sa.func.clock_timestamp())).scalar_one()
    until: datetime = now + retire_after
    note(connection, rotation.run_id, finished_at=now, retire_after=until)
    after = rotation.envelopes.get("after", {}).values()
    seen(connection, rotation.old_key, found=sum(one["old"] for one in after))
    sealed = sum(one["old"] for one in rotation.envelopes["before"].values())
    seen(connection, rotation.new_key, found=sum(one["new"] for one in after), sealed=sealed, current=True)
    return until


def evidence(rotation: Rotation) -> dict[str, Any]:
    """What a receipt says of a rotation: fingerprints, counts and times."""
    times = ("cut_over_at", "proved_at", "permitted_at")
    found: dict[str, Any] = {
        "old_key": rotation.old_key,
        "new_key": rotation.new_key,
        "rolls_back": str(rotation.rolls_back) if rotation.rolls_back else None,
        "envelopes": rotation.envelopes,
        "permitted_by": rotation.permitted_by,
        "lock_microseconds": rotation.lock_microseconds,
        "readers_waited": rotation.readers_waited,
    }
    return found | {name: value.isoformat() if (value := getattr(rotation, name)) else None for name in times}


def counts(connection: sa.Connection) -> list[dict[str, Any]]:
    """What is known of each key that was ever in use: ciphertexts found under it, and sealed with it by us."""
    rows = connection.execute(sa.select(MASTER_KEYS).order_by(MASTER_KEYS.c.first_seen))
    times = ("first_seen", "counted_at")
    return [
        {name: value.isoformat() if name in times and value else value for name, value in row._asdict().items()}
        for row in rows
    ]


def newest(connection: sa.Connection) -> Rotation | None:
    """The rotation that brought the key in use; None where none has cut over."""
    return next((one for one in every(connection) if one.cut_over_at), None)


def retired(connection: sa.Connection, fingerprint: str) -> bool:
    """Whether a key was destroyed for good, and is under no seal since."""
    of_key = [one for one in every(connection) if one.old_key == fingerprint]
    return any(one.retired_at for one in of_key) and not any(one.sealed for one in of_key)


def bringing(connection: sa.Connection, fingerprints: Collection[str]) -> Rotation | None:
    """A rotation to one of these keys that has not cut over, and may do so still."""
    alive = set(connection.scalars(sa.select(RUNS.c.id).where(RUNS.c.state.in_(ACTIVE | RESUMABLE))))
    for one in every(connection):
        waits = one.run_id in alive and one.cut_over_at is None and one.sealed is not None
        if waits and one.new_key in fingerprints and superseded(connection, one) is None:
            return one
    return None


def allowed_columns(connection: sa.Connection, fingerprint: str) -> set[str]:
    """The columns that operators named when they rotated this key away: what is in them is theirs."""
    runs = [one.run_id for one in every(connection) if one.old_key == fingerprint and one.finished_at]
    found = connection.scalars(sa.select(RUNS.c.params).where(RUNS.c.id.in_(runs)))
    return {name for params in found for name in params.get("allow_column", ())}


def under_seal(connection: sa.Connection) -> list[Rotation]:
    """The rotations whose old key is still there under seal, the one due first first."""
    found = (one for one in every(connection) if one.finished_at and one.sealed is not None)
    return sorted(found, key=lambda one: (one.retire_after or one.finished_at, one.run_id))


def destroy(connection: sa.Connection, rotation: Rotation, *, by: UUID) -> None:
    """Drop an old key for good: nothing can be opened with it any more, nor rolled back to it."""
    values = {"sealed": None, "retired_at": sa.func.clock_timestamp(), "retired_by": str(by)}
    connection.execute(sa.update(ROTATIONS).where(ROTATIONS.c.old_key == rotation.old_key).values(values))
    # What lies under the seal of this key can be opened no more.
    connection.execute(sa.update(ROTATIONS).where(ROTATIONS.c.new_key == rotation.old_key).values(sealed=None))


def permit(connection: sa.Connection, run: UUID, *, by: str) -> None:
    """Let a manual cut-over go on: every server is stopped."""
    note(connection, run, permitted_at=sa.func.clock_timestamp(), permitted_by=by)


def permitted(connection: sa.Connection, rotation: Rotation) -> bool:
    """Whether that was said since the run was last settled. Where a key was gone by then, nobody took it back."""
    if rotation.permitted_at is None:
        return False
    receipts = sa.table("receipts", sa.column("run_id"), sa.column("at"), schema=SCHEMA)
    since = sa.and_(receipts.c.run_id == rotation.run_id, receipts.c.at >= rotation.permitted_at)
    settled = sa.select(sa.literal(1)).select_from(receipts).where(since).limit(1)
    return connection.scalar(settled) is None


def forbid(connection: sa.Connection, run: UUID) -> None:
    """Take that back."""
    note(connection, run, permitted_at=None, permitted_by=None)
