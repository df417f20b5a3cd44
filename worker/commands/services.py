"""worker and beat: the long-running processes; schedule: what beat starts; metrics: what Prometheus reads."""

from __future__ import annotations

from typing import Any

import click

from worker.commands import common
from worker.errors import Exit


@click.command()
@click.option(
    "--concurrency",
    type=click.IntRange(1, 64),
    help="Processes that take bites at the same time.  [default: PAPERCLIP_WORKER_PARALLEL, or 2]",
)
def worker(concurrency: int | None) -> int:
    """Run a worker: it takes bites of runs until told to stop. SIGTERM lets the bites in flight finish."""
    from worker.config import Need

    settings = common.settings(Need.DATABASE, Need.BROKER, Need.SIGNING)
    from worker import app

    return app.run_worker(settings, concurrency=concurrency or settings.parallel)


@click.command()
def beat() -> None:
    """Run beat: it starts the recurring jobs of `schedule list` and looks for stalled runs. Two are safe."""
    from worker.config import Need

    settings = common.settings(Need.DATABASE, Need.BROKER, Need.SIGNING)
    from worker import beat as service

    service.run(settings)


@click.group()
def schedule() -> None:
    """What beat starts, and when."""


@schedule.command("list")
@common.json_option
def list_schedule(as_json: bool) -> None:
    """Every entry: when it last ran, when it is next due, how many due times it missed, and whether it never ran.

    The built-in entries as PAPERCLIP_WORKER_SCHEDULE_FILE changes them; crontabs are read in
    PAPERCLIP_WORKER_TIMEZONE. Needs no broker; without DATABASE_URL last, missed and never are left open.
    """
    from datetime import UTC, datetime

    from worker import layouts, ledger, standing, timetable

    settings, now = common.settings(), datetime.now(UTC)
    times = timetable.load(settings)
    if settings.database_url is not None:
        with common.operations().transaction(read_only=True) as connection:
            ledger.require(connection)
            found = standing.standings(connection, times.on(layouts.detect(connection)), now=now)
    else:
        found = standing.planned(times, now=now)
    rows = [one.to_json() for one in found]
    if as_json:
        common.print_json({"schedule": rows})
    else:
        header = ("entry", "crontab", "timezone", "job", "params", "enabled", "last", "next", "missed", "never")
        common.print_rows(header, [[_cell(row[name]) for name in header] for row in rows])


def _cell(value: Any) -> Any:
    """A value of `schedule list` for eyes."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, dict):
        last = f"{value['at']} {value['state']}" if "state" in value else None
        return last or " ".join(f"{name}={one}" for name, one in value.items())
    return value


@click.command()
@click.option("--measure", is_flag=True, help="Measure the backlog first: reads the tables of each schedule entry.")
@common.json_option
def metrics(measure: bool, as_json: bool) -> int:
    """Print the metrics of this deployment in Prometheus' text format, as `worker` serves them. Needs no worker.

    Exit status 1 when --measure could not measure the backlog of some entry; the others are printed.
    """
    from worker import backlog, timetable
    from worker import metrics as exposition

    deployment = common.operations()
    times = timetable.of(deployment)
    faults = backlog.measure(deployment, times) if measure else {}
    collector = exposition.LedgerCollector(deployment, times)
    if as_json:
        common.print_json({"metrics": exposition.samples(collector)})
    else:
        click.echo(exposition.text(collector), nl=False)
    if faults:
        why = "; ".join(f"{name}: {error}" for name, error in faults.items())
        click.echo(f"paperclip-worker: the backlog was not measured: {why}", err=True)
    return Exit.UNKEPT if faults else Exit.KEPT
