"""The demo: a believable deployment on embedded servers, the main job run on it by a real worker process."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tasks.prune_logs import PruneLogs
from worker import app, archive, audit, books, brokers, config, embedded, ledger, ledger_shards
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
# What settings of the machine, and of the libraries we use, begin with.
_CONFIGURED = ("PAPERCLIP_", "DATABASE_URL", "AWS_", "CELERY_", "PG", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY")
# Beside this package wherever it is installed; `-m cli` would take whatever the working directory calls so.
_CLI = Path(__file__).resolve().parents[1] / "cli.py"


def forget_settings(environment: MutableMapping[str, str]) -> None:
    """Take out what would lead the demo, or a library in it, to another server than its own."""
    for name in list(environment):
        if name.upper().startswith(_CONFIGURED) and name != embedded.PG_BIN:
            del environment[name]


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
    def worker(self, base: Mapping[str, str]) -> Iterator[Callable[[], bool]]:
        """A real worker process for as long as the block lasts; whether it has ended. Raises WorkerError if so."""
        with self._log.open("wb") as log:
            process = subprocess.Popen(  # noqa: S603 - our own program
                [sys.executable, str(_CLI), "worker"],
                env={**base, **self.environment},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        try:
            yield lambda: process.poll() is not None
            if process.poll() is not None:
                raise WorkerError(f"the worker process ended by itself: {self._last_words()}")
        finally:
            process.terminate()
            process.wait(60)

    def _last_words(self) -> str:
        return (self._log.read_text(errors="replace").splitlines() or ["it said nothing"])[-1]

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
