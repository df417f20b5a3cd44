"""The image without an engine: its Dockerfile is linted, its locks agree, and its build stage is carried out here."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from tests.cli.helpers import find_command
from tests.conftest import ROOT, Deployment
from tests.docker import image

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
FINAL = image.stages()[-1]
_LIST = (
    "import importlib.metadata as m, json; print(json.dumps({d.name.lower(): d.version for d in m.distributions()}))"
)


def _hadolint() -> str:
    """The linter of this environment, whether or not that is the first on PATH."""
    here = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
    found = shutil.which("hadolint", path=here)
    if found is None:
        pytest.skip("hadolint has no wheel for this platform")
    return found


def test_hadolint_finds_nothing() -> None:
    hadolint = _hadolint()
    done = subprocess.run(
        [hadolint, "--no-color", str(image.DOCKERFILE)], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (0, "")


def test_hadolint_would_find_something(tmp_path: Path) -> None:
    """The linter is at work: it has something to say about a tag that moves."""
    hadolint = _hadolint()
    bad = tmp_path / "Dockerfile"
    bad.write_text("FROM python:latest\n")
    done = subprocess.run([hadolint, str(bad)], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "DL3007" in done.stdout


def test_the_last_stage_has_a_user_an_entry_point_a_health_check_and_no_tool() -> None:
    said = dict(FINAL)
    assert said["USER"] == "10001:10001"
    assert json.loads(said["ENTRYPOINT"]) == [PROJECT["project"]["name"]]
    assert json.loads(said["CMD"]) == ["--help"]
    assert said["STOPSIGNAL"] == "SIGTERM"
    program, *words = json.loads(said["HEALTHCHECK"].partition(" CMD ")[2])
    assert program == PROJECT["project"]["name"]
    command, rest = find_command(tuple(words))
    assert command.name == "ping"
    command.make_context("ping", rest)
    for label in ("title", "description", "licenses", "version", "revision"):
        assert f"org.opencontainers.image.{label}=" in said["LABEL"]
    assert [rest for name, rest in FINAL if name == "COPY"] == [f"--from=build {image.PREFIX} {image.PREFIX}"]
    assert not [rest for name, rest in FINAL if name == "RUN" and ("pip" in rest or "apt" in rest)]


def test_every_base_has_a_tag_with_a_version() -> None:
    for stage in image.stages():
        base = stage[0][1].split()[0]
        assert base == "python:3.13-slim-trixie"


def test_no_secret_reaches_the_build(tmp_path: Path) -> None:
    """Nothing but the code and the locks: not the secrets beside them, no history, no environment."""
    sent = image.context(tmp_path)
    assert {path.name for path in sent.iterdir()} == {
        *("cli.py", "docker", "LICENSE", "pyproject.toml", "README.md", "schedules", "tasks", "worker"),
    }
    assert {path.name for path in (sent / "docker").iterdir()} == {"build.lock", "requirements.lock"}


def test_the_locks_agree() -> None:
    """The image has the very versions, with the same markers, that the tests ran with, and all that is asked for."""
    tested = image.locked(".ci/requirements.lock")
    runtime = image.locked("docker/requirements.lock")
    build = image.locked("docker/build.lock")
    assert {**runtime, **build}.items() <= tested.items()
    wanted = {Requirement(one).name for one in PROJECT["project"]["dependencies"]}
    assert wanted <= set(runtime)
    assert set(build) == {Requirement(one).name for one in PROJECT["build-system"]["requires"]}
    extras = {Requirement(one).name for many in PROJECT["project"]["optional-dependencies"].values() for one in many}
    assert not extras & set(runtime)


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The program of an installation as the Dockerfile's first stage makes it."""
    if importlib.util.find_spec("ensurepip") is None:
        pytest.skip("this interpreter cannot make an environment with pip")
    return image.build(tmp_path_factory.mktemp("image")) / "bin" / "paperclip-worker"


def _run(program: Path, *words: str) -> str:
    done = subprocess.run(
        [str(program), *words], cwd="/", env={"HOME": "/nonexistent"}, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


def test_the_build_installs_the_runtime_lock_and_the_project_alone(installed: Path) -> None:
    listed = subprocess.run(
        [str(installed.with_name("python")), "-Ic", _LIST], capture_output=True, text=True, check=True
    )
    here = {
        name.replace("_", "-"): str(one.specifier).removeprefix("==")
        for name, one in image.locked("docker/requirements.lock").items()
        if one.marker is None or one.marker.evaluate()
    }
    found = {name.replace("_", "-"): version for name, version in json.loads(listed.stdout).items()}
    assert found == here | {"paperclip-worker": PROJECT["project"]["version"]}


def test_the_installed_program_has_what_it_needs(installed: Path, released: Deployment) -> None:
    """Data files too: the catalogue and the SQL come with the package, not with the checkout."""
    assert "rehearse" in _run(installed, "--help")
    assert PROJECT["project"]["version"] in _run(installed, "--version")
    assert _run(installed, "db", "grants", "--layout", "paperclip") == released.cli("db", "grants").stdout


def test_the_installed_worker_works_with_secrets_in_files(
    installed: Path, released: Deployment, tmp_path: Path
) -> None:
    """As in a container: no home, no secret in the environment, and the health check of the image."""
    environment = {**released.environment, "HOME": "/nonexistent", "PYTHONDONTWRITEBYTECODE": "1"}
    for name in ("DATABASE_URL", "PAPERCLIP_WORKER_BROKER_URL"):
        path = tmp_path / name
        path.write_text(environment.pop(name) + "\n")
        environment[f"{name}_FILE"] = str(path)
    keys = tmp_path / "s3_credentials"
    pairs = [f"{name.lower()}={environment.pop(name)}" for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")]
    keys.write_text("\n".join(["[default]", *pairs, ""]))
    environment["AWS_SHARED_CREDENTIALS_FILE"] = str(keys)

    def run(*words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [str(installed), *words], cwd="/", env=environment, capture_output=True, text=True, check=False
        )

    worker = subprocess.Popen(
        [str(installed), "worker", "--concurrency=1"],
        cwd="/",
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        done = run("run", "prune-logs", "--yes", "--json")
        assert (done.returncode, done.stderr) == (0, "")
        assert json.loads(done.stdout)["kept"]
        assert run("ping", "--here").returncode == 0
        assert "last" in run("schedule", "list").stdout
    finally:
        worker.terminate()
        assert worker.wait(30) == 0
