"""The one moment in which a deployment goes from one master key to another: ciphertext and key file, or neither.

The file is renamed last before the commit. Where that commit fails, `settle_file` puts the old key back before
anything else is done with the run.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import sqlalchemy as sa
from sqlalchemy import exc

from worker import keyfile

if TYPE_CHECKING:
    from worker.layouts.model import Layout
    from worker.masterkeys import Keys, Rotation

# How long writers may queue behind us for the lock, and then readers for the moment of the switch.
_WRITERS = "5s"
_READERS = "500ms"
_NOT_AVAILABLE = "55P03"


def settle_file(keys: Keys, journal: Rotation) -> None:
    """Put the old key back where a cut-over renamed the file and then did not commit. Safe to repeat.

    Not for a manual cut-over: there the file is its operator's, who may well have put the new key in it already.
    """
    path = keys.source.path
    if journal.cut_over_at is not None or path is None or keys.new is None or keys.source.key != keys.new:
        return
    staged = keyfile.stage(path, keys.old, f"{journal.staged}-old")
    keyfile.swap(path, staged, expected=keys.new)
    keyfile.unstage(staged)


def swap_file(keys: Keys, journal: Rotation) -> None:
    """Put the staged new key in the old one's place, by one rename."""
    path = keys.source.path
    if path is not None:
        keyfile.swap(path, keyfile.staged_path(path, journal.staged), expected=keys.old)


def hold_off_writers(connection: sa.Connection, layout: Layout, *, seconds: float) -> None:
    """Lock everything with ciphertext against writers, parents first as the app does; wait for those in flight."""
    _set(connection, "lock_timeout", _WRITERS)
    allow(connection, seconds=seconds)
    tables = [*layout.locked_first, *(one.table for one in layout.carriers)]
    connection.exec_driver_sql(f"LOCK TABLE {_names(connection, tables)} IN SHARE ROW EXCLUSIVE MODE")


def hold_off_readers(connection: sa.Connection, layout: Layout) -> bool:
    """Let readers wait from the rename to the commit, when old ciphertext would meet the new key.

    Where one reads for long (a dump does), that must not hold up the cut-over: False, and what reads in that moment
    fails. Given up sooner than PostgreSQL looks for deadlocks, so that no transaction of the app is ended for ours.
    """
    savepoint = connection.begin_nested()
    try:
        _set(connection, "lock_timeout", _READERS)
        names = _names(connection, (one.table for one in layout.carriers))
        connection.exec_driver_sql(f"LOCK TABLE {names} IN ACCESS EXCLUSIVE MODE")
    except exc.DBAPIError as error:
        savepoint.rollback()
        if getattr(error.orig, "sqlstate", None) != _NOT_AVAILABLE:
            raise
        return False
    savepoint.commit()
    return True


def allow(connection: sa.Connection, *, seconds: float) -> None:
    """Let statements of this transaction take so long: a look at every row is no small bite."""
    _set(connection, "statement_timeout", f"{round(seconds * 1000)}ms")


def _names(connection: sa.Connection, tables: Iterable[sa.Table]) -> str:
    quote = connection.dialect.identifier_preparer.format_table
    return ", ".join(dict.fromkeys(quote(table) for table in tables))


def _set(connection: sa.Connection, name: str, value: str) -> None:
    connection.execute(sa.select(sa.func.set_config(name, value, True)))
