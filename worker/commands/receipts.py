"""receipts: the evidence runs leave; keygen: the key that signs it."""

from __future__ import annotations

from pathlib import Path

import click

from worker.commands import common
from worker.errors import Exit


@click.group()
def receipts() -> None:
    """List, show and verify receipts: canonical JSON, chained by hash, signed with Ed25519."""


@receipts.command("list")
@click.option(
    "--limit", default=20, show_default=True, type=click.IntRange(1, 100_000), help="How many, newest first."
)
@common.json_option
def list_receipts(limit: int, as_json: bool) -> None:
    """The newest receipts."""
    from worker import audit, ledger

    with common.operations().transaction(read_only=True) as connection:
        ledger.require(connection)
        found = [one.to_json() for one in audit.recent(connection, limit=limit)]
    if as_json:
        common.print_json({"receipts": found})
    else:
        header = ("seq", "run", "job", "state", "settled_at", "hash")
        common.print_rows(header, [[one[name] for name in header] for one in found])


@receipts.command()
@click.argument("seq", type=click.IntRange(1, 2**63 - 1))
@common.json_option
def show(seq: int, as_json: bool) -> None:
    """One receipt: with --json all of it, without just the signed text, byte for byte."""
    from worker import audit, ledger

    with common.operations().transaction(read_only=True) as connection:
        ledger.require(connection)
        receipt = audit.get(connection, seq)
    if as_json:
        common.print_json(receipt.to_json())
    else:
        click.echo(receipt.body)


@receipts.command()
@click.option(
    "--public-key",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    multiple=True,
    help="A public key (PEM) to trust instead of the configured signing key; repeatable.",
)
@common.json_option
def verify(public_key: tuple[Path, ...], as_json: bool) -> int:
    """Check the whole chain: changed, missing, reordered and forged receipts. Exit status 1 when it is broken."""
    from worker import audit, ledger
    from worker.config import Need

    deployment = common.operations(*([] if public_key else [Need.SIGNING]))
    trusted = [audit.load_public(path) for path in public_key]
    if deployment.settings.signing_key_file is not None and not public_key:
        trusted = [audit.Signer.load(deployment.settings.signing_key_file).public]
    with deployment.transaction(scan=True, read_only=True) as connection:
        ledger.require(connection)
        count, flaws = audit.verify(connection, trusted)
    if as_json:
        common.print_json({"receipts": count, "intact": not flaws, "flaws": [one.to_json() for one in flaws]})
    elif not flaws:
        click.echo(f"{count} receipts, chain intact")
    if flaws:
        first, more = flaws[0], f" (and {len(flaws) - 1} more)" if len(flaws) > 1 else ""
        click.echo(f"paperclip-worker: the chain is broken at receipt {first.seq}: {first.what}{more}", err=True)
    return Exit.UNKEPT if flaws else Exit.KEPT


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
