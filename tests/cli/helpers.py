"""What the tests of the command line share: the world as one value, refusals, runs begun and left."""

from __future__ import annotations

import math
import re
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlsplit
from uuid import UUID

import click
import psycopg
import redis
from psycopg import sql

from cli import cli
from tests.conftest import Deployment
from worker import registry
from worker.job import Job
from worker.operations import Operations
from worker.runner import Outcome

PRUNE = ("run", "prune-logs")
INLINE = (*PRUNE, "--inline", "--yes")


def world(deployment: Deployment) -> dict[str, tuple[int, str]]:
    """Rows and content hash of every table of the database, the ledger's too."""
    with psycopg.connect(deployment.environment["DATABASE_URL"]) as connection:
        tables = connection.execute(
            "SELECT schemaname, tablename FROM pg_tables "
            "WHERE schemaname NOT IN ('pg_catalog', 'information_schema') ORDER BY 1, 2"
        ).fetchall()
        one = sql.SQL("SELECT {}, count(*), md5(string_agg(md5(t::text), '' ORDER BY md5(t::text))) FROM {} t")
        every = sql.SQL(" UNION ALL ").join(
            one.format(sql.Literal(".".join(place)), sql.Identifier(*place)) for place in tables
        )
        return {name: (rows, content) for name, rows, content in connection.execute(every)}


def keys(deployment: Deployment) -> list[str]:
    """Everything below the deployment's prefix in the bucket."""
    store = deployment.operations.store
    assert store is not None
    return sorted(store.keys(""))


def refused(
    deployment: Deployment, *words: str, says: str, status: int = 2, env: dict[str, str] | None = None
) -> str:
    """Demand that a command is refused in one line that says so; the line."""
    done = deployment.cli(*words, ok=False, env=env)
    return check_refusal(done, says=says, status=status)


def check_refusal(done: subprocess.CompletedProcess[str], *, says: str, status: int) -> str:
    """Demand one clear line on stderr, nothing on stdout and the exit status; the line."""
    assert "Traceback" not in done.stderr, done.stderr
    lines = done.stderr.splitlines()
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith("paperclip-worker: "), lines[0]
    assert "internal error" not in lines[0], lines[0]
    assert re.search(says, lines[0]), lines[0]
    assert done.stdout == ""
    assert done.returncode == status, (done.returncode, lines[0])
    return lines[0]


@contextmanager
def least(deployment: Deployment, *words: str) -> Iterator[dict[str, str]]:
    """The environment of a role with just what `db grants` prints, with these words of it."""
    url = urlsplit(deployment.environment["DATABASE_URL"])
    role = f"least_of_{url.path.removeprefix('/')}"
    deployment.query(f"CREATE ROLE {role} LOGIN PASSWORD 'pw'")
    deployment.query(deployment.cli("db", "grants", "--role", role, *words).stdout)
    try:
        yield {"DATABASE_URL": f"postgres://{role}:pw@{url.netloc.rpartition('@')[2]}{url.path}"}
    finally:
        deployment.query(f"DROP OWNED BY {role}; DROP ROLE {role}")


@contextmanager
def full_broker(deployment: Deployment) -> Iterator[None]:
    """Redis at the end of its memory: it answers, and takes nothing more."""
    with redis.Redis.from_url(deployment.environment["PAPERCLIP_WORKER_BROKER_URL"]) as client:
        policy = client.config_get("maxmemory-policy")["maxmemory-policy"]
        client.config_set("maxmemory-policy", "noeviction")
        client.config_set("maxmemory", 1)
        try:
            yield
        finally:
            client.config_set("maxmemory", 0)
            client.config_set("maxmemory-policy", policy)


def start(operations: Operations, **fields: Any) -> UUID:
    """Enter a run of prune-logs, as a person would."""
    return operations.start(job(**fields), actor="tester", via="test")


def job(**fields: Any) -> Job:
    return registry.job("prune-logs")(**fields)


def begin(deployment: Deployment, *, bites: int = 6) -> UUID:
    """A run of which some bites are done and nobody works on the rest."""
    small = deployment.with_settings(bite_rows="50")
    run = start(small)
    left = iter(range(bites))
    assert small.runner().work(run, seconds=math.inf, leave=lambda: next(left, None) is None) is Outcome.MORE
    done = small.result(run)
    assert 0 < done["rows"] < done["planned"]
    return run


def complete(deployment: Deployment, **fields: Any) -> dict[str, Any]:
    """A run from start to end, in this process."""
    run = start(deployment.operations, **fields)
    assert deployment.operations.runner().work(run, seconds=math.inf) is Outcome.SETTLED
    result = deployment.operations.result(run)
    assert result["kept"], result
    return result


def commands() -> Iterator[tuple[str, ...]]:
    """The path of every command and group there is, jobs included."""
    yield from _below(cli, ())


def _below(command: click.Command, path: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
    yield path
    if isinstance(command, click.Group):
        context = click.Context(command)
        for name in command.list_commands(context):
            found = command.get_command(context, name)
            assert found is not None
            yield from _below(found, (*path, name))


def find_command(words: tuple[str, ...]) -> tuple[click.Command, list[str]]:
    """The command that words name, and the words after its name."""
    command: click.Command = cli
    rest = list(words)
    while isinstance(command, click.Group) and rest and not rest[0].startswith("-"):
        found = command.get_command(click.Context(command), rest[0])
        assert found is not None, f"there is no command {' '.join(words)}"
        command, rest = found, rest[1:]
    return command, rest
