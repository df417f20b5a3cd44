"""The catalogue and the stand-in schema against the schema of the real release."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path

import psycopg
import pytest
import sqlalchemy as sa

from tests.interop import release
from worker.layouts import demo_schema
from worker.layouts.catalogue import Drift, Retention, compare, live_schema, load

pytestmark = pytest.mark.interop

ROOT = Path(__file__).resolve().parents[2]
NOW = datetime(2026, 11, 24, 12, tzinfo=UTC)
# Beside the logs that are pruned: the tables these stand on.
PARENTS = frozenset(
    {"agent_api_keys", "agents", "account", "companies", "company_memberships", "company_secret_versions"}
    | {"company_secrets", "decision_effect_executions", "heartbeat_runs", "issues", "plugins", "user"}
)


@contextmanager
def opened(url: str) -> Iterator[sa.Connection]:
    """A transaction on the database; commits."""
    engine = sa.create_engine("postgresql+psycopg://", creator=lambda: psycopg.connect(url))
    try:
        with engine.begin() as connection:
            yield connection
    finally:
        engine.dispose()


@pytest.fixture
def released(fresh_database: Callable[..., str]) -> str:
    """The URL of an empty database with the release's schema."""
    release.require()
    url = fresh_database()
    release.apply_release(url)
    return url


def drift(connection: sa.Connection, layout: str = "paperclip") -> Drift:
    return compare(load(layout), live_schema(connection))


def test_the_catalogue_says_what_the_release_has(released: str) -> None:
    with opened(released) as connection:
        newest = connection.exec_driver_sql(
            "SELECT id, hash, created_at FROM drizzle.__drizzle_migrations ORDER BY id DESC LIMIT 1"
        ).one()
        known = "4da5ee2c26e269a19b8800ddaa410db040460b9a23ea24a35d70abce3fdd334a"
        assert tuple(newest) == (278, known, 1789390281190)
        assert len(live_schema(connection)) == 210
        assert drift(connection) == Drift(missing=(), unknown=(), changed=())
        # pg_catalog tells even those who may not look.
        connection.exec_driver_sql("CREATE ROLE outsider")
        connection.exec_driver_sql("SET LOCAL ROLE outsider")
        assert drift(connection).clean
        connection.rollback()


def test_the_committed_catalogue_is_what_the_tool_prints(released: str) -> None:
    tool = [sys.executable, str(ROOT / ".ci/catalogue.py"), "paperclip"]
    environment = {**os.environ, "DATABASE_URL": released, "PYTHONWARNINGS": "error"}
    printed = subprocess.run(tool, env=environment, capture_output=True, text=True, check=True).stdout
    assert printed == (ROOT / "worker/layouts/paperclip/catalogue.toml").read_text(encoding="utf-8")
    with opened(released) as connection:
        connection.exec_driver_sql("ALTER TABLE issues ADD COLUMN mood text, ADD COLUMN weight integer")
    again = subprocess.run(tool, env=environment, capture_output=True, text=True, check=False)
    assert (again.returncode, again.stderr) == (1, "class by hand: issues.mood\n")


def test_every_drift_from_the_release_is_found(released: str) -> None:
    expected = {
        "ALTER TABLE activity_log DROP COLUMN details": Drift(
            missing=("activity_log.details",), unknown=(), changed=()
        ),
        "DROP TABLE plugin_logs": Drift(missing=("plugin_logs",), unknown=(), changed=()),
        "ALTER TABLE issues ADD COLUMN mood text": Drift(missing=(), unknown=("issues.mood",), changed=()),
        "CREATE TABLE forks_own (id uuid)": Drift(missing=(), unknown=("forks_own",), changed=()),
        "CREATE TABLE forks_empty ()": Drift(missing=(), unknown=("forks_empty",), changed=()),
        "CREATE TABLE forks_parts (id uuid) PARTITION BY HASH (id);"
        "CREATE TABLE forks_part PARTITION OF forks_parts FOR VALUES WITH (MODULUS 1, REMAINDER 0)": Drift(
            missing=(), unknown=("forks_parts",), changed=()
        ),
        "CREATE SCHEMA plugin_crm_0123456789; CREATE TABLE plugin_crm_0123456789.notes (body text)": Drift(
            missing=(), unknown=("plugin_crm_0123456789.notes",), changed=()
        ),
        "ALTER TABLE activity_log ALTER entity_id TYPE varchar(64)": Drift(
            missing=(),
            unknown=(),
            changed=("activity_log.entity_id: text not null -> character varying(64) not null",),
        ),
        "ALTER TABLE companies ALTER name DROP NOT NULL": Drift(
            missing=(), unknown=(), changed=("companies.name: text not null -> text",)
        ),
        # Ours, the migrator's, and what lives only as long as a session.
        "CREATE SCHEMA paperclip_worker; CREATE TABLE paperclip_worker.runs (id int)": Drift(
            missing=(), unknown=(), changed=()
        ),
        "CREATE TABLE public.__drizzle_migrations (id int)": Drift(missing=(), unknown=(), changed=()),
        "CREATE TEMP TABLE passing (id int)": Drift(missing=(), unknown=(), changed=()),
    }
    with opened(released) as connection:
        for statement, difference in expected.items():
            attempt = connection.begin_nested()
            connection.exec_driver_sql(statement, execution_options={"no_parameters": True})
            assert drift(connection) == difference, statement
            attempt.rollback()


@pytest.mark.parametrize("layout", ["paperclip", "guide"])
def test_the_stand_in_is_what_its_catalogue_says(fresh_database: Callable[..., str], layout: str) -> None:
    with opened(fresh_database()) as connection:
        demo_schema.create(connection, layout)
        assert drift(connection, layout).clean
        demo_schema.seed(connection, layout, rows=400, now=NOW)
        assert drift(connection, layout).clean


def test_the_stand_in_behaves_like_the_release(fresh_database: Callable[..., str], released: str) -> None:
    with opened(fresh_database()) as connection:
        demo_schema.create(connection, "paperclip")
        ours = constraints_and_indexes(connection)
    with opened(released) as connection:
        theirs = constraints_and_indexes(connection)
    # Partial unique indexes that no seeded row falls under are left out of the stand-in.
    theirs = {fact for fact in theirs if "issues_active_" not in fact}
    assert ours == theirs
    assert len(ours) > 300


def test_the_seed_fits_the_release(released: str) -> None:
    with opened(released) as connection:
        demo_schema.seed(connection, "paperclip", rows=4000, now=NOW, companies=2, days=100)
        assert drift(connection).clean
        one = connection.exec_driver_sql(_SEEDED).mappings().one()
    assert one["rows"] == 4000
    assert one["companies"] == 2
    assert NOW - timedelta(days=100) < one["oldest"] < one["newest"] < NOW
    assert 0.4 < one["with_run"] / one["rows"] < 0.6
    assert 0.4 < one["on_issue"] / one["rows"] < 0.6
    assert 0 < one["on_open_issue"] < one["on_issue"] / 4
    assert one["strays"] == 0
    assert one["cited"] == 10
    assert one["live_runs"] > 0
    assert one["sessions_expired"] > one["sessions_live"] > 0


def test_the_same_seed_makes_the_same_rows(fresh_database: Callable[..., str]) -> None:
    found = []
    for _ in range(2):
        with opened(fresh_database()) as connection:
            demo_schema.create(connection, "guide")
            demo_schema.seed(connection, "guide", rows=300, now=NOW)
            found.append(
                connection.exec_driver_sql("SELECT md5(string_agg(a::text, '')) FROM activity_log a").scalar()
            )
    assert found[0] == found[1]


def constraints_and_indexes(connection: sa.Connection) -> set[str]:
    """Defaults, foreign keys and indexes of the tables that matter, and all foreign keys into the pruned ones."""
    tables = load("paperclip").tables.values()
    pruned = {table.name for table in tables if table.retention is Retention.PRUNABLE}
    found = connection.execute(
        sa.text(_FACTS), {"standing": sorted(pruned | PARENTS), "pruned": sorted(pruned)}
    ).scalars()
    return set(found)


_FACTS = """
SELECT concat_ws(' ', relation.relname, attname, 'DEFAULT', pg_get_expr(adbin, adrelid))
FROM pg_attrdef
JOIN pg_attribute ON attrelid = adrelid AND attnum = adnum
JOIN pg_class relation ON relation.oid = adrelid
WHERE relation.relname = ANY (:standing)
UNION ALL
SELECT concat_ws(' ', relation.relname, pg_get_constraintdef(key.oid))
FROM pg_constraint key
JOIN pg_class relation ON relation.oid = conrelid
JOIN pg_class target ON target.oid = confrelid
WHERE contype = 'f' AND (relation.relname = ANY (:standing) OR target.relname = ANY (:pruned))
UNION ALL
SELECT indexdef FROM pg_indexes WHERE tablename = ANY (:standing) AND schemaname = 'public'
"""

_SEEDED = """
SELECT count(*) AS rows, count(DISTINCT activity.company_id) AS companies,
       min(activity.created_at) AS oldest, max(activity.created_at) AS newest,
       count(activity.run_id) AS with_run, count(issues.id) AS on_issue,
       count(issues.id) FILTER (WHERE issues.status NOT IN ('done', 'cancelled')) AS on_open_issue,
       count(*) FILTER (WHERE run.company_id <> activity.company_id
                           OR issues.company_id <> activity.company_id
                           OR activity.entity_type = 'issue' AND issues.id IS NULL) AS strays,
       (SELECT count(activity_log_id) FROM decision_effect_executions) AS cited,
       (SELECT count(*) FROM heartbeat_runs WHERE status IN ('queued', 'running')) AS live_runs,
       (SELECT count(*) FROM session WHERE expires_at < '2026-11-24 12:00+00') AS sessions_expired,
       (SELECT count(*) FROM session WHERE expires_at >= '2026-11-24 12:00+00') AS sessions_live
FROM activity_log activity
LEFT JOIN heartbeat_runs run ON run.id = activity.run_id
LEFT JOIN issues ON activity.entity_type = 'issue' AND issues.id::text = activity.entity_id
"""
