"""A company of its own with tasks made by the test, on either layout, and what is asked of it."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any
from uuid import UUID, uuid4

import psycopg

from tasks.archive_tasks import ArchiveTasks
from tests.conftest import NOW, Deployment
from worker.operations import Operations
from worker.params import RunId
from worker.plans import Plan
from worker.runner import Outcome

OLD = timedelta(days=60)


@dataclass(frozen=True, kw_only=True)
class Board:
    """One new company of a deployment; on the released layout with an agent and an ended run, too."""

    deployment: Deployment
    company: UUID = field(default_factory=uuid4)
    agent: UUID = field(default_factory=uuid4)
    run: UUID = field(default_factory=uuid4)

    def __post_init__(self) -> None:
        if not self.released:
            self.sql("INSERT INTO companies (id, name) VALUES (%(company)s, 'Own')")
            return
        self.sql("INSERT INTO companies (id, name, issue_prefix) VALUES (%(company)s, 'Own', %(company)s::text)")
        self.sql("INSERT INTO agents (id, company_id, name) VALUES (%(agent)s, %(company)s, 'own')")
        self.sql(
            "INSERT INTO heartbeat_runs (id, company_id, agent_id, status) "
            "VALUES (%(run)s, %(company)s, %(agent)s, 'succeeded')"
        )

    @property
    def released(self) -> bool:
        return self.deployment.layout == "paperclip"

    @property
    def table(self) -> str:
        return "issues" if self.released else "tasks"

    def sql(self, statement: str, **names: Any) -> list[tuple[Any, ...]]:
        """Rows of a statement, committed; it may name the company, agent and run."""
        values = {"company": self.company, "agent": self.agent, "run": self.run, **names}
        with psycopg.connect(self.deployment.environment["DATABASE_URL"]) as connection:
            cursor = connection.execute(statement.encode(), values)
            return cursor.fetchall() if cursor.description else []

    def task(self, *, ended: datetime = NOW - OLD) -> UUID:
        """A task that ended then, and that nobody counts on."""
        task = uuid4()
        if self.released:
            self.sql(
                "INSERT INTO issues (id, company_id, title, status, completed_at, created_at, updated_at) "
                "VALUES (%(task)s, %(company)s, 'own', 'done', %(at)s, %(at)s, %(at)s)",
                task=task,
                at=ended,
            )
        else:
            self.sql(
                "INSERT INTO tasks (id, company_id, title, status, created_at, updated_at) "
                "VALUES (%(task)s, %(company)s, 'own', 'completed', %(at)s, %(at)s)",
                task=task,
                at=ended,
            )
        return task

    def tasks(self, number: int) -> list[UUID]:
        return [self.task(ended=NOW - OLD - timedelta(hours=hour)) for hour in range(number)]

    def hidden(self, task: UUID) -> bool:
        column = "hidden_at IS NOT NULL" if self.released else "archived"
        ((found,),) = self.sql(f"SELECT {column} FROM {self.table} WHERE id = %(task)s", task=task)
        return bool(found)

    def job(self, **fields: Any) -> ArchiveTasks:
        return ArchiveTasks(**{"company": (self.company,), **fields})

    def plan(self, **fields: Any) -> Plan:
        return self.deployment.operations.plan(self.job(**fields))

    def left(self, **fields: Any) -> dict[str, int]:
        """What a plan leaves of this company, by reason."""
        return {one.reason: one.rows for one in self.plan(**fields).left}

    def archive(self, *, on: Operations | None = None, now: datetime | None = None, **fields: Any) -> dict[str, Any]:
        """A run of the job on this company from start to end; what it says of itself."""
        operations = on or self.deployment.operations
        run = operations.start(self.job(**fields), actor="tester", via="test", now=now)
        assert operations.runner().work(run, seconds=math.inf) is Outcome.SETTLED
        return operations.result(run)

    def undo(self, result: dict[str, Any], **fields: Any) -> dict[str, Any]:
        return self.archive(undo=RunId(result["run"]), **fields)

    def world(self) -> str:
        """Every row of the tasks' table, as a hash."""
        ((found,),) = self.sql(f"SELECT md5(string_agg(t::text, '|' ORDER BY id)) FROM {self.table} t")
        return str(found)
