"""db: the ledger, and what the live database has and lacks."""

from __future__ import annotations

import click

from worker.commands import common
from worker.errors import Denied, Exit, Refused


@click.group()
def db() -> None:
    """Create the ledger, compare the database with the catalogue, print least-privilege grants."""


@db.command()
@common.json_option
def init(as_json: bool) -> None:
    """Create the ledger (schema paperclip_worker) or bring it to this release. Safe to repeat."""
    from worker import ledger

    deployment = common.operations()
    try:
        ledger.init(deployment.engine)
    except Denied as error:
        raise Refused("this role may not make the ledger; run `db init` as the database's owner") from error
    own = deployment.require_ledger()
    if as_json:
        common.print_json({"schema": ledger.SCHEMA, "version": ledger.VERSION, "ledger": str(own)})
    else:
        click.echo(f"ledger {ledger.SCHEMA} is at version {ledger.VERSION}; its id is {own}")


@db.command()
@common.json_option
def check(as_json: bool) -> int:
    """Compare the live database with the catalogue: what is missing, unknown or changed, and what each job lacks.

    A job lacks the ledger, tables, columns, or privileges of the role (see `db grants`). Exit status 1 when something
    is missing or changed, or when a job that the schedule starts lacks something; but for those of the master key,
    which are for a role of their own. Unknown tables and columns are never touched; class your own in a TOML file
    named by PAPERCLIP_WORKER_CATALOGUE_FILE.
    """
    from worker import layouts, timetable
    from worker.layouts import catalogue

    deployment = common.operations()
    times = timetable.load(deployment.settings)
    with deployment.transaction(scan=True, read_only=True) as connection:
        layout = layouts.detect(connection)
        facts = catalogue.load(layout.name, deployment.settings.catalogue_file)
        live = catalogue.live_schema(connection)
        drift = catalogue.compare(facts, live)
        jobs = _jobs(layout.name, connection)
    scheduled = {one.job.name for one in times.on(layout).enabled.values() if not one.job.reads_everything}
    unready = [f"{job} lacks {', '.join(jobs[job])}" for job in sorted(scheduled) if jobs[job]]
    if as_json:
        found = {name: list(getattr(drift, name)) for name in ("missing", "unknown", "changed")}
        common.print_json({"layout": layout.name, "tables": len(facts.tables), **found, "jobs": jobs})
    else:
        click.echo(f"layout {layout.name}, {len(facts.tables)} tables in the catalogue")
        for name in ("missing", "changed", "unknown"):
            for item in getattr(drift, name):
                click.echo(f"{name}\t{item}")
        for job, lacks in jobs.items():
            click.echo(f"job\t{job}\t{'ready' if not lacks else 'lacks ' + ', '.join(lacks)}")
    faults = []
    if drift.missing or drift.changed:
        numbers = f"{len(drift.missing)} missing, {len(drift.changed)} changed"
        faults.append(f"the database differs from the catalogue: {numbers}")
    if unready:
        faults.append(f"what the schedule starts would be refused: {'; '.join(unready)}")
    if faults:
        click.echo("paperclip-worker: " + "; ".join(faults), err=True)
    return Exit.UNKEPT if faults else Exit.KEPT


def _jobs(layout: str, connection: object) -> dict[str, list[str]]:
    """What each job, with its usual parameters, lacks in the live database, and its role of privileges there."""
    import sqlalchemy as sa

    from worker import layouts, privileges, registry

    if not isinstance(connection, sa.Connection):
        raise TypeError("a connection is needed")
    live = layouts.LAYOUTS[layout]
    return {
        name: layouts.missing(connection, job.usual().needs(live)) + privileges.lacking(connection, job, live)
        for name, job in registry.jobs().items()
    }


@db.command()
@click.option("--role", default="paperclip_worker", show_default=True, help="The database role of the workers.")
@click.option(
    "--layout",
    type=click.Choice(["paperclip", "guide"]),
    help="Print for this layout without asking a database.  [default: the live database's]",
)
@click.option(
    "--job",
    "names",
    metavar="JOB",
    multiple=True,
    help="Only what this job needs; repeatable.  [default: all but those that handle the master key]",
)
@common.json_option
def grants(role: str, layout: str | None, names: tuple[str, ...], as_json: bool) -> None:
    """Print the SQL that gives a role just the privileges the jobs need. Changes nothing.

    Run it as the owner, after `db init`.
    """
    from worker import grants as sql
    from worker import layouts, registry

    ordinary = [job for job in registry.jobs().values() if not job.reads_everything]
    jobs = [registry.job(name) for name in names] or ordinary

    if layout is None:
        with common.operations().transaction(read_only=True) as connection:
            layout = layouts.detect(connection).name
    statements = [statement + ";" for statement in sql.statements(layouts.LAYOUTS[layout], role, jobs)]
    if as_json:
        common.print_json({"layout": layout, "role": role, "statements": statements})
    else:
        click.echo("\n".join(statements))
