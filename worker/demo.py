"""The demo: a believable deployment on embedded servers, the main job run on it by a real worker process."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

from tasks.prune_logs import PruneLogs
from worker import app, archive, audit, books, brokers, config, ledger, ledger_shards
from worker.errors import WorkerError
from worker.layouts import demo_schema
from worker.operations import Operations

if TYPE_CHECKING:
    from uuid import UUID

    from worker.embedded import Embedded
    from worker.plans import Plan

COMPANIES = 3
DAYS = 200
_KEY = "signing.pem"


class Demo:
    """One demo deployment. The servers are the caller's to stop."""

    def __init__(self, servers: Embedded, layout: str) -> None:
        self.layout = layout
        key = servers.directory / _KEY
        self.signer = audit.keygen(key)
        self.environment = {**servers.environment(), "PAPERCLIP_WORKER_SIGNING_KEY_FILE": str(key)}
        self.operations = Operations(config.load(self.environment))
        self.job = PruneLogs(older_than=timedelta(days=90))
        self._log = servers.directory / "worker.log"

    def fill(self, rows: int) -> None:
        """Create the schema, seed it, create the ledger."""
        with self.operations.engine.begin() as connection:
            demo_schema.create(connection, self.layout)
            demo_schema.seed(
                connection, self.layout, rows=rows, now=datetime.now(UTC), companies=COMPANIES, days=DAYS
            )
        ledger.init(self.operations.engine)

    def plan(self) -> Plan:
        return self.operations.plan(self.job)

    @contextmanager
    def worker(self, base: Mapping[str, str]) -> Iterator[None]:
        """A real worker process for as long as the block lasts. Raises WorkerError when it ended by itself."""
        with self._log.open("wb") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", "cli", "worker"],
                env={**base, **self.environment},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        try:
            yield
            if process.poll() is not None:
                raise WorkerError(f"the worker process ended by itself; its log is {self._log}")
        finally:
            process.terminate()
            process.wait(60)

    def run(self, follow: Callable[[Operations, UUID], Any]) -> dict[str, Any]:
        """Start the job as an operator would, follow it, and say what it did."""
        celery = app.make(self.operations.settings)
        brokers.require_own(celery, self.operations.require_ledger())
        run = self.operations.start(self.job, actor="demo", via="demo", reason="a demonstration")
        app.send_work(celery, run)
        follow(self.operations, run)
        return self.operations.result(run)

    def objects(self, run: str) -> list[dict[str, Any]]:
        """The archive objects of a run as they are in the bucket, each read whole and compared with the ledger."""
        found = self.operations.find(run)
        store = self.operations.store
        if store is None:
            raise WorkerError("the demo has no bucket")
        with self.operations.transaction(read_only=True) as connection:
            objects = ledger_shards.objects(connection, found.id)
        archive.require_intact(store, objects)
        return [
            {"key": one.key, "company": one.company, "rows": one.rows, "bytes": one.bytes, "sha256": one.sha256}
            for one in objects
        ]

    def verify(self) -> tuple[int, list[str]]:
        """How many receipts there are, and what is wrong with their chain."""
        with self.operations.transaction(scan=True, read_only=True) as connection:
            count, flaws = books.verify(connection, [self.signer.public])
        return count, [one.what for one in flaws]
