"""Text as Node.js reads it: what the app accepts, the worker must read as the same bytes.

Python's own functions differ in each of these, so a key or an envelope read with them can be another one.
"""

from __future__ import annotations

import binascii

# ECMAScript's WhiteSpace and LineTerminator: with U+FEFF, without U+0085 and U+001C to U+001F.
_BLANK = (
    "\t\n\v\f\r \u00a0\u1680\u2000\u2001\u2002\u2003\u2004\u2005\u2006\u2007\u2008\u2009\u200a"
    "\u2028\u2029\u202f\u205f\u3000\ufeff"
)
_ALPHABET = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"
_URL_SAFE = bytes.maketrans(b"-_", b"+/")
_OUTSIDE = bytes(sorted(set(range(256)) - set(_ALPHABET)))


def trim(text: str) -> str:
    """`String.prototype.trim`."""
    return text.strip(_BLANK)


def utf8(raw: bytes) -> str:
    """`buffer.toString("utf8")`: what cannot be decoded becomes U+FFFD, a BOM stays."""
    return raw.decode("utf-8", "replace")


def byte_string(text: str) -> bytes:
    """`Buffer.from(text, "utf8")`: a lone surrogate becomes U+FFFD."""
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace").encode()


def base64(text: str) -> bytes:
    """`Buffer.from(text, "base64")`; there is no text that it refuses.

    It reads `-` and `_` as `+` and `/`, steps over what is outside the alphabet, and ends at the first `=`.
    """
    try:
        return binascii.a2b_base64(text, strict_mode=True)
    except ValueError:
        return _lenient(text)


def _lenient(text: str) -> bytes:
    # Node looks only at the low byte of each UTF-16 unit.
    units = text.encode("utf-16-le", "surrogatepass")[::2]
    digits = units.partition(b"=")[0].translate(_URL_SAFE).translate(None, _OUTSIDE)
    if len(digits) % 4 == 1:
        digits = digits[:-1]
    return binascii.a2b_base64(digits + b"=" * (-len(digits) % 4))
