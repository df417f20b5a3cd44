"""Ciphertext inside JSON text, opened and sealed anew, with every other byte of the text left as it is.

A document is never parsed and written again: numbers would not survive it. No database, no files.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from hashlib import sha256
from typing import TYPE_CHECKING, Any

from pydantic_core import from_json, to_json

from worker.envelopes import CODECS, Damaged, Pbkdf2, WrongKey

if TYPE_CHECKING:
    from worker.envelopes import Codec
    from worker.keyring import MasterKey

# Strings are stepped over whole, so that neither a brace nor the scheme's name inside one counts.
_PIECES = r'("scheme"\s*:\s*"%s")|"[^"\\]*(?:\\.[^"\\]*)*"|[{}]'
_SPACE = re.compile(r"[\s:,]*")
_DECODER = json.JSONDecoder()


@dataclass(slots=True)
class Census:
    """Envelopes by the key that opens them; `lost`: by neither; `odd`: to other bytes than their digest says.

    `other`: values of another scheme, which are none of ours.
    """

    old: int = 0
    new: int = 0
    lost: int = 0
    odd: int = 0
    other: int = 0

    def __iadd__(self, more: Census) -> Census:
        self.old += more.old
        self.new += more.new
        self.lost += more.lost
        self.odd += more.odd
        self.other += more.other
        return self

    def to_json(self) -> dict[str, int]:
        return {"old": self.old, "new": self.new, "lost": self.lost, "odd": self.odd, "other": self.other}


def resealer(
    scheme: str, old: MasterKey, new: MasterKey | None, *, salt: str | None = None, iterations: int | None = None
) -> Resealer:
    """From one key to the other; salt (hex) and iterations where the scheme seals under a derived key."""
    return Resealer(_codec(scheme, old, None, None), _codec(scheme, new, salt, iterations) if new else None)


@lru_cache(maxsize=16)
def _codec(scheme: str, key: MasterKey, salt: str | None, iterations: int | None) -> Codec:
    """One codec a process for each key: a derivation takes a good part of a second."""
    made = CODECS[scheme]
    if issubclass(made, Pbkdf2):
        return made(key.raw, salt=bytes.fromhex(salt) if salt else None, iterations=iterations)
    return made(key.raw)


class Resealer:
    """Opens with the old key or the new, seals with the new. `new` None: a look before there is one."""

    def __init__(self, old: Codec, new: Codec | None) -> None:
        self._old = old
        self._new = new
        self._marker = old.scheme.encode()
        self._tokens = re.compile(_PIECES % re.escape(old.scheme))

    def resealed(self, texts: Sequence[bytes], digests: Sequence[bytes]) -> Iterator[tuple[bytes | None, Census]]:
        """Each text with what the old key opens sealed with the new, and the keys; None where that is nothing.

        Each new envelope is opened again and compared before it is given out.
        """
        if self._new is None:
            raise ValueError("there is no key to seal with")
        # Nearly every text gives the first of these, which nobody may change.
        seal, plain, odd = self._new.seal_text, Census(old=1), Census(old=1, odd=1)
        for text, digest, plaintext in zip(texts, digests, self._old.open_texts(texts), strict=True):
            if plaintext is None:
                yield self._parsed(text, digest, self._new)
            else:
                yield seal(plaintext), odd if _differs(plaintext, digest) else plain

    def _parsed(self, text: bytes, digest: bytes, new: Codec) -> tuple[bytes | None, Census]:
        census, parts, last = Census(), list[bytes](), 0
        for start, end, envelope in self._envelopes(text):
            plaintext = self._classify(envelope, digest, census)
            if plaintext is None:
                continue
            sealed = new.reseal(envelope, plaintext)
            if new.open(sealed) != plaintext:
                raise RuntimeError("an envelope does not open to what was sealed in it")
            parts += [text[last:start], _written(text[start:end], envelope, sealed)]
            last = end
        return (b"".join([*parts, text[last:]]) if parts else None), census

    def counted(
        self, texts: Sequence[bytes], digests: Sequence[bytes], *, new_first: bool = False
    ) -> Iterator[Census]:
        """Which key opens what in each text, and whether to what has this SHA-256 (hex; empty: not asked).

        `new_first`: what opens with the new key is not tried with the old, which could not open it as well.
        """
        new = new_first and self._new is not None
        first = self._new if new_first and self._new is not None else self._old
        # As above.
        plain, odd = Census(new=int(new), old=int(not new)), Census(new=int(new), old=int(not new), odd=1)
        for text, digest, plaintext in zip(texts, digests, first.open_texts(texts), strict=True):
            if plaintext is None:
                yield self._count(text, digest, new_first=new_first)
            else:
                yield odd if _differs(plaintext, digest) else plain

    def _count(self, text: bytes, digest: bytes, *, new_first: bool) -> Census:
        if self._marker not in text:
            return Census(other=1)
        census = Census()
        for _, _, envelope in self._envelopes(text):
            plaintext = self._opened(self._new, envelope) if new_first else None
            if plaintext is not None:
                census.new += 1
            elif (plaintext := self._opened(self._old, envelope)) is not None:
                census.old += 1
            elif not new_first and (plaintext := self._opened(self._new, envelope)) is not None:
                census.new += 1
            else:
                census.lost += 1
                continue
            census.odd += _differs(plaintext, digest)
        return census

    def all_new(self, text: bytes) -> bool:
        """Whether each mention of the scheme in a text of whatever kind is an envelope that the new key opens."""
        try:
            one = self._count(text, b"", new_first=True)
        except (ValueError, IndexError, RecursionError):
            # Not as the carriers have it: escaped, or no JSON at all.
            return False
        return not (one.old or one.lost) and one.new == text.count(self._marker)

    def _classify(self, envelope: dict[str, Any], digest: bytes, census: Census) -> bytes | None:
        """Count an envelope by its key; its plaintext where that is the old one."""
        plaintext = self._opened(self._old, envelope)
        if plaintext is not None:
            census.old += 1
            census.odd += _differs(plaintext, digest)
        elif (other := self._opened(self._new, envelope)) is not None:
            census.new += 1
            census.odd += _differs(other, digest)
        else:
            census.lost += 1
        return plaintext

    @staticmethod
    def _opened(codec: Codec | None, envelope: dict[str, Any]) -> bytes | None:
        if codec is None:
            return None
        try:
            return codec.open(envelope)
        except (WrongKey, Damaged):
            return None

    def _envelopes(self, text: bytes) -> Iterator[tuple[int, int, dict[str, Any]]]:
        """Every object of the scheme in the text, with its place."""
        if self._marker not in text:
            return
        if text.find(b"{", 1) < 0:
            try:
                whole = from_json(text)
            except ValueError:
                # Deeper than this reader goes, which need not be within an envelope.
                pass
            else:
                if self._ours(whole):
                    yield 0, len(text), whole
                return
        yield from self._scan(text)

    def _scan(self, text: bytes) -> list[tuple[int, int, dict[str, Any]]]:
        # By characters, for the places in a bytes pattern would be the same only for ASCII. Nothing is parsed but
        # what says the scheme itself: whoever writes what is around it may nest it deeper than any parser goes.
        document = text.decode()
        ascii_only = len(document) == len(text)
        starts: list[int] = []
        ours: set[int] = set()
        found: list[tuple[int, int, dict[str, Any]]] = []
        for token in self._tokens.finditer(document):
            if token[0] == "{":
                starts.append(token.start())
            elif token[1]:
                ours.add(starts[-1])
            elif token[0] == "}":
                start, end = starts.pop(), token.end()
                if start in ours and self._ours(one := self._loaded(document[start:end])):
                    at = start if ascii_only else len(document[:start].encode())
                    stop = at + (end - start if ascii_only else len(document[start:end].encode()))
                    if found and found[-1][0] > at and self._opens(one):
                        # The app opens the outer envelope and ignores what else is in it.
                        while found and found[-1][0] > at:
                            found.pop()
                    found.append((at, stop, one))
        return found

    def _loaded(self, text: str) -> Any:
        try:
            return json.loads(text)
        except (ValueError, RecursionError):
            # Nested too deep, or with a number too long: an envelope all the same, and a damaged one to us.
            return {"scheme": self._old.scheme}

    def _opens(self, envelope: dict[str, Any]) -> bool:
        return any(self._opened(one, envelope) is not None for one in (self._old, self._new))

    def _ours(self, value: Any) -> bool:
        return isinstance(value, dict) and value.get("scheme") == self._old.scheme


def _differs(plaintext: bytes, digest: bytes) -> bool:
    return bool(digest) and sha256(plaintext).hexdigest().encode() != digest


def _written(text: bytes, before: dict[str, Any], after: dict[str, Any]) -> bytes:
    """An envelope's text with its new fields, every other field's text as it was."""
    if all(type(value) is str or type(value) is int for value in before.values()):
        return to_json(after)
    # Something else of the host's is in it, and numbers in that would not survive being parsed.
    document, parts, last, at = text.decode(), list[str](), 0, 1
    for _ in before:
        name, start = _DECODER.raw_decode(document, _skip(document, at))
        start = _skip(document, start)
        value, at = _DECODER.raw_decode(document, start)
        if after[name] != value:
            parts += [document[last:start], json.dumps(after[name])]
            last = at
    return "".join([*parts, document[last:]]).encode()


def _skip(document: str, at: int) -> int:
    found = _SPACE.match(document, at)
    return found.end() if found else at
