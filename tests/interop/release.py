"""The schema of the real Paperclip release, made by its own migrations out of its own npm package."""

from __future__ import annotations

import functools
import hashlib
import json
import os
import shutil
import subprocess
import tarfile
import tempfile
from dataclasses import dataclass
from pathlib import Path

import psycopg
import pytest

PACKAGE = "@paperclipai/db"
VERSION = "2026.916.1"
SHA256 = "2b95c975402ffef55b2bbd6ecaca26eb132e9e6bbbf1869ce8619d9bf6ac8906"
MIGRATIONS = 278

_CACHE = Path(__file__).resolve().parents[2] / ".cache" / "release"
_TARBALL = _CACHE / f"db-{VERSION}.tgz"
_FOLDER = "package/dist/migrations"
_BREAKPOINT = b"--> statement-breakpoint"
_FETCH_SECONDS = 120


@dataclass(frozen=True, kw_only=True)
class Migration:
    """One migration as the release's journal lists it."""

    tag: str
    when: int
    sql: bytes

    @property
    def hash(self) -> str:
        """What the release's migrator records for it."""
        return hashlib.sha256(self.sql).hexdigest()


@functools.cache
def unavailable() -> str | None:
    """Why the release cannot be had on this machine; None when it can.

    A package that is not the one we know is no reason to skip: it raises ValueError.
    """
    if _TARBALL.exists():
        return None
    npm = shutil.which("npm")
    if npm is None:
        return "npm is not installed, so the Paperclip release cannot be fetched"
    try:
        _fetch(npm)
    except subprocess.SubprocessError as error:
        return f"npm cannot fetch {PACKAGE}@{VERSION}: {type(error).__name__}"
    return None


def require() -> None:
    """Skip the calling test when the release cannot be had; in CI, where it always can, fail instead."""
    if reason := unavailable():
        if os.environ.get("CI") == "true":
            pytest.fail(reason)
        pytest.skip(reason)


def apply_release(conninfo: str) -> None:
    """Bring the empty database to the release's schema, with the rows its migrator would have recorded.

    One transaction: the database has all of it or is as it was. Call `require` first.
    """
    if reason := unavailable():
        raise RuntimeError(reason)
    with psycopg.connect(conninfo) as connection, connection.cursor() as cursor:
        # A migration that says IF NOT EXISTS is not worth a warning here.
        cursor.execute("SET LOCAL client_min_messages = error")
        cursor.execute("CREATE EXTENSION IF NOT EXISTS pg_trgm")
        cursor.execute("CREATE EXTENSION IF NOT EXISTS fuzzystrmatch")
        cursor.execute("CREATE SCHEMA drizzle")
        cursor.execute(
            "CREATE TABLE drizzle.__drizzle_migrations (id serial PRIMARY KEY, hash text NOT NULL, created_at bigint)"
        )
        for migration in migrations():
            for statement in migration.sql.split(_BREAKPOINT):
                if statement.strip():
                    cursor.execute(statement)
        cursor.executemany(
            "INSERT INTO drizzle.__drizzle_migrations (hash, created_at) VALUES (%s, %s)",
            [(one.hash, one.when) for one in migrations()],
        )


@functools.cache
def migrations() -> tuple[Migration, ...]:
    """Every migration in the journal's order. ValueError when the package is not the one we know."""
    _check(_TARBALL)
    with tarfile.open(_TARBALL) as package:
        files = {
            member.name: found.read()
            for member in package
            if member.name.startswith(_FOLDER) and (found := package.extractfile(member))
        }
    entries = json.loads(files[f"{_FOLDER}/meta/_journal.json"])["entries"]
    known = tuple(
        Migration(tag=entry["tag"], when=entry["when"], sql=files[f"{_FOLDER}/{entry['tag']}.sql"])
        for entry in entries
    )
    if len(known) != MIGRATIONS:
        raise ValueError(f"{PACKAGE}@{VERSION} has {len(known)} migrations, not {MIGRATIONS}")
    return known


def _fetch(npm: str) -> None:
    _CACHE.mkdir(parents=True, exist_ok=True)
    # Fetched beside its final place and renamed, so that concurrent runs never see half a file.
    with tempfile.TemporaryDirectory(dir=_CACHE) as folder:
        subprocess.run(
            [npm, "pack", f"{PACKAGE}@{VERSION}", "--pack-destination", folder, "--silent"],
            cwd=folder,
            check=True,
            capture_output=True,
            timeout=_FETCH_SECONDS,
        )
        (fetched,) = Path(folder).glob("*.tgz")
        _check(fetched)
        fetched.replace(_TARBALL)


def _check(tarball: Path) -> None:
    found = hashlib.sha256(tarball.read_bytes()).hexdigest()
    if found != SHA256:
        raise ValueError(f"{tarball} is not the release we know (sha256 {found}); delete it to fetch again")
