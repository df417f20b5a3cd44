"""The released server's own provider of local secrets, out of its npm package, in a Node process."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import tarfile
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.interop import release

_CACHE = Path(__file__).resolve().parents[2] / ".cache" / "release"
_SCRIPT = Path(__file__).with_name("provider.mjs")
_PROVIDER = "dist/secrets/local-encrypted-provider.js"
# Package: SHA-256 of its archive, and all that the provider needs of it.
_PARTS = {
    "server": (
        "1460b1537479d82d2a06df2f9815b98cc55cf2f67e470d581c3dc8e656a6d6d2",
        ("package.json", _PROVIDER, "dist/home-paths.js", "dist/errors.js"),
    ),
    "shared": (
        "5512dd8eb9a1fd0f3afa5864de29a50ca6a3223f0adc861dfe87d46ad57a2c89",
        ("package.json", "dist/home-paths.js"),
    ),
}


def require(folder: Path) -> Path:
    """The provider's module, unpacked into a folder; skips the test (fails it in CI) when it cannot be had."""
    try:
        for name in _PARTS:
            _unpack(_archive(name), name, folder)
        subprocess.run(["node", "--version"], check=True, capture_output=True)
    except (FileNotFoundError, subprocess.SubprocessError) as error:
        reason = f"the released server cannot be fetched: {error}"
        if os.environ.get("CI") == "true":
            pytest.fail(reason)
        pytest.skip(reason)
    return folder / _PROVIDER


def _archive(name: str) -> Path:
    target = _CACHE / f"{name}-{release.VERSION}.tgz"
    if not target.exists():
        _CACHE.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=_CACHE) as folder:
            package = f"@paperclipai/{name}@{release.VERSION}"
            command = ["npm", "pack", package, "--pack-destination", folder, "--silent"]
            subprocess.run(command, cwd=folder, check=True, capture_output=True, timeout=240)
            (fetched,) = Path(folder).glob("*.tgz")
            fetched.replace(target)
    if hashlib.sha256(target.read_bytes()).hexdigest() != _PARTS[name][0]:
        raise ValueError(f"{target} is not the release we know; delete it to fetch again")
    return target


def _unpack(archive: Path, name: str, folder: Path) -> None:
    base = folder if name == "server" else folder / "node_modules" / "@paperclipai" / name
    with tarfile.open(archive) as package:
        for path in _PARTS[name][1]:
            found = package.extractfile(f"package/{path}")
            if found is None:
                raise ValueError(f"{archive} has no {path}")
            (base / path).parent.mkdir(parents=True, exist_ok=True)
            (base / path).write_bytes(found.read())


class Provider:
    """One process of the provider; it reads the key file anew for every call, as the server does."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process

    def _ask(self, **request: Any) -> Any:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())

    def seal(self, value: str) -> dict[str, Any]:
        """What the server makes of a new value: material and digests."""
        found: dict[str, Any] = self._ask(seal=value)
        return found

    def open(self, material: Any) -> Any:
        """The value, or {"error": ...}."""
        return self._ask(open=material)


@contextmanager
def serving(module: Path, key_file: Path) -> Iterator[Provider]:
    """The provider with this key file, for as long as the block lasts."""
    environment = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
    process = subprocess.Popen(
        ["node", str(_SCRIPT), module.as_uri()],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env=environment | {"PAPERCLIP_SECRETS_MASTER_KEY_FILE": str(key_file)},
    )
    with process:
        yield Provider(process)
        assert process.stdin is not None
        process.stdin.close()
