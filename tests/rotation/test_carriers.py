"""Every place of ciphertext, and every shape it has there; whatever else the row holds stays as it is."""

from __future__ import annotations

import base64
import json
import os
from collections import Counter
from typing import Any
from uuid import UUID

import psycopg
import pytest

from tests.cli.helpers import refused
from tests.rotation import steps
from tests.rotation.vault import VALUES, Vault
from worker import keyring

MATERIAL = "company_secret_versions", "material"


def text(vault: Vault, row: UUID, table: str = MATERIAL[0], column: str = MATERIAL[1]) -> str:
    ((found,),) = vault.deployment.query(f"SELECT {column}::text FROM {table} WHERE id = %s", row)
    return str(found)


def with_material(vault: Vault, connection: psycopg.Connection[Any], material: dict[str, Any], value: str) -> UUID:
    """A version with just this material, which is to open to the value."""
    row = vault.add_version(connection, value)
    connection.execute(
        "UPDATE company_secret_versions SET material = %s::jsonb WHERE id = %s", (json.dumps(material), row)
    )
    return row


def test_envelopes_are_rotated_in_every_shape_the_app_reads(vault: Vault) -> None:
    short = vault.seal("short tag")
    short["tag"] = base64.b64encode(base64.b64decode(short["tag"])[:12]).decode()
    inner = vault.seal("inner")
    extra = {"note": 'größe { "scheme"', "list": [{"a": 1}], "inner": inner}
    with vault.connect() as connection:
        with_material(vault, connection, short, "short tag")
        kept = with_material(vault, connection, vault.seal("extra") | extra, "extra")
        number = with_material(vault, connection, vault.seal("number"), "number")
        connection.execute(
            "UPDATE company_secret_versions SET material = material || '{\"n\": 1.5000000000000000000000001}' "
            "WHERE id = %s",
            (number,),
        )
        for value in VALUES:
            vault.add_version(connection, value)
    rest = vault.rest()
    assert vault.run("--generate")["kept"] is True
    assert vault.opened(vault.now) == vault.held
    assert vault.rest() == rest
    found = json.loads(text(vault, kept))
    assert {name: found[name] for name in extra} == extra
    assert '"n": 1.5000000000000000000000001' in text(vault, number)


def test_a_row_with_envelopes_of_several_keys_keeps_those_that_are_not_old(released_vault: Vault) -> None:
    vault, new, third = released_vault, keyring.generate(), keyring.generate()
    file = vault.file.with_name("new.key")
    file.write_text(new.text)
    entries = [vault.seal("old"), vault.seal("new", new), vault.seal("lost", third), vault.seal("old again")]
    with vault.connect() as connection:
        row = vault.add_run(connection, [])
        connection.execute(
            "UPDATE heartbeat_runs SET context_snapshot = jsonb_set(context_snapshot, '{paperclipSecretRedactions}', "
            "%s::jsonb) WHERE id = %s",
            (json.dumps([{"material": one} for one in entries]), row),
        )
    del vault.held["heartbeat_runs", str(row)]
    result = vault.run("--new-key-file", str(file), "--allow-undecryptable", "1")
    assert result["kept"] is True
    materials = [
        one["material"]
        for one in json.loads(text(vault, row, "heartbeat_runs", "context_snapshot"))["paperclipSecretRedactions"]
    ]
    assert materials[1:3] == entries[1:3]
    assert materials[0] != entries[0]
    vault.deployment.query("DELETE FROM heartbeat_runs WHERE id = %s", row)
    assert vault.opened(new) == vault.held


def test_rows_of_the_new_key_and_of_other_schemes_are_not_even_written(vault: Vault) -> None:
    new = keyring.generate()
    file = vault.file.with_name("new.key")
    file.write_text(new.text)
    with vault.connect() as connection:
        rows = [vault.add_version(connection, value, key=new) for value in VALUES]
    query = (
        "SELECT id::text, xmin::text, t::text FROM company_secret_versions t WHERE id = ANY(%s) "
        "OR material->>'scheme' NOT IN ('local_encrypted_v1', 'pbkdf2_aes_256_gcm_v1') ORDER BY 1"
    )
    before = vault.deployment.query(query, rows)
    assert len(before) == len(rows) + (2 if vault.layout == "paperclip" else 0)
    assert vault.run("--new-key-file", str(file))["kept"] is True
    assert vault.deployment.query(query, rows) == before
    assert vault.opened(new) == vault.held
    assert vault.now == new


def test_text_that_looks_like_an_envelope_is_text(released_vault: Vault) -> None:
    vault = released_vault
    looks = json.dumps(vault.seal("decoy"))
    with vault.connect() as connection:
        row = vault.add_run(connection, ["real"])
        connection.execute(
            "UPDATE heartbeat_runs SET context_snapshot = context_snapshot || jsonb_build_object('said', %s::text, "
            "'twice', to_jsonb(to_jsonb(%s::text)::text)) WHERE id = %s",
            (looks, looks, row),
        )
    before = json.loads(text(vault, row, "heartbeat_runs", "context_snapshot"))
    assert vault.run("--generate")["kept"] is True
    after = json.loads(text(vault, row, "heartbeat_runs", "context_snapshot"))
    assert after["said"] == before["said"] == looks
    assert after["twice"] == before["twice"]
    assert vault.opened(vault.now)["heartbeat_runs", str(row)] == Counter(["real"])


def test_columns_of_types_without_a_hash_are_watched_as_well(vault: Vault) -> None:
    vault.deployment.query("CREATE TYPE strange AS (a json, b bit)")
    vault.deployment.query(
        "ALTER TABLE company_secret_versions ADD words tsvector DEFAULT 'a b', ADD place point DEFAULT '(1,2)', "
        "ADD old json DEFAULT '{}', ADD many json[] DEFAULT '{}', ADD tree xml, ADD odd \"char\" DEFAULT 'x', "
        "ADD made text GENERATED ALWAYS AS (md5(material::text)) STORED, ADD cost money DEFAULT 1, "
        "ADD flags bit(4) DEFAULT '0101', ADD more varbit DEFAULT '01', ADD pair strange DEFAULT ROW('{}', '1'), "
        "ADD span int4range DEFAULT '[1,2)', ADD \"100% of %s :b\" text DEFAULT 'x'"
    )
    assert vault.run("--generate")["kept"] is True
    assert vault.opened(vault.now) == vault.held


def test_another_column_that_changes_with_the_ciphertext_breaks_the_promise(vault: Vault) -> None:
    vault.deployment.query(
        "CREATE FUNCTION meddle() RETURNS trigger LANGUAGE plpgsql AS "
        "$$BEGIN NEW.version := NEW.version + 10000000; RETURN NEW; END$$"
    )
    vault.deployment.query(
        "CREATE TRIGGER meddle BEFORE UPDATE ON company_secret_versions FOR EACH ROW EXECUTE FUNCTION meddle()"
    )
    result = vault.run("--generate", ok=False)
    assert result["state"] == "unkept"
    assert [one["what"] for one in result["findings"]] == ["another column than the ciphertext was changed with it"]
    assert result["findings"][0]["rows"] == 40
    words = ("run", "rotate-master-key", "--inline", "--yes", "--generate")
    refused(vault.deployment, *words, says="ended unkept; see what it found, and --rollback it", status=3)


@pytest.mark.parametrize("stage", [steps.CUT_OVER, steps.SWEEP])
@pytest.mark.parametrize(
    "change", ["ADD COLUMN note text DEFAULT 'x'", "DROP COLUMN version CASCADE", "ALTER COLUMN version TYPE bigint"]
)
def test_a_table_that_gets_other_columns_meanwhile_is_no_row_that_changed(
    vault: Vault, stage: int, change: str
) -> None:
    """A newer release of the app may bring them."""
    run = steps.start(vault, generate=True)
    steps.work_until(vault, run, stage)
    vault.deployment.query(f"ALTER TABLE company_secret_versions {change}")
    result = steps.work(vault, run)
    assert result["kept"] is True, result["findings"]
    assert vault.opened(vault.now) == vault.held


def test_a_column_that_changes_with_the_ciphertext_is_found_beside_a_new_one(vault: Vault) -> None:
    vault.deployment.query(
        "CREATE FUNCTION meddle() RETURNS trigger LANGUAGE plpgsql AS "
        "$$BEGIN NEW.version := NEW.version + 10000000; RETURN NEW; END$$"
    )
    vault.deployment.query(
        "CREATE TRIGGER meddle BEFORE UPDATE ON company_secret_versions FOR EACH ROW EXECUTE FUNCTION meddle()"
    )
    run = steps.start(vault, generate=True)
    steps.work_until(vault, run, steps.SWEEP)
    vault.deployment.query("ALTER TABLE company_secret_versions ADD COLUMN note text")
    result = steps.work(vault, run)
    assert [one["rows"] for one in result["findings"]] == [40]


@pytest.mark.parametrize("size", [1_200, 9_000], ids=["in the table", "beside it"])
def test_a_large_deployment_is_looked_at_in_several_ranges(
    vault: Vault, monkeypatch: pytest.MonkeyPatch, size: int
) -> None:
    monkeypatch.setattr("worker.ciphertext._WINDOW_BLOCKS", 16)
    monkeypatch.setattr("worker.ciphertext._WINDOW_BYTES", 1 << 16)
    monkeypatch.setattr("worker.ciphertext._STEP", 1)
    monkeypatch.setattr("worker.proof._RANGE", 1)
    with vault.connect() as connection:
        # Large values are compressed, and those that still are large lie in another table, so blocks say little.
        for number in range(300):
            vault.add_version(connection, f"{number}" + os.urandom(size).hex()[:size])
    rest = vault.rest()
    run = steps.start(vault, generate=True)
    result = steps.work(vault, run)
    assert result["kept"] is True
    ((ranges,),) = vault.deployment.query(
        "SELECT count(*) FROM paperclip_worker.shards WHERE key LIKE 'make-ready:company_secret_versions%'"
    )
    assert ranges > 2
    for key, bites in vault.deployment.query(
        "SELECT key, bites FROM paperclip_worker.shards WHERE key ~ 'prove:[01]'"
    ):
        assert bites > 2, key
    assert vault.opened(vault.now) == vault.held
    assert vault.rest() == rest
    envelopes = result["receipt"]["evidence"]["envelopes"]
    held = sum(values.total() for values in vault.held.values())
    assert sum(one["old"] for one in envelopes["before"].values()) == held
    assert sum(one["new"] for one in envelopes["after"].values()) == held


@pytest.mark.parametrize("stage", [steps.MAKE_READY, steps.SWEEP])
def test_a_document_that_no_parser_reads_does_not_stop_it(released_vault: Vault, stage: int) -> None:
    """Whoever may wake an agent may write it, with the scheme's name in it."""
    vault = released_vault
    run = steps.start(vault, generate=True)
    steps.work_until(vault, run, stage)
    with vault.connect() as connection:
        row = vault.add_run(connection, ["real"])
        query = "UPDATE heartbeat_runs SET context_snapshot = jsonb_set(context_snapshot, '{deep}', %s::jsonb)"
        connection.execute(query + " WHERE id = %s", ("[" * 2_000 + "]" * 2_000, row))
        query = "UPDATE agent_wakeup_requests SET payload = %s WHERE payload->>'reason' = 'nothing'"
        connection.execute(
            query, (json.dumps({"said": "local_encrypted_v1", "deep": json.loads("[" * 500 + "]" * 500)}),)
        )
    assert steps.work(vault, run)["kept"] is True
    # Nor does the test's own reader go so deep.
    vault.deployment.query("UPDATE heartbeat_runs SET context_snapshot = context_snapshot - 'deep'")
    assert vault.opened(vault.now) == vault.held
