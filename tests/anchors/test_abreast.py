"""No run begins, or goes on, while the bucket has receipts that the database lacks: it came back from a backup."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any
from uuid import UUID

import psycopg
import pytest
from botocore.exceptions import EndpointConnectionError

import schedules
from tests.anchors.conftest import on
from tests.anchors.test_anchoring import _ERROR, _answer
from tests.cli.helpers import INLINE, begin, complete, keys, refused, start, world
from tests.conftest import Deployment
from tests.faults.evidence import check_anchored, rows
from tests.promises.archived import half
from worker import anchors, app, audit, embedded, timetable
from worker.errors import Refused, StorageFault
from worker.operations import Operations
from worker.runner import Outcome
from worker.states import State

BackUp = Callable[[Deployment], Deployment]
LACKS = "the bucket has receipt {} and the database lacks it: the database came from a backup"
EVENTS = "heartbeat_run_events"


def _work(operations: Operations, run: UUID) -> Outcome:
    return operations.runner().work(run, seconds=math.inf)


# -- what is refused, and what is not -----------------------------------------------------------------


def test_no_run_is_entered_or_resumed_and_all_else_goes_on(released: Deployment, back_up: BackUp) -> None:
    """A hold that was entered after the backup is gone from it: what it kept would go with the first run."""
    stopped = str(half(released))
    going = start(released.operations, table=EVENTS)
    back = back_up(released)
    released.cli("holds", "add", "--table", "activity_log", "--reason", "entered after the backup")
    complete(released, table="plugin_logs", archive=False)
    says = (
        LACKS.format(2) + ", without the legal holds and policies entered since, or PAPERCLIP_WORKER_S3_PREFIX is "
        'another deployment\'s; .*"After a restore from a backup" in docs/operations.md'
    )
    before, there = world(back), keys(back)
    forbidden: list[tuple[str, ...]] = [
        INLINE,
        (*INLINE, "--without-archive"),
        ("run", "prune-logs", "--yes", "--detach"),
        ("run", "archive-tasks", "--inline", "--yes"),
        ("run", "restore-logs", "--run", stopped, "--inline", "--yes"),
        ("runs", "resume", stopped, "--inline"),
        ("runs", "resume", str(going), "--inline"),
        ("runs", "resume", str(going), "--detach"),
        ("receipts", "anchor"),
        ("receipts", "anchor", "--all"),
    ]
    for words in forbidden:
        refused(back, *words, says=says)
    allowed: list[tuple[str, ...]] = [
        ("plan", "prune-logs"),
        ("rehearse", "prune-logs"),
        ("holds", "list"),
        ("policy", "list"),
        ("receipts", "list"),
        ("receipts", "verify"),
        ("runs", "list"),
        ("runs", "show", stopped),
        ("schedule", "list"),
        ("metrics",),
        ("db", "check"),
        ("db", "grants", "--role", "workers"),
    ]
    for words in allowed:
        back.cli(*words)
    assert (world(back), keys(back)) == (before, there)
    back.cli("db", "init")
    back.cli("holds", "add", "--table", "activity_log", "--reason", "entered again")
    back.cli("policy", "set", "--table", "activity_log", "--keep", "1000d", "--reason", "again", "--yes")
    assert back.json("runs", "stop", str(going))["state"] == "stopped"


@pytest.mark.parametrize("state", [State.QUEUED, State.RUNNING, State.VERIFYING, State.FINISHING])
def test_a_run_under_way_goes_no_further(released: Deployment, back_up: BackUp, state: State) -> None:
    """The worker that takes it up in the copy changes nothing more: it ends failed, and its receipt says why."""
    small = released.with_settings(bite_rows="400")
    run = start(small)
    while small.find(str(run)).state is not state or (state is State.RUNNING and not small.result(run)["bites"]):
        small.runner().work(run, seconds=0)
    back = back_up(released)
    assert _work(released.operations, run) is Outcome.SETTLED
    before, bites = rows(back), back.operations.result(run)["bites"]
    with pytest.raises(Refused, match=LACKS.format(1)):
        _work(back.operations, run)
    result = back.operations.result(run)
    assert (result["state"], result["bites"], rows(back)) == ("failed", bites, before)
    assert result["receipt"]["error"] == result["error"]
    assert result["error"].startswith("the bucket has receipt 1 and the database lacks it")
    # Its receipt waits for the new prefix, and the old one is left as it was.
    assert (result["receipt"]["seq"], result["anchor"]) == (1, None)
    released.cli("receipts", "verify", "--anchors")


def test_a_database_that_is_restored_below_a_worker_is_noticed_once_its_connection_breaks(
    released: Deployment, back_up: BackUp, servers: embedded.Embedded
) -> None:
    """Within one slice, which may be of hours where the command is the worker."""
    run = begin(released)
    back = back_up(released)
    complete(released, table=EVENTS, archive=False)
    names = [one.environment["DATABASE_URL"].rpartition("/")[2] for one in (released, back)]
    small = released.with_settings(bite_rows="50")
    puts = itertools.count()

    def restore(operation: str) -> None:
        # In the midst of a bite.
        if operation == "PutObject" and next(puts) == 2:
            _swap(servers, *names)

    before = rows(back)
    with _heard(small, restore), pytest.raises(Refused, match=LACKS.format(1)):
        _work(small, run)
    assert (small.result(run)["state"], rows(released)) == ("failed", before)
    _swap(servers, *names)


def _swap(servers: embedded.Embedded, live: str, other: str) -> None:
    """Give each of two databases the other's name; whoever is connected is cut off."""
    with psycopg.connect(servers.environment()["DATABASE_URL"], autocommit=True) as admin:
        for name in (live, other):
            admin.execute(f"ALTER DATABASE {name} ALLOW_CONNECTIONS false".encode())
            admin.execute("SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity WHERE datname = %s", (name,))
        for old, new in ((live, "swapped"), (other, live), ("swapped", other)):
            admin.execute(f"ALTER DATABASE {old} RENAME TO {new}".encode())
        for name in (live, other):
            admin.execute(f"ALTER DATABASE {name} ALLOW_CONNECTIONS true".encode())


def test_workers_and_beat_s_launches_are_refused_in_the_log_and_due_times_count_as_missed(
    released: Deployment, back_up: BackUp
) -> None:
    entry, *_ = schedules.SCHEDULE
    run = begin(released)
    back = back_up(released)
    _work(released.operations, run)
    settings = back.operations.settings
    with app.make(settings) as celery:
        site = app.Site(settings, timetable.load(settings), celery)
        back.opened.append(site.operations)
        site.launch(entry)
    ((entered,),) = back.query("SELECT count(*) FROM paperclip_worker.runs")
    assert entered == 1
    back.query("UPDATE paperclip_worker.chain SET born = clock_timestamp() - interval '3 days'")
    (listed,) = [one for one in back.json("schedule", "list")["schedule"] if one["entry"] == entry]
    assert listed["missed"] > 0
    # A worker of the restored deployment that is up, and the message of the run that was under way.
    with back.worker(), app.make(settings) as celery:
        app.send_work(celery, run)
        deadline = time.monotonic() + 30
        while back.operations.result(run)["state"] == "running":
            assert time.monotonic() < deadline
            time.sleep(0.1)
    assert back.json("runs", "list", "--state", "failed")["runs"][0]["run"] == str(run)
    assert LACKS.format(1) in back.cli("runs", "show", str(run)).stdout


def test_receipts_of_what_was_refused_do_not_hide_that_the_bucket_is_ahead(
    released: Deployment, back_up: BackUp
) -> None:
    """Runs that fail, or are stopped, take the chain beyond the bucket's end; the first deployment is left in peace.

    As in a drill, where somebody has the copy started with the settings of the first.
    """
    tables = ("activity_log", EVENTS, "plugin_logs")
    under_way = [start(released.operations, table=table, archive=False) for table in tables]
    back = back_up(released)
    _work(released.operations, under_way[0])
    back.cli("runs", "stop", str(under_way[0]))
    for run in under_way[1:]:
        with pytest.raises(Refused, match="the bucket has receipt 1 and the database has another: "):
            _work(back.operations, run)
    back.operations.runner().anchor()
    assert [one["anchor"] for one in back.json("receipts", "list")["receipts"]] == [None] * 3
    before = world(back)
    for words in (INLINE, ("runs", "resume", str(under_way[2]), "--inline")):
        refused(back, *words, says="the bucket has receipt 1 and the database has another: ")
    assert world(back) == before
    for run in under_way[1:]:
        assert _work(released.operations, run) is Outcome.SETTLED
    check_anchored(released)


@pytest.mark.parametrize(("head", "has"), [(2, "lacks it"), (1, "has another")], ids=["of the next", "of the last"])
def test_any_object_under_the_name_of_a_head_that_is_not_ours_is_enough(
    released: Deployment, head: int, has: str
) -> None:
    """As where another deployment writes below the same prefix."""
    complete(on(released, s3_bucket=""), archive=False)
    store = released.operations.store
    assert store is not None
    store.put_once(anchors.head_key(head), b"[1]", lock=None)
    refused(released, *INLINE, says=f"the bucket has receipt {head} and the database {has}: ")


def test_a_new_ledger_does_not_begin_where_another_was(released: Deployment, back_up: BackUp) -> None:
    back = back_up(released)
    complete(released, archive=False)
    back.query("DROP SCHEMA paperclip_worker CASCADE")
    back.cli("db", "init")
    refused(back, *INLINE, says=LACKS.format(1))


def test_without_a_bucket_nobody_knows_and_runs_go_on(released: Deployment, back_up: BackUp) -> None:
    back = back_up(released)
    complete(released, archive=False)
    assert on(back, s3_bucket="").json(*INLINE, "--without-archive")["kept"]


# -- what is no reason --------------------------------------------------------------------------------


@contextmanager
def _heard(operations: Operations, then: Callable[[str], None]) -> Iterator[None]:
    """Have something done just before each request to the store is sent."""
    store = operations.store
    assert store is not None

    def hear(event_name: str, **_: Any) -> None:
        then(event_name.rpartition(".")[2])

    store._client.meta.events.register("before-send.s3", hear)
    try:
        yield
    finally:
        store._client.meta.events.unregister("before-send.s3", hear)


@pytest.mark.parametrize("times", [1, 3])
@pytest.mark.parametrize("entered", [False, True], ids=["a run to enter", "a run under way"])
def test_what_others_settle_between_ledger_and_bucket_is_no_reason(
    released: Deployment, times: int, entered: bool
) -> None:
    """Read in the bucket and not in the ledger: the ledger is read again, as often as its end moves meanwhile."""
    complete(released, archive=False)
    other = on(released)
    run = start(released.operations) if entered else None
    left, asked = iter(range(times)), []

    def settle_first(operation: str) -> None:
        asked.append(operation)
        # The second of a look is for the receipt after the last.
        if len(asked) % 2 == 0 and next(left, None) is not None:
            complete(other, table=EVENTS, archive=False)

    with _heard(released.operations, settle_first):
        if run:
            released.operations.runner().work(run, seconds=0)
        else:
            start(released.operations, archive=False)
    assert asked == ["GetObject"] * 2 * (times + 1)
    assert released.query("SELECT count(*) FROM paperclip_worker.runs WHERE state = 'failed'") == [(0,)]
    check_anchored(released)


def test_two_workers_that_settle_at_the_same_time_refuse_each_other_nothing(released: Deployment) -> None:
    def settle(table: str) -> None:
        mine = on(released)
        for _ in range(12):
            assert complete(mine, table=table, archive=False)["kept"]

    with ThreadPoolExecutor(3) as pool:
        list(pool.map(settle, ("activity_log", EVENTS, "plugin_logs")))
    assert released.query("SELECT DISTINCT state, count(*) FROM paperclip_worker.runs GROUP BY 1") == [("kept", 36)]
    check_anchored(released)


def test_receipts_that_are_pending_are_no_reason(released: Deployment, back_up: BackUp) -> None:
    """Nor where the backup was made before the database had noted that they are in the bucket."""
    for _ in range(3):
        complete(on(released, s3_bucket=""), archive=False)
    back = back_up(released)
    assert start(released.operations, archive=False)
    released.cli("receipts", "anchor")
    run = start(back.operations, archive=False)
    assert _work(back.operations, run) is Outcome.SETTLED
    check_anchored(back)


@pytest.mark.parametrize("body", ["[", "[]", '{"settled_at": 7}'])
def test_a_last_receipt_that_somebody_made_no_json_breaks_nothing(released: Deployment, body: str) -> None:
    complete(released, archive=False)
    released.query("UPDATE paperclip_worker.receipts SET body = %s", body)
    assert complete(released, table=EVENTS, archive=False)["kept"]


def test_a_new_place_has_no_receipt_at_all(released: Deployment) -> None:
    complete(released, archive=False)
    assert complete(on(released, s3_prefix="new-" + released.environment["PAPERCLIP_WORKER_S3_PREFIX"]))["kept"]


def test_a_bucket_is_asked_twice_a_slice_however_many_bites(released: Deployment) -> None:
    """And never for a list, which would take longer with each receipt."""
    complete(released, archive=False)
    small, asked = released.with_settings(bite_rows="100"), list[str]()
    with _heard(small, asked.append):
        run = start(small, table=EVENTS, archive=False)
        assert asked == ["GetObject"] * 2
        assert (
            small.runner().work(run, seconds=math.inf, leave=lambda: small.result(run)["bites"] > 3) is Outcome.MORE
        )
        assert asked == ["GetObject"] * 4
        small.runner().work(run, seconds=0)
    assert (asked, small.result(run)["bites"] > 4) == (["GetObject"] * 6, True)


# -- a bucket that does not answer --------------------------------------------------------------------

_GONE = {"PAPERCLIP_STORAGE_S3_ENDPOINT": "http://127.0.0.1:9"}
WHY = "it must first say that it has no receipt which the database lacks"


def test_a_bucket_that_does_not_answer_lets_no_run_begin(released: Deployment) -> None:
    """Also one that needs no bucket: nobody knows what was held."""
    stopped = str(half(released))
    before = world(released)
    for words in (
        (*INLINE, "--without-archive"),
        ("run", "archive-tasks", "--inline", "--yes"),
        ("runs", "resume", stopped, "--inline"),
    ):
        refused(released, *words, env=_GONE, says=f"cannot be reached .*; {WHY}$")
    assert world(released) == before


@pytest.mark.parametrize("lasts", [False, True], ids=["for a moment", "for long"])
def test_a_worker_asks_a_bucket_that_is_away_again(
    released: Deployment, monkeypatch: pytest.MonkeyPatch, lasts: bool
) -> None:
    """For a while; then the run ends failed, and nothing of it was done. It goes on once it is resumed."""
    monkeypatch.setattr("worker.runner.MOST_FAULTS", 2)
    monkeypatch.setattr("worker.runner._LONGEST_REST", 0.05)
    monkeypatch.setattr("botocore.retries.standard.ExponentialBackoff.delay_amount", lambda *_: 0.01)
    run = start(released.operations, archive=False)
    before, behind = rows(released), on(released).operations
    # boto tries three times by itself.
    left = itertools.count() if lasts else iter(range(3))

    def be_away(operation: str) -> None:
        if operation == "GetObject" and next(left, None) is not None:
            raise EndpointConnectionError(endpoint_url="s3")

    with _heard(behind, be_away):
        if lasts:
            with pytest.raises(StorageFault, match=WHY):
                _work(behind, run)
            assert (behind.result(run)["state"], rows(released)) == ("failed", before)
            released.operations.resume(str(run))
            behind = released.operations
        assert _work(behind, run) is Outcome.SETTLED
    assert next(left, None) is None or lasts
    assert released.operations.result(run)["kept"]
    assert rows(released) != before


def test_credentials_that_may_not_list_are_told_so(released: Deployment) -> None:
    """To them a store says of a name that is not there that they may not read it."""
    operations = on(released).operations
    _answer(operations, "GetObject", 403, _ERROR.format("AccessDenied"))
    with pytest.raises(Refused, match=rf"the store refuses \(AccessDenied\); check bucket and credentials; {WHY}"):
        start(operations, archive=False)
    with operations.transaction(read_only=True) as connection:
        assert audit.recent(connection) == []
