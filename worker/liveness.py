"""Whether workers and beat are alive and what waits for them, as far as the broker knows."""

from __future__ import annotations

import base64
import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

from celery import Celery
from celery.utils.nodenames import default_nodename, host_format
from redbeat.schedulers import RedBeatConfig  # type: ignore[import-untyped]

from worker import brokers
from worker.errors import Refused, WorkerError

if TYPE_CHECKING:
    from kombu.transport.redis import Channel

    from worker.config import Settings

BEAT_PREFIX = "paperclip-worker:beat:"


@dataclass(frozen=True, kw_only=True)
class Alive:
    """Who answered: the workers' node names, and whether a beat holds the lock (asked for beat only)."""

    workers: tuple[str, ...] = ()
    beat: bool = False


def ask(settings: Settings, *, timeout: float, beat: bool = False, here: bool = False) -> Alive:
    """Who is alive within so many seconds: the beat at work, this host's worker, or all workers.

    Raises WorkerError when the broker does not answer, or takes no message.
    """
    # Not `app.make`: a health check that runs every minute need not load the jobs, the database and the store.
    celery = Celery(broker=settings.broker(), set_as_current=False)
    celery.conf.update(redbeat_redis_url=settings.broker(), redbeat_key_prefix=BEAT_PREFIX)
    try:
        with brokers.connected(celery, timeout) as connection:
            if beat:
                # redbeat's name for the lock that its one working beat extends at each tick
                lock = RedBeatConfig(celery).lock_key
                channel = cast("Channel", connection.default_channel)
                return Alive(beat=bool(channel.client.exists(lock)))
            only = [_node()] if here else None
            replies = celery.control.ping(destination=only, timeout=timeout, connection=connection)
            return Alive(workers=tuple(sorted(name for reply in replies or () for name in reply)))
    except Refused as refusal:
        # What is asked for is whether they are alive: that they cannot be reached is an answer.
        raise WorkerError(str(refusal)) from refusal
    finally:
        celery.close()


def waiting(celery: Celery, queue: str, priority: int) -> set[str]:
    """The runs whose message waits there as it was sent; one that came back from a dead worker is no sign of life."""
    with celery.connection_for_read() as connection:
        channel: Any = connection.default_channel
        messages = [json.loads(text) for text in channel.client.lrange(channel._q_for_pri(queue, priority), 0, -1)]
    sent = [one["body"] for one in messages if not one["headers"].get("redelivered")]
    return {json.loads(base64.b64decode(body))[0][0] for body in sent}


def silence(*, beat: bool = False, here: bool = False) -> str:
    """What it means that nobody answered, as a sentence."""
    if beat:
        return "no beat is at work on this broker"
    return f"the worker {_node()} does not answer" if here else "no worker answers on this broker"


def _node() -> str:
    """The name that a worker of this host gives itself."""
    return str(host_format(default_nodename("")))
