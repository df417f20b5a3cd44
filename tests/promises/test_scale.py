"""Deployments far from the tests' own in size: what is done and held grows with the rows that go, and no faster."""

from __future__ import annotations

import hashlib
import io
import json
import math
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from threading import Barrier
from typing import Any
from uuid import UUID, uuid4

import sqlalchemy as sa

from tasks.prune_logs import PruneLogs
from tests.conftest import ROOT, Deployment
from worker import audit, ledger, ledger_shards
from worker.job import Shard
from worker.nullstore import NullStore
from worker.operations import Operations
from worker.plans import Tally
from worker.runner import Outcome
from worker.states import State

MOST_MEMORY = 250 << 20


# What a process has held at most, without what its parent held when it was forked.
_MEASURED = """
import atexit, runpy, sys
status = lambda: open("/proc/self/status", encoding="ascii").read().partition("VmHWM:")[2].split()[0]
atexit.register(lambda: print(status(), file=sys.stderr))
"""
_COMMAND = """
sys.argv[0] = "cli.py"
runpy.run_path("cli.py", run_name="__main__")
"""
_REHEARSAL = """
from datetime import timedelta
from tasks.prune_logs import PruneLogs
from worker import config
from worker.operations import Operations
Operations(config.load()).rehearse(PruneLogs(table="plugin_logs", older_than=timedelta(days=150)), limit=20_000)
"""


def _peak(deployment: Deployment, *words: str, code: str = _COMMAND, status: int = 0) -> int:
    """The most memory that a command takes, which must end with this status."""
    command = [sys.executable, "-c", _MEASURED + code, *words]
    environment = {key: value for key, value in deployment.process_environment().items() if key != "PYTHONWARNINGS"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT, check=False)
    assert done.returncode == status, done.stderr
    return int(done.stderr.split()[-1]) << 10


def _companies(deployment: Deployment, number: int) -> None:
    """More companies, and nothing in the activity log but one old row of each."""
    deployment.query("TRUNCATE activity_log CASCADE")
    deployment.query(
        "WITH made AS (INSERT INTO companies (id, name, issue_prefix) "
        "SELECT gen_random_uuid(), 'many', 'M' || n FROM generate_series(1, %s) n RETURNING id) "
        "INSERT INTO activity_log (company_id, actor_id, action, entity_type, entity_id, created_at) "
        "SELECT id, 'u', 'a', 'x', 'y', now() - interval '200 days' FROM made",
        number,
    )


@contextmanager
def _statements(operations: Operations) -> Iterator[list[str]]:
    """The statements that are executed meanwhile."""
    found: list[str] = []

    def note(_connection: Any, _cursor: Any, statement: str, *_: Any) -> None:
        found.append(statement)

    sa.event.listen(operations.engine, "before_cursor_execute", note)
    try:
        yield found
    finally:
        sa.event.remove(operations.engine, "before_cursor_execute", note)


def _start(operations: Operations, **fields: Any) -> UUID:
    return operations.start(PruneLogs(**fields), actor="tester", via="test")


def _shards(operations: Operations, number: int) -> UUID:
    """A run laid out in so many shards, of two stages."""
    run = _start(operations, archive=False)
    shards = (Shard(key=f"{at}:0", rows=1, spec={}, stage=at * 2 // number) for at in range(number))
    with operations.transaction() as connection:
        held = ledger.get(connection, run, hold=True)
        assert held is not None
        ledger_shards.add_shards(connection, run, held.sweep, shards)
        ledger.step(connection, held, State.RUNNING)
    return run


def test_a_shard_of_ten_thousand_is_taken_in_no_time(released: Deployment) -> None:
    """One for each company, or of a restore for each object. It took the square of their number, and never came."""
    operations = released.with_settings(statement_timeout="1")
    run = _shards(operations, 10_000)
    for _ in range(20):
        with operations.transaction() as connection:
            held = ledger_shards.take_shard(connection, run)
            assert held is not None
            # The others are of a later stage, or are held; each of these is still the first for everybody else.
            with operations.transaction() as beside:
                other = ledger_shards.take_shard(beside, run)
                assert other is not None
                assert (other.shard.stage, other.number) == (0, held.number + 1)
            ledger_shards.record_bite(connection, held, cursor=None, tally=Tally(), done=True, objects=(), seconds=0)


def test_statements_do_not_grow_with_the_companies(released: Deployment) -> None:
    """The app and other receipts wait for nobody who tells thousands of companies one by one."""
    _companies(released, 1_500)
    operations = released.operations
    run = _start(operations)
    with _statements(operations) as laid_out:
        assert operations.runner().work(run, seconds=0) is Outcome.MORE
    assert len(laid_out) < 100
    assert operations.stop(str(run)).state is State.STOPPED
    run = _start(operations, archive=False)
    with _statements(operations) as found:
        assert operations.runner().work(run, seconds=math.inf) is Outcome.SETTLED
    assert len(found) < 1_000
    result = operations.result(run)
    assert (result["state"], result["rows"], len(result["tally"])) == ("kept", 1_500, 1_500)
    ((told, companies),) = released.query(
        "SELECT count(*), count(DISTINCT company_id) FROM activity_log WHERE action = %s AND details @> %s",
        PruneLogs.action,
        json.dumps({"run": str(run), "rows": 1}),
    )
    assert (told, companies) == (1_500, 1_500)


def test_what_one_company_cannot_be_told_the_others_are(released: Deployment) -> None:
    _companies(released, 30)
    ((deaf,),) = released.query("SELECT company_id FROM activity_log ORDER BY id LIMIT 1")
    released.query(
        f"ALTER TABLE activity_log ADD CHECK (created_at < now() - interval '1 day' OR company_id <> '{deaf}')"
    )
    run = _start(released.operations, archive=False)
    assert released.operations.runner().work(run, seconds=math.inf) is Outcome.SETTLED
    result = released.operations.result(run)
    assert result["kept"]
    missing = result["receipt"]["evidence"]["activity_not_written"]
    assert missing == {str(deaf): "the database refuses it (SQLSTATE 23514)"}
    assert released.query("SELECT count(*) FROM activity_log WHERE action = %s", PruneLogs.action) == [(29,)]


def test_as_many_policies_as_companies(released: Deployment) -> None:
    """More than a statement has parameters for: a run was told that the database is gone, again and again."""
    before = {one.company: one for one in released.operations.plan(PruneLogs()).targets}
    released.query(
        'INSERT INTO paperclip_worker.policies ("table", company, version, keep_seconds, reason, actor, created_at) '
        "SELECT 'activity_log', coalesce(c.id, gen_random_uuid()), 1, 86400 * (190 + n % 7), 'r', 'a', "
        "now() - interval '1 day' FROM generate_series(1, 33000) n "
        "LEFT JOIN (SELECT id, row_number() OVER (ORDER BY id) AS n FROM companies LIMIT 2) c USING (n)"
    )
    after = {one.company: one for one in released.operations.plan(PruneLogs()).targets}
    longer = [company for company, one in before.items() if after[company].rows < one.rows]
    assert sorted(longer, key=str) == sorted(before, key=str)[:2]
    assert [after[company] for company in before.keys() - set(longer)] == [before[max(before, key=str)]]


def _receipts(deployment: Deployment, number: int, *, megabytes: int) -> None:
    """Receipts of a run of very many companies, which is settled so often."""
    run = _start(deployment.operations, archive=False)
    assert deployment.operations.runner().work(run, seconds=math.inf) is Outcome.SETTLED
    settings = deployment.operations.settings
    assert settings.signing_key_file is not None
    signer = audit.Signer.load(settings.signing_key_file)
    left = [
        {"table": "activity_log", "company": str(uuid4()), "reason": "issue_open", "rows": 1}
        for _ in range(megabytes * 9_000)
    ]
    receipt = deployment.operations.result(run)["receipt"]
    facts = {"state": receipt["state"], "settled_at": receipt["settled_at"], "left": left}
    for _ in range(number):
        with deployment.operations.transaction() as connection:
            audit.append(connection, signer, run, facts)


def test_a_receipt_of_very_many_companies_goes_to_the_bucket(released: Deployment) -> None:
    """It went there, was taken for another deployment's, and every later `verify` told of a flaw."""
    _receipts(released, 1, megabytes=25)
    (_, size) = released.query("SELECT seq, length(body) FROM paperclip_worker.receipts ORDER BY seq DESC LIMIT 1")[0]
    assert size > 20 << 20
    assert released.json("receipts", "anchor")["not_anchored"] == 0
    released.cli("receipts", "verify", "--from-s3")


def test_large_receipts_are_read_a_few_at_a_time(released: Deployment) -> None:
    run = _start(released.operations, archive=False)
    assert released.operations.runner().work(run, seconds=math.inf) is Outcome.SETTLED
    released.query(
        "ALTER TABLE paperclip_worker.receipts ALTER body SET STORAGE EXTERNAL; "
        "INSERT INTO paperclip_worker.receipts (seq, run_id, body, hash, signer, signature) "
        "SELECT seq + n, run_id, repeat('large', 400000), '', '', '' "
        "FROM paperclip_worker.receipts, generate_series(1, 150) n"
    )
    assert _peak(released, "receipts", "verify", status=1) < MOST_MEMORY


def test_rows_that_the_database_packs_small_fit_in_memory(released: Deployment) -> None:
    """Text of one letter takes a hundredth in the table, and its full length in a line of the archive."""
    released.query("UPDATE activity_log SET details = jsonb_build_object('x', repeat('x', 150000))")
    # Half of that is the program itself.
    assert _peak(released, "run", "prune-logs", "--older-than", "100d", "--inline", "--yes") < MOST_MEMORY * 2 // 3


def test_a_rehearsals_store_gives_each_thread_its_own_object_back() -> None:
    """The objects of a batch are stored several at a time, and each is read back by whoever wrote it."""
    store, written = NullStore(), Barrier(2)

    def stored(key: str) -> bytes:
        body = key.encode()
        store.put(key, io.BytesIO(body), sha256=hashlib.sha256(body).hexdigest())
        written.wait(10)
        return b"".join(store.read(key))

    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(stored, ("one", "two"))) == [b"one", b"two"]


def test_a_bite_of_rows_of_thousands_of_companies_fits_in_memory(released: Deployment) -> None:
    """Where no index has them by company each bite has an object for each."""
    _companies(released, 4_000)
    released.query(
        "INSERT INTO plugin_logs (plugin_id, company_id, message, created_at) "
        "SELECT (SELECT plugin_id FROM plugin_logs LIMIT 1), id, 'm', now() - interval '200 days' FROM companies"
    )
    assert _peak(released, code=_REHEARSAL) < MOST_MEMORY


def test_a_list_of_runs_of_very_many_companies_fits_in_memory(released: Deployment) -> None:
    """Its plan and what it left name each company; a list shows neither, and who follows a run asks each moment."""
    run = _start(released.operations, archive=False)
    assert released.operations.runner().work(run, seconds=math.inf) is Outcome.SETTLED
    released.query(
        "UPDATE paperclip_worker.runs SET plan = jsonb_build_object('left', many), left_rows = many, findings = many "
        "FROM (SELECT jsonb_agg(jsonb_build_object('company', gen_random_uuid(), 'reason', 'issue_open', 'rows', n, "
        "'table', 'activity_log')) AS many FROM generate_series(1, 20000) n) made"
    )
    released.query(
        "INSERT INTO paperclip_worker.runs SELECT (jsonb_populate_record(r, jsonb_build_object('id', "
        "gen_random_uuid()))).* FROM paperclip_worker.runs r, generate_series(1, 19)"
    )
    assert _peak(released, "runs", "list") < MOST_MEMORY
