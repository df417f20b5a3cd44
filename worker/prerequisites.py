"""What must be so before a master key is rotated, and what its operator should know."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING
from uuid import UUID

from worker import keyfile, ledger, masterkeys
from worker.errors import Refused, UnderWay
from worker.states import State

if TYPE_CHECKING:
    import sqlalchemy as sa

    from worker.census import Counted
    from worker.keychain import Keys
    from worker.masterkeys import Rotation
    from worker.reseal import Census

# Measured: what a row costs under the lock, with its indexes, in a small and in a large table.
_ROW_SECONDS = 35e-6
# Measured as well: what is made ready beside, the new row, its index entries and its WAL.
_ROW_BYTES, _COPIES = 2_500, 3


def require_exchangeable(keys: Keys, journal: Rotation | None, *, file: bool) -> None:
    """Refused when the keys are the same, or the key file is to be exchanged and cannot be."""
    path = keys.source.path
    if journal is None and keys.new == keys.old:
        raise Refused("the new key is the one in use already; nothing would be rotated")
    if not file:
        return
    if path is None:
        raise Refused("the key comes from PAPERCLIP_SECRETS_MASTER_KEY, which no file replaces; use --cutover manual")
    if journal is None or journal.cut_over_at is None:
        keyfile.only_name(path)
    keyfile.room(path)
    keyfile.writable(path)


def require_none_half_done(connection: sa.Connection, *, run: UUID | None, rollback: UUID | None) -> None:
    """UnderWay when another rotation exchanged the key and did not end, unless it is the one to roll back."""
    half = masterkeys.unfinished(connection, but=run)
    if half is None or half.run_id == rollback:
        return
    found = ledger.get(connection, half.run_id)
    if found is not None and found.state is State.UNKEPT:
        raise UnderWay(f"run {half.run_id} exchanged the key and ended unkept; see what it found, and --rollback it")
    raise UnderWay(f"run {half.run_id} exchanged the key and did not end; resume it, or --rollback it first")


def require_in_use(connection: sa.Connection, keys: Keys, journal: Rotation | None, *, file: bool) -> None:
    """Refused when journal and key file speak of different keys, or the rotation was rolled back or overtaken.

    Before the cut-over also when there is no way on or back: the new key was retired, the old one is under no seal.
    """
    require_way(connection, keys, journal)
    if journal is None:
        return
    undone = [one for one in masterkeys.every(connection) if one.rolls_back == journal.run_id]
    if any(one.cut_over_at for one in undone):
        raise Refused(f"run {journal.run_id} was rolled back; start a new run")
    if by := masterkeys.superseded(connection, journal):
        raise Refused(f"run {by} has exchanged the key since run {journal.run_id} began; start a new run")
    # Before the cut-over the new key may be in the file for a moment, until `settle_file` is reached.
    expected = {journal.new_key} if journal.cut_over_at else {journal.old_key, journal.new_key}
    found = keys.source.key.fingerprint
    if file and found not in expected:
        raise Refused(f"the key file holds {found}, not {' or '.join(sorted(expected))} of run {journal.run_id}")


def require_way(connection: sa.Connection, keys: Keys, journal: Rotation | None) -> None:
    """Refused when the new key was retired, or the old one is under no seal; as the ledger has it this moment."""
    if journal is not None and journal.cut_over_at:
        return
    if keys.new is not None and masterkeys.retired(connection, keys.new.fingerprint):
        raise Refused(f"the key {keys.new.fingerprint} was retired for good; rotate to another key")
    now = masterkeys.of(connection, journal.run_id) if journal else None
    if now is not None and now.sealed is None:
        raise Refused(f"the key {now.old_key} is no longer under seal in run {now.run_id}; start a new run")


def require_opened(keys: Keys, total: Census) -> None:
    """Refused when there is no ciphertext at all, or the key in use opens none."""
    old = keys.old.fingerprint
    if not (total.old or total.new or total.lost):
        raise Refused("there is no ciphertext of a master key in the database: is DATABASE_URL the right one?")
    if not (total.old or total.new):
        raise Refused(f"the key {old} opens none of the {total.lost} ciphertexts: it is not the deployment's key")


def require_allowed(lost: int, allowed: int) -> None:
    """Refused when more ciphertexts open with no key than were allowed."""
    if lost > allowed:
        raise Refused(
            f"{lost} ciphertexts open with no key (`plan` lists them); "
            f"--allow-undecryptable {lost} leaves them as they are"
        )


def notes(keys: Keys, counted: Counted) -> Iterator[str]:
    """What an operator should know: keys, ciphertext by carrier and key, the lock, what no key opens."""
    new = keys.new.fingerprint if keys.new else "a key still to be made"
    yield f"keys: from {keys.old.fingerprint} to {new}; keep both with every backup made under them"
    for name, one in counted.by_carrier.items():
        counts = f"{one.old} under the old key, {one.new} under the new, {one.lost} under neither"
        yield f"{name}: {counts}, {one.other} of another scheme"
    rows, size = sum(one.rows for one in counted.targets), sum(one.bytes for one in counted.targets)
    yield f"disk: the database grows by about {(rows * _ROW_BYTES + size * _COPIES) / 2**20:,.0f} MiB, WAL included"
    yield f"lock: writers wait about {max(0.1, rows * _ROW_SECONDS):.1f} s at the cut-over, readers a moment"
    if counted.total.odd:
        yield f"odd: {counted.total.odd} open to other bytes than their digest says; they stay as they are"
    yield from (f"undecryptable: {one}" for one in counted.listed)
    yield from (f"warning: {one}" for one in keys.source.warnings)
