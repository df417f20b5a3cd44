"""The Dockerfile and its context as values, and its build stage carried out in a directory in place of an engine."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from packaging.requirements import Requirement

from tests.conftest import ROOT

DOCKERFILE = ROOT / "docker" / "Dockerfile"
PREFIX = Path("/opt/paperclip-worker")
Instruction = tuple[str, str]


def stages() -> list[list[Instruction]]:
    """The instructions of each stage, continued lines joined."""
    lines = [line for line in DOCKERFILE.read_text(encoding="utf-8").splitlines() if not line.startswith("#")]
    joined = re.sub(r"\\\n\s*", " ", "\n".join(lines))
    found: list[list[Instruction]] = []
    for line in filter(None, joined.splitlines()):
        name, _, rest = line.partition(" ")
        if name == "FROM":
            found.append([])
        found[-1].append((name, rest))
    return found


def context(into: Path) -> Path:
    """A copy of what .dockerignore lets through; it must begin by shutting out everything."""
    lines = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and not line.startswith("#")]
    assert lines[0] == "*"
    for line in lines[1:]:
        if line.startswith("!"):
            source, target = ROOT / line[1:], into / line[1:]
            target.parent.mkdir(parents=True, exist_ok=True)
            if source.is_dir():
                shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__", "*.pyc"))
            else:
                shutil.copy(source, target)
    return into


def build(root: Path) -> Path:
    """Carry out the first stage below `root` with this interpreter's version; the installation that it leaves."""
    sent = context(root / "context")
    programs = root / "programs"
    programs.mkdir()
    python = programs / "python"
    python.write_text(f'#!/bin/sh\nexec {shlex.quote(os.path.realpath(sys.executable))} "$@"\n')
    python.chmod(0o755)
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("VIRTUAL_ENV", "PYTHON"))}
    environment["PATH"] = os.pathsep.join([str(programs), os.environ["PATH"]])
    here = root
    for name, rest in stages()[0][1:]:
        if name == "WORKDIR":
            here = root / rest.lstrip("/")
            here.mkdir(parents=True)
        elif name == "ENV":
            environment |= dict(word.split("=", 1) for word in shlex.split(rest))
        elif name == "COPY":
            *sources, target = shlex.split(rest)
            for source in sources:
                _copy(sent / source, here / target, into=target.endswith("/"))
        else:
            assert name == "RUN", name
            (root / "opt").mkdir(exist_ok=True)
            script = rest.replace(str(PREFIX), str(root / PREFIX.relative_to("/")))
            subprocess.run(["sh", "-euc", script], cwd=here, env=environment, check=True)
    return root / PREFIX.relative_to("/")


def _copy(source: Path, target: Path, *, into: bool) -> None:
    if source.is_dir():
        shutil.copytree(source, target)
    else:
        (target if into else target.parent).mkdir(parents=True, exist_ok=True)
        shutil.copy(source, target)


def locked(name: str) -> dict[str, Requirement]:
    """The requirements of a lock by name; each must be pinned and hashed."""
    found = {}
    for entry in re.split(r"\n(?=\S)", (ROOT / name).read_text(encoding="utf-8").strip()):
        assert " --hash=sha256:" in entry, entry
        one = Requirement(entry.partition("\\")[0].strip())
        assert str(one.specifier).startswith("=="), entry
        found[one.name] = one
    return found
