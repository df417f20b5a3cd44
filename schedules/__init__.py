"""What beat starts, and when: one line per recurring job. Times are UTC."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from tasks.prune_logs import PruneLogs
from worker.job import Job


@dataclass(frozen=True)
class Entry:
    """A five-field crontab (minute hour day-of-month month day-of-week) and the job it starts."""

    crontab: str
    job: Job


SCHEDULE: Mapping[str, Entry] = {
    "prune-activity-log": Entry("15 3 * * *", PruneLogs()),
    "prune-run-events": Entry("45 3 * * *", PruneLogs(table="heartbeat_run_events")),
}
