"""Canonical JSON: one byte string per value, so that a hash or signature of it means something."""

from __future__ import annotations

import hashlib
import json
from typing import Any


def encode(value: Any) -> bytes:
    """`value` as UTF-8 JSON with sorted keys and no white space.

    Floats are refused (TypeError): they have no one spelling across languages.
    """
    _no_floats(value)
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()


def digest(value: Any) -> str:
    """SHA-256 of `encode(value)`, in hex."""
    return hashlib.sha256(encode(value)).hexdigest()


def _no_floats(value: Any) -> None:
    if isinstance(value, float):
        raise TypeError("canonical JSON holds no floats")
    if isinstance(value, dict):
        for item in value.values():
            _no_floats(item)
    elif isinstance(value, list | tuple):
        for item in value:
            _no_floats(item)
