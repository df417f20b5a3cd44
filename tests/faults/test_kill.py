"""A worker killed outright at every step of a run, and the run taken up again by another."""

from __future__ import annotations

import pytest

from tasks.prune_logs import PruneLogs
from tests.conftest import Deployment
from tests.faults import doomed
from tests.faults.doomed import work_and_die
from tests.faults.evidence import begin, check_exact, check_kept, complete, rows, thinned

pytestmark = pytest.mark.faults
STEPS = [*doomed.BITE, *doomed.AROUND, *doomed.COMMITS, *doomed.ANCHORING]
WITHOUT_ARCHIVE = ["after apply", "before commit of a bite", "after commit of a bite"]


@pytest.mark.parametrize("step", thinned(STEPS, {*doomed.BITE, *doomed.COMMITS, doomed.FIRST, "manifest written"}))
def test_killed_at_any_step_a_run_goes_on_as_if_it_had_not_been(released: Deployment, step: str) -> None:
    """At the kill ledger, table and archive agree; once resumed the run is exact and leaves nothing behind."""
    before = rows(released)
    run = begin(released.operations)
    work_and_die(released.environment, step, run, bite_rows=200)
    check_exact(released, run, before)
    # Other bites than the first worker's: what it left in the bucket is nobody's any more.
    complete(released.with_settings(bite_rows="170"), run)
    check_kept(released, run, before)


def test_killed_again_and_again_a_run_still_adds_up(deployment: Deployment) -> None:
    """Three workers die on one run, each elsewhere; on each layout."""
    before = rows(deployment)
    run = begin(deployment.operations)
    for number, step in enumerate(["after preserve", "after apply", "after commit of a bite"]):
        work_and_die(deployment.environment, step, run, bite_rows=60 + number)
        check_exact(deployment, run, before)
    complete(deployment.operations, run)
    check_kept(deployment, run, before)


@pytest.mark.parametrize("step", WITHOUT_ARCHIVE)
def test_killed_without_an_archive_the_tally_is_exact(released: Deployment, step: str) -> None:
    """The same where rows go by blocks and the ledger alone says how many."""
    before = rows(released)
    run = begin(released.operations, PruneLogs(archive=False))
    work_and_die(released.environment, step, run, bite_rows=100)
    gone = len(before) - len(rows(released))
    assert released.operations.result(run)["rows"] == gone
    complete(released.operations, run)
    check_kept(released, run, before, archive=False)


def test_what_a_dead_worker_wrote_goes_even_when_nothing_is_left_to_archive(released: Deployment) -> None:
    """The rows went by other hands meanwhile; their copy, which no manifest names, must not stay in the bucket."""
    run = begin(released.operations)
    work_and_die(released.environment, doomed.FIRST, run, bite_rows=200)
    store = released.operations.store
    assert store is not None
    assert len(store.keys("")) == 1
    released.query("DELETE FROM activity_log")
    complete(released.operations, run)
    assert released.operations.result(run)["kept"]
    assert store.keys("archive/") == []
