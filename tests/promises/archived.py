"""What the tests of restore-logs share: awkward rows, runs from start to end, a table as ids and hashes."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from datetime import timedelta
from typing import Any

from tasks.prune_logs import PruneLogs
from tasks.restore_logs import RestoreLogs
from tests.conftest import Deployment
from worker.job import Job
from worker.params import RunId
from worker.runner import Outcome
from worker.storage import Store

CONTROLS = "".join(map(chr, range(1, 32)))
TEXTS = ["", f"q\"u'o\\te \\n %s {{}} $1 {CONTROLS}\x7f\x85\u2028\ufeff größe 界 🦄 \x02\x01", "null", "\\."]
_DEEP = "[" * 200 + "{}" + "]" * 200
_DIGITS = f'{{"n": 1{"0" * 300}.{"1" * 40}, "e": 1E-300, "z": 0.10, "m": -0, "twice": 1, "twice": 2}}'
JSONS = [None, "null", '""', "[]", _DEEP, _DIGITS, json.dumps({text: [text, None] for text in TEXTS})]

# The columns of each log that take any text, and any JSON; `timestamp` has microseconds as it is.
LOGS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "activity_log": (("action", "actor_id"), ("details",)),
    "heartbeat_run_events": (("message", "color"), ("payload",)),
    "secret_access_events": (("config_path", "consumer_id", "error_code"), ()),
    "tool_call_events": (("error_message", "tool_name"), ("metadata", "request_summary")),
    "plugin_logs": (("message",), ("meta",)),
}


def spoil(deployment: Deployment, table: str) -> None:
    """Write awkward content into every row of a log: each text and each JSON value into some."""
    texts, jsons = LOGS[table]
    jsons = ("metadata",) if deployment.layout == "guide" else jsons
    dice = f'abs(hashtext("{table}".id::text))'
    sets = [f"{one} = (%s::text[])[{dice} / {7 + n} %% {len(TEXTS)} + 1]" for n, one in enumerate(texts)]
    sets += [f"{one} = ((%s::text[])[{dice} / {11 + n} %% {len(JSONS)} + 1])::jsonb" for n, one in enumerate(jsons)]
    statement = f"UPDATE {table} SET {', '.join(sets)}"
    deployment.query(statement, *([TEXTS] * len(texts)), *([JSONS] * len(jsons)))


def content(deployment: Deployment, table: str) -> dict[str, str]:
    """The hash of every column of each row by its id; without the rows by which runs say what they did."""
    said = " WHERE action NOT LIKE 'maintenance.%'" if table == "activity_log" else ""
    return dict(deployment.query(f"SELECT id::text, md5(t::text) FROM {table} t{said}"))


def complete(deployment: Deployment, job: Job, **settings: str) -> dict[str, Any]:
    """A run from start to end, in this process."""
    operations = deployment.with_settings(**settings) if settings else deployment.operations
    run = operations.start(job, actor="tester", via="test")
    assert operations.runner().work(run, seconds=math.inf) is Outcome.SETTLED
    return operations.result(run)


def prune(deployment: Deployment, table: str = "activity_log", *, bite_rows: str = "200", **more: Any) -> RunId:
    """A run of prune-logs that took some, but not all, rows of a log."""
    before = content(deployment, table)
    more.setdefault("older_than", timedelta(days=90 if table == "activity_log" else 20))
    job = PruneLogs(table=table, **more)
    result = complete(deployment, job, bite_rows=bite_rows)
    assert result["kept"], result
    assert 0 < result["rows"] < len(before)
    assert len(before) - len(content(deployment, table)) == result["rows"]
    return RunId(result["run"])


def half(
    deployment: Deployment,
    *,
    settings: Mapping[str, str] | None = None,
    meanwhile: Callable[[], object] = lambda: None,
) -> RunId:
    """A prune of the activity log that was stopped after some bites, with these settings by then."""
    small = deployment.with_settings(bite_rows="50")
    run = small.start(PruneLogs(), actor="tester", via="test")
    bites = iter(range(6))
    small.runner().work(run, seconds=math.inf, leave=lambda: next(bites, None) is None)
    meanwhile()
    deployment.with_settings(**(settings or {})).stop(str(run))
    result = deployment.operations.result(run)
    assert result["state"] == "stopped"
    assert 0 < result["rows"] < result["planned"]
    return RunId(str(run))


def restore(deployment: Deployment, run: RunId, **more: Any) -> dict[str, Any]:
    """A run of restore-logs that kept its promise."""
    settings = more.pop("settings", {})
    result = complete(deployment, RestoreLogs(run=run, **more), **settings)
    assert result["kept"], result
    return result


def store_of(deployment: Deployment) -> Store:
    store = deployment.operations.store
    assert store is not None
    return store


def objects_of(deployment: Deployment, run: RunId) -> list[str]:
    """The keys of a run's objects."""
    return [key for key in store_of(deployment).keys("") if f"run={run}/" in key and key.endswith(".zst")]
