"""Replacing the app's key file while the server reads it.

The one principle: at every moment, and after a crash at any, the file is there and holds one whole key. A server that
finds none makes a random one and encrypts with it. So a file is written beside it, flushed, and renamed over it.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

from worker.errors import Refused
from worker.keyring import BadKey, MasterKey, decode, read

# What the names of all staged files begin with, and those of what is being written end with.
STAGED = "master.key.paperclip-worker-"
_PART = ".paperclip-worker-part"
_BYTES = 64 << 10
_FILES = 8


# The extended attribute with a file's access control list.
_ACL = "system.posix_acl_access"


class KeyFileChanged(Refused):
    """The key file holds another key than the one to be replaced."""


def staged_path(path: Path, name: str) -> Path:
    """Where `stage` puts the file `name`: beside the key file, links followed."""
    if not name or "/" in name or name in {".", ".."} or name == _real(path).name:
        raise ValueError("name must be that of another file in the directory")
    return _real(path).parent / name


def stage(path: Path, key: MasterKey, name: str) -> Path:
    """Write `key` into the file `name` beside the key file, for its owner alone; done before is done.

    Refused when another key is there, when the owner cannot be kept, or when it cannot be written.
    """
    target = staged_path(path, name)
    with _said(target):
        if os.path.lexists(target):
            if target.is_symlink() or read(target) != key:
                raise Refused(f"{target} exists and is not the key {key.fingerprint}; find out whose it is first")
            return target
        owner = _real(path).stat()
        _write(target, key, owner, 0o600)
    if read(target) != key:
        raise Refused(f"{target} does not read back as it was written")
    return target


def swap(path: Path, staged: Path, *, expected: MasterKey) -> None:
    """Put the staged key in the place of `expected`, in one step; the staged file stays. Done before is done.

    The file keeps owner, group and mode, or its server could not read it. Raises KeyFileChanged when the key file
    holds neither key. Nothing holds off another writer between that look and the rename.
    """
    real, key = _real(path), read(staged)
    found = read(real)
    if found != key:
        if found != expected:
            raise KeyFileChanged(
                f"{path} holds the key {found.fingerprint}, not {expected.fingerprint} which is to be replaced"
            )
        with _said(real):
            owner = real.stat()
            _write(real, key, owner, stat.S_IMODE(owner.st_mode) & 0o777, like=real)
        if read(real) != key:
            raise KeyFileChanged(f"{path} does not hold the key {key.fingerprint} that was just put there")
    with _said(real):
        _flush_directory(real.parent)


def unstage(staged: Path) -> None:
    """Remove a staged file and what a killed writer left of it; done before is done."""
    with _said(staged):
        staged.unlink(missing_ok=True)
        _partial(staged).unlink(missing_ok=True)
        _flush_directory(staged.parent)


def clear(path: Path) -> None:
    """Remove what a swap that was killed left of the next key file; done before is done."""
    real = _real(path)
    with _said(real):
        _partial(real).unlink(missing_ok=True)
        _flush_directory(real.parent)


def remove(path: Path, keys: Collection[MasterKey]) -> list[str]:
    """Remove what we left beside the key file with one of these keys in it, or the beginning of one; the names.

    Refused where that cannot be told, or not be done.
    """
    real = _real(path)
    with _said(real.parent, "searched"):
        ours = [one for one in real.parent.iterdir() if one.name.startswith(STAGED) or one.name.endswith(_PART)]
    found = [one for one in sorted(ours) if one != real and _holds(one, keys)]
    for one in found:
        with _said(one, "removed"):
            one.unlink()
    with _said(real.parent):
        _flush_directory(real.parent)
    return [one.name for one in found]


def _holds(path: Path, keys: Collection[MasterKey]) -> bool:
    with _said(path, "read"):
        if path.is_symlink() or not path.is_file():
            raise Refused(f"{path} is not a regular file; find out whose it is and remove it")
        content = path.read_bytes()
    # A write that was cut short holds no key, but nearly all of one.
    if any(key.text.encode("ascii").startswith(content) for key in keys):
        return True
    try:
        return decode(content) in keys
    except BadKey:
        return False


def room(path: Path) -> None:
    """Refused when the key file's directory has no room for the staged files."""
    directory = _real(path).parent
    with _said(directory):
        free = os.statvfs(directory)
    # No inodes at all: a filesystem that does not count them.
    if free.f_bavail * free.f_frsize < _BYTES or (free.f_files and free.f_favail < _FILES):
        raise Refused(f"{directory} has no room left for a new key file; free some space")


def only_name(path: Path) -> None:
    """Refused when the key file has another name: that would keep the old key, and who reads by it as well."""
    real = _real(path)
    with _said(real, "looked at"):
        names = real.stat().st_nlink
    if names > 1:
        raise Refused(
            f"{real} has {names} names (hard links), and only this one would get the new key; remove the others, or "
            "make them symbolic links to it"
        )


def writable(path: Path) -> None:
    """Refused when this process may not put a file of the same owner in the key file's place. Writes nothing."""
    real = _real(path)
    with _said(real):
        file, directory = real.stat(), real.parent.stat()
        read_only = os.statvfs(real.parent).f_flag & os.ST_RDONLY
    allowed = os.access(real.parent, os.W_OK | os.X_OK, effective_ids=os.access in os.supports_effective_ids)
    if read_only or not allowed:
        raise Refused(f"{real.parent} cannot be written; the key file is replaced by renaming another over it")
    me = os.geteuid()
    if me == 0:
        return
    if directory.st_mode & stat.S_ISVTX and me not in {file.st_uid, directory.st_uid}:
        raise Refused(f"{real.parent} is sticky and {real} belongs to user {file.st_uid}; run as that user")
    if file.st_uid != me or file.st_gid not in {os.getegid(), directory.st_gid, *os.getgroups()}:
        raise Refused(_whose(real, file))


def _write(target: Path, key: MasterKey, owner: os.stat_result, mode: int, *, like: Path | None = None) -> None:
    """Make or replace `target` in one step, with the access control list of `like`."""
    partial = _partial(target)
    partial.unlink(missing_ok=True)
    try:
        _write_new(partial, key.text.encode("ascii"), owner, mode)
        if like is not None:
            _give_list(partial, like)
        partial.replace(target)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    _flush_directory(target.parent)


def _write_new(path: Path, content: bytes, owner: os.stat_result, mode: int) -> None:
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    with os.fdopen(handle, "wb") as file:
        _give(handle, path, owner)
        os.fchmod(handle, mode)
        file.write(content)
        file.flush()
        os.fsync(handle)
    if path.read_bytes() != content:
        raise Refused(f"{path} does not read back as it was written")


def _give(handle: int, target: Path, owner: os.stat_result) -> None:
    mine = os.fstat(handle)
    uid = -1 if mine.st_uid == owner.st_uid else owner.st_uid
    gid = -1 if mine.st_gid == owner.st_gid else owner.st_gid
    if (uid, gid) == (-1, -1):
        return
    try:
        os.fchown(handle, uid, gid)
    except PermissionError:
        raise Refused(_whose(target, owner)) from None


def _give_list(target: Path, like: Path) -> None:
    """A server that reads the file by an access control list must be able to read the next."""
    if _ACL in _attributes(like):
        os.setxattr(target, _ACL, os.getxattr(like, _ACL))


def _attributes(path: Path) -> list[str]:
    try:
        return os.listxattr(path)
    except (AttributeError, OSError):  # no such thing on this system, or on this filesystem
        return []


def _whose(path: Path, owner: os.stat_result) -> str:
    return (
        f"{path} must belong to user {owner.st_uid} and group {owner.st_gid}, or the server cannot read it; "
        "run as that user, or as root"
    )


def _partial(target: Path) -> Path:
    return target.with_name(f".{target.name}{_PART}")


def _real(path: Path) -> Path:
    return Path(os.path.realpath(path))


def _flush_directory(directory: Path) -> None:
    handle = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def _said(path: Path, done: str = "written") -> Iterator[None]:
    """An OSError as one sentence about `path`."""
    try:
        yield
    except OSError as error:
        raise Refused(f"{path} cannot be {done}: {error.strerror}") from error
