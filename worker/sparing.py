"""What a worker does beside its runs, and before them: never for more than half of its time."""

from __future__ import annotations

import time
from collections.abc import Callable


class Sparing:
    """Some work that is asked for again and again, and may take longer than until the next time.

    It is left out for as long as it last took: a store that hangs, or tables that take long to count, would else
    keep a worker from its runs for good.
    """

    def __init__(self, work: Callable[[], None]) -> None:
        self._work = work
        self._not_before = float("-inf")

    def __call__(self) -> None:
        """Do it, or leave it out. Raises what the work raises."""
        began = time.monotonic()
        if began < self._not_before:
            return
        try:
            self._work()
        finally:
            ended = time.monotonic()
            self._not_before = ended + (ended - began)
