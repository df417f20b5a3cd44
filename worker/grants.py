"""The least privilege the workers need, as SQL an owner runs: what each job says it needs, and no more."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

from sqlalchemy.dialects import postgresql

from worker.errors import Refused
from worker.job import Right, may_read
from worker.ledger import SCHEMA

if TYPE_CHECKING:
    from worker.job import Job
    from worker.layouts.model import Layout

# What a role may do with the tables of the ledger besides reading them. The evidence is append-only even for the
# worker itself.
_APPENDED = ("bites", "objects", "policies", "receipts", "anchors")
_ENTERED = ("runs", "shards", "holds", "archived_tasks", "entries", "backlog", "sums")
_COUNTED = ("chain",)
_KEYS = ("rotations", "master_keys")
# Ciphertext made ready for a cut-over, and forgotten after it.
_PASSING = "resealed"
_READ = ("alembic_version", "identity")
# Role names that mean something else to GRANT: `public` is everybody, with quotes as well.
_NO_ROLES = ("public", "none")


def statements(layout: Layout, role: str, jobs: Sequence[type[Job]]) -> Iterator[str]:
    """GRANT statements for `role`, idempotent. Refused for a role name that could not be one."""
    if not role or "\0" in role or len(role.encode()) > 63 or role in _NO_ROLES or role.startswith("pg_"):
        raise Refused("--role is not a name that a role of the workers can have in PostgreSQL")
    to = _quote(role)
    keys = any(job.reads_everything for job in jobs)
    yield f"GRANT USAGE ON SCHEMA public, {SCHEMA} TO {to}"
    for verb, names in _on_ledger(keys=keys).items():
        yield f"GRANT {verb} ON {_ledger(*names)} TO {to}"
    # Grants of earlier releases gave more.
    yield f"REVOKE UPDATE ON {_ledger(*_APPENDED, *_READ)} FROM {to}"
    yield f"REVOKE INSERT ON {_ledger(*_COUNTED, *_READ)} FROM {to}"
    # Until when an object is locked, as the store says; another bucket says otherwise.
    yield f"GRANT UPDATE (locked_until) ON {_ledger('anchors')} TO {to}"
    rights = [*_everyone(layout), *(right for job in jobs for right in job.rights(layout))]
    for (table, verb), columns in sorted(_merged(rights).items()):
        of = f" ({', '.join(map(_quote, sorted(columns)))})" if columns else ""
        yield f"GRANT {verb}{of} ON public.{_quote(table)} TO {to}"
    yield f"GRANT pg_read_all_stats TO {to}"
    if keys:
        # Ciphertext may be in a plugin's table that nobody has heard of yet.
        yield f"GRANT pg_read_all_data TO {to}"


def _on_ledger(*, keys: bool) -> dict[str, tuple[str, ...]]:
    """The tables of the ledger by what a role may do with them; `keys` for the jobs of the master key."""
    changed, passing = (_KEYS, (_PASSING,)) if keys else ((), ())
    return {
        "SELECT": (*_APPENDED, *_ENTERED, *_COUNTED, *_KEYS, *_READ, *passing),
        "INSERT": (*_APPENDED, *_ENTERED, *changed, *passing),
        "UPDATE": (*_ENTERED, *_COUNTED, *changed, *passing),
        **({"DELETE": passing} if keys else {}),
    }


def on_ledger(*, keys: bool) -> Iterator[tuple[str, str, str | None]]:
    """Verb, table and column (None: all of them) of what these statements give of the ledger."""
    for verb, names in _on_ledger(keys=keys).items():
        yield from ((verb, name, None) for name in names)
    yield "UPDATE", "anchors", "locked_until"


def of_every_run(layout: Layout) -> Iterator[Right]:
    """What every run needs of the host's tables: to tell each company, in one activity row, what it did."""
    yield Right(verb="SELECT", table=layout.companies, columns=("id",))
    activity = layout.logs["activity_log"].table
    details = "details" if "details" in activity.c else "metadata"
    yield Right(verb="INSERT", table=activity)
    # A resumed run brings the details of its one row up to date.
    yield Right(verb="UPDATE", table=activity, columns=(details,))
    yield Right(verb="SELECT", table=activity, columns=("id", details))


def _quote(name: str) -> str:
    quoted: str = postgresql.dialect().identifier_preparer.quote(name)  # type: ignore[no-untyped-call]
    # Doubled for the driver, which does not see these statements.
    return quoted.replace("%%", "%")


def _ledger(*names: str) -> str:
    return ", ".join(f"{SCHEMA}.{name}" for name in names)


def _everyone(layout: Layout) -> Iterator[Right]:
    """What every job and operator needs: to tell the layout, to find what is named, and what every run needs."""
    yield from may_read(layout.landmarks)
    for subject in layout.subjects.values():
        columns = (subject.key.name, *(name.name for name in subject.names))
        yield Right(verb="SELECT", table=subject.key.table, columns=columns)
    yield from of_every_run(layout)


def _merged(rights: Iterable[Right]) -> dict[tuple[str, str], frozenset[str]]:
    """The columns of each table and verb; none where the whole table is meant."""
    found: dict[tuple[str, str], frozenset[str] | None] = {}
    for right in rights:
        place = (right.table.name, right.verb)
        have = found.get(place, frozenset())
        found[place] = None if have is None or not right.columns else have | set(right.columns)
    return {place: columns or frozenset() for place, columns in found.items()}
