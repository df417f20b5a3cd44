"""An object store that refuses, cuts, changes or forgets: no row goes whose archive is not intact."""

from __future__ import annotations

import hashlib
import io
import math
from collections.abc import Callable, Iterator

import pytest

from tests.conftest import Deployment
from tests.faults.evidence import begin, check_exact, check_kept, complete, rows
from tests.faults.proxy import Fault, Proxy, proxy
from worker import archive, config, embedded
from worker.errors import StorageFault
from worker.operations import Operations
from worker.runner import Outcome
from worker.states import State

pytestmark = pytest.mark.faults
GOOD_BITES = 3  # before anything goes wrong


@pytest.fixture
def network(servers: embedded.Embedded, monkeypatch: pytest.MonkeyPatch) -> Iterator[Proxy]:
    """The way to the store, and a runner that loses patience soon."""
    monkeypatch.setattr("worker.runner.MOST_FAULTS", 2)
    monkeypatch.setattr("worker.runner._LONGEST_REST", 0.05)
    # boto's own rests between its three attempts.
    monkeypatch.setattr("botocore.retries.standard.ExponentialBackoff.delay_amount", lambda *_: 0.01)
    with proxy(servers.s3.port) as way:
        yield way


@pytest.fixture
def behind(released: Deployment, network: Proxy) -> Operations:
    """The deployment, its store reached through the faulty network."""
    environment = {
        **released.environment,
        "PAPERCLIP_STORAGE_S3_ENDPOINT": network.url,
        "PAPERCLIP_WORKER_BITE_ROWS": "200",
    }
    released.opened.append(Operations(config.load(environment)))
    return released.opened[-1]


def _from(
    number: int, method: str, ending: str, fault: Fault, *, most: float = math.inf
) -> Callable[..., Fault | None]:
    """So many times the fault, from the given request of its kind on."""
    seen = 0

    def decide(asked: str, path: str) -> Fault | None:
        nonlocal seen
        if asked != method or "/heads/" in path or not path.partition("?")[0].endswith(ending):
            return None
        seen += 1
        return fault if number <= seen < number + most else None

    return decide


FAULTS = [
    pytest.param("PUT", Fault.DROP, id="refuses to write"),
    pytest.param("PUT", Fault.BUSY, id="too busy to write"),
    pytest.param("PUT", Fault.SWALLOW, id="takes and forgets"),
    pytest.param("GET", Fault.DROP, id="refuses to read"),
    pytest.param("GET", Fault.CUT, id="cuts what it gives back"),
    pytest.param("GET", Fault.FLIP, id="gives back other bytes"),
]


@pytest.mark.parametrize(("method", "fault"), FAULTS)
def test_a_fault_that_lasts_fails_the_run_and_no_row_goes_unarchived(
    released: Deployment, behind: Operations, network: Proxy, method: str, fault: Fault
) -> None:
    """Some bites go well, then none: the run is failed, with a receipt; resumed once all is well, it is exact."""
    before = rows(released)
    run = begin(behind)
    network.fault = _from(GOOD_BITES + 1, method, ".zst", fault)
    with pytest.raises(StorageFault):
        behind.runner().work(run, seconds=math.inf)
    assert network.faults
    result = behind.result(run)
    assert result["state"] == "failed"
    assert result["receipt"]["error"] == result["error"]
    check_exact(released, run, before)
    assert result["bites"] == GOOD_BITES
    network.fault = lambda *_: None
    assert behind.resume(str(run)).state is State.RUNNING
    complete(behind, run)
    check_kept(released, run, before)


# boto tries three times by itself; the runner is to try again after that, too.
@pytest.mark.parametrize("ending", [".zst", ".json"])
@pytest.mark.parametrize(
    "bad",
    [("PUT", Fault.DROP, 3), ("PUT", Fault.SWALLOW, 1), ("GET", Fault.CUT, 1), ("GET", Fault.FLIP, 1)],
    ids=lambda bad: bad[1].value,
)
def test_a_fault_that_passes_is_ridden_out(
    released: Deployment, behind: Operations, network: Proxy, bad: tuple[str, Fault, int], ending: str
) -> None:
    """One bad moment, with a bite's object or with the manifest: the run is kept and nobody had to do a thing."""
    method, fault, times = bad
    before = rows(released)
    run = begin(behind)
    network.fault = _from(GOOD_BITES if ending == ".zst" else 1, method, ending, fault, most=times)
    assert behind.runner().work(run, seconds=math.inf) is Outcome.SETTLED
    assert network.faults == times
    check_kept(released, run, before)


def test_a_store_that_is_gone_for_good_fails_the_run(
    released: Deployment, behind: Operations, network: Proxy
) -> None:
    """Nobody listens any more: the run fails with its receipt, the index is written when it is resumed elsewhere."""
    before = rows(released)
    run = begin(behind)
    bites = iter(range(GOOD_BITES))
    assert behind.runner().work(run, seconds=math.inf, leave=lambda: next(bites, None) is None) is Outcome.MORE
    network.fault = lambda *_: Fault.DROP
    network.shutdown()
    network.server_close()
    with pytest.raises(StorageFault):
        behind.runner().work(run, seconds=math.inf)
    result = behind.result(run)
    assert result["state"] == "failed"
    assert result["receipt"]["evidence"] == {"index": "not written: StorageFault"}
    check_exact(released, run, before)
    with pytest.raises(StorageFault):
        behind.resume(str(run))
    released.operations.resume(str(run))
    complete(released.operations, run)
    check_kept(released, run, before)


def test_a_store_that_does_not_delete_does_not_fail_the_run(
    released: Deployment, behind: Operations, network: Proxy
) -> None:
    """What a dead worker left stays; the run's message, when it comes again, takes it away."""
    before = rows(released)
    run = begin(behind)
    store = behind.store
    assert store is not None
    leftover = archive.root("activity_log", run) + "company=instance/x.jsonl.zst"
    store.put(leftover, io.BytesIO(), sha256=hashlib.sha256().hexdigest())
    network.fault = _from(1, "POST", "", Fault.DROP)
    assert behind.runner().work(run, seconds=math.inf) is Outcome.SETTLED
    assert network.faults
    assert behind.result(run)["kept"]
    assert leftover in store.keys("archive/")
    network.fault = lambda *_: None
    assert behind.runner().work(run, seconds=0) is Outcome.SETTLED
    check_kept(released, run, before)


def test_an_archive_that_rots_before_the_end_is_found_by_verify(
    released: Deployment, behind: Operations, network: Proxy
) -> None:
    """Read back well and changed since: the run ends unkept and names the object."""
    run = begin(behind)
    done = behind.runner()
    while behind.find(str(run)).state is not State.VERIFYING:
        done.work(run, seconds=0)
    network.fault = _from(1, "GET", ".zst", Fault.FLIP)
    assert done.work(run, seconds=math.inf) is Outcome.SETTLED
    result = behind.result(run)
    assert result["state"] == "unkept"
    assert all("is not what was written" in one["what"] for one in result["findings"])
    assert result["findings"]
