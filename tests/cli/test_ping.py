"""ping: what a supervisor's health check is told of real workers, a real beat and a broker that is gone."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time

import pytest

from tests.cli.helpers import check_refusal, full_broker, refused
from tests.conftest import ROOT, Deployment

_ELSEWHERE = """
from worker import app, config
app.make(config.load()).worker_main(["worker", "-n", "celery@elsewhere", "-P", "solo", "--without-mingle"])
"""
NODE = f"celery@{socket.gethostname()}"


def _wait(deployment: Deployment, *words: str, until: int) -> subprocess.CompletedProcess[str]:
    """Ask until the exit status is the wanted one."""
    deadline = time.monotonic() + 40
    while True:
        done = deployment.cli("ping", *words, ok=False)
        if done.returncode == until:
            return done
        assert time.monotonic() < deadline, done.stderr


def test_a_worker_that_is_up_answers_until_it_is_gone(released: Deployment) -> None:
    line = refused(released, "ping", "--timeout=0.5", says="no worker answers", status=1)
    assert NODE not in line
    with released.worker():
        assert _wait(released, "--here", until=0).stdout == f"{NODE}\n"
        assert released.json("ping") == {"workers": [NODE]}
        started = time.monotonic()
        released.cli("ping", "--here", "--timeout=30")
        assert time.monotonic() - started < 20
        # A worker is no beat.
        refused(released, "ping", "--beat", says="no beat is at work", status=1)
    refused(released, "ping", "--here", "--timeout=0.5", says=f"worker {NODE} does not answer", status=1)


def test_a_worker_of_another_host_does_not_speak_for_this_one(released: Deployment) -> None:
    environment = {key: value for key, value in released.process_environment().items() if key != "PYTHONWARNINGS"}
    other = subprocess.Popen(
        [sys.executable, "-c", _ELSEWHERE],
        cwd=ROOT,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        assert _wait(released, until=0).stdout == "celery@elsewhere\n"
        refused(released, "ping", "--here", "--timeout=1", says=f"worker {NODE} does not answer", status=1)
        silent = released.cli("ping", "--here", "--json", "--timeout=1", ok=False)
        assert (silent.returncode, silent.stdout.split()) == (1, ["{", '"workers":', "[]", "}"])
    finally:
        other.terminate()
        other.wait(20)


def test_a_beat_is_alive_while_it_holds_the_lock(released: Deployment) -> None:
    refused(released, "ping", "--beat", says="no beat is at work", status=1)
    with released.worker("beat"):
        assert _wait(released, "--beat", until=0).stdout == "a beat is at work\n"
        assert released.json("ping", "--beat") == {"beat": True}
        refused(released, "ping", "--timeout=0.5", says="no worker answers", status=1)
    # Told to end it lets go of the lock, so the health check need not wait for it to lapse.
    refused(released, "ping", "--beat", says="no beat is at work", status=1)


@pytest.mark.parametrize("words", [(), ("--beat",)], ids=["workers", "beat"])
def test_a_broker_that_does_not_answer(released: Deployment, words: tuple[str, ...]) -> None:
    with socket.socket() as mute:
        mute.bind(("127.0.0.1", 0))
        mute.listen()
        url = f"redis://:hunter2@127.0.0.1:{mute.getsockname()[1]}/0"
        environment = {"PATH": os.environ["PATH"], "PAPERCLIP_WORKER_BROKER_URL": url, "PYTHONWARNINGS": "error"}
        started = time.monotonic()
        done = subprocess.run(
            [sys.executable, str(ROOT / "cli.py"), "ping", "--timeout=0.5", *words],
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert time.monotonic() - started < 15
    assert "hunter2" not in check_refusal(done, says="BROKER_URL: the broker does not answer", status=1)


def test_a_broker_that_is_full(released: Deployment) -> None:
    with full_broker(released):
        refused(
            released, "ping", "--timeout=0.5", says="BROKER_URL: the broker takes no message; is it full", status=1
        )
        # It can be read.
        refused(released, "ping", "--beat", says="no beat is at work", status=1)


def test_what_makes_no_sense_is_refused(released: Deployment) -> None:
    refused(released, "ping", "--beat", "--here", says="--here is about workers")
    refused(released, "ping", "--timeout=0", says="--timeout")
    refused(released, "ping", says="BROKER_URL is not set", env={"PAPERCLIP_WORKER_BROKER_URL": ""})
