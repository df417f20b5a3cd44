"""A look for many words at once finds what one look a word would: a hold that is missed is a row that goes."""

from __future__ import annotations

import json
import random
import uuid
from concurrent.futures import ThreadPoolExecutor

from hypothesis import example, given
from hypothesis import strategies as st

from worker import needles
from worker.layouts.model import sought

# Few letters, so that words do occur; what regular expressions and JSON treat as their own; letters of many bytes.
_LETTERS = 'aAbB.*\\"\n/%üÜẞK😀'
_TEXT = st.text(_LETTERS, min_size=1, max_size=6)


@given(st.frozensets(_TEXT, max_size=8), st.text(_LETTERS, max_size=60))
@example(frozenset({"a"}), "")
@example(frozenset({'"'}), 'x"')
@example(frozenset({"é"}), "\xe9")
@example(frozenset({"aa", "a"}), "baab")
def test_finds_what_one_look_a_word_finds(words: frozenset[str], text: str) -> None:
    for line in (text, json.dumps(text, ensure_ascii=False), json.dumps(json.dumps(text, ensure_ascii=False))):
        assert needles.of(words).any_in(line.encode()) == any(one in _small(line) for one in sought(words, 3))


def _small(text: str) -> str:
    return text.encode().lower().decode()


def test_ids_are_found_wherever_they_are_in_many_lines() -> None:
    chooser = random.Random(5)

    def some() -> str:
        return str(uuid.UUID(int=chooser.getrandbits(128)))

    ids = [some() for _ in range(300)]
    lines = "\n".join(f'{{"id":"{some()}","details":"{some()}{some()}"}}' for _ in range(256)).encode()
    looking = needles.of(ids)
    assert not looking.any_in(lines)
    for one in ids:
        place = chooser.randrange(len(lines) + 1)
        assert looking.any_in(lines[:place] + one.encode() + lines[place:])
        assert looking.any_in(lines[:place] + one.upper().encode() + lines[place:])
        # All but its last character.
        assert not looking.any_in(lines[:place] + one[:-1].encode() + b"-" + lines[place:])


def test_threads_have_their_own() -> None:
    """Two scans at once in the same memory are an error of the library's."""
    text = b"x" * 200_000 + b"needle"

    def look(_: int) -> bool:
        return all(needles.of({"needle"}).any_in(text) for _ in range(200))

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(look, range(8)))
    assert needles.of({"needle"}) is needles.of({"needle"})


def test_no_word_is_in_no_text() -> None:
    assert not needles.of(()).any_in(b"anything")
