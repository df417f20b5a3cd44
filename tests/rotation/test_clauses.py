"""The clauses of tests/contract/test_jobs.py for a job that changes many tables in one transaction."""

from __future__ import annotations

from collections import Counter
from datetime import timedelta
from typing import Any
from uuid import UUID, uuid4

import psycopg
import pytest
from psycopg import sql

from tasks.rotate_master_key import RotateMasterKey
from tests.faults.evidence import thinned
from tests.rotation import steps
from tests.rotation.vault import Vault
from worker import layouts, params, registry
from worker.errors import Contended, Refused, WorkerError
from worker.job import Job
from worker.params import RunId
from worker.runner import Outcome

AUDIT = "activity_log"


def _tables(vault: Vault) -> list[str]:
    return [one.table.name for one in layouts.LAYOUTS[vault.layout].carriers]


def _versions(vault: Vault) -> dict[tuple[str, str], str]:
    """The state of every row of every carrier's table."""
    with vault.connect() as connection:
        return {
            (table, row): version
            for table in _tables(vault)
            for row, version in connection.execute(
                sql.SQL("SELECT id::text, md5(t::text) FROM {} t").format(sql.Identifier(table))
            )
        }


def _changed(before: dict[Any, str], after: dict[Any, str]) -> set[Any]:
    return {one for one, _ in before.items() ^ after.items()}


def _audited(vault: Vault) -> list[str]:
    query = "SELECT company_id::text FROM activity_log WHERE action = 'maintenance.master_key_rotated' ORDER BY 1"
    return [row[0] for row in vault.deployment.query(query)]


def test_a_run_changes_what_was_planned_and_says_so_to_each_company_once(vault: Vault) -> None:
    plan = vault.deployment.operations.plan(RotateMasterKey(generate=True))
    rows, rest = _versions(vault), vault.deployment.digest(without=(AUDIT, *_tables(vault)))
    result = steps.work(vault, steps.start(vault, generate=True))
    assert result["kept"] is True
    assert _changed(rows, _versions(vault)) == set(vault.held)
    assert vault.deployment.digest(without=(AUDIT, *_tables(vault))) == rest
    planned = Counter({(one.table, one.company): one.rows for one in plan.targets})
    assert Counter({(one["table"], one["company"]): one["rows"] for one in result["tally"]}) == planned
    assert result["rows"] == len(vault.held)
    assert _audited(vault) == sorted({one["company"] for one in result["tally"]})


def test_a_second_run_to_the_same_key_is_refused(vault: Vault) -> None:
    path, _ = steps.key_file(vault)
    assert steps.work(vault, steps.start(vault, new_key_file=str(path)))["kept"] is True
    rows = _versions(vault)
    with pytest.raises(Refused, match="in use already"):
        steps.start(vault, new_key_file=str(path))
    assert _versions(vault) == rows


@pytest.mark.parametrize("step", ["claim", "apply"])
@pytest.mark.parametrize(
    "stage",
    thinned(
        [steps.MAKE_READY, steps.CATCH_UP, steps.CUT_OVER, steps.SWEEP, steps.LOOK_AGAIN],
        {steps.CUT_OVER, steps.SWEEP},
    ),
)
def test_an_exception_at_any_step_leaves_one_key_in_use(
    vault: Vault, step: str, stage: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file holds the key that opens everything, whatever was thrown, also right after the rename."""
    run = steps.start(vault, generate=True)
    steps.work_until(vault, run, stage)
    original = getattr(RotateMasterKey, step)

    def fails(self: Job, *arguments: Any) -> Any:
        original(self, *arguments)
        raise WorkerError("injected")

    with monkeypatch.context() as patch:
        patch.setattr(RotateMasterKey, step, fails)
        with pytest.raises(WorkerError, match="injected"):
            vault.deployment.operations.runner().work(run, seconds=60)
    result = vault.deployment.operations.result(run)
    assert result["state"] == "failed"
    assert result["receipt"]["error"] == "injected"
    switched = stage >= steps.SWEEP
    assert result["rows"] == (len(vault.held) if switched else 0)
    assert (vault.now != vault.key) is switched
    assert vault.opened(vault.now) == vault.held
    vault.deployment.operations.resume(str(run))
    assert steps.work(vault, run)["kept"] is True
    assert vault.opened(vault.now) == vault.held
    assert _audited(vault) == sorted(set(_audited(vault)))


def test_a_row_that_somebody_holds_is_waited_for(vault: Vault) -> None:
    """The cut-over cannot leave it behind, so it does not happen while the lock lasts."""
    run = steps.start(vault, generate=True)
    steps.work_until(vault, run, steps.CUT_OVER)
    runner = vault.deployment.with_settings(lock_timeout="0.1").runner()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("worker.cutover._WRITERS", 0.1)
        with psycopg.connect(vault.deployment.environment["DATABASE_URL"]) as other:
            other.execute("UPDATE company_secret_versions SET version = version + 20000000")
            assert runner.work(run, seconds=0) is Outcome.MORE
            assert vault.now == vault.key
            other.rollback()
    assert steps.work(vault, run)["kept"] is True
    assert vault.opened(vault.now) == vault.held


def test_conflicts_without_end_fail_the_run_before_its_cut_over(
    released_vault: Vault, monkeypatch: pytest.MonkeyPatch
) -> None:
    vault = released_vault
    run = steps.start(vault, generate=True)
    steps.work_until(vault, run, steps.CUT_OVER)
    monkeypatch.setattr("worker.runner._LONGEST_REST", 0.0)
    monkeypatch.setattr("worker.cutover._WRITERS", 0.02)
    with psycopg.connect(vault.deployment.environment["DATABASE_URL"]) as other:
        other.execute("UPDATE company_secret_versions SET version = version + 20000000")
        with pytest.raises(Contended):
            vault.deployment.operations.runner().work(run, seconds=60)
    assert vault.deployment.operations.result(run)["state"] == "failed"
    assert vault.now == vault.key
    assert vault.opened(vault.key) == vault.held


def test_parameters_survive_the_ledger() -> None:
    for job in (
        RotateMasterKey(generate=True),
        RotateMasterKey(new_key_file="key", cutover="manual", retire_after=timedelta(days=7), allow_undecryptable=3),
        RotateMasterKey(rollback=RunId(str(uuid4())), allow_column=("a.b", "c.d.e")),
    ):
        assert params.from_json(RotateMasterKey, params.to_json(job)) == job


def test_a_missing_column_refuses_the_job_and_names_it(vault: Vault) -> None:
    for table in registry.job("rotate-master-key").usual().needs(layouts.LAYOUTS[vault.layout]):
        column = list(table.c)[-1].name
        vault.deployment.query(f'ALTER TABLE "{table.name}" RENAME COLUMN "{column}" TO elsewhere')
        with pytest.raises(WorkerError, match=rf"{table.name}\.{column}"):
            vault.deployment.operations.plan(RotateMasterKey(generate=True))
        vault.deployment.query(f'ALTER TABLE "{table.name}" RENAME COLUMN elsewhere TO "{column}"')


def test_rows_of_other_companies_runs_are_counted_for_their_company(released_vault: Vault) -> None:
    """The sum over companies is the sum over tables, and each row's company is its own."""
    vault = released_vault
    result = steps.work(vault, steps.start(vault, generate=True))
    query = (
        "SELECT s.company_id::text, count(*) FROM company_secret_versions v JOIN company_secrets s "
        "ON s.id = v.secret_id WHERE v.id = ANY(%s) GROUP BY 1"
    )
    rows = [UUID(row) for table, row in vault.held if table == "company_secret_versions"]
    expected = dict(vault.deployment.query(query, rows))
    found = {one["company"]: one["rows"] for one in result["tally"] if one["table"] == "company_secret_versions"}
    assert found == expected
