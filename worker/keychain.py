"""Where the keys of a rotation are to be had: in the key file, staged beside it, under the seals of other keys."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING
from uuid import UUID

import sqlalchemy as sa

from worker import keyfile, keyring, masterkeys
from worker.errors import Refused

if TYPE_CHECKING:
    from worker.keyring import MasterKey
    from worker.masterkeys import Rotation
    from worker.means import Means


@dataclass(frozen=True, kw_only=True)
class Keys:
    """The two keys of a rotation, and the key file where there is one. `new` is None before it was made."""

    old: MasterKey
    new: MasterKey | None
    source: keyring.Source


def journalled(means: Means, rotation: Rotation, *, new_key_file: str | None) -> Keys:
    """The keys a rotation is about, wherever they are by now. Refused, by fingerprint, when one is nowhere."""
    source = keyring.locate(means.settings)
    found = {key.fingerprint: key for key in _candidates(source, rotation, new_key_file)}
    unseal(means.connection, found)
    for name, what in ((rotation.new_key, "new"), (rotation.old_key, "old")):
        if name not in found:
            raise Refused(
                f"the {what} master key {name} is nowhere to be found by this worker; put it back where it was"
            )
    return Keys(old=found[rotation.old_key], new=found[rotation.new_key], source=source)


def seals(connection: sa.Connection) -> list[Rotation]:
    """Every rotation that has its old key under seal, come to its end or not."""
    return [one for one in masterkeys.every(connection) if one.sealed is not None]


def reachable(connection: sa.Connection, start: str, *, without: Collection[str] = ()) -> set[str]:
    """The keys that can be had from this one, by the seals they lie under, once those `without` are destroyed."""
    sealed, found, more = seals(connection), set[str](), {start}
    while more:
        found |= more
        more = {one.old_key for one in sealed if one.new_key in found} - found - set(without)
    return found


def unseal(connection: sa.Connection, found: dict[str, MasterKey]) -> None:
    """Add to the keys found every older one under their seal, and under the seals of those."""
    # One key may lie under several seals: rotations that were rolled back, and tried again.
    sealed, before = seals(connection), -1
    while len(found) > before:
        before = len(found)
        for one in sealed:
            if one.old_key not in found and one.sealed and (under := found.get(one.new_key)):
                found[one.old_key] = keyring.open_key(one.sealed, under=under)


def returning(source: keyring.Source, parent: Rotation | None, run: UUID) -> Keys:
    """The keys of a rollback: from the one a rotation brought to the one it replaced. Refused when it cannot be."""
    if parent is None or parent.cut_over_at is None:
        raise Refused(f"--rollback: run {run} exchanged no master key")
    if parent.sealed is None:
        raise Refused(f"--rollback: the key {parent.old_key} was retired for good; nothing here can bring it back")
    if source.key.fingerprint != parent.new_key:
        raise Refused(f"--rollback: the key in use is {source.key.fingerprint}, not {parent.new_key} of run {run}")
    return Keys(old=source.key, new=keyring.open_key(parent.sealed, under=source.key), source=source)


def _candidates(source: keyring.Source, rotation: Rotation, new_key_file: str | None) -> Iterator[MasterKey]:
    yield source.key
    if source.path is not None and (staged := keyfile.staged_path(source.path, rotation.staged)).exists():
        yield keyring.read(staged)
    if new_key_file is not None and Path(new_key_file).exists():
        yield keyring.read(Path(new_key_file))
