"""Where a rehearsal's archives go: a store that keeps nothing."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterator
from typing import IO

from worker.errors import StorageFault
from worker.storage import Missing, Store


class _Last(threading.local):
    key, body = "", b""


class NullStore:
    """Holds each thread's last object only, long enough to be read back: what a rehearsal writes to.

    What it was not given it reads from the store behind it, and never writes there.
    """

    def __init__(self, behind: Store | None = None) -> None:
        self._behind = behind
        self._last = _Last()

    def put(self, key: str, body: IO[bytes], *, sha256: str) -> None:
        body.seek(0)
        self._last.key, self._last.body = key, body.read()
        if hashlib.sha256(self._last.body).hexdigest() != sha256:
            raise StorageFault(f"{key}: the body does not have the checksum it was announced with")

    def read(self, key: str) -> Iterator[bytes]:
        if key == self._last.key:
            yield self._last.body
        elif self._behind is not None:
            yield from self._behind.read(key)
        else:
            raise Missing(f"{key} is not in the store")

    def keys(self, prefix: str) -> list[str]:
        return [self._last.key] if self._last.key.startswith(prefix) else []

    def delete(self, keys: list[str]) -> None:
        if self._last.key in keys:
            self._last.key, self._last.body = "", b""
