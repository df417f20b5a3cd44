"""receipts: the evidence runs leave; keygen: the key that signs it."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from worker.commands import common
from worker.errors import Exit, Refused

if TYPE_CHECKING:
    from uuid import UUID

    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

    from worker.anchors import Anchor
    from worker.chains import Flaw, Receipt
    from worker.config import Settings


@click.group()
def receipts() -> None:
    """List, show, verify and anchor receipts: canonical JSON, chained by hash, signed with Ed25519."""


@receipts.command("list")
@click.option(
    "--limit", default=20, show_default=True, type=click.IntRange(1, 100_000), help="How many, newest first."
)
@common.json_option
def list_receipts(limit: int, as_json: bool) -> int:
    """The newest receipts, and where each is in the bucket. Exit status 1 when one was changed, which is left out."""
    from worker import anchors, audit, ledger

    with common.operations().transaction(read_only=True) as connection:
        ledger.require(connection)
        recent = audit.recent(connection, limit=limit)
        anchored = anchors.of(connection, [one.seq for one in recent])
    found: list[dict[str, Any]] = []
    changed: list[str] = []
    for one in recent:
        try:
            found.append(_shown(one, anchored))
        except Refused as refusal:
            changed.append(str(refusal))
    if as_json:
        common.print_json({"receipts": found})
    else:
        header = ("seq", "run", "job", "state", "settled_at", "hash", "anchor")
        rows = [one | {"anchor": one["anchor"] and one["anchor"]["key"]} for one in found]
        common.print_rows(header, [[one.get(name) for name in header] for one in rows])
    if changed:
        more = f" (and {len(changed) - 1} more)" if len(changed) > 1 else ""
        click.echo(f"paperclip-worker: {changed[0]}{more}", err=True)
    return Exit.UNKEPT if changed else Exit.KEPT


def _shown(receipt: Receipt, anchored: Mapping[int, Anchor]) -> dict[str, Any]:
    anchor = anchored.get(receipt.seq)
    return receipt.to_json() | {"anchor": anchor.to_json() if anchor else None}


@receipts.command()
@click.argument("seq", type=click.IntRange(1, 2**63 - 1))
@common.json_option
def show(seq: int, as_json: bool) -> None:
    """One receipt: with --json all of it, without just the signed text, byte for byte."""
    from worker import anchors, audit, ledger

    with common.operations().transaction(read_only=True) as connection:
        ledger.require(connection)
        receipt = audit.get(connection, seq)
        anchored = anchors.of(connection, [seq])
    if as_json:
        common.print_json(_shown(receipt, anchored))
    else:
        # In a file or a pipe nothing but what was signed.
        click.echo(receipt.body.encode(), nl=common.terminal(sys.stdout))


@receipts.command()
@click.option("--all", "every", is_flag=True, help="Write every receipt: to a bucket that is new, or has lost some.")
@common.json_option
def anchor(every: bool, as_json: bool) -> None:
    """Write receipts that are not in the bucket yet to it. Workers do so after each run and every minute.

    Where the bucket has Object Lock, each is kept from deletion for PAPERCLIP_WORKER_RECEIPT_LOCK.
    """
    from worker import anchors
    from worker.config import Need

    deployment = common.operations(Need.STORAGE, Need.SIGNING)
    written = deployment.anchor(every=every)
    if deployment.store is None:
        raise Refused(f"{Need.STORAGE.value} is not set")
    now = deployment.now()
    locked = all(one.locked_until and one.locked_until > now for one in written) and deployment.store.lockable()
    with deployment.transaction(read_only=True) as connection:
        pending = anchors.pending(connection)
    where = deployment.store.location + anchors.PREFIX
    if as_json:
        common.print_json({"anchored": len(written), "not_anchored": pending, "locked": locked, "location": where})
    else:
        click.echo(f"{len(written)} receipts written to {where}, {'locked' if locked else 'not locked'}")


@receipts.command()
@click.option(
    "--public-key",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    multiple=True,
    help="A public key (PEM), or several, to trust instead of those in the signing key's file; repeatable.",
)
@click.option("--from-s3", is_flag=True, help="Verify what is in the bucket. Needs no database.")
@click.option(
    "--ledger", "of", type=click.UUID, help="The id that `db init` printed: demand receipts of this ledger."
)
@click.option("--anchors", "both", is_flag=True, help="Verify database and bucket, and that they agree.")
@common.json_option
def verify(public_key: tuple[Path, ...], from_s3: bool, of: UUID | None, both: bool, as_json: bool) -> int:
    """Check the whole chain: changed, missing, reordered and forged receipts. Exit status 1 when it is broken."""
    from worker.config import Need

    if from_s3 and both:
        raise Refused("--from-s3 and --anchors cannot be combined; --anchors reads the bucket too")
    if of and not from_s3:
        raise Refused("--ledger goes with --from-s3; a database knows its own")
    needs = [*([] if public_key else [Need.SIGNING]), *([Need.STORAGE] if from_s3 or both else [])]
    settings = common.settings(*needs, *([] if from_s3 else [Need.DATABASE]))
    trusted = _trusted(public_key, settings)
    facts, flaws, text = _from_s3(settings, trusted, of) if from_s3 else _from_database(trusted, both=both)
    if as_json:
        head = {"receipts": facts.pop("receipts"), "intact": not flaws, "flaws": [one.to_json() for one in flaws]}
        common.print_json(head | facts)
    elif not flaws:
        click.echo(text)
    if flaws:
        first, more = flaws[0], f" (and {len(flaws) - 1} more)" if len(flaws) > 1 else ""
        what = common.on_one_line(first.what)
        click.echo(f"paperclip-worker: the chain is broken at receipt {first.seq}: {what}{more}", err=True)
    return Exit.UNKEPT if flaws else Exit.KEPT


def _trusted(public_key: tuple[Path, ...], settings: Settings) -> Sequence[Ed25519PublicKey]:
    from worker import audit

    if public_key or settings.signing_key_file is None:
        return [key for path in public_key for key in audit.load_public(path)]
    return audit.Signer.load(settings.signing_key_file).trusted


def _from_s3(
    settings: Settings, trusted: Sequence[Ed25519PublicKey], of: UUID | None
) -> tuple[dict[str, Any], list[Flaw], str]:
    from worker import anchors, witness
    from worker.storage import S3Store

    store = S3Store(settings)
    found = witness.verify(store, trusted, of=str(of) if of else None)
    facts = found.to_json() | {"location": store.location + anchors.PREFIX}
    lock = f"locked until {found.locked_until.isoformat()}" if found.locked and found.locked_until else "not locked"
    return (
        facts,
        found.flaws,
        f"{found.receipts} receipts, chain intact, {lock}; head {found.head[0]} {found.head[1]}"
        + (f"; ledger {found.ledger}" if found.ledger else ""),
    )


def _from_database(trusted: Sequence[Ed25519PublicKey], *, both: bool) -> tuple[dict[str, Any], list[Flaw], str]:
    from worker import anchors, books, ledger, witness
    from worker.config import Need

    deployment = common.operations(*([Need.STORAGE] if both else []))
    facts: dict[str, Any] = {}
    with deployment.transaction(scan=True, read_only=True) as connection:
        facts["ledger"] = str(ledger.require(connection))
        facts["not_anchored"] = anchors.pending(connection)
        count, flaws = books.verify(connection, trusted)
        if both and deployment.store is not None:
            comparison = witness.Comparison(anchors.books(connection))
            found = witness.verify(deployment.store, trusted, of=facts["ledger"], beside=comparison)
    if both:
        with deployment.transaction(read_only=True) as connection:
            comparison.catch_up(anchors.hashes(connection, comparison.beyond))
        facts["bucket"] = found.to_json()
        flaws = [*comparison.flaws, *flaws, *found.flaws]
    pending = facts["not_anchored"]
    agree = f", {pending} not in the bucket yet" if pending else ", and the bucket agrees"
    return {"receipts": count, **facts}, flaws, f"{count} receipts, chain intact{agree if both else ''}"


@click.command()
@click.argument("file", type=click.Path(path_type=Path))
@common.json_option
def keygen(file: Path, as_json: bool) -> None:
    """Make the Ed25519 key that signs receipts, in a new FILE only its owner can read.

    Prints the public key: give it to your auditor, for `receipts verify --public-key`.
    """
    from worker import audit

    signer = audit.keygen(file)
    pem = audit.public_pem(signer.public)
    if as_json:
        common.print_json({"file": str(file), "fingerprint": signer.fingerprint, "public_key": pem})
    else:
        click.echo(pem, nl=False)
        common.talk(f"fingerprint {signer.fingerprint}; set PAPERCLIP_WORKER_SIGNING_KEY_FILE={file}")
