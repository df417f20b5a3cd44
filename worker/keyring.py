"""The app's master key: where it is, and how its text is read. No database, and nothing is written.

What the server does on its own, the worker must not: it makes a new random key where it finds no file.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import secrets
import stat
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from worker import nodejs
from worker.config import Settings
from worker.errors import Refused

_HEX = re.compile(r"[0-9A-Fa-f]{64}")
_LARGEST_FILE = 64 << 10
_PURPOSE = "paperclip-worker retired master key"
KEY = "PAPERCLIP_SECRETS_MASTER_KEY"
KEY_FILE = "PAPERCLIP_SECRETS_MASTER_KEY_FILE"


class BadKey(Refused):
    """A text that is no master key, or a sealed one that does not open. Never quotes it."""


@dataclass(frozen=True, slots=True)
class MasterKey:
    """32 bytes that encrypt every secret of the app. Its fingerprint may be printed, nothing else of it."""

    raw: bytes = field(repr=False)

    def __post_init__(self) -> None:
        if len(self.raw) != 32:
            raise BadKey("a master key has 32 bytes")

    def __repr__(self) -> str:
        return f"MasterKey({self.fingerprint})"

    @property
    def fingerprint(self) -> str:
        """Twelve hex digits, the same as in the server's error texts."""
        return hashlib.sha256(self.raw).hexdigest()[:12]

    @property
    def text(self) -> str:
        """What stands in the file when the app makes it: 44 characters, no newline."""
        return base64.b64encode(self.raw).decode("ascii")


def generate() -> MasterKey:
    """A new random key."""
    return MasterKey(secrets.token_bytes(32))


def decode(raw: bytes | str) -> MasterKey:
    """The key that the server reads from this text or these bytes of a file. Raises BadKey."""
    text = nodejs.trim(nodejs.utf8(raw) if isinstance(raw, bytes) else raw)
    if _HEX.fullmatch(text):
        return MasterKey(bytes.fromhex(text))
    for read in (nodejs.base64, nodejs.byte_string):
        found = read(text)
        if text and len(found) == 32:
            return MasterKey(found)
    raise BadKey("not a master key: it must be 64 hex digits, base64 of 32 bytes, or a text of 32 bytes")


class Kind(StrEnum):
    """What the server takes the key from."""

    ENV = "env"
    FILE = "file"


@dataclass(frozen=True, kw_only=True)
class Source:
    """The master key as the server has it now. `path` is None exactly when the environment holds the key."""

    kind: Kind
    path: Path | None
    key: MasterKey
    warnings: tuple[str, ...] = ()


def locate(settings: Settings) -> Source:
    """The key a server with the same settings uses, in the server's own order.

    Refused, in a sentence that names the setting, where the server may use another file than the one we would see.
    """
    given = settings.secrets_master_key.get_secret_value() if settings.secrets_master_key else ""
    if nodejs.trim(given):
        try:
            return Source(kind=Kind.ENV, path=None, key=decode(given))
        except BadKey as error:
            raise BadKey(f"{KEY} is {error}") from None
    path = _path(settings)
    return Source(kind=Kind.FILE, path=path, key=read(path), warnings=tuple(_warnings(path)))


def read(path: Path) -> MasterKey:
    """The key in a file. Refused when there is none, it cannot be read, or it holds no key."""
    try:
        # A FIFO must not make us wait.
        handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except (FileNotFoundError, NotADirectoryError):
        raise Refused(
            f"there is no master key file {path}; put it back before the server needs it, because the server makes "
            f"a new random key in its place, or set {KEY_FILE} to the file the server uses"
        ) from None
    except OSError as error:
        raise Refused(f"the master key file {path} cannot be read: {error.strerror}") from None
    try:
        if not stat.S_ISREG(os.fstat(handle).st_mode):
            raise Refused(f"the master key file {path} is not a regular file; set {KEY_FILE} to the file itself")
        with os.fdopen(handle, "rb", closefd=False) as file:
            raw = file.read(_LARGEST_FILE + 1)
    except OSError as error:
        raise Refused(f"the master key file {path} cannot be read: {error.strerror}") from None
    finally:
        os.close(handle)
    if len(raw) > _LARGEST_FILE:
        raise BadKey(f"the master key file {path} is too large to be one")
    if not nodejs.trim(nodejs.utf8(raw)):
        raise BadKey(f"the master key file {path} is empty; restore the key from its backup")
    try:
        return decode(raw)
    except BadKey as error:
        raise BadKey(f"the master key file {path} is {error}") from None


def _path(settings: Settings) -> Path:
    if settings.secrets_master_key_file is not None:
        given = nodejs.trim(settings.secrets_master_key_file)
        if given:
            return _absolute(given, KEY_FILE)
    instance = _instance(settings)
    if settings.secrets_master_key_file is None:
        config = settings.paperclip_config
        configured = _configured(_absolute(config, "PAPERCLIP_CONFIG") if config else instance / "config.json")
        if configured is not None:
            return configured
        if config:
            raise Refused(f"PAPERCLIP_CONFIG names no file; make {config} readable here, or set {KEY_FILE}")
    return instance / "secrets" / "master.key"


def _instance(settings: Settings) -> Path:
    home = nodejs.trim(settings.paperclip_home or "")
    base = _absolute(home, "PAPERCLIP_HOME") if home else Path.home() / ".paperclip"
    return base / "instances" / settings.paperclip_instance_id


def _configured(config: Path) -> Path | None:
    """The key file that a config.json names; None when there is no such config. Refused when it cannot be told."""
    try:
        found = json.loads(config.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError):
        raise Refused(f"the server's configuration {config} cannot be read as JSON; set {KEY_FILE}") from None
    for name in ("secrets", "localEncrypted", "keyFilePath"):
        found = found.get(name) if isinstance(found, dict) else None
    if found is None:
        raise Refused(
            f"{config} has no secrets.localEncrypted.keyFilePath, and then the server uses the default instance "
            f"in its own home, whatever PAPERCLIP_HOME says; set {KEY_FILE} to the absolute path of the file it uses"
        )
    if not isinstance(found, str) or not found:
        raise Refused(f"secrets.localEncrypted.keyFilePath in {config} is not a path; set {KEY_FILE}")
    return _absolute(found, f"secrets.localEncrypted.keyFilePath in {config}")


def _absolute(given: str, name: str) -> Path:
    """The path as the server resolves it: by its letters, before any link in it is followed."""
    if given == "~" or given.startswith("~/"):
        raise Refused(
            f"{name} starts with ~, which the server does not expand or expands to its own home; write the absolute "
            "path of the file the server uses, there and here"
        )
    if not given.startswith("/") or "\0" in given:
        raise Refused(
            f"{name} is not an absolute path, and the server starts from a directory of its own; write the absolute "
            "path of the file the server uses, there and here"
        )
    return Path("/" + os.path.normpath(given).lstrip("/"))


def _warnings(path: Path) -> list[str]:
    found = []
    if path.is_symlink():
        found.append(f"{path} is a symbolic link; the file it leads to is the one that would be replaced")
    real = Path(os.path.realpath(path))
    file, directory = real.stat(), real.parent.stat()
    if file.st_mode & 0o077:
        found.append(
            f"{real} can be used by others than its owner (mode {file.st_mode & 0o777:04o}); chmod it to 0600"
        )
    if file.st_uid != directory.st_uid:
        found.append(f"{real} belongs to user {file.st_uid} and its directory to user {directory.st_uid}")
    return found


def seal_key(old: MasterKey, *, under: MasterKey) -> dict[str, str]:
    """A retired key, encrypted under its successor, to be kept as JSON for the backups of its time."""
    iv = secrets.token_bytes(12)
    sealed = AESGCM(under.raw).encrypt(iv, old.raw, _bound(old.fingerprint, under.fingerprint))
    parts = {"iv": iv, "tag": sealed[-16:], "ciphertext": sealed[:-16]}
    texts = {name: base64.b64encode(part).decode("ascii") for name, part in parts.items()}
    return {"v": "1", "purpose": _PURPOSE, "key": old.fingerprint, "under": under.fingerprint, **texts}


def open_key(sealed: Mapping[str, Any], *, under: MasterKey) -> MasterKey:
    """The key that `seal_key` sealed under `under`. Raises BadKey."""
    if sealed.get("v") != "1" or sealed.get("purpose") != _PURPOSE:
        raise BadKey("not a sealed master key of this release")
    if sealed.get("under") != under.fingerprint:
        raise BadKey(f"the retired key is not sealed under the key {under.fingerprint}")
    try:
        iv, tag, ciphertext = (base64.b64decode(sealed[name], validate=True) for name in ("iv", "tag", "ciphertext"))
        raw = AESGCM(under.raw).decrypt(iv, ciphertext + tag, _bound(sealed["key"], under.fingerprint))
        key = MasterKey(raw)
    except (InvalidTag, KeyError, TypeError, ValueError):
        raise BadKey("the sealed master key is damaged") from None
    if key.fingerprint != sealed["key"]:
        raise BadKey("the sealed master key is damaged")
    return key


def _bound(key: str, under: str) -> bytes:
    return f"{_PURPOSE}\0{key}\0{under}".encode()
