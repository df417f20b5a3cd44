"""Our own schema as PostgreSQL has it: its tables, its version, and how it is made and brought up to date."""

from __future__ import annotations

from typing import Any
from uuid import UUID

import sqlalchemy as sa
from sqlalchemy.dialects.postgresql import JSONB

from worker import db
from worker.errors import LedgerMissing

SCHEMA = "paperclip_worker"
VERSION = "0007"

_meta = sa.MetaData(schema=SCHEMA)


def _c(name: str, kind: Any) -> sa.Column[Any]:
    return sa.Column(name, kind)


_TIME = sa.DateTime(timezone=True)
RUNS = sa.Table(
    "runs",
    _meta,
    _c("id", sa.Uuid),
    *(_c(name, sa.Text) for name in ("job", "exclusion", "layout", "state", "plan_hash", "actor", "reason")),
    *(_c(name, sa.Text) for name in ("via", "waiting", "error")),
    *(_c(name, JSONB(none_as_null=True)) for name in ("params", "plan", "findings", "left_rows", "waits")),
    *(_c(name, sa.BigInteger) for name in ("sweep", "planned_rows", "rescues")),
    *(_c(name, _TIME) for name in ("now", "created_at", "touched_at", "settled_at")),
    _c("in_sums", sa.Boolean),
)
SHARDS = sa.Table(
    "shards",
    _meta,
    _c("run_id", sa.Uuid),
    *(
        _c(name, sa.BigInteger)
        for name in ("sweep", "stage", "number", "planned_rows", "bites", "rows", "bytes", "microseconds")
    ),
    _c("key", sa.Text),
    *(_c(name, JSONB(none_as_null=True)) for name in ("spec", "cursor", "tally")),
    _c("done", sa.Boolean),
    _c("touched_at", _TIME),
)
BITES = sa.Table(
    "bites",
    _meta,
    _c("run_id", sa.Uuid),
    *(_c(name, sa.BigInteger) for name in ("sweep", "shard", "number", "rows", "bytes", "microseconds")),
    _c("cursor", JSONB(none_as_null=True)),
)
OBJECTS = sa.Table(
    "objects",
    _meta,
    _c("run_id", sa.Uuid),
    *(_c(name, sa.Text) for name in ("key", "table", "company", "sha256", "first", "last")),
    *(_c(name, sa.BigInteger) for name in ("rows", "bytes", "raw_bytes")),
)
_IDENTITY = sa.Table("identity", _meta, _c("id", sa.Uuid))


def init(engine: sa.Engine) -> None:
    """Create the ledger or bring it to this release's version. Safe to repeat; one at a time."""
    from alembic import command  # noqa: PLC0415 - nothing else of this module needs alembic
    from alembic.config import Config  # noqa: PLC0415

    # What whoever had the lock before did is not in a snapshot taken while it was waited for.
    with db.transaction(engine, first=db.SEES_COMMITS, lock=30, statement=300) as connection:
        db.advisory_lock(connection, "ledger")
        if (_version(connection) or "") > VERSION:
            raise LedgerMissing("the ledger is of a newer release; upgrade this paperclip-worker")
        connection.execute(sa.schema.CreateSchema(SCHEMA, if_not_exists=True))
        config = Config()
        config.set_main_option("script_location", "worker:migrations")
        config.attributes["connection"] = connection
        command.upgrade(config, "head")


def require(connection: sa.Connection) -> UUID:
    """Which ledger this is. Raise LedgerMissing when it is not there or not of this release."""
    version = _version(connection)
    if version is None:
        raise LedgerMissing("the ledger is not there; run `paperclip-worker db init`")
    if version < VERSION:
        raise LedgerMissing("the ledger is of an older release; run `paperclip-worker db init`")
    if version > VERSION:
        raise LedgerMissing("the ledger is of a newer release; upgrade this paperclip-worker")
    # A run that could not name it in its receipt could not end.
    return identity(connection)


def identity(connection: sa.Connection) -> UUID:
    """Which ledger this is: made with it, and the same in every copy of the database.

    Raises LedgerMissing when it was removed.
    """
    found: UUID | None = connection.scalar(sa.select(_IDENTITY.c.id))
    if found is None:
        raise LedgerMissing(f"the ledger has lost its id: {SCHEMA}.identity is empty; restore it from a backup")
    return found


def _version(connection: sa.Connection) -> str | None:
    if connection.scalar(sa.select(sa.func.to_regclass(f"{SCHEMA}.alembic_version"))) is None:
        return None
    table = sa.table("alembic_version", schema=SCHEMA)
    version: str | None = connection.scalar(sa.select(sa.column("version_num", sa.Text)).select_from(table))
    if version is None:
        raise LedgerMissing(f"the ledger has lost its version: {SCHEMA}.alembic_version is empty; restore it")
    return version
