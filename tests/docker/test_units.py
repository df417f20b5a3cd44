"""docs/systemd.md: the unit's commands are real, its settings load, and systemd itself finds it sound and tight."""

from __future__ import annotations

import configparser
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.cli.helpers import find_command
from tests.conftest import ROOT
from worker import config
from worker.config import Need

PAGE = (ROOT / "docs" / "systemd.md").read_text(encoding="utf-8")
(UNIT,) = re.findall(r"^```ini\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
PROGRAM = "/opt/paperclip-worker/bin/paperclip-worker"
SERVICE = [tuple(line.split("=", 1)) for line in UNIT.splitlines() if "=" in line and not line.startswith("#")]


def _one(key: str) -> str:
    (value,) = _all(key)
    return value


def _all(key: str) -> list[str]:
    return [value for name, value in SERVICE if name == key]


def test_the_unit_has_its_sections() -> None:
    parser = configparser.ConfigParser(strict=False, interpolation=None, delimiters=("=",))
    parser.read_string(UNIT)
    assert parser.sections() == ["Unit", "Service", "Install"]


def test_each_instance_that_is_shown_is_a_real_command() -> None:
    shown = set(re.findall(r"paperclip-worker@(\w+)", PAGE))
    assert shown == {"worker", "beat"}
    program, *words = _one("ExecStart").split()
    assert program == PROGRAM
    for instance in shown:
        command, rest = find_command(tuple(word.replace("%i", instance) for word in words))
        assert command.name == instance
        command.make_context(instance, rest)


def test_the_first_session_makes_all_that_the_services_need() -> None:
    shells = "".join(re.findall(r"^```sh\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL))
    shown = re.findall(r"^(?:DATABASE_URL_FILE=(\S+) )?paperclip-worker (.+)$", shells, re.MULTILINE)
    owner = "/etc/paperclip-worker/database-owner-url"
    assert [(url, words.split()[:2]) for url, words in shown] == [
        ("", ["keygen", '"$PAPERCLIP_WORKER_SIGNING_KEY_FILE"']),
        (owner, ["db", "init"]),
        (owner, ["db", "grants"]),
        ("", ["plan", "prune-logs"]),
    ]
    for _, words in shown:
        find_command(tuple(words.split()))


def test_a_worker_is_told_to_end_and_given_the_time() -> None:
    # To all processes at once, SIGTERM would end the pool's children in the middle of their batch.
    assert (_one("KillMode"), _one("KillSignal")) == ("mixed", "SIGTERM")
    assert int(_one("TimeoutStopSec")) >= 2 * config.load({}).statement_timeout
    assert _one("Restart") == "always"


def test_every_credential_is_loaded_and_every_variable_is_a_setting(tmp_path: Path) -> None:
    given = dict(one.split("=", 1) for one in _all("Environment"))
    sdk_and_python = {"AWS_SHARED_CREDENTIALS_FILE", "PYTHONDONTWRITEBYTECODE"}
    assert set(given) - sdk_and_python <= config._names()
    loaded = dict(one.split(":", 1) for one in _all("LoadCredential"))
    assert {value.removeprefix("%d/") for value in given.values() if value.startswith("%d/")} == set(loaded)
    for name, path in loaded.items():
        assert path == f"/etc/paperclip-worker/{name}"
        assert f"| `{name}` |" in PAGE
    contents = {"database-url": "postgres://u:p@h/d\n", "broker-url": "redis://:p@h/0\n", "signing-key": "a key"}
    for name, content in contents.items():
        (tmp_path / name).write_text(content)
    environment = {name: value.replace("%d", str(tmp_path)) for name, value in given.items()}
    assert config.load(environment, needs=[Need.DATABASE, Need.BROKER, Need.SIGNING])


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="needs systemd-analyze")
@pytest.mark.parametrize("instance", ["worker", "beat"])
def test_systemd_finds_the_unit_sound_and_tight(tmp_path: Path, instance: str) -> None:
    unit = tmp_path / f"paperclip-worker@{instance}.service"
    unit.write_text(UNIT.replace(PROGRAM, "/bin/true"))
    verified = subprocess.run(["systemd-analyze", "verify", str(unit)], capture_output=True, text=True, check=False)
    assert (verified.returncode, verified.stderr) == (0, "")
    # From 0 to 100, the less the better; a unit without any of this has 96.
    exposed = subprocess.run(
        ["systemd-analyze", "security", "--offline=true", "--threshold=15", "--no-pager", str(unit)],
        capture_output=True,
        text=True,
        check=False,
    )
    if "unrecognized option" in exposed.stderr:
        pytest.skip("this systemd-analyze cannot judge a file")
    assert exposed.returncode == 0, exposed.stdout[-200:] + exposed.stderr
