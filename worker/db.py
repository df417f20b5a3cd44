"""Connections to the deployment's database: engines, bounded transactions, SQLSTATE to our errors."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar, cast

import psycopg
import sqlalchemy as sa
from psycopg import conninfo
from psycopg import errors as pg
from sqlalchemy import exc

from worker import pgtypes
from worker.errors import (
    Contended,
    DatabaseGone,
    Denied,
    LedgerMissing,
    Refused,
    SchemaError,
    Transient,
    Unheard,
)

if TYPE_CHECKING:
    from concurrent.futures import Future

    from worker.config import Settings

_T = TypeVar("_T")
# As `first` of a transaction: each statement sees what others have committed meanwhile.
SEES_COMMITS = "SET TRANSACTION ISOLATION LEVEL READ COMMITTED"
Transaction = AbstractContextManager[sa.Connection]

APPLICATION_NAME = "paperclip-worker"
_IDLE = "300s"
# A server or a network that vanishes says nothing. Keepalives find it out while an answer is awaited; while something
# sent is not yet acknowledged the kernel sends none, and `tcp_user_timeout` counts (in ms).
_NOTICING = {
    "connect_timeout": 10,
    "keepalives_idle": 30,
    "keepalives_interval": 10,
    "keepalives_count": 3,
    "tcp_user_timeout": 60_000,
}

# After so many seconds a session that waits for something else says something; far below what the server allows.
AWAKE = 20.0
# Waiting longer for these is pointless inside the transaction: the bite is rolled back and taken again.
_CONTENDED = (pg.LockNotAvailable, pg.SerializationFailure, pg.DeadlockDetected)
_GONE = (
    pg.AdminShutdown,
    pg.CrashShutdown,
    pg.CannotConnectNow,
    pg.TooManyConnections,
    pg.ConnectionException,
    pg.ConnectionFailure,
    pg.ConnectionDoesNotExist,
    pg.IdleInTransactionSessionTimeout,
)


def engine(settings: Settings) -> sa.Engine:
    """A pooled engine in REPEATABLE READ, so what a bite preserved is exactly what it then changes.

    The URL stays in libpq's hands: every form the app accepts (`postgres://`, sslmode, ...) works here too. A server
    that goes silent is given up after about a minute, or after what the URL says of it.
    """
    url = settings.database()
    said = conninfo.conninfo_to_dict(url)
    bounds: dict[str, Any] = {name: value for name, value in _NOTICING.items() if name not in said}

    def connect() -> psycopg.Connection[Any]:
        # Prepared statements would switch to generic plans, which cannot estimate a TID range.
        # Archives are UTF-8, whatever PGCLIENTENCODING and the role's own settings say.
        made = psycopg.connect(
            url, application_name=APPLICATION_NAME, client_encoding="utf8", prepare_threshold=None, **bounds
        )
        pgtypes.register(made)
        return made

    return sa.create_engine(
        "postgresql+psycopg://", creator=connect, isolation_level="REPEATABLE READ", pool_pre_ping=True
    )


@contextmanager
def transaction(
    on: sa.Engine,
    *,
    lock: float,
    statement: float,
    read_only: bool = False,
    first: str | None = None,
    lasting: bool = True,
) -> Iterator[sa.Connection]:
    """One transaction with its own timeouts in seconds; commits on success, rolls back on any error.

    `first` is a utility statement that must come before the snapshot is taken. A commit that is not `lasting` does
    not wait for the disk: a server that crashes may have forgotten it.
    Raises Contended, DatabaseGone (Unheard, where it may have committed), LedgerMissing, Refused or SchemaError in
    place of the driver's errors; their messages hold no row content.
    """
    done = False
    try:
        with translated(), on.connect() as connection, connection.begin():
            bounds = _bounds(lock=lock, statement=statement)
            _begin(connection, first, bounds, read_only=read_only, lasting=lasting)
            yield connection
            done = not read_only
    except (DatabaseGone, KeyboardInterrupt) as cut:
        if not done:
            raise
        # Ctrl-C as well: a commit that waits for a standby is done, and no longer waits.
        by = "the database ended the connection" if isinstance(cut, DatabaseGone) else "cut off"
        raise Unheard(
            f"{by} in the midst of a commit: what was asked for may be done; look before you ask again"
        ) from cut


def _begin(
    connection: sa.Connection, first: str | None, bounds: Mapping[str, str], *, read_only: bool, lasting: bool
) -> None:
    """What a transaction begins with, in one message. DatabaseGone on a standby, unless it is only read."""
    # What the role or database has as its default does not count.
    statements = ["SET TRANSACTION READ ONLY" if read_only else "SET TRANSACTION READ WRITE"]
    # Before it takes the snapshot, and waits for a lock as long as that takes.
    statements += [first] if first else []
    # Session-wide SET would leak through a transaction-pooling proxy. One query that sets them all takes longer.
    statements += [f"SET LOCAL {name} = '{value}'" for name, value in {**bounds, **_ALWAYS}.items()]
    statements += [_LASTING if lasting else f"SET LOCAL {_SYNC} = off", _UNTIMED]
    try:
        connection.exec_driver_sql("; ".join(statements))
    except exc.DBAPIError as error:
        if isinstance(error.orig, pg.FeatureNotSupported):
            # In a failover it passes.
            raise DatabaseGone(
                "DATABASE_URL: the server is a standby and takes no change; name the primary"
            ) from error
        raise


# Of what we commit others are told, in the bucket and at a terminal: it must not be forgotten, whatever the role's or
# the database's default. Where that is not `off`, whether standbys are waited for is the operator's choice.
_SYNC = "synchronous_commit"
_LASTING = f"SELECT set_config('{_SYNC}', 'local', true) WHERE current_setting('{_SYNC}') = 'off'"
# Each statement of ours has its bound, and the app's short transactions are no measure. PostgreSQL 17 brought it.
_UNTIMED = (
    "SELECT set_config(name, '0', true) FROM (VALUES ('transaction_timeout')) AS one (name) "
    "WHERE current_setting(name, true) IS NOT NULL"
)
# Values become text in archive objects, marks and digests: the same text, whatever the role's own settings are.
_ALWAYS = {
    "timezone": "UTC",
    "datestyle": "ISO, YMD",
    "intervalstyle": "postgres",
    "extra_float_digits": "1",
    "bytea_output": "hex",
    "lc_monetary": "C",
    # A row that a policy hides from us is an error: it may be what says that another must stay.
    "row_security": "off",
    "jit": "off",
    # Rows are taken by their places: without it each bite reads the whole table.
    "enable_tidscan": "on",
}


def _bounds(*, lock: float, statement: float) -> dict[str, str]:
    return {
        "lock_timeout": f"{max(1, round(lock * 1000))}ms",
        "statement_timeout": f"{max(1, round(statement * 1000))}ms",
        # An upload may stand between two statements; a worker that died is still cut off.
        "idle_in_transaction_session_timeout": _IDLE,
    }


@contextmanager
def translated() -> Iterator[None]:
    """Raise our errors in place of the driver's, by SQLSTATE."""
    try:
        yield
    except (exc.DBAPIError, psycopg.Error) as error:
        raise _translate(error) from error


def passes(error: exc.DBAPIError) -> bool:
    """Whether an error of the driver's is a fault that usually passes."""
    return isinstance(_translate(error), Transient)


# A connection that the server refused has no SQLSTATE in libpq, only the server's text.
_LOGIN = ("password authentication failed", "no pg_hba.conf entry", "FATAL:  database", "FATAL:  role")


def _translate(error: exc.DBAPIError | psycopg.Error) -> Exception:
    cause = error.orig if isinstance(error, exc.DBAPIError) else error
    state = getattr(cause, "sqlstate", None)
    if any(text in str(cause) for text in _LOGIN):
        return Refused("DATABASE_URL: the server refuses the login, or has no such database")
    if isinstance(cause, _GONE) or _lost(error, cause):
        return DatabaseGone("the database cannot be reached, or ended the connection; check DATABASE_URL")
    if isinstance(cause, pg.UndefinedTable) and "paperclip_worker." in str(cause):
        return LedgerMissing("the ledger is not there; run `paperclip-worker db init`")
    if isinstance(cause, pg.ForeignKeyViolation | pg.RestrictViolation):
        # The key's name alone: the server's own sentence quotes the row.
        by = f", by the foreign key {key}" if (key := cause.diag.constraint_name) else ""
        return Refused(f"a row refers to another that is gone, or is referred to{by} (SQLSTATE {state})")
    for kinds, ours, message in _MEANING:
        if isinstance(cause, kinds):
            return ours(f"{message} (SQLSTATE {state})")
    # A trigger of the host's, or a value it cannot have. The server's own sentence may quote a row.
    return Refused(f"the database refuses a statement (SQLSTATE {state})") if state else error


_MEANING: tuple[tuple[tuple[type[Exception], ...], type[Exception], str], ...] = (
    (_CONTENDED, Contended, "another transaction holds these rows"),
    (
        (pg.QueryCanceled,),
        Contended,
        "a statement ran longer than PAPERCLIP_WORKER_STATEMENT_TIMEOUT, or for plan and verify "
        "PAPERCLIP_WORKER_SCAN_TIMEOUT",
    ),
    (
        (pg.InvalidPassword, pg.InvalidAuthorizationSpecification, pg.InvalidCatalogName),
        Refused,
        "DATABASE_URL: the database refuses the login or does not exist",
    ),
    (
        (pg.InsufficientPrivilege,),
        Denied,
        "the database role lacks a privilege, or row level security keeps rows from it (BYPASSRLS lets it see them); "
        "apply the SQL that `paperclip-worker db grants` prints",
    ),
    (
        (pg.UndefinedTable, pg.UndefinedColumn),
        SchemaError,
        "the database lacks a table or column; see `paperclip-worker db check`",
    ),
)


def _lost(error: exc.DBAPIError | psycopg.Error, cause: object) -> bool:
    if isinstance(error, exc.DBAPIError) and error.connection_invalidated:
        return True
    # libpq reports a lost or refused connection as an OperationalError without a SQLSTATE.
    return isinstance(cause, psycopg.OperationalError) and cause.sqlstate is None


def driver(connection: sa.Connection) -> psycopg.Connection[Any]:
    """The psycopg connection beneath, for COPY; it shares the transaction."""
    return cast("psycopg.Connection[Any]", connection.connection.driver_connection)


def advisory_lock(connection: sa.Connection, name: str) -> None:
    """Hold a named lock until the transaction ends; waits up to the transaction's lock timeout."""
    connection.execute(sa.select(sa.func.pg_advisory_xact_lock(_lock_key(name))))


def try_advisory_lock(connection: sa.Connection, name: str) -> bool:
    """The same without waiting; False when somebody else holds it."""
    return bool(connection.scalar(sa.select(sa.func.pg_try_advisory_xact_lock(_lock_key(name)))))


def _lock_key(name: str) -> sa.ColumnElement[int]:
    return sa.func.hashtextextended(f"paperclip-worker:{name}", 0)


def beside(connection: sa.Connection, work: Callable[[], _T]) -> Callable[[], _T]:
    """Begin some work in a thread; what is returned waits for its result, with the session kept awake."""
    pool = ThreadPoolExecutor(1)
    future = pool.submit(work)
    pool.shutdown(wait=False)
    return partial(await_result, connection, future)


def await_result(connection: sa.Connection, future: Future[_T]) -> _T:
    """What other threads come to, however long it takes them: the server ends a session that only waits."""
    while True:
        try:
            return future.result(timeout=AWAKE)
        except TimeoutError:
            if future.done():
                raise
            connection.exec_driver_sql("SELECT 1")
