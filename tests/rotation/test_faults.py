"""Servers, disks and people that fail in the middle of a rotation: it ends whole or with nothing switched."""

from __future__ import annotations

import json
import math
import os
import resource
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest
import sqlalchemy as sa

from tasks.rotate_master_key import RotateMasterKey
from tests.conftest import NOW, Deployment
from tests.faults.evidence import wait
from tests.rotation.conftest import equipped
from tests.rotation.test_writers import begin, finish, once
from tests.rotation.vault import Vault
from worker import app, config, cutover, embedded, keyfile, keyring, ledger
from worker.errors import Refused
from worker.layouts import demo_schema
from worker.operations import Operations
from worker.rotation import Rotating
from worker.runner import Outcome

pytestmark = pytest.mark.faults


@pytest.fixture(scope="module")
def mortal() -> Iterator[embedded.Embedded]:
    """Servers to be killed; PostgreSQL as durable as in production."""
    with embedded.start() as started:
        engine = sa.create_engine(started.environment()["DATABASE_URL"].replace("postgres", "postgresql+psycopg", 1))
        with engine.begin() as connection:
            demo_schema.create(connection, "paperclip")
            demo_schema.seed(connection, "paperclip", rows=300, now=NOW)
        ledger.init(engine)
        engine.dispose()
        yield started


@pytest.fixture
def mortal_vault(
    mortal: embedded.Embedded,
    signing_key: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    request: pytest.FixtureRequest,
) -> Iterator[Vault]:
    """A vault on the mortal servers."""
    name = f"site_{sum(request.node.name.encode())}"
    with psycopg.connect(mortal.postgres.url("postgres"), autocommit=True) as admin:
        admin.execute(f"CREATE DATABASE {name} TEMPLATE paperclip".encode())
    environment = {
        **mortal.environment(name),
        "PAPERCLIP_WORKER_S3_PREFIX": f"{name}/",
        "PAPERCLIP_WORKER_SIGNING_KEY_FILE": str(signing_key),
    }
    for key in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(key, environment[key])
    operations = Operations(config.load(environment))
    site = Deployment(layout="paperclip", environment=environment, operations=operations, opened=[operations])
    vault = equipped(site, tmp_path / "secrets")
    vault.plant()
    yield vault
    for one in site.opened:
        one.engine.dispose()


def crash(mortal: embedded.Embedded) -> Callable[[], None]:
    def kill_and_start() -> None:
        mortal.postgres.kill()
        mortal.postgres.start()

    return kill_and_start


def swapped(vault: Vault, run: Any) -> list[tuple[Any, ...]]:
    """Which shards changed how many rows."""
    query = "SELECT key, rows::int FROM paperclip_worker.shards WHERE run_id = %s AND rows > 0"
    return vault.deployment.query(query, run)


@pytest.mark.parametrize("moment", ["claim_catch_up", "claim_cut_over"])
def test_what_a_crash_emptied_is_made_ready_again_before_the_lock(
    mortal_vault: Vault, mortal: embedded.Embedded, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    """PostgreSQL empties unlogged tables. All is swapped with the file, and nothing is left to a later sweep."""
    vault = mortal_vault
    done = once(monkeypatch, Rotating, moment, crash(mortal))
    run = begin(vault)
    finish(vault, run)
    assert done
    assert swapped(vault, run) == [("cut-over", len(vault.held))]


def after(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, action: Callable[[], None]) -> list[None]:
    """Do something just after the first call of a function."""
    original, done = getattr(owner, name), list[None]()

    def wrapper(*arguments: Any, **named: Any) -> Any:
        found = original(*arguments, **named)
        if not done:
            done.append(None)
            action()
        return found

    monkeypatch.setattr(owner, name, wrapper)
    return done


def test_a_crash_between_the_rename_and_the_commit(
    mortal_vault: Vault, mortal: embedded.Embedded, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The old key is back in the file before the next attempt, which goes through."""
    vault, keys = mortal_vault, list[keyring.MasterKey]()
    done = after(monkeypatch, cutover, "swap_file", crash(mortal))
    monkeypatch.setattr(
        cutover, "hold_off_writers", _noting(cutover.hold_off_writers, lambda: keys.append(vault.now))
    )
    run = begin(vault)
    finish(vault, run)
    assert done
    assert keys == [vault.key, vault.key]
    assert swapped(vault, run) == [("cut-over", len(vault.held))]


def _noting(original: Callable[..., Any], note: Callable[[], None]) -> Callable[..., Any]:
    def wrapper(*arguments: Any, **named: Any) -> Any:
        note()
        return original(*arguments, **named)

    return wrapper


def test_an_answer_to_the_commit_that_is_lost(released_vault: Vault, monkeypatch: pytest.MonkeyPatch) -> None:
    """The cut-over is done and the worker does not know: it looks, and leaves the new key where it is."""
    vault = released_vault
    commit, lost = psycopg.Connection.commit, list[None]()

    def deaf(connection: psycopg.Connection[Any]) -> None:
        commit(connection)
        if vault.now != vault.key and not lost:
            lost.append(None)
            raise psycopg.OperationalError("the answer was lost")

    monkeypatch.setattr(psycopg.Connection, "commit", deaf)
    run = begin(vault)
    finish(vault, run)
    assert lost
    assert swapped(vault, run) == [("cut-over", len(vault.held))]


def test_a_crash_proves_no_server(mortal_vault: Vault, mortal: embedded.Embedded, tmp_path: Path) -> None:
    """Rows we resealed ourselves are not taken for a server's because we forgot which they were."""
    vault, file = mortal_vault, tmp_path / "new.key"
    new = keyring.generate()
    file.touch(0o600)
    file.write_text(new.text)
    operations = vault.deployment.operations
    run = operations.start(RotateMasterKey(new_key_file=str(file), cutover="manual"), actor="tester", via="test")
    runner = operations.runner()
    assert runner.work(run, seconds=0.5) is Outcome.MORE
    wait(lambda: runner.work(run, seconds=0.1) and operations.find(str(run)).waiting)
    # Whose the file is, is the operator's to say: one that is early is not put back.
    vault.file.write_text(new.text)
    vault.deployment.query("UPDATE paperclip_worker.rotations SET permitted_at = now(), permitted_by = 'tester'")
    assert runner.work(run, seconds=0) is Outcome.MORE
    asked = "start the servers"
    # Its clean sweeps are behind it: only what it looks for after the crash can hold it back.
    wait(lambda: runner.work(run, seconds=0) and asked in (operations.find(str(run)).waiting or ""))
    assert vault.now == new
    crash(mortal)()
    assert vault.deployment.query("SELECT count(*) FROM paperclip_worker.resealed") == [(0,)]
    assert runner.work(run, seconds=6) is Outcome.MORE
    assert asked in (operations.find(str(run)).waiting or "")
    # A server with the old key touches what we sealed.
    vault.deployment.query("UPDATE company_secret_versions SET status = 'previous'")
    assert runner.work(run, seconds=3) is Outcome.MORE
    assert asked in (operations.find(str(run)).waiting or "")
    with vault.connect() as connection:
        vault.add_version(connection, "by a server", key=new)
    finish(vault, run)


def failed(vault: Vault, run: Any) -> str:
    """Work until the run fails; nothing was switched. Why it failed."""
    with pytest.raises(Refused) as caught:
        vault.deployment.operations.runner().work(run, seconds=math.inf)
    assert vault.deployment.operations.find(str(run)).state.value == "failed"
    query = "SELECT count(cut_over_at) FROM paperclip_worker.rotations"
    assert vault.deployment.query(query) == [(0,)]
    assert vault.opened(vault.key) == vault.held
    return str(caught.value)


def test_a_key_file_that_somebody_replaced_is_left_alone(
    released_vault: Vault, monkeypatch: pytest.MonkeyPatch
) -> None:
    vault, other = released_vault, keyring.generate()
    once(monkeypatch, cutover, "hold_off_writers", lambda: _put(vault.file, other.text))
    run = begin(vault)
    assert f"holds the key {other.fingerprint}, not {vault.key.fingerprint}" in failed(vault, run)
    assert vault.now == other
    vault.file.write_text(vault.key.text)
    vault.deployment.operations.resume(str(run))
    finish(vault, run)


def _put(file: Path, text: str) -> None:
    file.write_text(text)


def test_a_key_file_that_is_gone(released_vault: Vault, monkeypatch: pytest.MonkeyPatch) -> None:
    vault = released_vault
    once(monkeypatch, cutover, "hold_off_writers", vault.file.unlink)
    run = begin(vault)
    assert "there is no master key file" in failed(vault, run)
    assert not vault.file.exists()
    vault.file.write_text(vault.key.text)
    vault.file.chmod(0o600)
    vault.deployment.operations.resume(str(run))
    finish(vault, run)


@pytest.mark.parametrize("moment", ["stage", "swap"])
def test_a_full_disk_switches_nothing(released_vault: Vault, monkeypatch: pytest.MonkeyPatch, moment: str) -> None:
    vault = released_vault
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    original, done = getattr(keyfile, moment), list[None]()

    def full(*arguments: Any, **named: Any) -> Any:
        if done:
            return original(*arguments, **named)
        done.append(None)
        resource.setrlimit(resource.RLIMIT_FSIZE, (20, limits[1]))
        try:
            return original(*arguments, **named)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)

    monkeypatch.setattr(keyfile, moment, full)
    run = begin(vault)
    assert "File too large" in failed(vault, run)
    assert vault.now == vault.key
    assert not [one for one in vault.file.parent.iterdir() if one.name.endswith("part")]
    vault.deployment.operations.resume(str(run))
    finish(vault, run)


def test_one_rotation_at_a_time(released_vault: Vault) -> None:
    begin(released_vault)
    done = released_vault.deployment.cli("run", "rotate-master-key", "--generate", "--inline", "--yes", ok=False)
    assert done.returncode == 3
    assert "already under way" in done.stderr


def test_the_printed_grants_are_enough_to_rotate(vault: Vault) -> None:
    """PostgreSQL lets nobody lock a table who may only update a column of it; and all of the database is read."""
    role = f"rotator_{os.getpid()}_{vault.layout}"
    vault.deployment.query(f"CREATE ROLE {role} LOGIN PASSWORD 'x'")
    try:
        with vault.connect() as connection:
            connection.execute(
                vault.deployment.cli("db", "grants", "--role", role, "--job", "rotate-master-key").stdout.encode()
            )
        url = vault.deployment.environment["DATABASE_URL"]
        least = url.replace(url.split("@")[0], f"postgres://{role}:x")
        vault.deployment.query(f"REVOKE pg_read_all_data FROM {role}")
        vault.deployment.query(f"GRANT SELECT ON ALL TABLES IN SCHEMA public TO {role}")
        vault.deployment.query(f"REVOKE SELECT ON agent_api_keys FROM {role}")
        words = ("run", "rotate-master-key", "--generate", "--inline", "--yes")
        done = vault.deployment.cli(*words, ok=False, env={"DATABASE_URL": least})
        assert done.returncode != 0
        assert "columns cannot be looked into, public.agent_api_keys." in done.stderr
        assert [one.name for one in vault.file.parent.iterdir()] == ["master.key"]
        vault.deployment.query(f"GRANT pg_read_all_data TO {role}")
        vault.deployment.cli("runs", "resume", "last", "--inline", env={"DATABASE_URL": least})
        assert vault.now != vault.key
        assert vault.opened(vault.now) == vault.held
    finally:
        vault.deployment.query(f"DROP OWNED BY {role}")
        vault.deployment.query(f"DROP ROLE {role}")


def test_real_workers_rotate_many(released_vault: Vault) -> None:
    """Two processes of a Celery worker share 20,000 versions; each is swapped once."""
    vault = released_vault
    with vault.connect() as connection, connection.cursor() as cursor:
        secret, _ = vault.secret(connection)
        columns = "(secret_id, version, material, value_sha256, fingerprint_sha256, status)"
        with cursor.copy(f"COPY company_secret_versions {columns} FROM STDIN".encode()) as copy:
            for number in range(20_000):
                copy.write_row(
                    (secret, number + 20_000_000, json.dumps(vault.seal(f"many-{number}")), "x", "x", "current")
                )
    before = len(vault.held)
    with vault.deployment.worker("worker", "--concurrency=2"):
        run = begin(vault)
        with app.make(vault.deployment.operations.settings) as celery:
            app.send_work(celery, run)
        wait(lambda: vault.deployment.operations.find(str(run)).settled_at is not None, seconds=90)
    result = vault.deployment.operations.result(run)
    assert result["state"] == "kept", result
    assert result["rows"] == before + 20_000
    assert len(vault.opened(vault.now)) == before + 20_000
