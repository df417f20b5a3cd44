"""Redis as the broker: whether it answers, and whose it is. Queue and schedule have the same names in each."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from celery.exceptions import WorkerShutdown
from kombu.exceptions import OperationalError
from redis.exceptions import RedisError, ResponseError

from worker.errors import Refused
from worker.logs import log

if TYPE_CHECKING:
    from uuid import UUID

    from celery import Celery
    from kombu import Connection

# The ledger whose runs this database of Redis carries. Whoever comes first writes it, and nobody removes it.
CLAIM = "paperclip-worker:ledger"
_NAME = "PAPERCLIP_WORKER_BROKER_URL"


class Silent(Refused):
    """The broker does not answer."""


@contextmanager
def connected(app: Celery, timeout: float) -> Iterator[Connection]:
    """A connection that is Silent once the broker has been so for so many seconds. Refused when it takes nothing."""
    bounds = {"socket_timeout": timeout, "socket_connect_timeout": timeout}
    try:
        with app.connection_for_write(connect_timeout=timeout, transport_options=bounds) as connection:
            connection.ensure_connection(max_retries=1, timeout=math.ceil(timeout))
            yield connection
    except (OSError, OperationalError, RedisError) as error:
        # kombu has an error of its own round the broker's.
        if isinstance(error, ResponseError) or isinstance(error.__cause__, ResponseError):
            raise Refused(f"{_NAME}: the broker takes no message; is it full, or a replica?") from error
        raise Silent(f"{_NAME}: the broker does not answer, or refuses the login") from error


def require_own(app: Celery, ledger: UUID) -> None:
    """Refused when the broker is another ledger's, or takes nothing; Silent when it does not answer.

    Two deployments on one would take each other's messages, and one beat would keep the other from its work.
    """
    try:
        with connected(app, 3) as connection:
            channel: Any = connection.default_channel
            found = owner(channel.client, str(ledger))
    except Silent as silent:
        raise Silent(f"{silent}; start it, or run jobs with --inline") from silent
    if found != str(ledger):
        raise Refused(
            f"{_NAME}: this database of Redis is another deployment's (ledger {found}; this one is {ledger}); "
            f"give each a database of its own; if that one is gone, remove its claim: `redis-cli -u URL DEL {CLAIM}`"
        )


def leave_another_s(app: Celery, ledger: UUID) -> None:
    """End the worker that calls this, where its broker is another ledger's. It was not there to be asked before."""
    try:
        require_own(app, ledger)
    except Silent:
        # Gone again.
        return
    except Refused as refusal:
        log.error("the worker ends", why=str(refusal))
        raise WorkerShutdown(int(refusal.exit_code)) from None


def owner(client: Any, ledger: str) -> str:
    """Whose a database of Redis is: this ledger's, from now on, where it was nobody's."""
    found = client.get(CLAIM)
    if found is None:
        client.set(CLAIM, ledger, nx=True)
        found = client.get(CLAIM)
    return found if isinstance(found, str) else bytes(found or b"nobody").decode(errors="replace")
