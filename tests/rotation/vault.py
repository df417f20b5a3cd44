"""Secrets as the app leaves them in its database, sealed with a master key of ours, and what they must open to."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import psycopg
from psycopg import sql

from tests.conftest import Deployment
from tests.faults.evidence import wait
from worker import keyring, layouts
from worker.envelopes import CODECS, Codec, Damaged, LocalEncrypted, Pbkdf2, WrongKey
from worker.keyring import MasterKey
from worker.layouts.catalogue import load

# Cheap, so that a test may seal and open under many keys.
ROUNDS = 1_000
VALUES = ("", "x", "sk-live-0123456789", "  padded \n", "größe 顧客 😀 \u0001", '{"a": "b"}', "v" * 65_536)
_DUMMY = {
    "uuid": uuid4,
    "text": lambda: "x",
    "integer": lambda: 0,
    "bigint": lambda: 0,
    "boolean": lambda: False,
    "jsonb": lambda: "{}",
    "timestamp with time zone": lambda: "2026-01-01",
}


def _dummy(kind: str) -> Any:
    make: Any = _DUMMY[kind]
    return make()


def codec(layout: str, key: MasterKey) -> Codec:
    made = CODECS[layouts.LAYOUTS[layout].scheme]
    if made is Pbkdf2:
        return Pbkdf2(key.raw, salt=key.raw[:16], iterations=ROUNDS)
    return LocalEncrypted(key.raw)


@dataclass(kw_only=True)
class Vault:
    """The secrets of one deployment: the key file, and every plaintext by the row and place it was put in."""

    deployment: Deployment
    file: Path
    key: MasterKey
    held: dict[tuple[str, str], Counter[str]] = field(default_factory=dict)

    @property
    def layout(self) -> str:
        return self.deployment.layout

    def seal(self, value: str, key: MasterKey | None = None) -> dict[str, Any]:
        return dict(codec(self.layout, key or self.key).seal(value.encode()))

    def insert(self, connection: psycopg.Connection[Any], table: str, **values: Any) -> UUID:
        """A row with these values, and something in every other column that needs a value."""
        fact = load(self.layout).tables[table]
        row = {n: _dummy(c.type) for n, c in fact.columns.items() if not c.nullable and n not in values}
        row = {**row, "id": uuid4()} | values
        names = sql.SQL(", ").join(map(sql.Identifier, row))
        cells = [json.dumps(one) if isinstance(one, dict | list) else one for one in row.values()]
        places = sql.SQL(", ").join([sql.Placeholder()] * len(row))
        connection.execute(
            sql.SQL("INSERT INTO {} ({}) VALUES ({})").format(sql.Identifier(table), names, places), cells
        )
        return UUID(str(row["id"]))

    def secret(self, connection: psycopg.Connection[Any]) -> tuple[UUID, UUID]:
        """Some secret, and its company."""
        row = connection.execute("SELECT id, company_id FROM company_secrets ORDER BY random() LIMIT 1").fetchone()
        assert row is not None
        return row[0], row[1]

    def add_version(
        self, connection: psycopg.Connection[Any], value: str, *, key: MasterKey | None = None, **more: Any
    ) -> UUID:
        """One version of a secret, as the app writes it."""
        secret, _ = self.secret(connection)
        known = {"secret_id": secret, "material": self.seal(value, key), "version": int.from_bytes(uuid4().bytes[:3])}
        if self.layout == "paperclip":
            digest = hashlib.sha256(value.encode()).hexdigest()
            known |= {"value_sha256": digest, "fingerprint_sha256": digest, "status": "current"}
        row = self.insert(connection, "company_secret_versions", **known | more)
        self.held["company_secret_versions", str(row)] = Counter([value])
        return row

    def plant(self, *, versions: int = 40) -> None:
        """Secrets in every carrier of the layout, with values of all kinds."""
        with self.connect() as connection:
            for number in range(versions):
                status = ("current", "previous", "disabled", "destroyed")[number % 4]
                more: dict[str, Any] = {"status": status} if self.layout == "paperclip" else {}
                self.add_version(connection, VALUES[number % len(VALUES)], **more)
            if self.layout == "paperclip":
                self._plant_elsewhere(connection)

    def _plant_elsewhere(self, connection: psycopg.Connection[Any]) -> None:
        company = self.secret(connection)[1]
        external = {"scheme": "external_reference_v1", "provider": "vault", "externalRef": "a/b", "note": "{"}
        secret, _ = self.secret(connection)
        for number, material in enumerate((external, {"scheme": "aws_secrets_manager_v1", "secretId": "x"})):
            self.insert(
                connection,
                "company_secret_versions",
                secret_id=secret,
                material=material,
                version=9_000_000 + number,
            )
        for value in VALUES:
            row = self.insert(
                connection, "company_secret_proposals", company_id=company, value_ciphertext=self.seal(value)
            )
            self.held["company_secret_proposals", str(row)] = Counter([value])
        self.insert(connection, "company_secret_proposals", company_id=company)
        for number in range(12):
            self.add_run(connection, [f"run-{number}", VALUES[number % len(VALUES)]])
        for number in range(5):
            values = [f"wake-{number}", "größe"]
            payload = {"reason": "x", "_paperclipWakeContext": {"n": 1, **self.registry(values)}}
            row = self.insert(connection, "agent_wakeup_requests", company_id=company, payload=payload)
            self.held["agent_wakeup_requests", str(row)] = Counter(values)
        self.insert(connection, "agent_wakeup_requests", company_id=company, payload={"reason": "nothing"})
        for number in range(3):
            parts = {name: self.seal(f"{name}-{number}") for name in ("binding", "response", "upload")}
            state = {"schema": "paperclip.teams.transfer-private.v1", **parts, "resolution": None}
            row = self.insert(connection, "chat_teams_file_transfers", company_id=company, private_state=state)
            self.held["chat_teams_file_transfers", str(row)] = Counter(f"{name}-{number}" for name in parts)

    def registry(self, values: list[str], key: MasterKey | None = None) -> dict[str, Any]:
        """What the app keeps in a run's context to mask these values."""
        entries = [
            {"fingerprintSha256": hashlib.sha256(value.encode()).hexdigest(), "material": self.seal(value, key)}
            for value in values
        ]
        return {"paperclipSecretRedactions": entries}

    def add_run(
        self, connection: psycopg.Connection[Any], values: list[str], *, key: MasterKey | None = None
    ) -> UUID:
        """A run whose context has these values, beside numbers no float holds and text with braces and the scheme."""
        agent = connection.execute("SELECT id, company_id FROM agents ORDER BY random() LIMIT 1").fetchone()
        assert agent is not None
        context = {
            "issueId": str(uuid4()),
            "text": 'a { "scheme": "local_encrypted_v1" } of π',
            "number": 12345678901234567890,
            **self.registry(values, key),
        }
        row = self.insert(
            connection,
            "heartbeat_runs",
            agent_id=agent[0],
            company_id=agent[1],
            status="succeeded",
            context_snapshot=context,
        )
        self.held["heartbeat_runs", str(row)] = Counter(values)
        return row

    # -- what must hold afterwards --------------------------------------------------------------------

    def connect(self) -> psycopg.Connection[Any]:
        return psycopg.connect(self.deployment.environment["DATABASE_URL"])

    def wait_for_nobody(self) -> None:
        """Wait until PostgreSQL has noticed that a worker is dead."""
        query = "SELECT count(*) = 0 FROM pg_stat_activity WHERE application_name = %s AND state <> 'idle' "
        query += "AND datname = current_database()"
        wait(lambda: self.deployment.query(query, "paperclip-worker")[0][0])

    def opened(self, *keys: MasterKey) -> dict[tuple[str, str], Counter[str]]:
        """Every row's plaintexts, each of which exactly one of the keys opens."""
        codecs = [codec(self.layout, key) for key in keys]
        found: dict[tuple[str, str], Counter[str]] = {}
        with self.connect() as connection:
            for carrier in layouts.LAYOUTS[self.layout].carriers:
                query = sql.SQL("SELECT id, {} FROM {}").format(
                    sql.Identifier(carrier.column.name), sql.Identifier(carrier.table.name)
                )
                for row, value in connection.execute(query).fetchall():
                    texts = [one_that_opens(codecs, envelope) for envelope in envelopes(value, codecs[0].scheme)]
                    if texts:
                        found[carrier.table.name, str(row)] = Counter(texts)
        return found

    def rest(self) -> dict[str, list[Any]]:
        """Everything in the carriers' tables but iv, tag, ciphertext (and the guide's salt and iterations)."""
        found = {}
        with self.connect() as connection:
            for carrier in layouts.LAYOUTS[self.layout].carriers:
                query = sql.SQL("SELECT to_jsonb(t)::text FROM {} t ORDER BY id").format(
                    sql.Identifier(carrier.table.name)
                )
                rows = [json.loads(one[0], parse_float=str, parse_int=str) for one in connection.execute(query)]
                found[carrier.name] = [_stripped(row, codec(self.layout, self.key).scheme) for row in rows]
        return found

    def run(self, *words: str, ok: bool = True, **settings: str) -> Any:
        """`run rotate-master-key --inline --yes`, with the new key still to be named; what it says as JSON."""
        env = {f"PAPERCLIP_WORKER_{name.upper()}": value for name, value in settings.items()}
        done = self.deployment.cli(
            "--debug", "run", "rotate-master-key", "--inline", "--yes", "--json", *words, ok=ok, env=env
        )
        return json.loads(done.stdout)

    @property
    def now(self) -> MasterKey:
        """The key in the key file."""
        return keyring.read(self.file)


def envelopes(value: Any, scheme: str) -> Iterator[dict[str, Any]]:
    if isinstance(value, dict):
        if value.get("scheme") == scheme:
            yield value
            return
        value = list(value.values())
    for one in value if isinstance(value, list) else ():
        yield from envelopes(one, scheme)


def one_that_opens(codecs: list[Codec], envelope: dict[str, Any]) -> str:
    texts = []
    for one in codecs:
        try:
            texts.append(one.open(envelope).decode())
        except (WrongKey, Damaged):
            continue
    assert len(texts) == 1, f"{len(texts)} keys open a ciphertext"
    return texts[0]


def _stripped(value: Any, scheme: str) -> Any:
    if isinstance(value, dict):
        ours = value.get("scheme") == scheme
        left_out = {"iv", "tag", "ciphertext", "salt", "iterations"} if ours else set()
        return {name: _stripped(one, scheme) for name, one in value.items() if name not in left_out}
    return [_stripped(one, scheme) for one in value] if isinstance(value, list) else value
