"""What the released server's own provider sealed, on its own schema, rotated: it opens all of it with the new key."""

from __future__ import annotations

import json
from hashlib import sha256
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest

from tests.conftest import Deployment
from tests.interop import provider
from tests.rotation.conftest import equipped
from tests.rotation.vault import VALUES, Vault, codec, envelopes
from worker.layouts import LAYOUTS

pytestmark = pytest.mark.interop
SCHEME = "local_encrypted_v1"


@pytest.fixture
def vault(real: Deployment, tmp_path: Path) -> Vault:
    return equipped(real, tmp_path / "secrets")


def test_the_server_s_own_provider_opens_what_was_rotated(vault: Vault, tmp_path: Path) -> None:
    """In every carrier; and what it seals afterwards opens with the key we put there."""
    module = provider.require(tmp_path / "server")
    with provider.serving(module, vault.file) as server:
        _plant(vault, server)
        before = _opened(vault, server)
        places = {f"{carrier.table.name}.{carrier.column.name}" for carrier in LAYOUTS["paperclip"].carriers}
        assert {place for place, _ in before} == places
        assert not any(isinstance(text, dict) for texts in before.values() for text in texts)
        rest = vault.rest()
        result = vault.run("--generate")
        assert result["kept"] is True
        assert result["rows"] == len(before)
        assert vault.now != vault.key
        # The same process, with the file it read before.
        assert _opened(vault, server) == before
        assert vault.rest() == rest
        for value in VALUES:
            sealed = server.seal(value)
            assert codec("paperclip", vault.now).open(sealed["material"]).decode() == value


def _plant(vault: Vault, server: provider.Provider) -> None:
    with vault.connect() as connection:
        # Rows of no consequence that the release's foreign keys would ask for.
        connection.execute("SET session_replication_role = replica")
        for value in VALUES:
            sealed = server.seal(value)
            secret, company = vault.secret(connection)
            digests = {name: sealed[_CAMEL[name]] for name in _CAMEL}
            number = 9_000 + VALUES.index(value)
            vault.insert(
                connection,
                "company_secret_versions",
                secret_id=secret,
                version=number,
                material=sealed["material"],
                status="previous",
                **digests,
            )
            proposal = {
                "kind": "secret",
                "status": "pending",
                "projection_class": "unclassified",
                "proposed_name": "x",
                "proposed_key": str(uuid4()),
                "value_ciphertext": server.seal(value)["material"],
            }
            vault.insert(connection, "company_secret_proposals", company_id=company, **proposal)
            entry = {"fingerprintSha256": sealed["fingerprintSha256"], "material": server.seal(value)["material"]}
            registry = {"paperclipSecretRedactions": [entry, entry], "other": [1, value]}
            agent = connection.execute("SELECT id, company_id FROM agents LIMIT 1").fetchone()
            assert agent is not None
            vault.insert(
                connection, "heartbeat_runs", agent_id=agent[0], company_id=agent[1], context_snapshot=registry
            )
            vault.insert(
                connection,
                "agent_wakeup_requests",
                agent_id=agent[0],
                company_id=agent[1],
                payload={"_paperclipWakeContext": registry},
            )
            parts = {name: server.seal(f"{name}{value}")["material"] for name in ("binding", "upload")}
            vault.insert(
                connection,
                "chat_teams_file_transfers",
                company_id=company,
                private_state=parts,
                **_TRANSFER,
                token_sha256=sha256(uuid4().bytes).hexdigest(),
            )
        connection.execute("SET session_replication_role = origin")


_TRANSFER: dict[str, Any] = {
    **dict.fromkeys(("source_digest", "authority_digest", "sha256"), "0" * 64),
    **dict.fromkeys(("version", "byte_size", "conversation_generation"), 1),
    "phase": "declined",
}
_CAMEL = {"value_sha256": "valueSha256", "fingerprint_sha256": "fingerprintSha256"}


def _opened(vault: Vault, server: provider.Provider) -> dict[tuple[str, str], list[Any]]:
    """What the server's provider reads in every row of every carrier."""
    found: dict[tuple[str, str], list[Any]] = {}
    with vault.connect() as connection:
        for carrier in LAYOUTS["paperclip"].carriers:
            name, table = carrier.column.name, carrier.table.name
            for key, value in connection.execute(f'SELECT id::text, "{name}" FROM "{table}"'.encode()).fetchall():
                document = json.loads(value) if isinstance(value, str) else value
                if texts := [server.open(one) for one in envelopes(document, SCHEME)]:
                    found[f"{table}.{name}", key] = texts
    return found
