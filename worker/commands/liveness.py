"""ping: whether workers and beat are alive, for the health checks of supervisors."""

from __future__ import annotations

import math

import click

from worker.commands import common
from worker.errors import Exit


@click.command()
@click.option("--beat", is_flag=True, help="Ask whether a beat is at work, in place of the workers.")
@click.option("--here", is_flag=True, help="Ask the worker of this host (or container) only.")
@click.option(
    "--timeout",
    type=click.FloatRange(0.1, 60),
    default=2.0,
    show_default=True,
    metavar="SECONDS",
    help="How long to wait for answers.",
)
@common.json_option
def ping(beat: bool, here: bool, timeout: float, as_json: bool) -> int:
    """Ask over the broker whether a worker answers. A busy worker answers too; nothing is started or changed.

    \b
    Health check of a worker:  paperclip-worker ping --here
    Health check of a beat:    paperclip-worker ping --beat

    Needs only PAPERCLIP_WORKER_BROKER_URL. All answers within the time are counted; with --here the first ends the
    wait. With several beats one works and the rest wait: --beat is about the one. One that was killed is missed when
    its lock in the broker lapses, after minutes.

    Exit status: 0 yes, 1 nobody answers, or the broker does not.
    """
    from worker.config import Need

    if beat and here:
        raise click.UsageError("--here is about workers; leave it out with --beat")
    if math.isnan(timeout):
        raise click.UsageError("--timeout: nan is no number of seconds")
    settings = common.settings(Need.BROKER)
    from worker import liveness, logs

    logs.silence()
    found = liveness.ask(settings, timeout=timeout, beat=beat, here=here)
    if as_json:
        common.print_json({"beat": found.beat} if beat else {"workers": list(found.workers)})
    elif found.beat:
        click.echo("a beat is at work")
    for name in () if as_json else found.workers:
        click.echo(name)
    if found.beat or found.workers:
        return Exit.KEPT
    click.echo(f"paperclip-worker: {liveness.silence(beat=beat, here=here)}", err=True)
    return Exit.UNKEPT
