"""keys: the master keys there are and were, the permission for a manual cut-over, the end of an old key."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from worker.commands import common, jobs
from worker.errors import Refused

if TYPE_CHECKING:
    from uuid import UUID

    import sqlalchemy as sa

    from worker.ledger import Run
    from worker.masterkeys import Rotation
    from worker.operations import Operations


@click.group()
def keys() -> None:
    """Show master keys by fingerprint, let a manual cut-over go on, retire an old key.

    The key itself is exchanged by `run rotate-master-key`. A fingerprint is the first 12 hex digits of the key's
    SHA-256, as the server's own error texts have it.
    """


@keys.command("list")
@common.json_option
def list_keys(as_json: bool) -> None:
    """The key in use, and what every rotation made of the one before.

    Note the fingerprint with each backup: a backup needs the key it was made under.
    """
    from worker import ledger, masterkeys

    deployment = common.operations()
    with deployment.transaction(read_only=True) as connection:
        ledger.require(connection)
        rotations = masterkeys.every(connection)
        counted = {one["fingerprint"]: one for one in masterkeys.counts(connection)}
    undone = {one.rolls_back for one in rotations if one.finished_at}
    source, found = _in_use(deployment), [_row(one, undone) for one in rotations]
    if as_json:
        common.print_json({"in_use": source, "rotations": found, "keys": list(counted.values())})
        return
    click.echo(f"in use: {source['fingerprint'] or 'unknown'} ({source['from']})")
    header = ("old", "new", "state", "cut_over_at", "retire_after", "run")
    common.print_rows(header, [[one[name] for name in header] for one in found])


def _in_use(deployment: Operations) -> dict[str, Any]:
    from worker import keyring

    try:
        source = keyring.locate(deployment.settings)
    except Refused as error:
        return {"fingerprint": None, "from": str(error)}
    return {"fingerprint": source.key.fingerprint, "from": str(source.path or "PAPERCLIP_SECRETS_MASTER_KEY")}


def _row(one: Rotation, undone: set[UUID | None]) -> dict[str, Any]:
    if one.run_id in undone:
        state = "rolled back"
    elif one.retired_at:
        state = "retired"
    elif one.finished_at:
        state = "under seal"
    else:
        state = "exchanged, not ended" if one.cut_over_at else "not exchanged"
    times = {name: getattr(one, name) for name in ("cut_over_at", "finished_at", "retire_after", "retired_at")}
    return {
        "old": one.old_key,
        "new": one.new_key,
        "state": state,
        **{name: value.isoformat(timespec="seconds") if value else None for name, value in times.items()},
        "run": str(one.run_id),
    }


@keys.command()
@click.argument("run")
@click.option("--yes", "-y", is_flag=True, help="Do not ask; for scripts.")
@common.actor_option
@common.json_option
def switch(*, run: str, yes: bool, actor: str | None, as_json: bool) -> None:
    """Let RUN, a rotation with --cutover manual that waits, exchange the ciphertext.

    Stop every server first: one that still runs fails on every secret from then on. Afterwards give each of them the
    new key and start it; once one of them has sealed a secret with it, the run goes on.
    """
    from worker import ledger, masterkeys

    deployment = common.operations()
    found = deployment.find(run)
    with deployment.transaction(read_only=True) as connection:
        journal = _permissible(connection, found)
    common.require_answer(yes=yes, as_json=as_json, what="servers with the old key would fail on every secret")
    common.confirm(journal.new_key, yes=yes)
    with deployment.transaction() as connection:
        # Held, so that it cannot be settled meanwhile, which would leave the permission behind.
        held = ledger.get(connection, found.id, hold=True)
        if held is None:
            raise Refused(f"run {found.id} is being changed this moment; look again")
        _permissible(connection, held)
        masterkeys.permit(connection, found.id, by=actor or common.login())
    if as_json:
        common.print_json({"run": str(found.id), "new_key": journal.new_key, "permitted": True})
    else:
        click.echo(f"run {found.id} may cut over; then start the servers with the key {journal.new_key}")


def _permissible(connection: sa.Connection, run: Run) -> Rotation:
    """The journal of a run that waits for this word. Refused, saying why, where it does not."""
    from tasks.rotate_master_key import CUT_OVER
    from worker import ledger_shards, masterkeys
    from worker.states import State

    journal = masterkeys.of(connection, run.id)
    if journal is None or run.params.get("cutover") != "manual":
        raise Refused(f"run {run.id} is no rotation with --cutover manual that was laid out")
    if masterkeys.permitted(connection, journal):
        raise Refused(f"run {run.id} was permitted to cut over already, by {journal.permitted_by}")
    if run.state is not State.RUNNING:
        raise Refused(f"run {run.id} is {run.state}; only one that is under way can be permitted to cut over")
    if ledger_shards.stage(connection, run.id) != CUT_OVER:
        raise Refused(f"run {run.id} is not ready for the cut-over; `runs show {run.id}` says when it is")
    return journal


@keys.command(params=jobs.run_options())
@click.argument("fingerprint")
@click.option(
    "--allow-column",
    multiple=True,
    metavar="TABLE.COLUMN",
    help="Do not look for ciphertext in this unknown column; repeatable.",
)
@common.json_option
def retire(*, fingerprint: str, allow_column: tuple[str, ...], **given: Any) -> int:
    """Destroy the old key FINGERPRINT before its time, after one more sweep: `run retire-master-key --key`.

    No rollback to it is possible afterwards.
    """
    from tasks.retire_master_key import RetireMasterKey

    return jobs.start(RetireMasterKey(key=fingerprint, allow_column=allow_column), **given)
