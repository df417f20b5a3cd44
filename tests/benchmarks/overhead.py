"""Print the share of an inline run that statements on the ledger take. Run by test_prune.py in its own process."""

from __future__ import annotations

import json
import math
import sys
import time
from datetime import timedelta
from typing import Any

import sqlalchemy as sa

from tasks.prune_logs import PruneLogs
from worker import config, logs
from worker.operations import Operations


def main() -> None:
    logs.silence()
    operations = Operations(config.load())
    spent = 0.0

    @sa.event.listens_for(operations.engine, "before_cursor_execute")
    def before(_c: Any, _cursor: Any, _statement: str, _p: Any, context: Any, _many: bool) -> None:
        context.began = time.perf_counter()

    @sa.event.listens_for(operations.engine, "after_cursor_execute")
    def after(_c: Any, _cursor: Any, statement: str, _p: Any, context: Any, _many: bool) -> None:
        nonlocal spent
        if "paperclip_worker." in statement or "set_config" in statement:
            spent += time.perf_counter() - context.began

    job = PruneLogs(older_than=timedelta(days=100), archive=False)
    run = operations.start(job, actor="bench", via="bench")
    began = time.perf_counter()
    operations.runner().work(run, seconds=math.inf)
    total = time.perf_counter() - began
    sys.stdout.write(json.dumps({"total": total, "ledger": spent, "share": spent / total}) + "\n")


main()
