"""Make the project's virtual environment when it is not there, then run something in it.

    python3 .ci/start.py demo [ARGUMENT ...]     the whole worker against real servers, on this machine
    python3 .ci/start.py test [ARGUMENT ...]     the tests; arguments go to pytest
    python3 .ci/start.py exec COMMAND [...]      any tool of the environment (ruff, mypy, python, ...)
    python3 .ci/start.py lock [--upgrade ...]    write the locks anew from pyproject.toml (needs uv)

Needs Python 3.11 or later and a package index as pip or uv are set up to use it; nothing else, and no root. What is
installed is exactly .ci/requirements.lock, by hash. Exits 2 when the machine lacks something, and says what.
"""

# Standard library only, and syntax of Python 3.8, so that an old interpreter can still say what it lacks.
# ruff: noqa: S603 - it runs installers and our own tools, with words of its own

from __future__ import annotations

import ast
import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from contextlib import contextmanager
from pathlib import Path
from typing import Iterator, NoReturn  # noqa: UP035 - the other place is not in Python 3.8

ROOT = Path(__file__).resolve().parents[1]
LOCK = ROOT / ".ci" / "requirements.lock"
# The image's: what runs in it, and what its build makes the project's wheel with.
RUNTIME_LOCK = ROOT / "docker" / "requirements.lock"
BUILD_LOCK = ROOT / "docker" / "build.lock"
OLDEST = (3, 11)
# The installers' own settings stay in force, except those that cannot go with a virtual environment.
PIP = {"PIP_DISABLE_PIP_VERSION_CHECK": "1", "PIP_NO_INPUT": "1", "PIP_USER": "0", "PIP_REQUIRE_VIRTUALENV": "0"}
UV = {"UV_SYSTEM_CERTS": "1", "UV_PYTHON_DOWNLOADS": "never"}
# pip looks for a package on all indexes and takes the best; with hashes given this is no less safe in uv.
PIP_TO_UV = {
    "index-url": "UV_DEFAULT_INDEX",
    "extra-index-url": "UV_INDEX",
    "find-links": "UV_FIND_LINKS",
    "trusted-host": "UV_INSECURE_HOST",
    "cert": "SSL_CERT_FILE",
    "proxy": "ALL_PROXY",
}


def main(words: list[str]) -> NoReturn:
    """Run one of the commands above; never returns."""
    command, rest = (words[0], words[1:]) if words else ("", [])
    if command not in ("demo", "test", "exec", "lock") or (command == "exec" and not rest):
        asked = command in ("-h", "--help")
        (sys.stdout if asked else sys.stderr).write(__doc__ or "")
        sys.exit(0 if asked else 2)
    if sys.version_info < OLDEST:
        use_newer_python()
    if command == "lock":
        sys.exit(lock(rest))
    venv = environment()
    os.environ["PATH"] = os.pathsep.join([str(venv / "bin"), os.environ.get("PATH", os.defpath)])
    os.environ["VIRTUAL_ENV"] = str(venv)
    os.environ.pop("PYTHONHOME", None)
    if command == "demo":
        run = [str(venv / "bin" / "paperclip-worker"), "demo", *rest]
    elif command == "test":
        os.chdir(ROOT)
        run = [str(venv / "bin" / "python"), "-m", "pytest", *rest]
    else:
        run = rest
    sys.stdout.flush()
    try:
        os.execvp(run[0], run)  # noqa: S606 - a tool of ours, or what was asked for
    except OSError as error:
        give_up(f"cannot run {run[0]}: {error.strerror}")


def use_newer_python() -> NoReturn:
    """Start again with a Python that is new enough; those the tests ran on come first."""
    for name in ("python3.13", "python3.12", "python3.11", "python3.14"):
        found = shutil.which(name)
        # A version manager's shim may carry the name and run nothing.
        if found and subprocess.run([found, "-c", ""], check=False, stderr=subprocess.DEVNULL).returncode == 0:
            os.execv(found, [found, *sys.argv])  # noqa: S606 - this very program again
    give_up(f"this is Python {sys.version.split()[0]} and no newer one is on PATH; install Python 3.11 or later")


def environment() -> Path:
    """The virtual environment, made or brought up to date if need be."""
    home = ROOT
    if stamped(ROOT / ".venv") != stamp(ROOT / ".venv"):
        home = venv_home()
    venv = home / ".venv"
    wanted = stamp(venv)
    if stamped(venv) == wanted:
        return venv
    with only_one(home) as held:
        have = stamped(venv)
        if have == wanted:
            return venv
        if have[:1] != wanted[:1]:
            make(venv, held)
            install(venv, held, ["--require-hashes", "-r", str(LOCK)])
        (venv / "stamp").unlink(missing_ok=True)
        with scratch_build() as build:
            install(venv, held, ["--no-deps", "--no-build-isolation", "-e", str(ROOT)], build)
        fresh = venv / "stamp.new"
        fresh.write_text("\n".join(wanted))
        fresh.replace(venv / "stamp")
    return venv


def venv_home() -> Path:
    """The checkout, or a directory in the user's cache when the checkout cannot be written."""
    if os.access(ROOT, os.W_OK):
        return ROOT
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    home = cache / "paperclip-worker" / hashlib.sha256(str(ROOT).encode()).hexdigest()[:16]
    try:
        home.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        give_up(
            f"neither {ROOT} nor {home} can be written ({error.strerror}); set XDG_CACHE_HOME to a directory that can"
        )
    return home


def stamp(venv: Path) -> list[str]:
    """What a finished environment bears: one line for its packages and one for the project in it."""
    interpreter = f"{sys.version}\n{os.path.realpath(sys.executable)}\n{venv}\n"
    return [
        hashlib.sha256(interpreter.encode() + LOCK.read_bytes()).hexdigest(),
        hashlib.sha256((ROOT / "pyproject.toml").read_bytes()).hexdigest(),
    ]


def stamped(venv: Path) -> list[str]:
    """What an environment bears; nothing when it is absent, half made, or its interpreter is gone."""
    try:
        found = (venv / "stamp").read_text().splitlines()
    except OSError:
        return []
    return found if (venv / "bin" / "python").exists() else []


@contextmanager
def only_one(home: Path) -> Iterator[int]:
    """Hold the directory's lock; an installer inherits it, and so holds it when we are killed before it ends."""
    held = os.open(home, os.O_RDONLY)
    try:
        try:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say("waiting for another start that makes the environment")
            fcntl.flock(held, fcntl.LOCK_EX)
        yield held
    finally:
        os.close(held)


def make(venv: Path, held: int) -> None:
    """Make an empty environment, in the place of one that we made before."""
    marker = venv / "made-by-start.py"
    if venv.exists() and any(venv.iterdir()) and not marker.exists():
        give_up(f"{venv} was not made by this script; move it away")
    if venv.exists():
        (venv / "stamp").unlink(missing_ok=True)
        shutil.rmtree(venv)
    say(f"making {venv} (once; half a minute, or seconds with uv)")
    venv.mkdir()
    marker.touch()
    made = run([sys.executable, "-m", "venv", "--without-pip", str(venv)], held, quiet=True)
    uv = shutil.which("uv")
    if made and not (
        uv and run([uv, "venv", "-q", "--allow-existing", "--python", sys.executable, str(venv)], held) == 0
    ):
        give_up(f"{sys.executable} lacks the module venv; install it (on Debian: python3-venv), or uv")


def install(venv: Path, held: int, words: list[str], env: dict[str, str] | None = None) -> None:
    """Install with uv, else with pip; gives up in one sentence when there is neither, or it fails."""
    python = str(venv / "bin" / "python")
    uv = shutil.which("uv")
    if uv:
        if run([uv, "pip", "install", "-q", "--python", python, *words], held, {**uv_settings(), **(env or {})}) == 0:
            return
        say("uv could not install; trying pip")
    pip = find_pip(python, held)
    if not pip:
        give_up(f"{sys.executable} has neither pip nor ensurepip; install one (on Debian: python3-venv), or uv")
    if run([*pip, "install", "-q", *words], held, env) != 0:
        give_up("the packages could not be installed; the installer's message is above", 1)


def find_pip(python: str, held: int) -> list[str]:
    """A pip that can install for `python`: this interpreter's if it is new enough, else the environment's own."""
    outer = [sys.executable, "-m", "pip", "--python", python]
    for pip in (outer, [python, "-m", "pip"]):
        if run([*pip, "--version"], held, quiet=True) == 0:
            return pip
    return [python, "-m", "pip"] if run([python, "-m", "ensurepip"], held, quiet=True) == 0 else []


def uv_settings() -> dict[str, str]:
    """uv's variables for what pip is told by its files and variables, which uv does not read."""
    asked = [sys.executable, "-m", "pip", "config", "list"]
    said = subprocess.run(asked, check=False, capture_output=True, text=True)
    found: dict[str, str] = {}
    for section in ("global.", "install.", ":env:."):  # each outdoes the one before
        for line in said.stdout.splitlines():
            key, _, value = line.partition("=")
            if key.startswith(section) and key[len(section) :] in PIP_TO_UV:
                found[key[len(section) :]] = " ".join(str(ast.literal_eval(value)).split())
    if "find-links" in found:
        found["find-links"] = found["find-links"].replace(" ", ",")
    settings = {PIP_TO_UV[key]: value for key, value in found.items() if value}
    if "UV_INDEX" in settings:
        settings["UV_INDEX_STRATEGY"] = "unsafe-best-match"
    return {key: value for key, value in {**UV, **settings}.items() if key not in os.environ}


@contextmanager
def scratch_build() -> Iterator[dict[str, str]]:
    """Let setuptools write its notes elsewhere than in the checkout, which may be read-only."""
    with tempfile.TemporaryDirectory() as name:
        config = Path(name) / "setup.cfg"
        config.write_text(f"[egg_info]\negg_base = {name}\n")
        yield {"DIST_EXTRA_CONFIG": str(config)}


def run(command: list[str], held: int, env: dict[str, str] | None = None, quiet: bool = False) -> int:
    """Run a step of the setup; its output is talk, not data."""
    return subprocess.run(
        command,
        check=False,
        env={**os.environ, **PIP, **(env or {})},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL if quiet else sys.stderr.fileno(),
        stderr=subprocess.DEVNULL if quiet else None,
        pass_fds=(held,),
    ).returncode


def lock(words: list[str]) -> int:
    """Write the locks anew; without --upgrade they keep the versions they have wherever they still fit."""
    import tomllib  # noqa: PLC0415 - not in the Pythons that only get as far as saying so

    project = "pyproject.toml"
    build = "\n".join(tomllib.loads((ROOT / project).read_text())["build-system"]["requires"])
    # The image gets the very versions that the tests ran with.
    same = ["-c", str(LOCK.relative_to(ROOT)), "--no-annotate"]
    status = write_lock(LOCK, [project, "--extra", "embedded", "--extra", "dev", *words])
    return status or write_lock(RUNTIME_LOCK, [project, *same]) or write_lock(BUILD_LOCK, ["-", *same], build)


def write_lock(lock: Path, what: list[str], given: str = "") -> int:
    """Write one lock with uv; its exit status."""
    uv = shutil.which("uv")
    if not uv:
        give_up("uv is not on PATH; install it to write the lock")
    how = "--universal --generate-hashes --no-header --python-version 3.11 -q"
    target = str(lock.relative_to(ROOT))
    command = [uv, "pip", "compile", *how.split(), *what, "-o", target]
    # An extra index of this machine may hold one file of a release; the lock must know the hashes of all.
    local = ("UV_INDEX", "UV_FIND_LINKS", "UV_INDEX_STRATEGY")
    env = {**os.environ, **{key: value for key, value in uv_settings().items() if key not in local}}
    status = subprocess.run(
        command, input=given, check=False, cwd=ROOT, env=env, stdout=subprocess.DEVNULL, text=True
    ).returncode
    if status == 0 and ("://" in lock.read_text() or str(ROOT) in lock.read_text()):
        give_up(f"{target} names an address or a path of this machine; it must not be committed", 1)
    return status


def say(what: str) -> None:
    """Talk goes to standard error."""
    sys.stderr.write(f"start.py: {what}\n")


def give_up(why: str, status: int = 2) -> NoReturn:
    """End with one sentence."""
    say(why)
    sys.exit(status)


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except KeyboardInterrupt:
        sys.exit(130)
