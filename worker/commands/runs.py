"""runs: what is under way and what was."""

from __future__ import annotations

import click

from worker.commands import common
from worker.errors import Refused
from worker.states import SETTLED, State


@click.group()
def runs() -> None:
    """List, show, watch, stop and resume runs.

    RUN is the start of a run's id, or `last`.
    """


@runs.command("list")
@click.option(
    "--limit", default=20, show_default=True, type=click.IntRange(1, 10_000), help="How many, newest first."
)
@click.option("--state", type=click.Choice([state.value for state in State]), help="Only runs in this state.")
@common.json_option
def list_runs(limit: int, state: str | None, as_json: bool) -> None:
    """The newest runs."""
    from worker import ledger

    with common.operations().transaction(read_only=True) as connection:
        ledger.require(connection)
        found = ledger.recent(connection, limit=limit, state=State(state) if state else None)
    rows = [
        {
            "run": str(run.id),
            "job": run.job,
            "state": run.state.value,
            "created_at": run.created_at.isoformat(timespec="seconds"),
            "actor": run.actor,
            "via": run.via,
            "waiting": run.waiting,
        }
        for run in found
    ]
    if as_json:
        common.print_json({"runs": rows})
    else:
        header = ("run", "job", "state", "created_at", "actor", "via", "waiting")
        common.print_rows(header, [[row[name] for name in header] for row in rows])


@runs.command()
@click.argument("run")
@common.json_option
def show(run: str, as_json: bool) -> None:
    """One run: state, tally, what stayed, findings, rests, receipt."""
    deployment = common.operations()
    result = deployment.result(deployment.find(run).id)
    if as_json:
        common.print_json(result)
    else:
        common.print_result(result)


@runs.command()
@click.argument("run")
@common.json_option
def watch(run: str, as_json: bool) -> int:
    """Follow a run until it has settled; the exit status is the run's."""
    deployment = common.operations()
    found = deployment.find(run)
    if not common.follow(deployment, found.id):
        return common.detached(deployment, found.id, as_json=as_json)
    return common.report(deployment, found.id, as_json=as_json)


@runs.command()
@click.argument("run")
@common.json_option
def stop(run: str, as_json: bool) -> None:
    """Stop a run after the bites in flight. What is done stays done; `resume` goes on from there."""
    from worker.config import Need

    found = common.operations(Need.SIGNING).stop(run, told=common.told_to_stop)
    if as_json:
        common.print_json({"run": str(found.id), "state": found.state.value})
    else:
        click.echo(f"run {found.id} is {found.state.value}")


@runs.command()
@click.argument("run")
@click.option("--inline", is_flag=True, help="Work in this process, without a broker.")
@click.option("--detach", is_flag=True, help="Enqueue and leave.")
@common.json_option
def resume(run: str, inline: bool, detach: bool, as_json: bool) -> int:
    """Take up a stopped, failed or stalled run at its cursors, with the horizon it had."""
    from worker.config import Need

    if inline and detach:
        raise Refused("--inline and --detach exclude each other")
    deployment = common.operations(Need.SIGNING, *([] if inline else [Need.BROKER]))
    send = None if inline else common.broker(deployment)
    found = deployment.resume(run)
    with common.entered(found.id):
        if send is None:
            if common.work_inline(deployment, found.id) and deployment.find(str(found.id)).state not in SETTLED:
                common.talk("another worker has the rest of it in hand")
                common.follow(deployment, found.id)
        else:
            send(found.id)
            if detach:
                return common.left(deployment, found.id, as_json=as_json)
            if not common.follow(deployment, found.id):
                return common.detached(deployment, found.id, as_json=as_json)
        return common.report(deployment, found.id, as_json=as_json)
