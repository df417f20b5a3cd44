"""A prune in a deployment that is not as delivered: its settings, keys and types must cost no value and no row."""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import datetime, timedelta, tzinfo

import psycopg
import pytest
import sqlalchemy as sa
import zstandard
from psycopg import sql

from tasks.prune_logs import PruneLogs
from tasks.restore_logs import RestoreLogs
from tasks.retire_master_key import RetireMasterKey
from tests.cli.helpers import INLINE, begin, keys, least, refused, world
from tests.conftest import NOW, Deployment
from tests.promises.archived import complete, content, objects_of, prune, restore, store_of
from worker import ledger
from worker.errors import Refused
from worker.job import Job
from worker.layouts import demo_schema
from worker.params import RunId

LOGS = ("--table", "plugin_logs", "--older-than", "20d")


@pytest.fixture
def guide(
    make_deployment: Callable[..., Deployment], fresh_database: Callable[..., str], template: Callable[[str], str]
) -> Deployment:
    """A seeded deployment on the guide's layout."""
    return make_deployment(fresh_database(template("guide")), "guide")


def _database(deployment: Deployment) -> str:
    return deployment.environment["DATABASE_URL"].rpartition("/")[2]


def _set(deployment: Deployment, setting: str) -> None:
    """A setting of the database's, for whoever connects from now on."""
    deployment.query(f"ALTER DATABASE {_database(deployment)} SET {setting}")
    deployment.operations.close()


def _reset(deployment: Deployment) -> None:
    deployment.query(f"SET TRANSACTION READ WRITE; ALTER DATABASE {_database(deployment)} RESET ALL")
    for one in deployment.opened:
        one.close()


def _refused(deployment: Deployment, *words: str, says: str) -> str:
    """The line by which a prune of plugin_logs is refused; nothing has changed."""
    before = (world(deployment), keys(deployment))
    line = refused(deployment, *INLINE, *(words or LOGS), says=says)
    assert (world(deployment), keys(deployment)) == before
    return line


def test_a_default_that_ends_long_transactions_ends_no_look_at_everything(released: Deployment) -> None:
    """The app's are short; ours, a plan or a verdict, would be ended each time, and no run come to its end."""
    if not released.query("SELECT current_setting('transaction_timeout', true)")[0][0]:
        pytest.skip("PostgreSQL before 17 has no such setting")
    _set(released, "transaction_timeout = '1s'")
    with released.operations.transaction(scan=True) as connection:
        connection.execute(sa.text("SELECT pg_sleep(1.2)"))
    _reset(released)


# -- how values become text -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "value", "setting"),
    [
        ("float8", "0.1::float8 + 0.2::float8", "extra_float_digits = 0"),
        ("bytea", "'\\x00ff'", "bytea_output = 'escape'"),
        ("interval", "'-1 days -02:03:04'", "intervalstyle = 'sql_standard'"),
        ("timestamptz", "'2026-05-01 10:00:00.123456+02'", "datestyle = 'SQL, DMY'"),
    ],
)
def test_what_a_role_has_set_changes_no_value(released: Deployment, kind: str, value: str, setting: str) -> None:
    """Set while rows are archived and not when they come back, and the other way round."""
    released.query(f"ALTER TABLE plugin_logs ADD own {kind}")
    released.query(f"UPDATE plugin_logs SET own = {value}")
    before = content(released, "plugin_logs")
    _set(released, setting)
    first = prune(released, "plugin_logs")
    _reset(released)
    restore(released, first)
    assert content(released, "plugin_logs") == before
    second = prune(released, "plugin_logs")
    _set(released, setting)
    restore(released, second)
    _reset(released)
    assert content(released, "plugin_logs") == before


@pytest.mark.parametrize("by", ["environment", "database"])
def test_an_archive_is_utf_8_whatever_clients_speak(released: Deployment, by: str) -> None:
    released.query("UPDATE plugin_logs SET message = 'größe 界', meta = NULL")
    before = content(released, "plugin_logs")
    env = {"PGCLIENTENCODING": "LATIN1"} if by == "environment" else {}
    if by == "database":
        _set(released, "client_encoding = 'LATIN1'")
    run = json.loads(released.cli(*INLINE, *LOGS, "--json", env=env).stdout)["run"]
    _reset(released)
    packed = b"".join(store_of(released).read(objects_of(released, run)[0]))
    assert "größe 界" in zstandard.ZstdDecompressor().stream_reader(packed).read().decode()
    released.cli("run", "restore-logs", "--run", run, "--inline", env=env)
    assert content(released, "plugin_logs") == before


def test_a_default_of_reading_only_does_not_bind_the_worker(released: Deployment) -> None:
    _set(released, "default_transaction_read_only = on")
    assert prune(released, "plugin_logs")
    released.cli("holds", "add", "--table", "activity_log", "--reason", "x")
    _reset(released)


def test_a_look_writes_nothing_whatever_the_default(released: Deployment) -> None:
    """As plan, verify and whatever else only reads begin theirs."""
    with (
        pytest.raises(Refused, match=r"SQLSTATE 25006"),
        released.operations.transaction(read_only=True) as connection,
    ):
        connection.exec_driver_sql("UPDATE companies SET name = 'other'")


def test_a_transaction_has_settings_of_its_own_whatever_the_database_has(released: Deployment) -> None:
    """Each decides how a value becomes text, what is seen, or how long a plan takes to make."""
    others = {
        "timezone": "Asia/Tokyo",
        "datestyle": "German",
        "intervalstyle": "iso_8601",
        "extra_float_digits": "-3",
        "bytea_output": "escape",
        "lc_monetary": "POSIX",
        "row_security": "on",
        "jit": "on",
        "enable_tidscan": "off",
        "client_encoding": "LATIN1",
    }
    for name, value in others.items():
        _set(released, f"{name} = '{value}'")
    with released.operations.transaction(read_only=True) as connection:
        found = {name: connection.exec_driver_sql(f"SHOW {name}").scalar() for name in others}
    _reset(released)
    assert found == {
        "timezone": "UTC",
        "datestyle": "ISO, YMD",
        "intervalstyle": "postgres",
        "extra_float_digits": "1",
        "bytea_output": "hex",
        "lc_monetary": "C",
        "row_security": "off",
        "jit": "off",
        "enable_tidscan": "on",
        "client_encoding": "UTF8",
    }


def test_text_without_an_encoding_is_not_archived(
    released: Deployment, make_deployment: Callable[..., Deployment]
) -> None:
    name = f"{_database(released)}_ascii"
    url = released.environment["DATABASE_URL"].rpartition("/")[0] + f"/{name}"
    with psycopg.connect(released.environment["DATABASE_URL"], autocommit=True) as admin:
        admin.execute(f"CREATE DATABASE {name} ENCODING 'SQL_ASCII' TEMPLATE template0".encode())
        try:
            engine = sa.create_engine(
                url.replace("postgres:", "postgresql+psycopg:", 1), connect_args={"client_encoding": "utf8"}
            )
            with engine.begin() as connection:
                demo_schema.create(connection, "paperclip")
                demo_schema.seed(connection, "paperclip", rows=100, now=NOW)
            ledger.init(engine)
            engine.dispose()
            bare = make_deployment(url, "paperclip")
            refused(bare, *INLINE, *LOGS, says="the database has no encoding")
            assert keys(bare) == []
            bare.operations.close()
        finally:
            admin.execute(f"DROP DATABASE {name} WITH (FORCE)".encode())


# -- rows that a role does not see ----------------------------------------------------------------------


@pytest.mark.parametrize("table", ["issues", "activity_log"])
def test_rows_that_a_policy_hides_stop_the_prune(released: Deployment, table: str) -> None:
    """An open issue that is not seen keeps nothing; a row that is not seen is not old."""
    released.query(f"ALTER TABLE {table} ENABLE ROW LEVEL SECURITY")
    with least(released) as env:
        before = (world(released), keys(released))
        refused(released, *INLINE, says="row level security", env=env)
        assert (world(released), keys(released)) == before


# -- what hangs on a row --------------------------------------------------------------------------------


_NAMESAKE = "plugin_x.decision_effect_executions"


@pytest.mark.parametrize(
    ("table", "action"),
    [
        ("notes", "CASCADE"),
        (_NAMESAKE, "CASCADE"),
        ("notes", "SET NULL"),
        ("notes", "SET DEFAULT"),
        ("notes", "NO ACTION"),
        (_NAMESAKE, "RESTRICT"),
    ],
)
def test_rows_that_refer_to_a_log_refuse_its_prune(released: Deployment, table: str, action: str) -> None:
    """They would go or change with its rows, or forbid that those go; a namesake of what is known is not that."""
    released.query("CREATE SCHEMA plugin_x")
    released.query(
        f"CREATE TABLE {table} (id serial, activity_log_id uuid REFERENCES activity_log ON DELETE {action}); "
        f"INSERT INTO {table} (activity_log_id) SELECT id FROM activity_log"
    )
    says = f"rows of {table} refer to activity_log by activity_log_id"
    _refused(released, "--older-than", "90d", says=says)
    refused(released, "plan", "prune-logs", says=says)


def test_a_key_that_forbids_a_delete_is_named_and_never_its_row(
    released: Deployment, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that was added after the last look at the table."""
    for look in ("require_prunable", "require_known_references"):
        monkeypatch.setattr(f"worker.livetable.{look}", lambda *_, **__: None)
    released.query("CREATE TABLE notes (log uuid CONSTRAINT notes_of_log REFERENCES activity_log)")
    released.query("INSERT INTO notes SELECT id FROM activity_log")
    with pytest.raises(Refused, match=r"by the foreign key notes_of_log \(SQLSTATE 23503\)$"):
        complete(released, PruneLogs())
    ((error,),) = released.query("SELECT error FROM paperclip_worker.runs")
    assert "notes_of_log" in error


def test_a_key_that_is_added_while_a_run_is_at_work_stops_it(released: Deployment) -> None:
    """Its rows would go with those of the log, and the archive has nothing of them."""
    run = begin(released)
    released.query("CREATE TABLE notes (log uuid REFERENCES activity_log ON DELETE CASCADE)")
    released.query("INSERT INTO notes SELECT id FROM activity_log")
    ((before,),) = released.query("SELECT count(*) FROM notes")
    with pytest.raises(Refused, match="rows of notes refer to activity_log by log and would be changed or deleted"):
        released.operations.runner().work(run, seconds=60)
    assert released.operations.result(run)["state"] == "failed"
    assert released.query("SELECT count(*) FROM notes") == [(before,)]


@pytest.mark.parametrize(
    "statement",
    [
        "CREATE TABLE plugin_logs_eu (region text) INHERITS (plugin_logs)",
        "ALTER TABLE plugin_logs RENAME TO old; CREATE TABLE plugin_logs (LIKE old) PARTITION BY RANGE (created_at)",
    ],
)
def test_a_log_whose_rows_lie_in_other_tables_is_not_pruned(released: Deployment, statement: str) -> None:
    for one in statement.split(";"):
        released.query(one)
    _refused(released, says="plugin_logs is partitioned, or other tables inherit from it")


def test_tasks_whose_rows_lie_in_other_tables_are_not_archived(deployment: Deployment) -> None:
    table = "tasks" if deployment.layout == "guide" else "issues"
    deployment.query(f"CREATE TABLE more_tasks () INHERITS ({table})")
    before = world(deployment)
    for words in (("plan", "archive-tasks"), ("run", "archive-tasks", "--inline", "--yes")):
        refused(deployment, *words, says=f"{table} is partitioned, or other tables inherit from it")
    assert world(deployment) == before


# -- columns of other releases --------------------------------------------------------------------------


_LOST = (
    ("CREATE DOMAIN doc AS jsonb", "ALTER TABLE plugin_logs ADD own doc"),
    ("ALTER TABLE plugin_logs ADD own jsonb[]",),
    ("CREATE TYPE mixed AS (a int, b json)", "ALTER TABLE plugin_logs ADD own mixed"),
    ("CREATE TYPE pair AS (a int, b int)", "CREATE DOMAIN two AS pair", "ALTER TABLE plugin_logs ADD own two[]"),
    (
        "CREATE TYPE grade AS ENUM ('a', 'b')",
        "CREATE FUNCTION of(grade) RETURNS json LANGUAGE sql IMMUTABLE AS $$ SELECT '1'::json $$",
        "CREATE CAST (grade AS json) WITH FUNCTION of(grade)",
        "ALTER TABLE plugin_logs ADD own grade",
    ),
)


def test_a_type_that_json_does_not_give_back_refuses_the_archive(released: Deployment) -> None:
    for statements in _LOST:
        for one in statements:
            released.query(one)
        _refused(released, says="an archive would not give back the values of own")
        released.cli(*INLINE, *LOGS, "--without-archive")
        released.query("ALTER TABLE plugin_logs DROP own")


def test_other_types_come_back(released: Deployment) -> None:
    """Among them an enum, a domain, arrays, ranges, and a column that the server computes."""
    for one in (
        "CREATE TYPE grade AS ENUM ('a', 'b')",
        "CREATE DOMAIN short AS varchar(9)",
        "ALTER TABLE plugin_logs ADD e grade DEFAULT 'b', ADD d short DEFAULT 'x', ADD da short[] DEFAULT '{x,NULL}'",
        "ALTER TABLE plugin_logs ADD r int4range DEFAULT '[1,3)', ADD n numeric DEFAULT 'NaN'",
        "ALTER TABLE plugin_logs ADD m money DEFAULT 1.5",
        "ALTER TABLE plugin_logs ADD f float4[] DEFAULT '{NaN,-0,1e-40}', ADD i inet DEFAULT '::1'",
        "ALTER TABLE plugin_logs ADD b bit(3) DEFAULT B'101', ADD t tsvector DEFAULT 'a b', ADD archived boolean",
        "ALTER TABLE plugin_logs ADD g text GENERATED ALWAYS AS (upper(message)) STORED",
    ):
        released.query(one)
    before = content(released, "plugin_logs")
    restore(released, prune(released, "plugin_logs"))
    assert content(released, "plugin_logs") == before


@pytest.mark.parametrize("age", ["-infinity", "0044-03-15 BC", "0001-01-01 00:00:00+14"])
@pytest.mark.parametrize("table", ["activity_log", "plugin_logs"])
def test_an_age_before_all_calendars(released: Deployment, table: str, age: str) -> None:
    oldest = sql.SQL("(SELECT id FROM {t} WHERE company_id IS NOT NULL ORDER BY created_at LIMIT 3)")
    name = sql.SQL("UPDATE {t} SET created_at = %s WHERE id IN " + oldest.as_string())
    released.query(name.format(t=sql.Identifier(table)).as_string(), age)
    if table == "activity_log":
        # So few that bites of two rows are not many.
        few = "SELECT id FROM activity_log WHERE created_at < now() - interval '89 days' ORDER BY created_at LIMIT 30"
        released.query(
            f"DELETE FROM activity_log WHERE created_at < now() - interval '89 days' AND id NOT IN ({few})"
        )
    before = content(released, table)
    ((overdue,),) = [
        (one.rows,) for one in released.operations.overdue(PruneLogs(table=table, older_than=timedelta(days=20)))
    ]
    assert overdue > 0
    run = prune(released, table, bite_rows="2")
    count = sql.SQL("SELECT count(*) FROM {t} WHERE created_at = %s").format(t=sql.Identifier(table))
    restore(released, run)
    assert content(released, table) == before
    assert released.query(count.as_string(), age) == [(3,)]


def test_an_age_without_a_timezone_is_refused(released: Deployment) -> None:
    released.query("ALTER TABLE plugin_logs ALTER created_at TYPE timestamp")
    _refused(released, says="plugin_logs.created_at is timestamp without time zone")


_TYPES = (
    (("prune-logs",), "activity_log", "timestamp", "timestamp without time zone"),
    (("archive-tasks",), "tasks", "updated_at", "timestamp without time zone"),
    (("archive-tasks",), "tasks", "id", "text"),
    (("archive-tasks",), "tasks", "company_id", "text"),
    (("prune-logs",), "activity_log", "company_id", "text"),
)


@pytest.mark.parametrize(("words", "table", "column", "kind"), _TYPES)
def test_the_guides_columns_of_another_type_are_named(
    guide: Deployment, words: tuple[str, ...], table: str, column: str, kind: str
) -> None:
    guide.query(f"ALTER TABLE {table} DROP CONSTRAINT {table}_company_id_fkey")
    guide.query(f'ALTER TABLE {table} ALTER "{column}" DROP DEFAULT, ALTER "{column}" TYPE {kind}')
    before = (world(guide), keys(guide))
    for one in (("plan", *words), ("run", *words, "--inline", "--yes")):
        refused(guide, *one, says=f"{table}.{column} is {kind}, not ")
    assert (world(guide), keys(guide)) == before


@pytest.mark.parametrize("kind", ["text", "bigint"])
def test_an_archive_that_could_not_be_put_back_is_not_made(guide: Deployment, kind: str) -> None:
    """A row is found again by its key, which may be another in a deployment."""
    guide.query("ALTER TABLE activity_log ALTER id DROP DEFAULT")
    guide.query(f"ALTER TABLE activity_log ALTER id TYPE {kind} USING abs(hashtextextended(id::text, 0))::{kind}")
    before = (world(guide), keys(guide))
    refused(guide, *INLINE, says=f"activity_log.id is {kind}, not uuid")
    assert (world(guide), keys(guide)) == before


def test_a_user_whose_id_is_a_uuid_can_be_held(guide: Deployment) -> None:
    for table, column in (("tasks", "created_by_user_id"), ("activity_log", "actor_id")):
        guide.query(f"UPDATE {table} SET {column} = md5({column})::uuid")
    guide.query('ALTER TABLE "authSessions" DROP CONSTRAINT "authSessions_userId_fkey"')
    guide.query('ALTER TABLE "authUsers" ALTER id TYPE uuid USING md5(id)::uuid')
    (user,) = guide.query("SELECT actor_id FROM activity_log WHERE actor_type = 'user' ORDER BY timestamp LIMIT 1")[0]
    assert guide.cli("holds", "add", "--user", user, "--reason", "case 7")
    count = "SELECT count(*) FROM activity_log WHERE actor_id = %s AND timestamp < now() - interval '91 days'"
    before = guide.query(count, user)
    assert before > [(0,)]
    assert complete(guide, PruneLogs())["kept"]
    assert guide.query(count, user) == before


def test_rows_that_say_no_action_are_no_security_events(guide: Deployment) -> None:
    guide.query("ALTER TABLE activity_log ALTER action DROP NOT NULL")
    guide.query("UPDATE activity_log SET action = NULL WHERE abs(hashtext(id::text)) % 3 = 0")
    result = complete(guide, PruneLogs(keep_security=True))
    assert result["kept"], result["findings"]
    none = "SELECT count(*) FROM activity_log WHERE action IS NULL AND timestamp < now() - interval '91 days'"
    assert guide.query(none) == [(0,)]


# -- what the host forbids ------------------------------------------------------------------------------


def test_a_trigger_that_forbids_the_delete_is_named_by_its_state_and_never_by_its_text(released: Deployment) -> None:
    released.query("UPDATE plugin_logs SET message = 'hunter2'")
    released.query(
        "CREATE FUNCTION forbid() RETURNS trigger LANGUAGE plpgsql AS "
        "$$ BEGIN RAISE EXCEPTION 'append only: %', OLD; END $$"
    )
    released.query("CREATE TRIGGER forbid BEFORE DELETE ON plugin_logs FOR EACH ROW EXECUTE FUNCTION forbid()")
    before = content(released, "plugin_logs")
    done = released.cli(*INLINE, *LOGS, ok=False)
    assert done.returncode == 1
    assert len(done.stderr.splitlines()) == 1
    assert "the database refuses a statement (SQLSTATE P0001)" in done.stderr
    assert "hunter2" not in done.stderr
    assert content(released, "plugin_logs") == before
    ((state, error),) = released.query("SELECT state, error FROM paperclip_worker.runs")
    assert (state, "P0001" in error, "hunter2" in error) == ("failed", True, False)


# -- the clock ------------------------------------------------------------------------------------------


class _Ahead(datetime):
    @classmethod
    def now(cls, tz: tzinfo | None = None) -> _Ahead:
        return super().now(tz) + timedelta(days=60)


def test_the_age_is_counted_by_the_databases_clock(released: Deployment, monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker whose own clock runs ahead must not take what is not old yet."""
    monkeypatch.setattr("worker.operations.datetime", _Ahead)
    result = complete(released, PruneLogs())
    horizon = datetime.fromisoformat(result["receipt"]["horizon"])
    ((distance,),) = released.query("SELECT abs(extract(epoch FROM %s - clock_timestamp()))", horizon)
    assert distance < 600


class _Behind(datetime):
    @classmethod
    def now(cls, tz: tzinfo | None = None) -> _Behind:
        return super().now(tz) - timedelta(days=60)


@pytest.mark.parametrize("job", [PruneLogs(), RetireMasterKey()], ids=lambda job: job.name)
def test_a_database_whose_clock_is_far_ahead_takes_nothing(
    released: Deployment, monkeypatch: pytest.MonkeyPatch, job: Job
) -> None:
    """All of a log would be old by it, and a key under seal over."""
    monkeypatch.setattr("worker.operations.datetime", _Behind)
    with pytest.raises(Refused, match=r"the database.s clock is (59|60) days ahead of this machine"):
        complete(released, job)
    assert released.query("SELECT count(*) FROM paperclip_worker.runs") == [(0,)]


# -- what came back while a prune stood still -----------------------------------------------------------


def test_a_prune_of_which_rows_were_put_back_does_not_go_on(released: Deployment) -> None:
    """It would take them again, under the very names its objects have already."""
    small = released.with_settings(bite_rows="50")
    run = small.start(PruneLogs(), actor="tester", via="test")
    while not small.result(run)["bites"]:
        small.runner().work(run, seconds=0)
    small.stop(str(run))
    back = complete(released, RestoreLogs(run=RunId(str(run))))
    assert back["rows"] > 0
    before = (world(released), keys(released))
    says = f"run {run} cannot go on: run {back['run']} has put rows of it back"
    refused(released, "runs", "resume", str(run), "--inline", says=says)
    assert (world(released), keys(released)) == before
    assert complete(released, PruneLogs())["kept"]


def test_a_company_policy_does_not_hide_rows_of_no_company(released: Deployment) -> None:
    ((company,),) = released.query("SELECT id::text FROM companies LIMIT 1")
    none = "SELECT count(*) FROM plugin_logs WHERE company_id IS NULL AND created_at < now() - interval '20 days'"
    assert released.query(none) != [(0,)]
    released.cli(
        "policy", "set", "--table", "plugin_logs", "--company", company, "--keep", "300d", "--reason", "x", "--yes"
    )
    assert complete(released, PruneLogs(table="plugin_logs", older_than=timedelta(days=20)))["kept"]
    assert released.query(none) == [(0,)]
