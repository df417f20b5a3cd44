"""A rotation beside a server that goes on writing and reading, and beside transactions that stand in its way."""

from __future__ import annotations

import json
import math
import threading
from collections import Counter
from collections.abc import Callable
from datetime import datetime
from typing import Any
from uuid import UUID

import psycopg
import pytest

from tasks import rotate_master_key
from tasks.rotate_master_key import RotateMasterKey
from tests.faults.evidence import wait
from tests.rotation import app, steps
from tests.rotation.vault import Vault
from worker import cutover, runner
from worker.errors import Contended, Refused
from worker.rotation import Rotating
from worker.runner import Outcome

pytestmark = pytest.mark.faults


def begin(vault: Vault) -> UUID:
    return vault.deployment.operations.start(RotateMasterKey(generate=True), actor="tester", via="test")


def finish(vault: Vault, run: UUID) -> dict[str, Any]:
    """Work until the run is settled; what its receipt says of the rotation."""
    assert vault.deployment.operations.runner().work(run, seconds=math.inf) is Outcome.SETTLED
    result = vault.deployment.operations.result(run)
    assert result["state"] == "kept", result
    assert vault.now != vault.key
    assert vault.opened(vault.now) == vault.held
    evidence: dict[str, Any] = result["receipt"]["evidence"]
    return evidence


def once(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, action: Callable[[], None]) -> list[None]:
    """Do something just before the first call of a function; the list says that it was done."""
    original, done = getattr(owner, name), list[None]()

    def wrapper(*arguments: Any, **named: Any) -> Any:
        if not done:
            done.append(None)
            action()
        return original(*arguments, **named)

    monkeypatch.setattr(owner, name, wrapper)
    return done


def locked(vault: Vault, mode: str) -> bool:
    """Whether the worker holds the first carrier's table in this mode."""
    query = "SELECT count(*) > 0 FROM pg_locks WHERE relation = 'company_secret_versions'::regclass AND granted "
    return bool(vault.deployment.query(query + "AND mode = %s", mode)[0][0])


def test_a_server_goes_on_through_a_rotation(released_vault: Vault) -> None:
    """It inserts what it sealed before the switch, writes old documents back whole, deletes and reads, all along."""
    vault = released_vault
    with app.serving(vault, writers=3, readers=2) as seen:
        run = begin(vault)
        assert vault.deployment.operations.runner().work(run, seconds=math.inf) is Outcome.SETTLED
    result = vault.deployment.operations.result(run)
    assert result["state"] == "kept", result
    assert seen.errors == []
    assert vault.now != vault.key
    assert vault.opened(vault.now) == vault.held
    assert seen.writes > 50
    # Without those the test would show nothing.
    assert seen.late > 0
    assert seen.reads > 500
    evidence = result["receipt"]["evidence"]
    assert evidence["readers_waited"] is True
    # What the server was reading opened all the same, unless the machine held it up; what it wrote late, soon after.
    assert seen.torn <= seen.reads // 10
    switched = datetime.fromisoformat(evidence["cut_over_at"]).timestamp()
    assert all(0 < one - switched < 10 for one in seen.unread)


def test_a_server_that_keeps_the_old_key_fails_the_run_until_it_is_put_right(
    released_vault: Vault, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it wrote so far is sealed anew all the same, and the resumed run has its sweeps before it again."""
    vault, writes, original = released_vault, [True], Rotating.sweep

    def beside_a_writer(self: Rotating, **named: bool) -> Any:
        if writes:
            with vault.connect() as connection:
                vault.add_version(connection, "with the old key")
        return original(self, **named)

    monkeypatch.setattr(Rotating, "sweep", beside_a_writer)
    monkeypatch.setattr(rotate_master_key, "_MOST_SWEEPS", 2)
    run = begin(vault)
    for _ in range(2):
        with pytest.raises(Refused, match="a server still seals with the old key"):
            vault.deployment.operations.runner().work(run, seconds=math.inf)
        assert vault.opened(vault.now) == vault.held
        vault.deployment.operations.resume(str(run))
    writes.clear()
    finish(vault, run)


def test_what_nobody_can_read_is_swept_though_the_server_is_under_pressure(released_vault: Vault) -> None:
    """All that the swap wrote has yet to go to the replicas, which a slot tells of."""
    vault = released_vault
    run, slot = begin(vault), f"slot_{vault.deployment.environment['DATABASE_URL'].rpartition('/')[2]}"
    steps.work_until(vault, run, steps.SWEEP)
    pressed = steps.with_environment(vault, PAPERCLIP_WORKER_MAX_RETAINED_WAL="1")
    vault.deployment.query("SELECT pg_create_physical_replication_slot(%s, true)", slot)
    try:
        with vault.connect() as connection:
            vault.add_version(connection, "late")
        assert pressed.deployment.operations.runner().work(run, seconds=10) is Outcome.SETTLED
        finish(vault, run)
    finally:
        vault.deployment.query("SELECT pg_drop_replication_slot(%s)", slot)


def test_rows_that_change_after_they_were_made_ready(released_vault: Vault, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another column, the value itself, and the row itself: between the last look and the lock."""
    vault = released_vault
    versions = [row for table, row in vault.held if table == "company_secret_versions"]
    touched, renewed, deleted = versions[:3]

    def change() -> None:
        with vault.connect() as connection:
            connection.execute("UPDATE company_secret_versions SET status = 'disabled' WHERE id = %s", [touched])
            material = json.dumps(vault.seal("renewed"))
            query = (
                "UPDATE company_secret_versions SET material = %s, value_sha256 = encode(sha256('renewed'), 'hex') "
            )
            connection.execute(query + "WHERE id = %s", [material, renewed])
            connection.execute("DELETE FROM company_secret_versions WHERE id = %s", [deleted])
        vault.held["company_secret_versions", renewed] = Counter(["renewed"])
        del vault.held["company_secret_versions", deleted]

    done = once(monkeypatch, cutover, "hold_off_writers", change)
    finish(vault, begin(vault))
    assert done
    assert vault.deployment.query("SELECT status FROM company_secret_versions WHERE id = %s", touched) == [
        ("disabled",)
    ]


def test_a_table_that_is_rewritten_is_made_ready_again(
    released_vault: Vault, monkeypatch: pytest.MonkeyPatch
) -> None:
    """VACUUM FULL moves every row and makes none newer; still all are swapped with the file, and not later."""
    vault = released_vault

    def rewrite() -> None:
        with psycopg.connect(vault.deployment.environment["DATABASE_URL"], autocommit=True) as connection:
            connection.execute("DELETE FROM company_secret_versions WHERE material->>'scheme' LIKE 'external%'")
            connection.execute("VACUUM FULL company_secret_versions")

    assert once(monkeypatch, Rotating, "claim_cut_over", rewrite) == []
    run = begin(vault)
    finish(vault, run)
    swapped = "SELECT key, rows::int FROM paperclip_worker.shards WHERE run_id = %s AND rows > 0"
    assert vault.deployment.query(swapped, run) == [("cut-over", len(vault.held))]


def test_a_long_read_does_not_hold_the_cut_over_up(released_vault: Vault) -> None:
    """As a dump does it: a transaction that has read every carrier's table and stays open."""
    vault = released_vault
    with vault.connect() as dump:
        for table in {key[0] for key in vault.held}:
            dump.execute(f"SELECT count(*) FROM {table}".encode())
        evidence = finish(vault, begin(vault))
        assert dump.execute("SELECT 1").fetchone() == (1,)
    assert evidence["readers_waited"] is False


def test_no_reader_that_turns_writer_is_ended_for_us(released_vault: Vault, monkeypatch: pytest.MonkeyPatch) -> None:
    """It waits for our lock and we must not for its: PostgreSQL would end the one who waited first."""
    vault = released_vault
    swap = Rotating._swap
    # So late that its look for a deadlock comes while we would wait for it.
    monkeypatch.setattr(Rotating, "_swap", lambda one: (threading.Event().wait(0.75), swap(one))[1])
    errors: list[BaseException] = []

    def turn() -> None:
        with vault.connect() as connection:
            connection.execute("SELECT count(*) FROM company_secret_versions")
            company, sealed = vault.secret(connection)[1], vault.seal("turned writer")
            wait(lambda: locked(vault, "ExclusiveLock"))
            row = vault.insert(connection, "company_secret_proposals", company_id=company, value_ciphertext=sealed)
            vault.held["company_secret_proposals", str(row)] = Counter(["turned writer"])

    thread = _started(turn, errors)
    evidence = finish_after(vault, thread, errors)
    assert evidence["readers_waited"] is False


def test_no_writer_of_two_tables_is_ended_for_us(released_vault: Vault) -> None:
    """It has written the second table that we lock and goes on to the first: we give way and come again."""
    vault = released_vault
    errors: list[BaseException] = []
    ready = threading.Event()

    def cross() -> None:
        with vault.connect() as connection:
            company = vault.secret(connection)[1]
            row = vault.insert(
                connection, "company_secret_proposals", company_id=company, value_ciphertext=vault.seal("crossed")
            )
            vault.held["company_secret_proposals", str(row)] = Counter(["crossed"])
            ready.set()
            wait(lambda: locked(vault, "ExclusiveLock"))
            vault.add_version(connection, "crossed")

    thread = _started(cross, errors)
    assert ready.wait(10)
    finish_after(vault, thread, errors)


def test_a_row_locked_to_be_updated_ends_nobody(released_vault: Vault) -> None:
    """SELECT FOR UPDATE of a row we want to swap, and then the update."""
    vault = released_vault
    errors: list[BaseException] = []
    ready = threading.Event()
    row = next(row for table, row in vault.held if table == "company_secret_versions")
    asked = "SELECT count(*) > 0 FROM pg_locks WHERE relation = 'company_secret_versions'::regclass "
    asked += "AND mode IN ('ShareRowExclusiveLock', 'ExclusiveLock')"

    def update() -> None:
        with vault.connect() as connection:
            connection.execute("SELECT FROM company_secret_versions WHERE id = %s FOR UPDATE", [row])
            ready.set()
            wait(lambda: vault.deployment.query(asked)[0][0])
            connection.execute("UPDATE company_secret_versions SET status = 'previous' WHERE id = %s", [row])

    thread = _started(update, errors)
    assert ready.wait(10)
    finish_after(vault, thread, errors)


def _started(action: Callable[[], None], errors: list[BaseException]) -> threading.Thread:
    def run() -> None:
        try:
            action()
        except BaseException as error:  # noqa: BLE001 - the test looks at it
            errors.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    return thread


def finish_after(vault: Vault, thread: threading.Thread, errors: list[BaseException]) -> dict[str, Any]:
    """Rotate beside a thread that writes, and wait for both before anything is looked at."""
    run = begin(vault)
    assert vault.deployment.operations.runner().work(run, seconds=math.inf) is Outcome.SETTLED
    thread.join(20)
    assert errors == []
    return finish(vault, run)


def test_a_writer_that_does_not_end_makes_the_run_fail_with_nothing_switched(
    released_vault: Vault, monkeypatch: pytest.MonkeyPatch
) -> None:
    vault = released_vault
    monkeypatch.setattr(runner, "MOST_FAULTS", 3)
    run = begin(vault)
    with vault.connect() as writer:
        vault.add_version(writer, "long in coming")
        with pytest.raises(Contended):
            vault.deployment.operations.runner().work(run, seconds=math.inf)
        found = vault.deployment.operations.find(str(run))
        assert (found.state.value, found.error) == (
            "failed",
            "another transaction holds these rows (SQLSTATE 55P03)",
        )
        assert vault.now == vault.key
    assert vault.opened(vault.key) == vault.held
    vault.deployment.operations.resume(str(run))
    finish(vault, run)
