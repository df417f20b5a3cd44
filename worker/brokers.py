"""Redis as the broker: whether it answers, and whose it is. Queue and schedule have the same names in each."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from kombu.exceptions import OperationalError
from redis.exceptions import RedisError, ResponseError

from worker.errors import Refused

if TYPE_CHECKING:
    from uuid import UUID

    from celery import Celery

# The ledger whose runs this database of Redis carries. Whoever comes first writes it, and nobody removes it.
CLAIM = "paperclip-worker:ledger"
_NAME = "PAPERCLIP_WORKER_BROKER_URL"


class Silent(Refused):
    """The broker does not answer."""


def require_own(app: Celery, ledger: UUID) -> None:
    """Refused when the broker is another ledger's, or takes nothing; Silent when it does not answer.

    Two deployments on one would take each other's messages, and one beat would keep the other from its work.
    """
    try:
        with app.connection_for_write(connect_timeout=3) as connection:
            connection.ensure_connection(max_retries=1, timeout=3)
            owner = _owner(connection.default_channel, str(ledger))
    except ResponseError as error:
        raise Refused(f"{_NAME}: the broker takes no message; is it full, or a replica?") from error
    except (OSError, OperationalError, RedisError) as error:
        raise Silent(
            f"{_NAME}: the broker does not answer, or refuses the login; start it, or run jobs with --inline"
        ) from error
    if owner != str(ledger):
        raise Refused(
            f"{_NAME}: this database of Redis is another deployment's (ledger {owner}; this one is {ledger}); "
            f"give each a database of its own; if that one is gone, remove its claim: `redis-cli -u URL DEL {CLAIM}`"
        )


def _owner(channel: Any, ledger: str) -> str:
    client = channel.client
    found = client.get(CLAIM)
    if found is None:
        client.set(CLAIM, ledger, nx=True)
        found = client.get(CLAIM)
    return bytes(found or b"nobody").decode(errors="replace")
