"""Ended tasks as a set: put out of sight by statements, each noted in the ledger, and brought back by that note.

A note says how the app had the task right after it was archived. A task that differs from it later was changed by
somebody, and is theirs.
"""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING
from uuid import UUID

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql

from worker import ledger, triggers
from worker.errors import Refused, UnderWay
from worker.job import Batch
from worker.layouts.model import Keep
from worker.ledger import SCHEMA
from worker.plans import Left, Tally
from worker.retention import Cutoffs
from worker.rowset import RowSet, totals
from worker.states import ACTIVE, State

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from typing import Any

    from worker.means import Means

NOTES = sa.Table(
    "archived_tasks",
    sa.MetaData(schema=SCHEMA),
    *(sa.Column(name, sa.Uuid) for name in ("run_id", "task", "company", "undone_by")),
    sa.Column("mark", sa.Text),
)
# What a run archived comes back whatever its age is now: all are of one, and that is old enough.
_AGE = sa.literal(datetime(2, 1, 1, tzinfo=UTC))
_ANY_AGE = Cutoffs(default=datetime(9999, 1, 1, tzinfo=UTC))


class TaskSets:
    """What a step can do with the tasks' table."""

    def __init__(self, means: Means) -> None:
        self._means = means
        self._connection = means.connection
        self._tasks = means.layout.tasks

    def archive(self, rows: RowSet, batch: Batch) -> Tally:
        """Archive a batch's tasks and note each, in one statement."""
        done = self._changed(rows, batch, self._tasks.archived(self._means.now))
        run = sa.literal(self._means.run, sa.Uuid())
        values = sa.select(run, done.c.task, sa.cast(done.c.company, sa.Uuid), done.c.mark)
        note = postgresql.insert(NOTES).from_select(["run_id", "task", "company", "mark"], values)
        # Whoever brings a task back while the run goes on has it archived again by the second sweep.
        again = {"mark": note.excluded.mark, "company": note.excluded.company, "undone_by": None}
        note = note.on_conflict_do_update(index_elements=["run_id", "task"], set_=again)
        return totals(self._connection, self._tasks.name, done, note.cte("note"))

    def bring_back(self, rows: RowSet, batch: Batch, *, of: UUID) -> Tally:
        """Bring a batch's tasks back as they were before run `of`, and note by which run."""
        done = self._changed(rows, batch, self._tasks.back)
        note = (
            sa.update(NOTES)
            .where(NOTES.c.run_id == of, NOTES.c.task.in_(sa.select(done.c.task)))
            .values(undone_by=self._means.run)
            .cte("note")
        )
        return totals(self._connection, self._tasks.name, done, note)

    def _changed(self, rows: RowSet, batch: Batch, values: Mapping[str, Any]) -> sa.CTE:
        found = (self._tasks.key.label("task"), rows.whose.label("company"))
        mark, changed = self._tasks.mark.label("mark"), sa.update(self._tasks.table).values(dict(values))
        if not self._tasks.resized:
            return changed.where(rows.rows(batch)).returning(*found, rows.size.label("size"), mark).cte("done")
        # Sizes are those before, and RETURNING has the new row.
        before = (
            sa.select(self._tasks.key.label("key"), rows.size.label("size"))
            .select_from(rows.what.table)
            .where(rows.rows(batch))
            .subquery("before")
        )
        # The window again, or a seemingly large batch is joined by a scan of the whole table.
        changed = changed.where(rows.window(batch), before.c.key == self._tasks.key)
        return changed.returning(*found, before.c.size.label("size"), mark).cte("done")

    def archived_by(self, run: UUID, companies: tuple[UUID, ...]) -> RowSet:
        """The tasks a run archived in these companies and nobody has brought back, but for those changed since."""
        of_task = sa.and_(NOTES.c.run_id == run, NOTES.c.task == self._tasks.key)

        def noted(what: sa.ColumnElement[bool]) -> sa.ColumnElement[bool]:
            # A scalar, by the notes' primary key: an EXISTS the planner may begin with, for each bite anew, at every
            # note of the run, because the notes are too fresh for statistics.
            return sa.func.coalesce(sa.select(what).where(of_task).scalar_subquery(), sa.false())

        moved = NOTES.c.company.is_distinct_from(self._tasks.company)
        changed = Keep(
            reason="changed",
            why="somebody has changed the task since it was archived",
            rows=noted(sa.or_(NOTES.c.mark != self._tasks.mark, moved)),
        )
        # By the company it was archived in: one that has been moved is counted with the others.
        there = NOTES.c.company.in_(companies) if companies else sa.true()
        note = noted(sa.and_(NOTES.c.undone_by.is_(None), there))
        what = replace(self._tasks, among=note, keeps=(), age=_AGE, indexed=False)
        return RowSet(what=what, cutoffs=_ANY_AGE, companies=(), keeps=(changed,))

    def gone(self, run: UUID, companies: tuple[UUID, ...]) -> list[Left]:
        """Tasks that a run archived and the app has deleted since, per company."""
        there = sa.exists(self._tasks.key).where(self._tasks.key == NOTES.c.task)
        query = (
            sa.select(NOTES.c.company, sa.func.count())
            .where(NOTES.c.run_id == run, NOTES.c.undone_by.is_(None), ~there)
            .group_by(NOTES.c.company)
        )
        rows = self._connection.execute(query.where(NOTES.c.company.in_(companies)) if companies else query)
        name = self._tasks.name
        return [Left(table=name, company=str(whose), reason="gone", rows=number) for whose, number in rows]

    def wanted_after_all(self, rows: RowSet) -> Iterator[tuple[str, bool, int]]:
        """Per company the tasks this run archived that are open or held back by a guard now: whether they were
        changed since, so that no undo touches them, and how many.

        The app opened something below them, or went on with them, while they were being archived.
        """
        tasks = self._tasks
        as_left = (tasks.table.c[of] == value for of, value in tasks.archived(self._means.now).items())
        # OFFSET 0: of the notes the server knows no numbers yet, and would look each of them up in the tasks.
        there = (
            sa.select(tasks.key.label("task"), rows.company.label("company"), tasks.mark.label("mark"))
            .select_from(tasks.table)
            .where(*as_left, sa.or_(tasks.open, *(keep.rows for keep in tasks.keeps)))
            .offset(0)
            .subquery("there")
        )
        changed = sa.or_(NOTES.c.mark != there.c.mark, NOTES.c.company.is_distinct_from(there.c.company))
        query = (
            sa.select(sa.cast(there.c.company, sa.Text), changed, sa.func.count())
            .select_from(there.join(NOTES, NOTES.c.task == there.c.task))
            .where(NOTES.c.run_id == self._means.run, NOTES.c.undone_by.is_(None))
            .group_by(there.c.company, changed)
        )
        yield from self._connection.execute(query)

    def require_untriggered(self) -> None:
        """Refused, naming them, when triggers of the host's fire on what is done to a task: they may do more."""
        name = self._tasks.name
        if firing := triggers.on_update(self._connection, name, self._tasks.back):
            raise Refused(
                f"{name}: the trigger{'s' * (len(firing) > 1)} {', '.join(firing)} would fire on each task, and may "
                "change more than was asked for; limit to other columns (UPDATE OF ...) or disable"
            )

    def require_undoable(self, run: UUID, companies: tuple[UUID, ...], *, job: str) -> None:
        """Refused when a run is not one of `job`, archived nothing of these companies, or was undone already."""
        found = ledger.get(self._connection, run)
        if found is None or found.job != job:
            raise Refused(f"--undo: run {run} is not a run of {job}")
        if (of := found.params.get("undo")) is not None:
            raise Refused(f"--undo: run {run} itself undid run {of}; to archive the tasks again, run {job}")
        if found.state in ACTIVE:
            raise UnderWay(f"--undo: run {run} is under way ({found.state}); stop it first")
        archived = set(self._connection.scalars(sa.select(NOTES.c.company).where(NOTES.c.run_id == run).distinct()))
        if not (asked := archived.intersection(companies or archived)):
            raise Refused(f"--undo: run {run} archived nothing{' of that company' if companies else ''}")
        undone = self._undone_by(run)
        if all(None in undone or company in undone for company in asked):
            by = undone.get(None) or undone[min(asked)]
            raise Refused(f"--undo: run {run} was undone already, by run {by}")

    def require_not_undone(self, run: UUID) -> None:
        """Refused when tasks that a run archived were brought back: going on with it would archive the rest.

        Also when an undo found none that it could bring back: it was kept, and what came after it would stay.
        """
        query = sa.select(NOTES.c.undone_by).where(NOTES.c.run_id == run, NOTES.c.undone_by.is_not(None)).limit(1)
        by = self._connection.scalar(query) or next(iter(self._undone_by(run).values()), None)
        if by is not None:
            raise Refused(f"run {run} was undone by run {by}; to archive the tasks after all, start another run")

    def _undone_by(self, run: UUID) -> dict[UUID | None, UUID]:
        """The runs that kept the promise to undo this one, by company; None stands for every company."""
        runs = ledger.RUNS.c
        query = sa.select(runs.id, runs.params).where(
            runs.params["undo"].astext == str(run), runs.state == State.KEPT
        )
        found: dict[UUID | None, UUID] = {}
        for by, params in self._connection.execute(query):
            whose: list[UUID | None] = [UUID(one) for one in params["company"]]
            found |= dict.fromkeys(whose or [None], by)
        return found
