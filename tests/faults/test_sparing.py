"""What workers do beside their runs takes half of their time at most, however long it takes: runs wait meanwhile."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

import psycopg
import pytest
from botocore.exceptions import ConnectTimeoutError

from tests.anchors.conftest import on
from tests.cli.helpers import complete
from tests.conftest import Deployment
from tests.faults.evidence import wait
from worker import timetable
from worker.app import Site, make

pytestmark = pytest.mark.faults


def _site(deployment: Deployment) -> Site:
    settings = deployment.operations.settings
    site = Site(settings, timetable.load(settings), make(settings))
    deployment.opened.append(site.operations)
    return site


def _again(work: Callable[[], None], *, until: Callable[[], bool]) -> None:
    """Have it done from time to time, as beat does."""

    def done() -> bool:
        work()
        return until()

    wait(done)


def test_a_store_that_hangs(released: Deployment) -> None:
    """The rescue comes before all slices of runs, and while a receipt is pending it asks the store each minute."""
    complete(on(released, s3_bucket=""), archive=False)
    site, asked = _site(released), list[str]()

    def hang(**_: Any) -> None:
        asked.append("request")
        time.sleep(0.5)
        raise ConnectTimeoutError(endpoint_url="s3")

    store = site.operations.store
    assert store is not None
    store._client.meta.events.register("before-send.s3", hang)
    site.rescue()
    number = len(asked)
    assert number > 0
    site.rescue()
    assert len(asked) == number
    store._client.meta.events.unregister("before-send.s3", hang)
    written = "SELECT count(*) FROM paperclip_worker.anchors"
    _again(site.rescue, until=lambda: released.query(written) == [(1,)])


def test_tables_that_take_long_to_count(released: Deployment) -> None:
    measured = "SELECT max(measured_at) FROM paperclip_worker.backlog"
    site = _site(released)
    with psycopg.connect(released.environment["DATABASE_URL"]) as holder:
        holder.execute("LOCK TABLE activity_log")
        threading.Timer(1, holder.rollback).start()
        site.measure()
    before = released.query(measured)
    site.measure()
    assert released.query(measured) == before
    _again(site.measure, until=lambda: released.query(measured) != before)
