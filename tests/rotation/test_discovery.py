"""Ciphertext where no carrier is: the cut-over does not begin before somebody has said what it is."""

from __future__ import annotations

import json
from typing import Any

import pytest
from psycopg import sql

from tests.cli.helpers import refused
from tests.rotation import steps
from tests.rotation.vault import Vault
from worker import discovery
from worker.errors import Refused
from worker.layouts import LAYOUTS

TALK = "The scheme is called local_encrypted_v1 (pbkdf2_aes_256_gcm_v1 in the guide); see the documentation."


def _plant(vault: Vault, place: str, type_: str, made: str = "") -> str:
    """A column of a new table with an envelope in one of its rows; the column's name."""
    schema, table, column = place.split(".")
    value: Any = json.dumps({"kept": vault.seal("hidden")})
    value = [value] if type_.endswith("[]") else value
    with vault.connect() as connection:
        connection.execute(sql.SQL("CREATE SCHEMA IF NOT EXISTS {}").format(sql.Identifier(schema)))
        name = sql.Identifier(schema, table)
        create = made or f"CREATE TABLE {{0}} (id int, {{1}} {type_})"
        connection.execute(sql.SQL(create).format(name, sql.Identifier(column)))
        for number in range(5):
            row = (sql.Literal(number), sql.Literal(value if number == 3 else None))
            connection.execute(sql.SQL(f"INSERT INTO {{}} VALUES ({{}}, {{}}::{type_})").format(name, *row))
    return place


def _stops(vault: Vault, *columns: str, **fields: Any) -> None:
    """The run ends before its cut-over, names the columns, and leaves data and key file as they were."""
    before, carriers = vault.deployment.digest(), vault.opened(vault.key)
    run = steps.start(vault, generate=True, **fields)
    with pytest.raises(Refused, match=r"--allow-column") as refused:
        steps.work(vault, run)
    for column in columns:
        assert column in str(refused.value)
    result = vault.deployment.operations.result(run)
    assert result["state"] == "failed"
    assert result["rows"] == 0
    assert result["receipt"]["error"] == str(refused.value)
    assert vault.deployment.digest() == before
    assert vault.opened(vault.key) == carriers
    assert vault.now == vault.key


@pytest.mark.parametrize(
    ("place", "type_"),
    [
        ("public.notes.body", "text"),
        ("public.notes.body", "varchar(4000)"),
        ("public.notes.body", "json"),
        ("plugin_x.state.value", "jsonb"),
        ("plugin_x.state.values", "text[]"),
        ("plugin_x.state.values", "jsonb[]"),
        ("Strange Schema.Odd table.The column", "text"),
        ('public.the "notes".100% of %s :scheme :b', "text"),
        ("public.100% of %s :notes.body", "text"),
    ],
)
def test_an_envelope_in_an_unknown_column_stops_the_cut_over(released_vault: Vault, place: str, type_: str) -> None:
    column = _plant(released_vault, place, type_)
    _stops(released_vault, f"{column} (1)")


def test_a_domain_and_a_partition_are_looked_into(released_vault: Vault) -> None:
    released_vault.deployment.query("CREATE DOMAIN public.sealed AS jsonb")
    first = _plant(released_vault, "public.of_domain.value", "public.sealed")
    _plant(
        released_vault,
        "public.parted.value",
        "jsonb",
        "CREATE TABLE {0} (id int, {1} jsonb) PARTITION BY RANGE (id); "
        "CREATE TABLE public.part_low PARTITION OF {0} FOR VALUES FROM (0) TO (2); "
        "CREATE TABLE public.part_high PARTITION OF {0} FOR VALUES FROM (2) TO (9)",
    )
    _stops(released_vault, f"{first} (1)", "public.part_high.value (1)")


def test_an_envelope_in_a_known_table_stops_the_cut_over(vault: Vault) -> None:
    table, column = ("issues", "description") if vault.layout == "paperclip" else ("tasks", "description")
    details = "details" if vault.layout == "paperclip" else "metadata"
    hidden = json.dumps(vault.seal("hidden"))
    vault.deployment.query(
        f"UPDATE {table} SET {column} = %s WHERE id = (SELECT min(id::text)::uuid FROM {table})", hidden
    )
    vault.deployment.query(
        f"UPDATE activity_log SET {details} = jsonb_build_object('x', %s::jsonb) "
        "WHERE id = (SELECT min(id::text)::uuid FROM activity_log)",
        hidden,
    )
    _stops(vault, f"public.{table}.{column} (1)", f"public.activity_log.{details} (1)")


def test_another_column_of_a_carriers_table_is_no_carrier(vault: Vault) -> None:
    vault.deployment.query("ALTER TABLE company_secret_versions ADD backup jsonb")
    vault.deployment.query("UPDATE company_secret_versions SET backup = material")
    _stops(vault, "public.company_secret_versions.backup (4")


def test_an_allowed_column_does_not_stop_it(released_vault: Vault) -> None:
    vault = released_vault
    first, second = _plant(vault, "plugin_x.state.value", "jsonb"), _plant(vault, "public.notes.body", "text")
    _stops(vault, f"{second} (1)", allow_column=(first,))
    before = (
        vault.deployment.query("SELECT body FROM notes"),
        vault.deployment.query("SELECT value FROM plugin_x.state"),
    )
    result = vault.run("--generate", "--allow-column", first, "--allow-column", "notes.body")
    assert result["kept"] is True
    after = (
        vault.deployment.query("SELECT body FROM notes"),
        vault.deployment.query("SELECT value FROM plugin_x.state"),
    )
    assert after == before
    # What the runs before left beside the key file went with the last one.
    assert [one.name for one in vault.file.parent.iterdir()] == ["master.key"]


@pytest.mark.parametrize("name", ["issues.no_such", "nothing", "public.companies.id", ""])
def test_a_name_of_no_column_is_refused(released_vault: Vault, name: str) -> None:
    """Mistyped, it would allow nothing and say so only when all is made ready."""
    before = steps.everything(released_vault)
    words = ("run", "rotate-master-key", "--inline", "--yes", "--generate", "--allow-column", name)
    refused(released_vault.deployment, *words, says="--allow-column: .*is no text or JSON column")
    assert steps.everything(released_vault) == before


def test_text_about_the_scheme_does_not_stop_it(vault: Vault) -> None:
    table = "issues" if vault.layout == "paperclip" else "tasks"
    vault.deployment.query(f"UPDATE {table} SET description = %s", TALK)
    assert vault.run("--generate")["kept"] is True
    assert vault.opened(vault.now) == vault.held


def test_a_table_that_is_gone_when_its_turn_comes_is_no_fault(released_vault: Vault) -> None:
    vault = released_vault
    _plant(vault, "plugin_x.state.value", "jsonb")
    run = steps.start(vault, generate=True)
    runner, told = vault.deployment.operations.runner(), iter((False, True))
    runner.work(run, seconds=60, leave=lambda: next(told))
    vault.deployment.query("DROP SCHEMA plugin_x CASCADE")
    assert steps.work(vault, run)["kept"] is True


def test_a_table_that_only_a_snapshot_still_has_is_nothing_to_look_into(released_vault: Vault) -> None:
    """A run is laid out, and a key destroyed, in a snapshot; whatever the host drops meanwhile is none of theirs."""
    vault = released_vault
    _plant(vault, "public.notes.body", "text")
    _plant(vault, "plugin_x.state.value", "jsonb")
    with vault.deployment.operations.transaction() as connection:
        vault.deployment.query("DROP TABLE notes; DROP SCHEMA plugin_x CASCADE")
        there = {table["table"] for table in discovery.tables(connection, LAYOUTS["paperclip"], ())}
        assert "issues" in there
        assert not {"notes", "state"} & there
        assert list(discovery.shards(connection, LAYOUTS["paperclip"], ()))


def test_a_column_that_cannot_be_read_is_named(released_vault: Vault) -> None:
    vault = released_vault
    _plant(vault, "public.notes.body", "text")
    _plant(vault, "plugin_x.state.value", "jsonb")
    role = "blind_" + vault.deployment.environment["DATABASE_URL"].rpartition("/")[2]
    name = vault.deployment.environment["DATABASE_URL"].rpartition("/")[2]
    vault.deployment.query(
        f"CREATE ROLE {role} LOGIN PASSWORD 'pw'; GRANT ALL ON DATABASE {name} TO {role}; "
        f"GRANT ALL ON SCHEMA public, paperclip_worker TO {role}; "
        f"GRANT ALL ON ALL TABLES IN SCHEMA public, paperclip_worker TO {role}; "
        f"GRANT ALL ON ALL SEQUENCES IN SCHEMA public, paperclip_worker TO {role}; "
        f"REVOKE ALL ON public.notes FROM {role}; GRANT SELECT (id) ON public.notes TO {role}"
    )
    host = vault.deployment.environment["DATABASE_URL"].rpartition("@")[2]
    blind = steps.with_environment(vault, DATABASE_URL=f"postgres://{role}:pw@{host}")
    try:
        run = steps.start(blind, generate=True)
        with pytest.raises(Refused, match=r"2 columns cannot be looked into, plugin_x.state.value among them"):
            steps.work(blind, run)
        assert vault.now == vault.key
        again = steps.start(blind, generate=True, allow_column=("notes.body", "plugin_x.state.value"))
        assert steps.work(blind, again)["kept"] is True
    finally:
        blind.deployment.operations.engine.dispose()
        vault.deployment.query(f"DROP OWNED BY {role}; DROP ROLE {role}")


# -- what comes after the first look ---------------------------------------------------------------------


def _hide(vault: Vault, table: str = "public.notes") -> None:
    vault.deployment.query(f"INSERT INTO {table} VALUES (1, %s)", json.dumps({"kept": vault.seal("hidden")}))


@pytest.fixture
def notes(released_vault: Vault) -> Vault:
    """A deployment with a table in which nothing is yet, and one with much else in it."""
    released_vault.deployment.query("CREATE TABLE public.notes (id int, body jsonb)")
    return released_vault


@pytest.mark.parametrize("known", [True, False], ids=["in a table that was looked into", "in a new table"])
@pytest.mark.parametrize("cutover", ["manual", "file"])
def test_an_envelope_that_comes_while_a_run_stands_still_stops_the_cut_over(
    notes: Vault, cutover: str, known: bool
) -> None:
    """A manual run waits for its operator, another was stopped and is resumed."""
    vault = notes
    path, _ = steps.key_file(vault)
    run = steps.start(vault, new_key_file=str(path), cutover=cutover)
    steps.work_until(vault, run, steps.CUT_OVER)
    if not known:
        vault.deployment.query("DROP TABLE notes")
        vault.deployment.query("CREATE TABLE notes (id int, body jsonb)")
    _hide(vault)
    if cutover == "manual":
        vault.deployment.cli("keys", "switch", str(run), "--yes")
    else:
        vault.deployment.operations.stop(str(run))
        vault.deployment.operations.resume(str(run))
    with pytest.raises(Refused, match=r"public\.notes\.body \(1\); see --allow-column"):
        steps.work(vault, run)
    assert vault.now == vault.key
    assert vault.opened(vault.key) == vault.held


def test_the_second_look_goes_on_where_it_was(notes: Vault, monkeypatch: pytest.MonkeyPatch) -> None:
    """In bites, of which none sees what another saw; rows that were looked into before are not read again."""
    monkeypatch.setattr("worker.latecomers._WINDOW", 64)
    vault = notes
    run = steps.start(vault, generate=True)
    steps.work_until(vault, run, steps.CUT_OVER)
    vault.deployment.query(
        "INSERT INTO notes SELECT n, to_jsonb(repeat(md5(n::text), 20)) FROM generate_series(1, 500) n"
    )
    vault.deployment.query("CREATE TABLE more AS SELECT * FROM notes")
    for number in range(0, 500, 100):
        for table in ("notes", "more"):
            query = f"UPDATE {table} SET body = %s WHERE id = %s"
            vault.deployment.query(query, json.dumps(vault.seal("hidden")), number + 1)
    result = steps.work(vault, run)
    assert result["state"] == "unkept"
    found = {(one["table"], one["rows"], one["what"]) for one in result["findings"]}
    assert found == {(f"public.{one}", 5, "ciphertext in the unknown column body") for one in ("notes", "more")}
    query = "SELECT sum(bites)::int FROM paperclip_worker.shards WHERE run_id = %s AND key ~ '^look-again'"
    assert vault.deployment.query(query, run)[0][0] > 10


def test_an_envelope_that_the_swap_itself_put_elsewhere_breaks_the_promise(notes: Vault) -> None:
    """A history kept by a trigger has the old ciphertext, which the new key does not open."""
    vault = notes
    vault.deployment.query(
        "CREATE FUNCTION keep() RETURNS trigger LANGUAGE plpgsql AS "
        "$$BEGIN INSERT INTO notes VALUES (1, to_jsonb(OLD)); RETURN NEW; END$$"
    )
    vault.deployment.query(
        "CREATE TRIGGER keep AFTER UPDATE ON company_secret_versions FOR EACH ROW EXECUTE FUNCTION keep()"
    )
    result = vault.run("--generate", ok=False)
    assert result["state"] == "unkept"
    rows = sum(table == "company_secret_versions" for table, _ in vault.held)
    (finding,) = result["findings"]
    assert (finding["table"], finding["rows"]) == ("public.notes", rows)
    assert finding["what"] == "ciphertext in the unknown column body"


def test_an_allowed_column_may_fill_meanwhile(notes: Vault) -> None:
    vault = notes
    run = steps.start(vault, generate=True, allow_column=("notes.body",))
    steps.work_until(vault, run, steps.CUT_OVER)
    _hide(vault)
    vault.deployment.operations.stop(str(run))
    vault.deployment.operations.resume(str(run))
    assert steps.work(vault, run)["kept"] is True
