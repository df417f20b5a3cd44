"""The one moment in which a deployment goes from one master key to another: ciphertext and key file, or neither.

The file is renamed last before the commit. Where that commit fails, `settle_file` puts the old key back before
anything else is done with the run.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import sqlalchemy as sa
from sqlalchemy import exc

from worker import keyfile

if TYPE_CHECKING:
    from worker.keychain import Keys
    from worker.layouts.model import Layout
    from worker.masterkeys import Rotation

# How long we may wait for the locks. Always less than PostgreSQL lets a transaction wait before it looks for a
# deadlock: one of the app's must never be ended for ours.
_WRITERS = 5.0
_READERS = 0.5
_PART = 0.8
_NOT_AVAILABLE = "55P03"
# What was read before readers had to wait is opened meanwhile, with the old key. Measured: see test_writers.py.
_OPENED = 0.05


def settle_file(keys: Keys, journal: Rotation) -> None:
    """Put the old key back where a cut-over renamed the file and then did not commit. Safe to repeat.

    Not for a manual cut-over: there the file is its operator's, who may well have put the new key in it already.
    """
    path = keys.source.path
    if path is None or keys.new is None:
        return
    aside = f"{journal.staged}-old"
    if journal.cut_over_at is None and keys.source.key == keys.new:
        # It may be nowhere else, where the database alone went back to before the cut-over (a restore, a failover),
        # and servers may have sealed with it.
        keyfile.stage(path, keys.new, journal.staged)
        keyfile.swap(path, keyfile.stage(path, keys.old, aside), expected=keys.new)
    # Also what was left by one that was killed here.
    keyfile.unstage(keyfile.staged_path(path, aside))
    keyfile.clear(path)


def swap_file(keys: Keys, journal: Rotation) -> None:
    """Put the staged new key in the old one's place, by one rename. Refused when another key is staged there."""
    path = keys.source.path
    if path is not None and keys.new is not None:
        keyfile.swap(path, keyfile.stage(path, keys.new, journal.staged), expected=keys.old)


def allow(connection: sa.Connection, *, seconds: float) -> None:
    """Let statements of this transaction take so long: a look at every row is no small bite."""
    _set(connection, "statement_timeout", f"{round(seconds * 1000)}ms")


def hold_off_writers(connection: sa.Connection, layout: Layout, *, seconds: float) -> None:
    """Lock everything with ciphertext against writers and wait for those in flight, for `seconds` of work at most.

    Raises the driver's lock timeout when they take longer than a part of PostgreSQL's deadlock_timeout.
    """
    allow(connection, seconds=seconds)
    _end_vacuum(connection, layout)
    # EXCLUSIVE also waits for rows locked to be updated, which would hold up our updates and could never be theirs.
    _lock(connection, layout, "EXCLUSIVE", seconds=min(_WRITERS, _PART * _deadlock_timeout(connection)))


# PostgreSQL ends an autovacuum for whoever has waited for its lock for deadlock_timeout; a moment more, for it to go.
# What is held by then is a look at these tables, which only a change of their definition waits for.
_BEYOND = 1.2


def _end_vacuum(connection: sa.Connection, layout: Layout) -> None:
    """Wait until PostgreSQL has ended an autovacuum of one of these tables; the next, when this is done again."""
    name = connection.execute(_VACUUMED, {"names": list(_names(connection, layout))}).scalar()
    if name is not None:
        _set(connection, "lock_timeout", f"{round(_BEYOND * _deadlock_timeout(connection) * 1000)}ms")
        connection.exec_driver_sql(f"LOCK TABLE {name} IN EXCLUSIVE MODE")


_VACUUMED = sa.text(
    """
    SELECT one FROM unnest(CAST(:names AS text[])) AS one
    JOIN pg_locks held ON held.relation = CAST(one AS regclass) AND held.granted
      AND held.database = (SELECT oid FROM pg_database WHERE datname = current_database())
    JOIN pg_stat_activity worker ON worker.pid = held.pid AND worker.backend_type = 'autovacuum worker' LIMIT 1
    """
)


def hold_off_readers(connection: sa.Connection, layout: Layout) -> bool:
    """Let readers wait from the rename to the commit, when old ciphertext would meet the new key.

    Where one reads for long (a dump does), that must not hold up the cut-over: False, and what reads in that moment
    fails.
    """
    # Those already wait for us, and their look for a deadlock may come while we wait for them.
    if connection.execute(_WOULD_DEADLOCK, {"names": list(_names(connection, layout))}).scalar_one():
        return False
    savepoint = connection.begin_nested()
    try:
        _lock(
            connection, layout, "ACCESS EXCLUSIVE", seconds=min(_READERS, _PART / 2 * _deadlock_timeout(connection))
        )
    except exc.DBAPIError as error:
        savepoint.rollback()
        if getattr(error.orig, "sqlstate", None) != _NOT_AVAILABLE:
            raise
        return False
    savepoint.commit()
    time.sleep(_OPENED)
    return True


_WOULD_DEADLOCK = sa.text(
    """
    SELECT EXISTS (
        SELECT FROM pg_locks held JOIN pg_locks wanted ON wanted.pid = held.pid AND NOT wanted.granted
        WHERE held.granted AND held.locktype = 'relation' AND held.pid <> pg_backend_pid()
          AND held.database = (SELECT oid FROM pg_database WHERE datname = current_database())
          AND held.relation = ANY (CAST(CAST(:names AS text[]) AS regclass[]))
    )
    """
)


def _lock(connection: sa.Connection, layout: Layout, mode: str, *, seconds: float) -> None:
    until = time.monotonic() + seconds
    for name in _names(connection, layout):
        # Zero would be no limit at all.
        left = max(1, round((until - time.monotonic()) * 1000))
        _set(connection, "lock_timeout", f"{left}ms")
        connection.exec_driver_sql(f"LOCK TABLE {name} IN {mode} MODE")


def _deadlock_timeout(connection: sa.Connection) -> float:
    query = sa.text("SELECT setting::float8 / 1000 FROM pg_settings WHERE name = 'deadlock_timeout'")
    return float(connection.execute(query).scalar_one())


def _names(connection: sa.Connection, layout: Layout) -> dict[str, None]:
    quote = connection.dialect.identifier_preparer.format_table
    return dict.fromkeys(quote(one.table) for one in layout.carriers)


def _set(connection: sa.Connection, name: str, value: str) -> None:
    connection.execute(sa.select(sa.func.set_config(name, value, True)))
