"""A job is one file in `tasks/` and one line in `schedules/`: shown on a copy of the project."""

from __future__ import annotations

import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.conftest import ROOT, Deployment

_JOB = '''
from dataclasses import dataclass

from tasks import prune_logs
from worker.job import Job
from worker.params import param


@dataclass(frozen=True, kw_only=True)
class CountCompanies(Job):
    """Count the companies and change nothing."""

    name = "count-companies"
    action = "maintenance.companies_counted"
    destructive = False
    loud: bool = param(False, help="Say it loudly.")

    def needs(self, layout):
        return (layout.companies,)

    @classmethod
    def rights(cls, layout):
        return ()

    def check(self, means):
        means.require_companies(())

    def plan(self, means):
        return prune_logs.Plan(
            job=self.name, params={"loud": self.loud}, layout=means.layout.name, now=means.now, targets=(), left=()
        )

    def shards(self, means, plan):
        return iter((prune_logs.Shard(key="all", rows=0, spec={}),))

    def claim(self, means, shard, after, limit):
        return None

    def apply(self, means, batch):
        return prune_logs.Tally()

    def verify(self, means):
        return prune_logs.Verdict(findings=(), left=())
'''
_LINE = '    "count": Entry("0 5 * * 1", CountCompanies()),\n}\n'


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """The project with one job more."""
    for name in ("worker", "tasks", "schedules"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "cli.py", tmp_path)
    (tmp_path / "tasks" / "count_companies.py").write_text(_JOB)
    schedule = tmp_path / "schedules" / "__init__.py"
    text = schedule.read_text().rstrip()
    assert text.endswith("}")
    schedule.write_text("from tasks.count_companies import CountCompanies\n" + _hoist(text[:-1] + _LINE))
    return tmp_path


def _hoist(text: str) -> str:
    """The import of the new job stands before the module's own docstring and future import: move those up."""
    return text.replace("from __future__ import annotations\n", "")


def _cli(copy: Path, deployment: Deployment, *words: str) -> str:
    environment = {**deployment.process_environment(), "PYTHONPATH": str(copy)}
    done = subprocess.run(
        [sys.executable, str(copy / "cli.py"), *words], capture_output=True, text=True, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_cli_celery_and_the_ledger_know_it(copy: Path, released: Deployment) -> None:
    assert "Say it loudly." in _cli(copy, released, "run", "count-companies", "--help")
    assert "0 5 * * 1" in _cli(copy, released, "schedule", "list")
    environment = {**released.process_environment(), "PYTHONPATH": str(copy)}
    worker = subprocess.Popen(
        [sys.executable, str(copy / "cli.py"), "worker", "--concurrency=1"],
        env={name: value for name, value in environment.items() if name != "PYTHONWARNINGS"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        _cli(copy, released, "run", "count-companies", "--loud")
        script = (
            "from worker import app, config\n"
            "celery = app.make(config.load())\n"
            "assert celery.conf.beat_schedule['count']['args'] == ('count',)\n"
            "celery.send_task('paperclip_worker.launch', ('count',))\n"
            "celery.close()\n"
        )
        subprocess.run([sys.executable, "-c", script], env=environment, check=True, cwd=copy)
        deadline = time.monotonic() + 30
        wanted = {("cli", "kept", True), ("schedule:count", "kept", False)}
        seen: set[tuple[str, str, bool]] = set()
        while seen != wanted and time.monotonic() < deadline:
            time.sleep(0.2)
            seen = {
                (via, state, loud)
                for via, state, loud in released.query(
                    "SELECT via, state, (params->>'loud')::boolean FROM paperclip_worker.runs "
                    "WHERE job = 'count-companies'"
                )
            }
        assert seen == wanted
    finally:
        worker.terminate()
        worker.wait(20)
