"""A disk that is really full: the key file lies on a small filesystem that only the workers of a test see.

Where a machine lets no user mount one, test_faults.py still limits the size of files, which is as full a disk to us.
"""

from __future__ import annotations

import errno
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from uuid import UUID

import pytest

from tests.cli.helpers import check_refusal
from tests.faults.evidence import wait
from tests.rotation import test_kills
from tests.rotation.vault import Vault
from tests.zygote import CLI
from worker import keyfile, masterkeys

pytestmark = pytest.mark.faults
_MOUNT = 'mount -t tmpfs -o size=256k,mode=0700 tmpfs "$1" && cp -p "$2" "$1" && echo ready && exec cat'


@dataclass(frozen=True, kw_only=True)
class _Site:
    """A vault whose workers find a small filesystem at the key file's place, and we what was there before."""

    vault: Vault
    holder: int
    # The directory as the workers see it.
    inside: Path

    def resume(self, run: UUID) -> subprocess.Popen[str]:
        """`runs resume`, and all the work on the run, on the small filesystem."""
        entered = ("nsenter", "--target", str(self.holder), "--user", "--mount", "--preserve-credentials")
        return subprocess.Popen(
            [*entered, sys.executable, str(CLI), "runs", "resume", str(run), "--inline"],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            # As long as it takes to fill the disk.
            env={**self.vault.deployment.process_environment(), "PAPERCLIP_WORKER_LOCK_TIMEOUT": "60"},
        )

    def fill(self) -> Path:
        """Take the last byte."""
        path = self.inside / "filler"
        with path.open("wb", buffering=0) as file:
            try:
                while True:
                    file.write(bytes(4096))
            except OSError as error:
                assert error.errno == errno.ENOSPC, error  # noqa: PT017 - any number of writes may come before it
        return path


@pytest.fixture
def site(released_vault: Vault, tmp_path: Path) -> Iterator[_Site]:
    if not (shutil.which("unshare") and shutil.which("nsenter")):
        pytest.skip("needs unshare and nsenter, to mount a small filesystem")
    folder, copy = released_vault.file.parent, tmp_path / "copy" / "master.key"
    shutil.copytree(folder, copy.parent)
    holder = subprocess.Popen(
        ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", _MOUNT, "sh", str(folder), str(copy)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    with holder:
        if holder.stdout is None or holder.stdout.readline() != "ready\n":
            pytest.skip("this machine lets its users mount no filesystem of their own")
        # The first process of the namespace, of which the mount is gone with the last.
        inside = Path(f"/proc/{holder.pid}/root{folder}")
        yield _Site(vault=replace(released_vault, file=inside / "master.key"), holder=holder.pid, inside=inside)


def _waits_for_a_lock(vault: Vault) -> bool:
    query = "SELECT count(*) > 0 FROM pg_locks WHERE relation = 'company_secret_versions'::regclass AND NOT granted"
    return bool(vault.deployment.query(query)[0][0])


@pytest.mark.parametrize(
    ("mode", "staged"),
    [pytest.param("ACCESS EXCLUSIVE", False, id="while staging"), pytest.param("ROW EXCLUSIVE", True, id="cut-over")],
)
def test_nothing_is_switched_on_a_full_disk(site: _Site, mode: str, staged: bool) -> None:
    """There was room when the run looked for it; it is gone while the worker waits for rows, or for their lock."""
    vault = site.vault
    rest, run = vault.rest(), test_kills.begin(vault)
    beside = keyfile.staged_path(Path("/x/master.key"), masterkeys.staged_name(run)).name
    with vault.connect() as other:
        other.execute(f"LOCK TABLE company_secret_versions IN {mode} MODE".encode())
        worker = site.resume(run)
        wait(lambda: _waits_for_a_lock(vault))
        filler = site.fill()
    _, said = worker.communicate(timeout=60)
    assert worker.returncode == 1, said
    assert said.rstrip().endswith(f"{'master.key' if staged else beside} cannot be written: No space left on device")
    assert vault.deployment.operations.result(run)["receipt"]["state"] == "failed"
    assert {one.name for one in site.inside.iterdir()} == {"master.key", "filler"} | ({beside} if staged else set())
    assert not test_kills.cut_over(vault)
    assert vault.now == vault.key
    assert vault.opened(vault.key) == vault.held
    # As long as it is full, that is said before anything is begun.
    check_refusal(_ended(site.resume(run)), says="has no room left for a new key file; free some space", status=2)
    filler.unlink()
    done = _ended(site.resume(run))
    assert done.returncode == 0, done.stderr
    test_kills.check_kept(vault, run, rest)


def _ended(worker: subprocess.Popen[str]) -> subprocess.CompletedProcess[str]:
    out, err = worker.communicate(timeout=60)
    return subprocess.CompletedProcess(worker.args, worker.returncode, out, err)
