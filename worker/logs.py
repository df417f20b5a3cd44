"""Structured logs on stderr: constant events with fields, and nothing in them that must not leave."""

from __future__ import annotations

import logging
import re
import sys
from collections.abc import MutableMapping
from typing import Any

import structlog

# A URL's user and password, and fields that by their name hold a credential.
_USERINFO = re.compile(r"(?<=://)[^/@\s]+@")
_SECRET_NAME = re.compile(r"(?i)(password|passwd|secret|token|authorization|credential|private_key|api_key)")
_HIDDEN = "[redacted]"

log: structlog.stdlib.BoundLogger = structlog.get_logger("paperclip-worker")


def redact(_: Any, __: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    """Hide credentials wherever they stand in an event."""
    return {name: _HIDDEN if _SECRET_NAME.search(name) else _clean(value) for name, value in event.items()}


def _clean(value: Any) -> Any:
    if isinstance(value, str):
        return _USERINFO.sub(_HIDDEN + "@", value)
    if isinstance(value, dict):
        return redact(None, "", value)
    if isinstance(value, list | tuple):
        return [_clean(one) for one in value]
    return value


def configure(*, level: int = logging.INFO) -> None:
    """JSON lines on stderr for this process, Celery's own records included."""
    shared: list[Any] = [
        structlog.contextvars.merge_contextvars,
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    # No traceback is rendered: its lines may quote a statement's parameters, which are row content.
    last: list[Any] = [_name_exception, redact, structlog.processors.JSONRenderer()]
    structlog.configure(
        processors=[*shared, structlog.stdlib.ProcessorFormatter.wrap_for_formatter],
        wrapper_class=structlog.make_filtering_bound_logger(level),
        logger_factory=structlog.stdlib.LoggerFactory(),
        cache_logger_on_first_use=False,
    )
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=shared,
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *last],
        )
    )
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level)


def silence() -> None:
    """No log at all from this process."""
    configure(level=logging.CRITICAL)
    logging.disable(logging.CRITICAL)


def _name_exception(_: Any, __: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    info = event.pop("exc_info", None)
    if info is True:
        info = sys.exc_info()
    if isinstance(info, tuple) and info[0] is not None:
        event["exception"] = info[0].__name__
    elif isinstance(info, BaseException):
        event["exception"] = type(info).__name__
    return event
