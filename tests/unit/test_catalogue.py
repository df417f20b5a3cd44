"""The built-in catalogues, and what an operator's file may add to them."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from worker.errors import SettingsError
from worker.layouts.catalogue import (
    NOT_A_LOG,
    Catalogue,
    ColumnClass,
    LiveColumn,
    Retention,
    Scope,
    compare,
    load,
)

Extra = Callable[[str], Catalogue]


@pytest.fixture
def extended(tmp_path: Path) -> Extra:
    """A function that loads the released layout with an operator's file of this content."""

    def load_with(content: str) -> Catalogue:
        file = tmp_path / "own.toml"
        file.write_text(content, encoding="utf-8")
        return load("paperclip", file)

    return load_with


class TestBuiltIn:
    def test_knows_every_table_of_the_release(self) -> None:
        assert len(load("paperclip").tables) == 210

    @pytest.mark.parametrize(
        ("column", "kind"),
        [
            ("activity_log.action", ColumnClass.PLAIN),
            ("activity_log.details", ColumnClass.CONTENT),
            ("activity_log.actor_id", ColumnClass.PERSONAL),
            ("user.email", ColumnClass.PERSONAL),
            ("session.token", ColumnClass.SECRET),
            ("company_secret_versions.material", ColumnClass.SECRET),
            # Unsalted digests of plain texts can be guessed.
            ("company_secret_versions.value_sha256", ColumnClass.SECRET),
        ],
    )
    def test_classes_columns(self, column: str, kind: ColumnClass) -> None:
        table, _, name = column.partition(".")
        assert load("paperclip").tables[table].columns[name].kind is kind

    def test_every_credential_is_secret(self) -> None:
        door = re.compile(r"(key|token|secret)_hash$|^token(_prefix)?$|password|ciphertext|^material$|_sha256$")
        # Digests of logs and documents, which open nothing.
        digests = {"log_sha256", "completion_contract_sha256", "source_payload_sha256", "canonical_sha256"}
        digests |= {"payload_sha256"}
        loose = [
            f"{layout}: {table.name}.{column.name}"
            for layout in ("paperclip", "guide")
            for table in load(layout).tables.values()
            for column in table.columns.values()
            if door.search(column.name) and column.type in {"text", "jsonb"} and column.name not in digests
            if column.kind is not ColumnClass.SECRET
        ]
        assert loose == []

    def test_says_whose_rows_are(self) -> None:
        tables = load("paperclip").tables
        assert tables["issues"].scope is Scope.COMPANY
        assert tables["issues"].company == "company_id"
        assert tables["companies"].company == "id"
        assert tables["session"].scope is Scope.INSTANCE
        parent = tables["company_secret_versions"].parent
        assert parent is not None
        assert (parent.column, parent.table) == ("secret_id", "company_secrets")

    def test_no_company_column_goes_unused(self) -> None:
        for table in load("paperclip").tables.values():
            assert ("company_id" in table.columns) is (table.company == "company_id")

    def test_says_what_may_be_pruned(self) -> None:
        tables = load("paperclip").tables
        prunable = {name for name, table in tables.items() if table.retention is Retention.PRUNABLE}
        assert prunable == {
            "activity_log",
            "cli_auth_challenges",
            "connection_token_issuances",
            "heartbeat_run_events",
            "plugin_logs",
            "secret_access_events",
            "session",
            "tool_access_audit_events",
            "tool_call_events",
            "tool_gateway_sessions",
            "verification",
        }
        assert "budgets" in (tables["cost_events"].reason or "")
        assert tables["goals"].reason == NOT_A_LOG


class TestOperatorsFile:
    def test_classes_own_columns_and_tables(self, extended: Extra) -> None:
        tables = extended("""
            [table.agents.columns]
            nickname = "text; personal"

            [table.crm_contacts]
            scope = "company"
            key = ["id"]
            [table.crm_contacts.columns]
            id = "uuid not null"
            company_id = "uuid not null"
            email = "character varying(128); personal"

            [table."plugin_crm_0123456789.notes"]
            scope = "parent"
            parent = { column = "contact", table = "crm_contacts" }
            key = []
            [table."plugin_crm_0123456789.notes".columns]
            contact = "uuid not null"
            body = "text; content"
        """).tables
        assert tables["agents"].columns["nickname"].kind is ColumnClass.PERSONAL
        assert tables["agents"].columns["name"] == load("paperclip").tables["agents"].columns["name"]
        assert tables["crm_contacts"].columns["email"].type == "character varying(128)"
        notes = tables["plugin_crm_0123456789.notes"]
        assert (notes.schema, notes.name, notes.retention) == ("plugin_crm_0123456789", "notes", Retention.NEVER)

    def test_leaves_the_layout_as_it_was(self, extended: Extra) -> None:
        extended('[table.agents.columns]\nnickname = "text; personal"')
        assert "nickname" not in load("paperclip").tables["agents"].columns

    def test_may_be_stricter(self, extended: Extra) -> None:
        tables = extended('[table.agents.columns]\nadapter_config = "jsonb not null; secret"').tables
        assert tables["agents"].columns["adapter_config"].kind is ColumnClass.SECRET

    def test_types_may_be_in_capitals(self, extended: Extra) -> None:
        own = 'nickname = "TEXT NOT NULL; PERSONAL"\nid = "UUID not null"\nmood = \'"Mood"\''
        columns = extended(f"[table.agents.columns]\n{own}").tables["agents"].columns
        assert str(columns["nickname"]) == "text not null"
        assert columns["nickname"].kind is ColumnClass.PERSONAL
        assert columns["mood"].type == '"Mood"'

    def test_public_may_be_spelled_out(self, extended: Extra) -> None:
        tables = extended('[table."public.agents".columns]\nnickname = "text"').tables
        assert "nickname" in tables["agents"].columns
        assert "public.agents" not in tables

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            pytest.param("[table", "own.toml: is not TOML", id="not TOML"),
            pytest.param("[tables.agents]", "own.toml: tables: is not a known key", id="unknown top key"),
            pytest.param("table = 3", "own.toml: table:", id="not a table"),
            pytest.param(
                "[table.agents]\ncolour = 1", "own.toml: table.agents.colour: is not a known key", id="unknown key"
            ),
            pytest.param(
                "[table.agents.columns]\nnickname = 3",
                "own.toml: table.agents.columns.nickname:",
                id="column no text",
            ),
            pytest.param(
                '[table.agents.columns]\nnickname = "text; harmless"',
                "own.toml: table.agents.columns.nickname: must read TYPE",
                id="unknown class",
            ),
            pytest.param(
                '[table.agents.columns]\nnickname = ""',
                "own.toml: table.agents.columns.nickname: must read TYPE",
                id="no type",
            ),
            pytest.param(
                '[table.session.columns]\ntoken = "text not null; plain"',
                "own.toml: table.session.columns.token: plain is weaker than the layout's secret",
                id="loosened",
            ),
            pytest.param(
                '[table.user.columns]\nemail = "text not null; content"',
                "own.toml: table.user.columns.email: content is weaker than the layout's personal",
                id="loosened a little",
            ),
            pytest.param(
                '[table.user.columns]\nemail = "text not null"',
                "own.toml: table.user.columns.email: plain is weaker than the layout's personal",
                id="loosened by silence",
            ),
            pytest.param(
                '[table.agents.columns]\nid = "text not null"',
                "own.toml: table.agents.columns.id: says text not null, but the layout says uuid not null",
                id="other type",
            ),
            pytest.param(
                '[table.cost_events]\nretention = "prunable"',
                "own.toml: table.cost_events.retention: is settled by the layout",
                id="retention of a known table",
            ),
            pytest.param(
                '[table.mine]\nscope = "instance"\nkey = []\nretention = "prunable"',
                "own.toml: table.mine.retention: only a layout can say prunable",
                id="own table prunable",
            ),
            pytest.param(
                '[table.mine]\nkey = []\n[table.mine.columns]\nid = "uuid"',
                "own.toml: table.mine.scope: is required",
                id="no scope",
            ),
            pytest.param(
                '[table.mine]\nscope = "instance"\n[table.mine.columns]\nid = "uuid"',
                "own.toml: table.mine.key: is required",
                id="no key",
            ),
            pytest.param(
                '[table.mine]\nscope = "world"\nkey = []', "own.toml: table.mine.scope:", id="unknown scope"
            ),
            pytest.param(
                '[table.mine]\nscope = "instance"\nkey = ["id"]',
                "own.toml: table.mine.key: names id, which is no column",
                id="key without column",
            ),
            pytest.param(
                '[table.mine]\nscope = "company"\nkey = []',
                "own.toml: table.mine.company: names company_id, which is no column",
                id="company without column",
            ),
            pytest.param(
                '[table.mine]\nscope = "parent"\nkey = []',
                "own.toml: table.mine.parent: goes with scope parent",
                id="parent without one",
            ),
            pytest.param(
                '[table.mine]\nscope = "instance"\nkey = []\ncompany = "id"\n[table.mine.columns]\nid = "uuid"',
                "own.toml: table.mine.company: goes with scope company",
                id="company of the instance",
            ),
            pytest.param(
                '[table.mine]\nscope = "parent"\nkey = []\nparent = { column = "of", table = "nowhere" }\n'
                '[table.mine.columns]\nof = "uuid"',
                "own.toml: table.mine.parent.table: names nowhere, which is no table known here",
                id="parent nowhere",
            ),
        ],
    )
    def test_refuses(self, extended: Extra, content: str, message: str) -> None:
        with pytest.raises(SettingsError) as refusal:
            extended(content)
        assert str(refusal.value).startswith(message)
        assert "\n" not in str(refusal.value)

    def test_refuses_a_file_that_is_not_there(self, tmp_path: Path) -> None:
        with pytest.raises(SettingsError, match=r"^absent\.toml: cannot be read: FileNotFoundError$"):
            load("paperclip", tmp_path / "absent.toml")

    def test_refuses_a_file_that_is_no_text(self, tmp_path: Path) -> None:
        (tmp_path / "own.toml").write_bytes(b"\xff\xfe")
        with pytest.raises(SettingsError, match=r"^own\.toml: cannot be read"):
            load("paperclip", tmp_path / "own.toml")


class TestCompare:
    def test_a_database_as_the_catalogue_says_is_clean(self) -> None:
        catalogue = load("guide")
        assert compare(catalogue, {key: table.columns for key, table in catalogue.tables.items()}).clean

    def test_names_every_difference_once_in_order(self) -> None:
        catalogue = load("guide")
        live: dict[str, dict[str, LiveColumn]] = {key: dict(table.columns) for key, table in catalogue.tables.items()}
        del live["assets"]
        del live["tasks"]["title"]
        live["tasks"]["archived"] = LiveColumn(type="boolean", nullable=True)
        live["agents"]["id"] = LiveColumn(type="text", nullable=False)
        live["agents"]["nickname"] = LiveColumn(type="text", nullable=True)
        live["plugin_crm_0123456789.notes"] = {"body": LiveColumn(type="text", nullable=True)}
        drift = compare(catalogue, live)
        assert not drift.clean
        assert drift.missing == ("assets", "tasks.title")
        assert drift.unknown == ("agents.nickname", "plugin_crm_0123456789.notes")
        assert drift.changed == (
            "agents.id: uuid not null -> text not null",
            "tasks.archived: boolean not null -> boolean",
        )
