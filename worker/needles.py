"""Many words looked for at once in the lines of an archive, as they are on their way out.

The server's strpos takes 0.15 µs a row and word; this takes as much for a thousand words, beside the server's work.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable
from functools import lru_cache

import hyperscan

from worker.layouts.model import sought


class Needles:
    """Words, and whether any of them is somewhere in a text, in small letters or capitals. For one thread."""

    def __init__(self, words: frozenset[str]) -> None:
        # In the line of a text column a word is written once more over than in the column.
        forms = [form.encode() for form in sought(words, 3)]
        self._found = False
        self._database = hyperscan.Database()
        if forms:
            flags = hyperscan.HS_FLAG_SINGLEMATCH | hyperscan.HS_FLAG_CASELESS
            self._database.compile(expressions=forms, flags=flags, literal=True)
        self._forms = forms

    def any_in(self, text: bytes) -> bool:
        """Whether some word is in the text, which is UTF-8 and has JSON in it."""
        if not self._forms:
            return False
        self._found = False
        self._database.scan(text, match_event_handler=self._note)
        return self._found

    def _note(self, *_: object) -> None:
        self._found = True


def of(words: Iterable[str]) -> Needles:
    """The words as they were made ready for this thread's last bites."""
    return _made(frozenset(words), threading.get_ident())


@lru_cache(maxsize=16)
def _made(words: frozenset[str], _thread: int) -> Needles:
    return Needles(words)
