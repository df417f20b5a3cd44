"""What a layout says: which tables hold the logical things jobs speak of, and which rows must stay."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any
from uuid import UUID

import sqlalchemy as sa

from worker.errors import Refused


@dataclass(frozen=True, kw_only=True)
class Keep:
    """Rows that stay although they are old. `rows` is a predicate that is never NULL."""

    reason: str
    why: str
    rows: sa.ColumnElement[bool]
    reads: tuple[sa.Table, ...] = ()


@dataclass(frozen=True, kw_only=True)
class LogTable:
    """A table whose old rows may go.

    `age` decides how old a row is; NULL never expires. `company` is None where rows belong to the instance.
    `indexed`: an index on (company, age) exists. `record`: rows are worth an archive; credentials are not,
    and an archive of them would leave a secret behind.
    """

    table: sa.Table
    key: sa.Column[Any]
    age: sa.Column[datetime]
    company: sa.Column[UUID] | None
    indexed: bool
    record: bool = True
    keeps: tuple[Keep, ...] = ()
    # Which rows are security events, where the table tells.
    security: sa.ColumnElement[bool] | None = None

    def security_keep(self) -> tuple[Keep, ...]:
        """The keep that holds security events back; none where the table does not tell them."""
        if self.security is None:
            return ()
        return (Keep(reason="security", why="--keep-security was asked for", rows=self.security),)

    @property
    def name(self) -> str:
        return self.table.name

    def reads(self) -> tuple[sa.Table, ...]:
        """Every table a statement on this log touches, with the columns it needs."""
        return (self.table, *(table for keep in self.keeps for table in keep.reads))


@dataclass(frozen=True, kw_only=True)
class Activity:
    """One row of the host's activity log that tells a company what was done to it."""

    id: UUID
    company: str
    action: str
    at: datetime
    details: Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Layout:
    """One schema of the shared database, in the terms jobs use."""

    name: str
    companies: sa.Table
    logs: Mapping[str, LogTable]
    # Tables whose presence tells this layout from the others.
    landmarks: tuple[sa.Table, ...]
    record_activity: Callable[[Activity], sa.Insert]

    def log(self, name: str) -> LogTable:
        """The log table of that name. Refused, with the reason, when its rows must not be pruned."""
        if found := self.logs.get(name):
            return found
        from worker.layouts import catalogue  # noqa: PLC0415 - read only to say why not

        known = catalogue.load(self.name).tables.get(name)
        if known is not None:
            raise Refused(f"--table: {name} is never pruned by age: {known.reason or 'it is not a log'}")
        raise Refused(f"--table: {name} is not a log of the {self.name} layout; logs: {', '.join(self.logs)}")
