"""compose.yml without an engine: what it names is real, and what it confines is confined."""

from __future__ import annotations

import re
import shlex
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.cli.helpers import find_command
from tests.conftest import ROOT
from tests.docker import image
from worker import config
from worker.config import Need

COMPOSE = ROOT / "docker" / "compose.yml"
DOCUMENT: dict[str, Any] = yaml.safe_load(COMPOSE.read_text(encoding="utf-8"))
SERVICES: dict[str, dict[str, Any]] = DOCUMENT["services"]
OURS = {name: one for name, one in SERVICES.items() if "build" in one}
SERVERS = {name: one for name, one in SERVICES.items() if "build" not in one}
ONCE = {name for name, one in SERVICES.items() if one["restart"] == "no"}
VERSION = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"]
RUN_SECRETS = "/run/secrets/"
every = pytest.mark.parametrize("name", list(SERVICES))


def env_file(name: str) -> dict[str, str]:
    """The variables of an environment file beside compose.yml."""
    lines = (ROOT / "docker" / name).read_text(encoding="utf-8").splitlines()
    return dict(line.split("=", 1) for line in lines if line and not line.startswith("#"))


def seconds(text: str) -> int:
    found = re.fullmatch(r"(\d+)([sm])", text)
    assert found, text
    return int(found[1]) * {"s": 1, "m": 60}[found[2]]


def test_the_five_are_there_and_only_ours_without_a_profile() -> None:
    assert set(OURS) == {"init", "worker", "beat", "bucket"}
    assert set(SERVERS) == {"postgres", "redis", "s3"}
    assert {name for name, one in SERVICES.items() if "profiles" not in one} == {"init", "worker", "beat"}
    assert env_file("servers.env")["COMPOSE_PROFILES"] == "servers"
    assert {"init", "bucket"} == ONCE


@every
def test_an_image_has_a_tag_with_a_version(name: str) -> None:
    repository, _, tag = SERVICES[name]["image"].partition(":")
    assert re.match(r"\d", tag), tag
    assert "." not in repository.partition("/")[0], "names no registry"
    if name in OURS:
        assert (repository, tag) == ("paperclip-worker", VERSION)
        assert SERVICES[name]["build"]["args"] == {"VERSION": VERSION}
        dockerfile = (COMPOSE.parent / SERVICES[name]["build"]["context"]).resolve() / "docker" / "Dockerfile"
        assert dockerfile == image.DOCKERFILE


@every
def test_a_service_is_confined_and_ends_gracefully(name: str) -> None:
    one = SERVICES[name]
    assert one["cap_drop"] == ["ALL"]
    assert one["security_opt"] == ["no-new-privileges:true"]
    assert one["read_only"] is True
    assert one["tmpfs"]
    assert not {"privileged", "ports", "network_mode", "pid", "container_name", "devices"} & set(one)
    assert set(one["deploy"]["resources"]["limits"]) == {"cpus", "memory", "pids"}
    assert one["restart"] in ({"no"} if name in ONCE else {"unless-stopped"})
    assert one["logging"]["options"]["max-size"]
    assert seconds(one["stop_grace_period"]) >= 30
    if name in OURS:
        assert one["user"] == dict(image.stages()[-1])["USER"]
        assert one["stop_signal"] == "SIGTERM"
        assert "cap_add" not in one
        # A batch is one transaction of a few statements; each is bounded.
        assert seconds(one["stop_grace_period"]) >= 2 * config.load({}).statement_timeout
    else:
        assert one["volumes"][0].partition(":")[0] in DOCUMENT["volumes"]


@every
def test_a_service_has_a_health_check_or_ends_by_itself(name: str) -> None:
    check = SERVICES[name]["healthcheck"]
    if name in ONCE:
        assert check == {"disable": True}
        return
    assert seconds(check["timeout"]) < seconds(check["interval"]) + 1
    assert check["retries"] >= 3
    assert check["test"][0] in {"CMD", "CMD-SHELL"}
    if name in OURS:
        _, program, *words = check["test"]
        assert program == "paperclip-worker"
        command, rest = find_command(tuple(words))
        found = command.make_context(command.name, rest).params
        assert command.name == "ping"
        assert (found["here"], found["beat"]) == (name == "worker", name == "beat")
        # ping gives up on a mute broker after twice its own time, and takes a moment to start.
        assert seconds(check["timeout"]) >= 2 * found["timeout"] + 5


@pytest.mark.parametrize("name", [name for name in OURS if "entrypoint" not in OURS[name]])
def test_a_command_of_ours_is_a_real_one(name: str) -> None:
    command, rest = find_command(tuple(OURS[name]["command"]))
    command.make_context(command.name, rest)
    assert command.name == name


@every
def test_a_service_waits_for_what_there_is(name: str) -> None:
    for other, how in SERVICES[name].get("depends_on", {}).items():
        condition = "service_completed_successfully" if other in ONCE else "service_healthy"
        assert how["condition"] == condition
        # Without the profile these do not exist, and nobody waits for them.
        inside = "profiles" in SERVICES[name]
        assert how.get("required", True) is (inside or "profiles" not in SERVICES[other])
    if name in {"worker", "beat"}:
        assert set(SERVICES[name]["depends_on"]) == {"init", "postgres", "redis", "bucket"}


@every
def test_a_service_is_given_the_secrets_that_it_names_and_no_other(name: str) -> None:
    one = SERVICES[name]
    named = set(re.findall(rf"{RUN_SECRETS}(\w+)", yaml.safe_dump(one)))
    if "env_file" in one and name in ONCE:
        named &= set(one["secrets"])  # bucket shares the variables of worker, and is given the store's keys alone
    assert named == set(one["secrets"])
    assert named <= set(DOCUMENT["secrets"])


def test_every_secret_is_a_file_and_used() -> None:
    assert {secret for one in SERVICES.values() for secret in one["secrets"]} == set(DOCUMENT["secrets"])
    for name, secret in DOCUMENT["secrets"].items():
        assert secret == {"file": f"${{SECRETS_DIR:-./secrets}}/{name}"}
    ignored = (ROOT / ".gitignore").read_text().splitlines()
    assert {"/docker/secrets/", "/docker/settings.env"} <= set(ignored)


def test_no_secret_is_in_the_files() -> None:
    for path in (COMPOSE, image.DOCKERFILE, ROOT / "docker" / "servers.env"):
        text = path.read_text(encoding="utf-8")
        assert not re.search(r"://[^/\s]*:[^/\s]*@", text), path.name
        assert not re.search(r"[0-9A-Za-z+]{24,}", text), path.name
    for one in SERVICES.values():
        for variable in one.get("environment", {}):
            assert not re.search(r"(?i)(PASSWORD|SECRET|TOKEN|KEY|URL)$", variable), variable


def test_every_variable_of_ours_is_a_setting(tmp_path: Path) -> None:
    """And together they are settings that load, with each secret in its file."""
    names = {variable for one in OURS.values() for variable in one["environment"]} | set(env_file("servers.env"))
    compose = {"COMPOSE_PROFILES", "SETTINGS_FILE"}
    sdk = {"AWS_SHARED_CREDENTIALS_FILE"}
    assert names - compose - sdk <= config._names()
    contents = {
        "database_url": "postgres://u:p@postgres/d\n",
        "broker_url": "redis://:p@redis:6379/0\n",
        "signing_key": "a key",
    }
    for name, content in contents.items():
        (tmp_path / name).write_text(content)
    for name in ("worker", "beat"):
        assert OURS[name]["env_file"] == [{"path": "${SETTINGS_FILE:-settings.env}"}]
        environment = env_file("servers.env") | {
            variable: value.replace(RUN_SECRETS, f"{tmp_path}/")
            for variable, value in OURS[name]["environment"].items()
        }
        settings = config.load(environment, needs=list(Need))
        assert settings.s3_endpoint == "http://s3:8333"
        assert "s3" in SERVERS
    assert (ROOT / "docker" / env_file("servers.env")["SETTINGS_FILE"]).is_file()


def test_what_the_manual_has_compose_run_is_real() -> None:
    text = (ROOT / "docs" / "docker.md").read_text(encoding="utf-8")
    shown = re.findall(r"^docker compose (-f .+)$", text, re.MULTILINE)
    assert shown
    for line in shown:
        words = shlex.split(line)
        assert (ROOT / words[1]).is_file()
        if "run" in words:
            service, *command = words[words.index("--rm") + 1 :]
            found, rest = find_command(tuple(command or OURS[service]["command"]))
            found.make_context(found.name, rest)
        if "--env-file" in words:
            assert (ROOT / words[words.index("--env-file") + 1]).is_file()
        if "--scale" in words:
            assert words[-1].partition("=")[0] in OURS


@pytest.mark.parametrize("page", ["docker/Dockerfile", "docs/docker.md"])
def test_the_version_is_the_same_everywhere(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    found = re.findall(r"(?:paperclip-worker:|VERSION=)(\d\S+)", text)
    assert set(found) == {VERSION}
