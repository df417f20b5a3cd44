"""plan, rehearse and run: for every job the same, with the job's own parameters as options."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import click

from worker import params, registry
from worker.commands import common
from worker.errors import Refused

if TYPE_CHECKING:
    from worker.job import Job
    from worker.operations import Operations
    from worker.plans import Plan


class _Jobs(click.Group):
    """A group whose commands are the jobs there are."""

    def __init__(self, verb: Callable[[type[Job]], click.Command], **attributes: Any) -> None:
        super().__init__(subcommand_metavar="JOB [OPTIONS]", **attributes)
        self._verb = verb

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002
        return list(registry.jobs())

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:  # noqa: ARG002
        return self._verb(registry.job(cmd_name))


class _Value(click.ParamType[Any]):
    """A job parameter on the command line: the same reader as everywhere else."""

    def __init__(self, item: params.Param) -> None:
        self.name = item.metavar or item.type.__name__
        self._item = item

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if isinstance(value, self._item.type):
            return value
        if self._item.type is params.RunId:
            # The start of an id, which the ledger is asked for once there is a connection.
            return value
        try:
            return params.read(self._item.type, value)
        except Refused as error:
            raise click.BadParameter(str(error), ctx, param) from None


def _options(job: type[Job]) -> list[click.Option]:
    return [_option(item) for item in params.params_of(job)]


def _option(item: params.Param) -> click.Option:
    if item.type is bool:
        names = f"{item.option}/{item.off}" if item.off else item.option
        return click.Option([names], is_flag=True, default=item.default, help=item.help, show_default=True)
    shown = params.duration_text(item.default) if item.metavar == "AGE" and item.default else None
    return click.Option(
        [item.option],
        type=_Value(item),
        metavar=item.metavar or None,
        multiple=item.many,
        default=item.default,
        help=item.help,
        show_default=shown or not (item.many or item.optional),
    )


def _build(job: type[Job], given: dict[str, Any]) -> Job:
    values = {item.name: given[item.name] for item in params.params_of(job)}
    for item in params.params_of(job):
        if item.type is params.RunId and values[item.name] is not None:
            values[item.name] = params.RunId(str(common.operations().find(values[item.name]).id))
    return job(**values)


def _command(job: type[Job], run: Callable[..., Any], extra: list[click.Option]) -> click.Command:
    as_json = click.Option(["--json", "as_json"], is_flag=True, help="Print one JSON object on stdout.")
    return click.Command(
        job.name, callback=run, params=[*_options(job), *extra, as_json], help=job.__doc__, add_help_option=True
    )


def _plan_command(job: type[Job]) -> click.Command:
    def callback(*, as_json: bool, **given: Any) -> None:
        plan = common.operations().plan(_build(job, given))
        if as_json:
            common.print_json(plan.to_json())
        else:
            print_plan(plan)

    return _command(job, callback, [])


def _rehearse_command(job: type[Job]) -> click.Command:
    def callback(*, as_json: bool, **given: Any) -> None:
        tally = common.operations().rehearse(_build(job, given))
        total = tally.total
        if as_json:
            found = {"job": job.name, "rehearsed": True, "rows": total.rows, "bytes": total.bytes}
            common.print_json({**found, "tally": tally.to_json()})
            return
        click.echo(f"rehearsed and rolled back: {common.number(total.rows)} rows, {common.size(total.bytes)}")
        common.print_rows(
            ("table", "company", "rows", "bytes"),
            [(one["table"], one["company"], one["rows"], one["bytes"]) for one in tally.to_json()],
        )

    return _command(job, callback, [])


def _run_command(job: type[Job]) -> click.Command:
    def callback(**given: Any) -> int:
        return start(_build(job, given), **{name: given[name] for name in _RUN_OPTIONS})

    return _command(job, callback, run_options())


_RUN_OPTIONS = ("inline", "detach", "yes", "approved", "reason", "actor", "as_json")


def run_options() -> list[click.Option]:
    return [
        click.Option(["--inline"], is_flag=True, help="Work in this process, without a broker."),
        click.Option(["--detach"], is_flag=True, help="Enqueue, print the run's id and leave."),
        click.Option(["--yes", "-y"], is_flag=True, help="Do not ask; for scripts."),
        click.Option(
            ["--plan", "approved"],
            metavar="HASH",
            help="Run just the plan with this hash; refused if it has drifted.",
        ),
        click.Option(["--reason"], help="Why; goes into the receipt."),
        click.Option(["--actor"], help="Who; goes into the receipt.  [default: the login name]"),
    ]


def start(
    job: Job,
    *,
    inline: bool,
    detach: bool,
    yes: bool,
    approved: str | None,
    reason: str | None,
    actor: str | None,
    as_json: bool,
) -> int:
    from worker.config import Need

    if inline and detach:
        raise Refused("--inline and --detach exclude each other")
    needs = [Need.SIGNING, *([] if inline else [Need.BROKER]), *([Need.STORAGE] if job.archives else [])]
    deployment = common.operations(*needs)
    deployment.require_free(job)
    now = _approve(deployment, job, yes=yes, approved=approved, as_json=as_json)
    send = _no_broker if inline else common.broker(deployment)
    run = deployment.start(
        job,
        actor=actor or common.login(),
        via="cli",
        reason=reason,
        now=now,
        approved=approved,
    )
    with common.entered(run):
        send(run)
        if detach:
            return common.left(deployment, run, as_json=as_json)
        if inline:
            common.work_inline(deployment, run)
        elif not common.follow(deployment, run):
            return common.detached(deployment, run, as_json=as_json)
        return common.report(deployment, run, as_json=as_json)


def _approve(deployment: Operations, job: Job, *, yes: bool, approved: str | None, as_json: bool) -> Any:
    """The horizon of the plan that was approved, by hash, by `--yes` or by a typed answer; None: now."""
    if approved is not None:
        return deployment.plan(job, approved=approved).now
    if yes or not job.destructive:
        return None
    common.require_answer(yes=yes, as_json=as_json, what=f"{job.name} is destructive", other=" or --plan HASH")
    plan = deployment.plan(job)
    print_plan(plan)
    common.confirm(job.subject, yes=yes)
    return plan.now


def _no_broker(run: Any) -> None:
    del run


def print_plan(plan: Plan) -> None:
    found = plan.to_json()
    click.echo(f"plan {plan.hash}")
    click.echo(f"{plan.job} as of {plan.now:%Y-%m-%d %H:%M:%S} UTC on the {plan.layout} layout")
    click.echo(f"would change {common.number(found['rows'])} rows, {common.size(found['bytes'])}")
    common.print_rows(
        ("table", "company", "rows", "bytes"),
        [(one["table"], one["company"], one["rows"], one["bytes"]) for one in found["tally"]],
    )
    common.print_left(found["left"])
    for note in plan.notes:
        click.echo(f"note: {note}")


plan = _Jobs(_plan_command, name="plan", help="Show what a run started now would change, and what would stay.")
rehearse = _Jobs(
    _rehearse_command,
    name="rehearse",
    help="Run every batch for real in the database and roll each back. Nothing is written to the bucket.",
)
run = _Jobs(
    _run_command,
    name="run",
    help="Run a job: show the plan, ask, enqueue, follow.\n\nCtrl-C stops following; the run goes on.",
)
