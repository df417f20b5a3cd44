"""policy: how long rows are kept, per company and table."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import click

from worker import params
from worker.commands import common
from worker.errors import Refused


class _Keep(click.ParamType[timedelta]):
    name = "age"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> timedelta:
        try:
            return value if isinstance(value, timedelta) else params.duration(value)
        except Refused as error:
            raise click.BadParameter(str(error), ctx, param) from None


_table = click.option("--table", required=True, metavar="NAME", help="The table: a log, or that of the tasks.")
_company = click.option("--company", metavar="ID|NAME", help="Only this company.  [default: all without their own]")
_keep = click.option("--keep", type=_Keep(), required=True, metavar="AGE", help="Keep rows so long (365d, 12w).")
_reason = click.option("--reason", required=True, help="Why; kept as evidence.")
_yes = click.option("--yes", "-y", is_flag=True, help="Do not ask; for scripts.")


@click.group()
def policy() -> None:
    """Set, list, remove and preview retention policies.

    A policy says how long the rows of a table are kept: of one company, or of all that have none of their own. Runs
    and schedules that name no age follow it; one that names an age can only keep longer.
    PAPERCLIP_WORKER_RETENTION_FLOOR and _CEILING bound every policy, and one outside of them stops its table's runs.
    """


@policy.command("set")
@_table
@_company
@_keep
@_reason
@_yes
@common.actor_option
@common.json_option
def set_policy(
    *, table: str, company: str | None, keep: timedelta, reason: str, yes: bool, actor: str | None, as_json: bool
) -> None:
    """Enter a policy, or its next version.

    One that keeps shorter shows the rows it newly dooms and asks; it takes effect with the next run. One that keeps
    longer takes effect with the next batch. Where runs would be refused it says why nothing can be shown, and asks.
    """
    _change(table, company, keep, reason=reason, yes=yes, actor=actor, as_json=as_json)


@policy.command()
@_table
@_company
@_reason
@_yes
@common.actor_option
@common.json_option
def remove(*, table: str, company: str | None, reason: str, yes: bool, actor: str | None, as_json: bool) -> None:
    """Take a policy back: what holds without it holds again.

    Shows the rows that this newly dooms, and asks.
    """
    _change(table, company, None, reason=reason, yes=yes, actor=actor, as_json=as_json)


@policy.command()
@_table
@_company
@_keep
@common.json_option
def preview(table: str, company: str | None, keep: timedelta, as_json: bool) -> None:
    """Show the rows that a policy would newly doom. Changes nothing."""
    from worker import rules

    _, look = rules.look_at_policy(common.operations(), table=table, company=company, keep=keep)
    if as_json:
        common.print_json({"table": table, "keep": params.duration_text(keep), **look.to_json()})
    else:
        common.print_look(look)


@policy.command("list")
@click.option("--history", is_flag=True, help="Every version there ever was.")
@common.json_option
def list_policies(history: bool, as_json: bool) -> None:
    """The policies in force, with who set them, why and when."""
    from worker import ledger, retention

    with common.operations().transaction(read_only=True) as connection:
        ledger.require(connection)
        found = retention.versions(connection)
    if not history:
        tables = sorted({one.table for one in found})
        found = [
            one for table in tables for one in retention.newest(it for it in found if it.table == table).values()
        ]
    rows = [one.to_json() for one in found]
    if as_json:
        common.print_json({"policies": rows})
        return
    header = ("table", "company", "version", "keep", "created_at", "actor", "reason")
    common.print_rows(header, [[row[name] for name in header] for row in rows])


def _change(
    table: str,
    company: str | None,
    keep: timedelta | None,
    *,
    reason: str,
    yes: bool,
    actor: str | None,
    as_json: bool,
) -> None:
    from worker import rules

    rules.require_reason(reason)
    deployment = common.operations()
    whose, look = rules.look_at_policy(deployment, table=table, company=company, keep=keep)
    if look.doomed or look.refused:
        what = f"it newly dooms {sum(one['rows'] for one in look.doomed)} rows of {table}"
        if look.refused:
            why = "; ".join(one["why"] for one in look.refused)
            what = f"what it dooms in {table} cannot be told, as runs would be refused ({why})"
        common.require_answer(yes=yes, as_json=as_json, what=what)
        if not as_json:
            common.print_look(look)
        common.confirm(table, yes=yes)
    made = rules.set_policy(
        deployment, table=table, company=whose, keep=keep, reason=reason, actor=actor or common.login()
    )
    if as_json:
        common.print_json({**made.to_json(), **look.to_json()})
    else:
        held = f"keep {params.duration_text(made.keep)}" if made.keep else "taken back"
        click.echo(f"{table}, {whose or 'every company without its own'}: {held} (version {made.version})")
