"""What beat starts, and when: one line per recurring job, read in PAPERCLIP_WORKER_TIMEZONE.

These are the defaults; a deployment changes them by its PAPERCLIP_WORKER_SCHEDULE_FILE (worker/timetable.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from tasks.archive_tasks import ArchiveTasks
from tasks.prune_logs import PruneLogs
from tasks.retire_master_key import RetireMasterKey
from worker.job import Job


@dataclass(frozen=True)
class Entry:
    """A five-field crontab (minute hour day-of-month month day-of-week) and the job it starts.

    `layout`: the one it is for, where it is not for each; on another it is off.
    """

    crontab: str
    job: Job
    enabled: bool = True
    layout: str | None = None


SCHEDULE: Mapping[str, Entry] = {
    "prune-activity-log": Entry("15 3 * * *", PruneLogs()),
    "prune-run-events": Entry("45 3 * * *", PruneLogs(table="heartbeat_run_events"), layout="paperclip"),
    "archive-tasks": Entry("15 4 * * *", ArchiveTasks()),
    "retire-master-key": Entry("15 5 * * *", RetireMasterKey()),
}
