"""Envelopes: how a value is encrypted at rest. One codec per scheme, bound to one key; no database.

An IV is used once: two values under one key and IV give both away. So IVs are random, and a fork drops those drawn.
"""

from __future__ import annotations

import binascii
import hashlib
import os
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from functools import lru_cache
from typing import Any, ClassVar

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from worker import nodejs

KEY_BYTES = 32
IV_BYTES = 12
TAG_BYTES = 16
_SHORT_TAGS = frozenset({4, 8, 12, 13, 14, 15})  # besides 16, what Node's setAuthTag takes
_DRAWN = 512

ITERATIONS = 600_000
# One derivation of this many takes some seconds; a row that asks for more is refused, not served.
MOST_ITERATIONS = 10_000_000
_DERIVATIONS = 64
_SALT_BYTES = 16
_KDF = "pbkdf2-hmac-sha256"


class NotOurs(ValueError):
    """Material of another scheme, or no object at all: counted and left alone."""


class Damaged(ValueError):
    """Material of this scheme whose parts are missing, of the wrong type or of an impossible length."""


class WrongKey(ValueError):
    """Well formed, and not sealed under this key (or altered since)."""


_b64 = binascii.b2a_base64
# As jsonb prints an envelope of the app's with nothing else in it: what is before the IV, the tag, the ciphertext.
_BEFORE_IV, _BEFORE_TAG = b'{"iv": "', b'", "tag": "'
_BEFORE_CIPHERTEXT, _AFTER = b'", "scheme": "local_encrypted_v1", "ciphertext": "', b'"}'
_IV = len(_BEFORE_IV)
_IV_END = _IV + 16
_TAG = _IV_END + len(_BEFORE_TAG)
_TAG_END = _TAG + 24
_CIPHERTEXT = _TAG_END + len(_BEFORE_CIPHERTEXT)
_ivs: list[tuple[bytes, bytes]] = []  # with their base64
os.register_at_fork(after_in_child=_ivs.clear)


def _iv() -> tuple[bytes, bytes]:
    try:
        return _ivs.pop()
    except IndexError:
        pass
    raw = os.urandom(IV_BYTES * _DRAWN)
    text = binascii.b2a_base64(raw, newline=False)
    drawn = [(raw[12 * n : 12 * n + 12], text[16 * n : 16 * n + 16]) for n in range(_DRAWN)]
    last = drawn.pop()
    _ivs.extend(drawn)
    return last


class Codec(ABC):
    """Opens and seals the envelopes of one scheme under one key. Safe to share between threads."""

    scheme: ClassVar[str]

    def __init__(self, key: bytes) -> None:
        if len(key) != KEY_BYTES:
            raise ValueError(f"a master key has {KEY_BYTES} bytes")
        self._key = key

    @abstractmethod
    def open(self, material: Mapping[str, Any]) -> bytes:
        """The plaintext. Raises NotOurs, Damaged or WrongKey, none of which quotes the material."""

    @abstractmethod
    def seal(self, plaintext: bytes) -> dict[str, str | int]:
        """A fresh envelope, with exactly the fields the app writes."""

    def reseal(self, material: Mapping[str, Any], plaintext: bytes) -> dict[str, Any]:
        """A fresh envelope in the place of `material`, whose other fields it keeps. Raises NotOurs."""
        self._ours(material)
        return {**material, **self.seal(plaintext)}

    def open_texts(self, texts: Iterable[bytes]) -> Iterator[bytes | None]:
        """Of each text the plaintext, where it is an envelope as jsonb prints it that opens.

        None: it may have to be parsed, or not open. A third of the time of `open`, for what nearly every row is.
        """
        return (None for _ in texts)

    def seal_text(self, plaintext: bytes) -> bytes:
        """A fresh envelope as JSON text."""
        raise NotImplementedError

    def _ours(self, material: Mapping[str, Any]) -> None:
        # The look at the exact type spares the slow one at an ABC, once an envelope.
        if (type(material) is not dict and not isinstance(material, Mapping)) or material.get(
            "scheme"
        ) != self.scheme:
            raise NotOurs(f"not {self.scheme}")


class LocalEncrypted(Codec):
    """The app's: AES-256-GCM under the master key itself, no AAD.

    Reads all that the app reads, except IVs under 8 bytes, which neither of the two ever writes.
    """

    scheme = "local_encrypted_v1"

    def __init__(self, key: bytes) -> None:
        super().__init__(key)
        self._aead = AESGCM(key)

    def open(self, material: Mapping[str, Any]) -> bytes:
        self._ours(material)
        return _open(self._aead, self._key, material)

    def seal(self, plaintext: bytes) -> dict[str, str | int]:
        iv, text = _iv()
        tag, ciphertext = _sealed(self._aead, iv, plaintext)
        return {"scheme": self.scheme, "iv": text.decode("ascii"), "tag": tag, "ciphertext": ciphertext}

    def open_texts(self, texts: Iterable[bytes]) -> Iterator[bytes | None]:
        # Once a row, millions of times: slices take a quarter of what a pattern takes.
        decode, decrypt = binascii.a2b_base64, self._aead.decrypt
        for text in texts:
            if (
                text[:_IV] != _BEFORE_IV
                or text[_IV_END:_TAG] != _BEFORE_TAG
                or text[_TAG_END:_CIPHERTEXT] != _BEFORE_CIPHERTEXT
                or text[-2:] != _AFTER
            ):
                yield None
                continue
            try:
                # Strict: nothing but the alphabet, so there is no quote and no escape in what was taken.
                iv = decode(text[_IV:_IV_END], strict_mode=True)
                sealed = decode(text[_CIPHERTEXT:-2], strict_mode=True)
                yield decrypt(iv, sealed + decode(text[_TAG:_TAG_END], strict_mode=True), None)
            except (InvalidTag, ValueError):
                yield None

    def seal_text(self, plaintext: bytes) -> bytes:
        """Opened again before it is given out. Raises RuntimeError when that gives anything else."""
        iv, text = _iv()
        sealed = self._aead.encrypt(iv, plaintext, None)
        if self._aead.decrypt(iv, sealed, None) != plaintext:
            raise RuntimeError("an envelope does not open to what was sealed in it")
        tag, ciphertext = _b64(sealed[-TAG_BYTES:], newline=False), _b64(sealed[:-TAG_BYTES], newline=False)
        return _BEFORE_IV + text + _BEFORE_TAG + tag + _BEFORE_CIPHERTEXT + ciphertext + _AFTER


class Pbkdf2(Codec):
    """The guide's: AES-256-GCM under a key derived from the master key, with salt and iterations in the envelope.

    All that one codec seals shares one derivation: `salt` and `iterations` when they are given, else a new salt and
    the iterations of the first envelope it met, and never fewer than ITERATIONS.
    """

    scheme = "pbkdf2_aes_256_gcm_v1"

    def __init__(self, key: bytes, *, salt: bytes | None = None, iterations: int | None = None) -> None:
        super().__init__(key)
        if iterations is not None and not 1 <= iterations <= MOST_ITERATIONS:
            raise ValueError(f"iterations must be 1 to {MOST_ITERATIONS}")
        self._salt = binascii.b2a_base64(salt or os.urandom(_SALT_BYTES), newline=False).decode("ascii")
        self._iterations = iterations
        self._derived = lru_cache(maxsize=_DERIVATIONS)(self._derive)

    @property
    def derivation(self) -> tuple[bytes, int]:
        """Salt and iterations of what it seals; from the first look on they stay."""
        if self._iterations is None:
            self._iterations = ITERATIONS
        return binascii.a2b_base64(self._salt), self._iterations

    def open(self, material: Mapping[str, Any]) -> bytes:
        salt, iterations = self._parameters(material)
        key, aead = self._derived(salt, iterations)
        return _open(aead, key, material)

    def seal(self, plaintext: bytes) -> dict[str, str | int]:
        if self._iterations is None:
            self._iterations = ITERATIONS
        _, aead = self._derived(self._salt, self._iterations)
        iv, text = _iv()
        tag, ciphertext = _sealed(aead, iv, plaintext)
        return {
            "scheme": self.scheme,
            "kdf": _KDF,
            "iterations": self._iterations,
            "salt": self._salt,
            "iv": text.decode("ascii"),
            "tag": tag,
            "ciphertext": ciphertext,
        }

    def reseal(self, material: Mapping[str, Any], plaintext: bytes) -> dict[str, Any]:
        self._parameters(material)
        return super().reseal(material, plaintext)

    def _parameters(self, material: Mapping[str, Any]) -> tuple[str, int]:
        self._ours(material)
        salt, iterations = material.get("salt"), material.get("iterations")
        if material.get("kdf") != _KDF or type(salt) is not str or not salt or type(iterations) is not int:
            raise Damaged("kdf, salt or iterations are not as they must be")
        if not 1 <= iterations <= MOST_ITERATIONS:
            raise Damaged(f"iterations are not 1 to {MOST_ITERATIONS}")
        if self._iterations is None:
            # One envelope must not talk us down: that would weaken all that are sealed after it.
            self._iterations = max(iterations, ITERATIONS)
        return salt, iterations

    def _derive(self, salt: str, iterations: int) -> tuple[bytes, AESGCM]:
        key = hashlib.pbkdf2_hmac("sha256", self._key, nodejs.base64(salt), iterations, KEY_BYTES)
        return key, AESGCM(key)


CODECS: dict[str, type[Codec]] = {codec.scheme: codec for codec in (LocalEncrypted, Pbkdf2)}


def _open(aead: AESGCM, key: bytes, material: Mapping[str, Any]) -> bytes:
    try:
        iv, tag, ciphertext = material["iv"], material["tag"], material["ciphertext"]
    except KeyError:
        raise Damaged("iv, tag or ciphertext is missing") from None
    if not type(iv) is type(tag) is type(ciphertext) is str:
        raise Damaged("iv, tag or ciphertext is not a text")
    iv, tag, ciphertext = nodejs.base64(iv), nodejs.base64(tag), nodejs.base64(ciphertext)
    try:
        if len(tag) == TAG_BYTES:
            return aead.decrypt(iv, ciphertext + tag, None)
        if len(tag) in _SHORT_TAGS:
            return _open_short(key, iv, tag, ciphertext)
    except InvalidTag:
        raise WrongKey("not sealed under this key") from None
    except ValueError:
        raise Damaged(f"an IV of {len(iv)} bytes") from None
    raise Damaged(f"a tag of {len(tag)} bytes")


def _open_short(key: bytes, iv: bytes, tag: bytes, ciphertext: bytes) -> bytes:
    mode = modes.GCM(iv, tag, min_tag_length=len(tag))
    decryptor = Cipher(algorithms.AES(key), mode).decryptor()
    return decryptor.update(ciphertext) + decryptor.finalize()


def _sealed(aead: AESGCM, iv: bytes, plaintext: bytes) -> tuple[str, str]:
    """Tag and ciphertext, in base64."""
    sealed = aead.encrypt(iv, plaintext, None)
    tag = binascii.b2a_base64(sealed[-TAG_BYTES:], newline=False)
    ciphertext = binascii.b2a_base64(sealed[:-TAG_BYTES], newline=False)
    return tag.decode("ascii"), ciphertext.decode("ascii")
