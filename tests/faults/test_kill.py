"""A worker killed outright at every step of a run, and the run taken up again by another."""

from __future__ import annotations

import signal
import subprocess
import sys
from uuid import UUID

import pytest

from tasks.prune_logs import PruneLogs
from tests.conftest import ROOT, Deployment
from tests.faults import doomed
from tests.faults.evidence import begin, check_exact, check_kept, complete, rows

pytestmark = pytest.mark.faults
STEPS = [*doomed.BITE, *doomed.AROUND, *doomed.COMMITS]
WITHOUT_ARCHIVE = ["after claim", "after apply", "bite recorded", "before commit of a bite", "after commit of a bite"]


def _work_and_die(deployment: Deployment, step: str, run: UUID, *, bite_rows: int) -> None:
    """Let a worker process work on the run until it is killed at the step."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.faults.doomed", step, str(run)],
        cwd=ROOT,
        env=deployment.process_environment() | {"PAPERCLIP_WORKER_BITE_ROWS": str(bite_rows)},
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.returncode == -signal.SIGKILL, (done.returncode, done.stderr)


@pytest.mark.parametrize("step", STEPS)
def test_killed_at_any_step_a_run_goes_on_as_if_it_had_not_been(released: Deployment, step: str) -> None:
    """At the kill ledger, table and archive agree; once resumed the run is exact and leaves nothing behind."""
    before = rows(released)
    run = begin(released.operations)
    _work_and_die(released, step, run, bite_rows=200)
    check_exact(released, run, before)
    # Other bites than the first worker's: what it left in the bucket is nobody's any more.
    complete(released.with_settings(bite_rows="170"), run)
    check_kept(released, run, before)


def test_killed_again_and_again_a_run_still_adds_up(deployment: Deployment) -> None:
    """Five workers die on one run, each elsewhere; on each layout."""
    before = rows(deployment)
    run = begin(deployment.operations)
    for number, step in enumerate(
        ["shards laid out", "after preserve", "after apply", "bite recorded", "after claim"]
    ):
        _work_and_die(deployment, step, run, bite_rows=60 + number)
        check_exact(deployment, run, before)
    complete(deployment.operations, run)
    check_kept(deployment, run, before)


@pytest.mark.parametrize("step", WITHOUT_ARCHIVE)
def test_killed_without_an_archive_the_tally_is_exact(released: Deployment, step: str) -> None:
    """The same where rows go by blocks and the ledger alone says how many."""
    before = rows(released)
    run = begin(released.operations, PruneLogs(archive=False))
    _work_and_die(released, step, run, bite_rows=100)
    gone = len(before) - len(rows(released))
    assert released.operations.result(run)["rows"] == gone
    complete(released.operations, run)
    check_kept(released, run, before, archive=False)
