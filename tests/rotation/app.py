"""The app's server as processes of their own: it reads the key file, seals, and only then writes; and it reads."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import random
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psycopg

from tests.conftest import Deployment
from tests.rotation.vault import Vault, codec, envelopes
from worker import config, keyring
from worker.envelopes import Damaged, WrongKey
from worker.operations import Operations

Held = dict[tuple[str, str], Counter[str]]
# So long a value or a document is in a server's memory, at most, before it is written.
HELD = 0.25


@dataclass(kw_only=True)
class Seen:
    """What the processes of one server did: rows as they must be found, and what could not be opened when."""

    held: Held = field(default_factory=dict)
    gone: list[tuple[str, str]] = field(default_factory=list)
    writes: int = 0
    # Writes of ciphertext that another key than the file's had sealed by the time they were in.
    late: int = 0
    reads: int = 0
    unread: list[float] = field(default_factory=list)
    # Of those, reads that began before the key was another.
    torn: int = 0
    errors: list[str] = field(default_factory=list)

    def add(self, other: Seen) -> None:
        self.held |= other.held
        self.gone += other.gone
        self.writes += other.writes
        self.late += other.late
        self.reads += other.reads
        self.unread += other.unread
        self.torn += other.torn
        self.errors += other.errors


@contextmanager
def serving(vault: Vault, *, writers: int, readers: int) -> Iterator[Seen]:
    """Servers at work as long as the block lasts; afterwards what they did is known, and entered in the vault."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    ending, results, seen = context.Event(), context.Queue(), Seen()
    environment, processes = dict(vault.deployment.environment), []
    runs = sorted(key for key in vault.held if key[0] == "heartbeat_runs")
    for number in range(writers + readers):
        own = {key: vault.held[key] for key in runs[number::writers]} if number < writers else {}
        work = _write if number < writers else _read
        arguments = ((environment, vault.file), number, own, (ending, results))
        processes.append(context.Process(target=_serve, args=(work, *arguments)))
        processes[-1].start()
    for _ in processes:
        assert results.get(timeout=30) is None
    try:
        yield seen
    finally:
        ending.set()
        for _ in processes:
            seen.add(results.get(timeout=30))
        for process in processes:
            process.join(10)
        vault.held |= seen.held
        for key in seen.gone:
            vault.held.pop(key, None)


def _serve(work: Any, place: tuple[Mapping[str, str], Path], number: int, own: Held, ends: tuple[Any, Any]) -> None:
    (environment, file), (ending, results) = place, ends
    operations = Operations(config.load(environment))
    deployment = Deployment(layout="paperclip", environment=dict(environment), operations=operations, opened=[])
    vault, seen = Vault(deployment=deployment, file=file, key=keyring.read(file), held=own), Seen()
    rng = random.Random(number)
    with psycopg.connect(environment["DATABASE_URL"], autocommit=True) as connection:
        results.put(None)
        while not ending.is_set():
            try:
                work(vault, connection, rng, seen)
            except psycopg.Error as error:
                seen.errors.append(f"{type(error).__name__}: {error}")
    seen.held = vault.held
    results.put(seen)


def _write(vault: Vault, connection: psycopg.Connection[Any], rng: random.Random, seen: Seen) -> None:
    """One thing a server does, with time between the sealing and the writing."""
    vault.key = keyring.read(vault.file)
    value = f"value-{rng.random()}"
    runs = [row for table, row in vault.held if table == "heartbeat_runs"]
    versions = [row for table, row in vault.held if table == "company_secret_versions"]
    choice = rng.choices(("version", "proposal", "run", "delete", "touch"), (4, 3, 4, 1, 1))[0]
    if choice == "version":
        material, digest = vault.seal(value), hashlib.sha256(value.encode()).hexdigest()
        time.sleep(rng.random() * 0.03)
        vault.add_version(connection, value, material=material, value_sha256=digest)
    elif choice == "proposal":
        company, sealed = vault.secret(connection)[1], vault.seal(value)
        time.sleep(rng.random() * 0.03)
        added = vault.insert(connection, "company_secret_proposals", company_id=company, value_ciphertext=sealed)
        vault.held["company_secret_proposals", str(added)] = Counter([value])
    elif choice == "run" and runs:
        _rewrite(vault, connection, rng, rng.choice(runs), value)
    elif choice == "delete" and versions:
        gone = rng.choice(versions)
        connection.execute("DELETE FROM company_secret_versions WHERE id = %s", [gone])
        del vault.held["company_secret_versions", gone]
    elif choice == "touch" and versions:
        query = "UPDATE company_secret_versions SET status = 'previous' WHERE id = %s"
        connection.execute(query, [rng.choice(versions)])
    seen.writes += 1
    seen.late += choice in {"version", "proposal", "run"} and vault.key != keyring.read(vault.file)


def _rewrite(vault: Vault, connection: psycopg.Connection[Any], rng: random.Random, row: str, value: str) -> None:
    """A whole document read before, written back with one more entry."""
    query = "SELECT context_snapshot FROM heartbeat_runs WHERE id = %s"
    found = connection.execute(query, [row]).fetchone()
    assert found is not None
    document = found[0]
    document["paperclipSecretRedactions"] += vault.registry([value])["paperclipSecretRedactions"]
    time.sleep(rng.random() * HELD)
    update = "UPDATE heartbeat_runs SET context_snapshot = %s WHERE id = %s"
    connection.execute(update, [json.dumps(document), row])
    vault.held["heartbeat_runs", row] = vault.held["heartbeat_runs", row] + Counter([value])


_QUERIES = (
    "SELECT material FROM company_secret_versions WHERE material->>'scheme' = 'local_encrypted_v1' "
    "ORDER BY random() LIMIT 10",
    "SELECT value_ciphertext FROM company_secret_proposals WHERE value_ciphertext IS NOT NULL LIMIT 10",
    "SELECT context_snapshot FROM heartbeat_runs WHERE context_snapshot ? 'paperclipSecretRedactions' LIMIT 10",
)


def _read(vault: Vault, connection: psycopg.Connection[Any], rng: random.Random, seen: Seen) -> None:
    """Rows, then the key file for each of their values, as the server does it."""
    before = keyring.read(vault.file)
    rows = connection.execute(rng.choice(_QUERIES)).fetchall()
    for (value,) in rows:
        for envelope in envelopes(value, "local_encrypted_v1"):
            seen.reads += 1
            # A list of many takes a server a while, and it reads the file for each.
            time.sleep(0.002)
            try:
                codec("paperclip", key := keyring.read(vault.file)).open(envelope)
            except (WrongKey, Damaged):
                seen.unread.append(time.time())
                seen.torn += key != before
