"""demo: everything at once, on servers of its own."""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from worker.commands import common
from worker.errors import Exit

if TYPE_CHECKING:
    from worker.demo import Demo


@click.command()
@click.option("--layout", type=click.Choice(["paperclip", "guide"]), default="paperclip", show_default=True)
@click.option(
    "--rows", type=click.IntRange(1_000, 5_000_000), default=240_000, show_default=True, help="Activity rows."
)
@click.option("--keep", is_flag=True, help="Leave the servers up and print the environment to use them.")
@click.option(
    "--stop",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="Stop the servers of a demo that was kept there, and remove it.",
)
@common.json_option
def demo(layout: str, rows: int, keep: bool, stop: Path | None, as_json: bool) -> int:
    """Run the main job on a deployment made for the purpose, through a real worker process.

    Starts PostgreSQL, Redis and an S3 server of its own on loopback ports, seeds companies, agents, tasks, runs
    and activity of 200 days, prunes what is older than 90 days into the archive, and verifies the receipt. Needs
    nothing that is installed beforehand and touches nothing that is configured.
    """
    from worker import embedded, logs

    logs.silence()
    if stop is not None:
        embedded.stop_kept(stop)
        shutil.rmtree(stop)
        return Exit.KEPT
    from worker import demo as demonstration

    demonstration.forget_settings(os.environ)
    # Whoever stops the demo wants its servers and their directory gone with it; 128 + the signal, as shells have it.
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    common.talk("starting PostgreSQL, Redis and S3")
    servers = embedded.start(outlive=keep, keep=keep)
    try:
        shown = demonstration.Demo(servers, layout)
        # boto3 finds credentials by its own chain, and the demo's servers have their own.
        os.environ.update({name: value for name, value in shown.environment.items() if name.startswith("AWS_")})
        status = _show(shown, rows, as_json=as_json)
        if keep:
            _print_environment(shown, servers.directory, as_json=as_json)
    except BaseException:
        servers.stop()
        raise
    if not keep:
        servers.stop()
    return status


def _show(shown: Demo, rows: int, *, as_json: bool) -> int:
    common.talk(f"seeding {rows:,} activity rows")
    shown.fill(rows)
    plan = shown.plan()
    if not as_json:
        from worker.commands import jobs

        jobs.print_plan(plan)
        click.echo()
    with shown.worker(os.environ) as ended:
        result = shown.run(partial(common.follow, leave=ended))
    objects = shown.objects(result["run"])
    receipts, flaws = shown.verify()
    kept = result["kept"] and not flaws and result["rows"] == plan.tally.total.rows
    if as_json:
        found: dict[str, Any] = {"plan": plan.to_json(), "run": result, "objects": objects}
        common.print_json({**found, "receipts": receipts, "chain_intact": not flaws, "kept": kept})
    else:
        common.print_result(result)
        click.echo(
            f"\narchive: {len(objects)} objects, {common.size(sum(one['bytes'] for one in objects))}, read back"
        )
        for one in objects[:5]:
            click.echo(f"  {one['rows']:>7,} rows  {one['key']}")
        click.echo(f"receipts: {receipts}, " + ("chain intact" if not flaws else "; ".join(flaws)))
    if not kept:
        click.echo("paperclip-worker: the demo did not keep its promise", err=True)
    return Exit.KEPT if kept else Exit.UNKEPT


def _print_environment(shown: Demo, directory: Path, *, as_json: bool) -> None:
    lines = [f"export {name}={shlex.quote(value)}" for name, value in shown.environment.items()]
    lines.append(f"# to end it: paperclip-worker demo --stop {shlex.quote(str(directory))}")
    # With --json stdout holds one object already.
    click.echo("\n" + "\n".join(lines), err=as_json)
