"""worker and beat: the long-running processes; schedule: what beat starts."""

from __future__ import annotations

import os
from typing import Any

import click

from worker.commands import common


@click.command()
@click.option(
    "--concurrency",
    type=click.IntRange(1, 64),
    help="Processes that take bites at the same time.  [default: PAPERCLIP_WORKER_PARALLEL, or 2]",
)
def worker(concurrency: int | None) -> None:
    """Run a worker: it takes bites of runs until told to stop. SIGTERM lets the bites in flight finish."""
    from worker.config import Need

    settings = common.settings(Need.DATABASE, Need.BROKER, Need.SIGNING)
    from worker import app

    app.run_worker(settings, concurrency=concurrency or settings.parallel)


@click.command()
def beat() -> None:
    """Run beat: it starts the recurring jobs of `schedule list` and looks for stalled runs. Two are safe."""
    from worker.config import Need

    settings = common.settings(Need.DATABASE, Need.BROKER, Need.SIGNING)
    from worker import app

    app.run_beat(settings)


@click.group()
def schedule() -> None:
    """What beat starts, and when."""


@schedule.command("list")
@common.json_option
def list_schedule(as_json: bool) -> None:
    """Every entry with its crontab (UTC), job, parameters and, where a ledger can be read, its last run."""
    import schedules
    from worker import params

    last = _last_runs() if os.environ.get("DATABASE_URL") or os.environ.get("DATABASE_URL_FILE") else {}
    rows: list[dict[str, Any]] = [
        {
            "entry": name,
            "crontab": entry.crontab,
            "job": entry.job.name,
            "params": params.to_json(entry.job),
            "last": last.get(f"schedule:{name}"),
        }
        for name, entry in schedules.SCHEDULE.items()
    ]
    if as_json:
        common.print_json({"schedule": rows})
        return
    texts = [
        (
            row["entry"],
            row["crontab"],
            row["job"],
            " ".join(f"{k}={v}" for k, v in row["params"].items()),
            row["last"],
        )
        for row in rows
    ]
    common.print_rows(("entry", "crontab", "job", "params", "last"), texts)


def _last_runs() -> dict[str, str]:
    from worker import ledger

    with common.operations().transaction(read_only=True) as connection:
        ledger.require(connection)
        return ledger.last_by_origin(connection)
