"""holds: rows that no job may touch while a legal hold is in force."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import click

from worker.commands import common
from worker.errors import Refused

if TYPE_CHECKING:
    from worker.job import Job
    from worker.operations import Operations


@click.group()
def holds() -> None:
    """Add, list and release legal holds.

    While a hold is in force no job deletes, archives or erases a row it covers, however old and whatever a policy
    says. Held rows are counted under `legal_hold` in every plan, run and receipt. A hold that was added binds every
    batch that commits afterwards, also of runs already under way.
    """


_LAST_YEAR = 9000


class _When(click.ParamType[datetime]):
    name = "date"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> datetime:
        if isinstance(value, datetime):
            return value
        try:
            found = datetime.fromisoformat(value)
        except ValueError:
            self.fail(f"{value!r} is not a date such as 2027-01-31, or 2027-01-31T18:00+01:00", param, ctx)
        if found.year > _LAST_YEAR:
            self.fail(f"{value!r} is too far away; leave --until out for a hold without an end", param, ctx)
        return found if found.tzinfo else found.replace(tzinfo=UTC)


@holds.command()
@click.option("--company", metavar="ID|NAME", help="Hold every row of this company.")
@click.option("--user", metavar="ID|EMAIL", help="Hold rows that name or mention this user.")
@click.option(
    "--task", metavar="ID|IDENTIFIER", help="Hold this task, rows that name or mention it, and of its runs."
)
@click.option("--table", metavar="NAME", help="Hold every row of this table.")
@click.option("--reason", required=True, help="Why; kept as evidence.")
@click.option("--until", type=_When(), metavar="DATE", help="When it ends by itself (UTC).  [default: never]")
@common.actor_option
@common.json_option
def add(reason: str, until: datetime | None, actor: str | None, as_json: bool, **target: str | None) -> None:
    """Put a hold on one company, user, task or table.

    Waits for the batches in flight: once it returns, nothing it covers can still go.
    """
    from worker import rules

    given = {kind: name for kind, name in target.items() if name is not None}
    if len(given) != 1:
        raise Refused("name exactly one of --company, --user, --task and --table; a hold has one target")
    ((kind, name),) = given.items()
    deployment = common.operations()
    hold = rules.add_hold(deployment, kind=kind, name=name, reason=reason, actor=actor or common.login(), until=until)
    if as_json:
        # Not the database's clock: one that goes now must not make a refusal of it.
        common.print_json(hold.to_json(now=hold.created_at))
    else:
        click.echo(str(hold.id))
        common.talk(f"{hold.kind} {hold.target} is held")


@holds.command("list")
@click.option("--all", "every", is_flag=True, help="Released and ended ones too.")
@common.json_option
def list_holds(every: bool, as_json: bool) -> None:
    """The holds in force, newest first."""
    from worker import holds as found_in
    from worker import ledger

    deployment = common.operations()
    with deployment.transaction(read_only=True) as connection:
        ledger.require(connection)
        found = found_in.every(connection)
    now = deployment.now()
    rows = [hold.to_json(now=now) for hold in found if every or hold.state(now) == "in force"]
    if as_json:
        common.print_json({"holds": rows})
        return
    header = ("id", "kind", "target", "state", "until", "actor", "reason")
    common.print_rows(header, [[row[name] for name in header] for row in rows])


@holds.command()
@click.argument("hold")
@click.option("--reason", required=True, help="Why; kept as evidence.")
@click.option("--yes", "-y", is_flag=True, help="Do not ask; for scripts.")
@common.actor_option
@common.json_option
def release(*, hold: str, reason: str, yes: bool, actor: str | None, as_json: bool) -> None:
    """Release HOLD (the start of its id), after a look at what the next runs would take.

    The look plans every scheduled job as things are and as they would be.
    """
    from worker import rules

    rules.require_reason(reason)
    deployment = common.operations()
    found, look = rules.look_at_release(deployment, hold, _scheduled(deployment))
    common.require_answer(yes=yes, as_json=as_json, what=f"{found.kind} {found.target} would no longer be held")
    if not as_json:
        common.print_look(look)
    common.confirm(found.target, yes=yes)
    rules.release_hold(deployment, found, reason=reason, actor=actor or common.login())
    if as_json:
        common.print_json({"id": str(found.id), "state": "released", **look.to_json()})
    else:
        click.echo(f"released {found.id}")


def _scheduled(deployment: Operations) -> list[Job]:
    from worker import timetable

    return [entry.job for entry in timetable.of(deployment).enabled.values()]
