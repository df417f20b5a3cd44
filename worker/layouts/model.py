"""What a layout says: which tables hold the logical things jobs speak of, and which rows must stay."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from string import ascii_lowercase, ascii_uppercase
from typing import Any
from uuid import UUID

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql

from worker.errors import Refused

# The actions that an auditor asks for long after the rest has gone (reference/paperclip-schema.md §2.3).
SECURITY_ACTIONS = ("auth.%", "secret.%", "company_member.%", "board_api_key.%", "company.%")


@dataclass(frozen=True, kw_only=True)
class Keep:
    """Rows that stay although they are old. `rows` is a predicate that is never NULL.

    `needles`: what it looks for in the text of every row; `unread` are the rows it holds back without that look. A
    row of which no part has a needle is held back by `rows` only where it is by `unread`.
    """

    reason: str
    why: str
    rows: sa.ColumnElement[bool]
    reads: tuple[sa.Table, ...] = ()
    needles: tuple[str, ...] = ()
    unread: sa.ColumnElement[bool] | None = None


@dataclass(frozen=True, kw_only=True)
class Records:
    """A table of which a job changes rows by their age.

    `age` decides how old a row is; NULL never expires. `company` is None where rows belong to the instance.
    `indexed`: an index on (company, age) exists. `among`: the only rows a job may think of. `updated`: rows are only
    updated, so that others may refer to one while it is locked.
    """

    table: sa.Table
    key: sa.Column[Any]
    age: sa.ColumnElement[datetime]
    company: sa.Column[UUID] | None
    indexed: bool
    keeps: tuple[Keep, ...] = ()
    among: sa.ColumnElement[bool] | None = None
    updated: bool = False
    # Where a row names a user or a task by its id, and where it may mention one; asked for legal holds alone.
    users: tuple[sa.ColumnElement[Any], ...] = ()
    tasks: tuple[sa.ColumnElement[Any], ...] = ()
    texts: tuple[sa.ColumnClause[Any], ...] = ()
    # Further rows that belong to tasks, given their ids: those of the tasks' runs.
    of_tasks: Callable[[Sequence[str]], sa.ColumnElement[bool]] | None = None

    @property
    def name(self) -> str:
        return self.table.name

    def reads(self) -> tuple[sa.Table, ...]:
        """Every table a statement on these rows touches, with the columns it needs."""
        return (self.table, *(table for keep in self.keeps for table in keep.reads))

    def names(self, users: Sequence[str], tasks: Sequence[str]) -> sa.ColumnElement[bool]:
        """Rows in which a column is the id of one of these users or tasks, and those of the tasks' runs."""
        # Most columns may name either: each is asked once for all.
        ids: dict[sa.ColumnElement[Any], list[str]] = {}
        for columns, found in ((self.users, users), (self.tasks, tasks)):
            for column in columns:
                ids.setdefault(column, []).extend(found)
        terms = [_is_one(column, found) for column, found in ids.items() if found]
        return sa.or_(sa.false(), *terms, *([self.of_tasks(tasks)] if tasks and self.of_tasks else []))

    def mentions(self, ids: Sequence[str]) -> sa.ColumnElement[bool]:
        """Rows that have one of these ids anywhere in a text or JSON, in small letters or capitals."""
        if not self.texts:
            return sa.false()
        # Collated: a column's own collation may forbid the look, and letters of other alphabets make it slow.
        whole = sa.collate(sa.func.concat_ws("\n", *(sa.cast(one, sa.Text) for one in self.texts)), "C")
        # OFFSET keeps the planner from making the text anew for each id; strpos skips where LIKE tries every place.
        # Together 4 µs a row for 20 ids, where LIKE ANY takes 15.
        small = sa.func.lower(whole).label("text")
        text = sa.select(small).offset(0).correlate(self.table).lateral("mention")
        found = _has_one(text.c.text, sought(ids, 2))
        return sa.select(found).select_from(text).correlate(self.table).scalar_subquery()


# Up to so many words a term each is quicker than to unpack a list of them for every row.
_FEW = 100


def _has_one(text: sa.ColumnElement[str], words: list[str]) -> sa.ColumnElement[bool]:
    """Whether one of these words is somewhere in a text."""
    if len(words) <= _FEW:
        return sa.or_(*(sa.func.strpos(text, one) > 0 for one in words))
    word = sa.func.unnest(sa.literal(words, sa.ARRAY(sa.Text))).column_valued("word")
    return sa.exists(sa.select(word).where(sa.func.strpos(text, word) > 0).correlate(text.table))


def is_one_of(column: sa.ColumnElement[Any], values: Iterable[Any], kind: Any = sa.Text) -> sa.ColumnElement[bool]:
    """Whether a column is one of these values, however many: a statement has at most 65535 parameters."""
    found: sa.ColumnElement[bool] = column == sa.any_(sa.literal(list(values), sa.ARRAY(kind)))
    return found


def _is_one(column: sa.ColumnElement[Any], ids: Sequence[str]) -> sa.ColumnElement[bool]:
    """Whether a column is one of these ids; an id that its type cannot hold is none."""
    if isinstance(column.type, sa.Uuid):
        return is_one_of(column, uuids(ids), sa.Uuid)
    return is_one_of(sa.cast(column, sa.Text), ids)


def uuids(ids: Iterable[str]) -> list[UUID]:
    """Those of these ids that are UUIDs."""
    return [found for one in ids if (found := as_uuid(one)) is not None]


def as_uuid(text: str) -> UUID | None:
    """The uuid that a text is, if it is one."""
    try:
        return UUID(text)
    except ValueError:
        return None


def json_forms(text: str, depth: int) -> set[str]:
    """A text as it is, and as it is between the quotes of a JSON string, up to so many times over.

    As PostgreSQL writes it, and as those do who escape other letters than ASCII's, or slashes.
    """
    forms = {text}
    for _ in range(depth):
        forms |= {json.dumps(one, ensure_ascii=ascii_)[1:-1] for one in forms for ascii_ in (False, True)}
        forms |= {one.replace("/", "\\/") for one in forms}
    return forms


def sought(ids: Iterable[str], depth: int) -> list[str]:
    """What a text in small letters has that mentions one of these ids, as it is or as JSON writes it so often.

    A UUID is the same in capitals. Of other ids two that differ in nothing else are not told apart: too much is kept.
    Small are the letters of ASCII alone, as they are to PostgreSQL's collation "C" and to hyperscan.
    """
    return sorted({form.translate(_SMALL) for one in ids for form in json_forms(one, depth)})


_SMALL = str.maketrans(ascii_uppercase, ascii_lowercase)


@dataclass(frozen=True, kw_only=True)
class LogTable(Records):
    """A table whose old rows may go.

    `record`: rows are worth an archive; credentials are not, and an archive of them would leave a secret behind.
    """

    record: bool = True
    # Which rows are security events, where the table tells.
    security: sa.ColumnElement[bool] | None = None
    # What foreign keys of the table refer to, with just the columns they mean.
    parents: tuple[sa.Table, ...] = ()
    # Columns of other tables that refer to rows of this one, which a keep therefore holds back.
    cited_by: tuple[sa.Column[Any], ...] = ()

    def security_keep(self) -> tuple[Keep, ...]:
        """The keep that holds security events back; none where the table does not tell them."""
        if self.security is None:
            return ()
        # A row may say nothing of it, where a deployment lets it.
        rows = sa.func.coalesce(self.security, sa.false())
        return (Keep(reason="security", why="--keep-security was asked for", rows=rows),)


@dataclass(frozen=True, kw_only=True)
class TaskTable(Records):
    """The table of tasks, of which ended ones are archived: put out of sight, and brought back as they were.

    `archived` and `back` are what is set then. `mark` is a text that differs once the app has changed a task. `open`:
    a task is not over.
    `resized`: an archived task takes more or less room than before.
    """

    archived: Callable[[datetime], Mapping[str, Any]]
    back: Mapping[str, Any] = field(hash=False)
    mark: sa.ColumnElement[str]
    open: sa.ColumnElement[bool]
    resized: bool = True


@dataclass(frozen=True, kw_only=True)
class Carrier:
    """A JSON column that holds ciphertext of the master key, as a whole or somewhere in it.

    `owner` says whose a row is: its company, or with `owners` (key, company) a row there. `digest` is the column with
    the plaintext's SHA-256, where the ciphertext is the whole value. `fresh`: a row the app adds holds ciphertext
    made then, and not a copy of older.
    """

    table: sa.Table
    key: sa.Column[Any]
    column: sa.Column[Any]
    owner: sa.Column[Any]
    owners: tuple[sa.Column[Any], sa.Column[Any]] | None = None
    digest: sa.Column[Any] | None = None
    fresh: bool = False

    @property
    def name(self) -> str:
        return f"{self.table.name}.{self.column.name}"

    @property
    def reads(self) -> tuple[sa.Table, ...]:
        """The tables it reads."""
        return (self.table,) if self.owners is None else (self.table, self.owners[0].table)

    def whose(self, rows: sa.FromClause, owner: sa.ColumnElement[Any]) -> tuple[sa.FromClause, sa.ColumnElement[Any]]:
        """Rows and their companies, `owner` being what the rows have in that column."""
        if self.owners is None:
            return rows, owner
        key, company = self.owners
        return rows.outerjoin(key.table, key == owner), company


@dataclass(frozen=True, kw_only=True)
class Subject:
    """What an operator may name in a legal hold: `key` is its id, `names` are other unique or near-unique names."""

    key: sa.Column[Any]
    names: tuple[sa.Column[Any], ...]


@dataclass(frozen=True, kw_only=True)
class Activity:
    """One row of the host's activity log that tells a company what was done to it."""

    id: UUID
    company: str
    action: str
    at: datetime
    details: Mapping[str, Any]


def record_activity(
    table: sa.Table, *, details: str, at: str, **entity: str
) -> Callable[[Sequence[Activity]], sa.Insert]:
    """How a layout writes activity rows: `details` and `at` name its columns, `entity` what it says of its object.

    A resumed run settles again; its one row of a company then says the final numbers.
    """

    def values(row: Activity) -> dict[str, Any]:
        return {
            "id": row.id,
            "company_id": row.company,
            "action": row.action,
            "actor_type": "system",
            "actor_id": "paperclip-worker",
            details: dict(row.details),
            at: row.at,
        } | {name: row.company if value == "company_id" else value for name, value in entity.items()}

    def insert(rows: Sequence[Activity]) -> sa.Insert:
        found = postgresql.insert(table).values([values(row) for row in rows])
        return found.on_conflict_do_update(index_elements=["id"], set_={details: found.excluded[details]})

    return insert


@dataclass(frozen=True, kw_only=True)
class Layout:
    """One schema of the shared database, in the terms jobs use."""

    name: str
    companies: sa.Table
    logs: Mapping[str, LogTable]
    tasks: TaskTable
    subjects: Mapping[str, Subject]
    # The scheme of ciphertext of the master key, and where it is.
    scheme: str
    carriers: tuple[Carrier, ...]
    # Tables whose presence tells this layout from the others.
    landmarks: tuple[sa.Table, ...]
    record_activity: Callable[[Sequence[Activity]], sa.Insert]

    def records(self, name: str) -> Records:
        """The log or the tasks' table of that name. Refused as for `log`."""
        if name == self.tasks.name:
            return self.tasks
        return self._log(name, "a log or the tasks' table", (self.tasks.name, *self.logs))

    def log(self, name: str) -> LogTable:
        """The log table of that name. Refused, with the reason, when its rows must not be pruned."""
        return self._log(name, "a log", self.logs)

    def _log(self, name: str, what: str, names: Iterable[str]) -> LogTable:
        if found := self.logs.get(name):
            return found
        from worker.layouts import catalogue  # noqa: PLC0415 - read only to say why not

        known = catalogue.load(self.name).tables.get(name)
        if known is not None:
            raise Refused(f"--table: {name} is never pruned by age: {known.reason or 'it is not a log'}")
        raise Refused(f"--table: {name} is not {what} of the {self.name} layout; it has {', '.join(names)}")
