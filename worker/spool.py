"""Temporary files that stand in memory while they are small; a disk without room for one has a sentence."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from worker.errors import NoRoom

IN_MEMORY = 8 << 20


class Spool(tempfile.SpooledTemporaryFile[bytes]):
    """A temporary file of bytes. Raises NoRoom where the disk does not take it."""

    def __init__(self, most_in_memory: int = IN_MEMORY) -> None:
        super().__init__(max_size=most_in_memory)

    def write(self, data: Any) -> int:
        with _said():
            return super().write(data)

    def seek(self, *where: int) -> int:
        with _said():
            return super().seek(*where)

    def close(self) -> None:
        # What was not written yet would be now, and the fault of it hide the one that led here.
        with suppress(OSError):
            super().close()

    def __exit__(self, *_: object) -> None:
        self.close()


@contextmanager
def _said() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise NoRoom(
            f"there is no room for temporary files ({error.strerror}); make some in /tmp, or let TMPDIR name a "
            "directory that has it"
        ) from error
