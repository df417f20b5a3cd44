"""Every bad input is refused in one line that says what to do, with the right exit status, and changes nothing."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import boto3
import pytest

from tests.cli.conftest import Watch
from tests.cli.helpers import INLINE, PRUNE, begin, check_refusal, complete, keys, refused, start, world
from tests.conftest import ROOT, Deployment
from worker import audit
from worker.errors import Refused, SettingsError
from worker.layouts import LAYOUTS, catalogue

UNKNOWN = "00000000-0000-4000-8000-000000000000"
PLAN = ("plan", "prune-logs")
FROM_S3 = ("receipts", "verify", "--from-s3")


def test_each_table_that_is_no_log_is_refused_with_the_reason() -> None:
    for layout in LAYOUTS.values():
        for table in catalogue.load(layout.name).tables.values():
            if table.name not in layout.logs:
                with pytest.raises(Refused, match=rf"{table.name} is never pruned by age: .{{8,}}"):
                    layout.log(table.name)


def _closed_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
        return port


_SHUT = _closed_port()
# Variables that differ, the command, and what the one line must say.
_SETTINGS: dict[str, tuple[dict[str, str], tuple[str, ...], str]] = {
    "no database": (
        {"DATABASE_URL": f"postgres://someone:hunter2@127.0.0.1:{_SHUT}/db"},
        INLINE,
        "database cannot be reached.*DATABASE_URL",
    ),
    "no database for a plan": (
        {"DATABASE_URL": f"postgres://someone:hunter2@127.0.0.1:{_SHUT}/db"},
        PLAN,
        "database cannot be reached.*DATABASE_URL",
    ),
    "DATABASE_URL unset": ({"DATABASE_URL": ""}, PLAN, "DATABASE_URL is not set"),
    "no broker": (
        {"PAPERCLIP_WORKER_BROKER_URL": f"redis://someone:hunter2@127.0.0.1:{_SHUT}/0"},
        (*PRUNE, "--yes"),
        "BROKER_URL.*does not answer.*--inline",
    ),
    "no broker for beat": (
        {"PAPERCLIP_WORKER_BROKER_URL": f"redis://someone:hunter2@127.0.0.1:{_SHUT}/0"},
        ("beat",),
        "BROKER_URL: the broker does not answer, or refuses the login",
    ),
    "no port of a broker": ({"PAPERCLIP_WORKER_BROKER_URL": "redis://h:99999/0"}, ("beat",), "BROKER_URL must be a"),
    "a broker of Celery's own": (
        {"CELERY_BROKER_URL": "redis://:hunter2@127.0.0.1:1/0"},
        ("ping",),
        "CELERY_BROKER_URL would send Celery to another broker",
    ),
    "a port in words": ({"PAPERCLIP_WORKER_BROKER_URL": "redis://h:abc/0"}, ("ping",), "BROKER_URL must be a redis"),
    "no number of a database": (
        {"PAPERCLIP_WORKER_BROKER_URL": "redis://h:1/abc"},
        ("worker",),
        "BROKER_URL must end in the number of a database",
    ),
    "options of a broker": (
        {"PAPERCLIP_WORKER_BROKER_URL": "redis://h:1/0?password=hunter2"},
        ("ping",),
        "BROKER_URL may have no options but ssl_",
    ),
    "a broker's option that there is not": (
        {"PAPERCLIP_WORKER_BROKER_URL": "rediss://h:1/0?ssl_hunter2=1"},
        ("ping",),
        "BROKER_URL may have no options but ssl_ca_certs",
    ),
    "a broker's option with another value": (
        {"PAPERCLIP_WORKER_BROKER_URL": "rediss://h:1/0?ssl_cert_reqs=hunter2"},
        ("beat",),
        "BROKER_URL may have ssl_cert_reqs only as required, optional or none",
    ),
    "a broker's option without encryption": (
        {"PAPERCLIP_WORKER_BROKER_URL": "redis://h:1/0?ssl_cert_reqs=none"},
        ("ping",),
        "BROKER_URL must be a rediss:// URL for ssl_... to mean anything",
    ),
    # urlsplit quotes all before the host where a sign would become one that parts a URL.
    "no password for a URL": (
        {"DATABASE_URL": "postgres://someone:hunter2\uff03@127.0.0.1/db"},
        PLAN,
        "DATABASE_URL is not a URL",
    ),
    "no password for a broker's URL": (
        {"PAPERCLIP_WORKER_BROKER_URL": "redis://:hunter2\uff1f@127.0.0.1/0"},
        ("ping",),
        "BROKER_URL must be a redis://",
    ),
    "no URL of a store": (
        {"PAPERCLIP_STORAGE_S3_ENDPOINT": "http://someone:hunter2\uff20@127.0.0.1"},
        PLAN,
        "S3_ENDPOINT must be",
    ),
    "an underscore in a store's name": (
        {"PAPERCLIP_STORAGE_S3_ENDPOINT": "http://my_minio:9000"},
        PLAN,
        "S3_ENDPOINT names a host that the S3 client refuses.*no _",
    ),
    "a dash before a store's name": (
        {"PAPERCLIP_STORAGE_S3_ENDPOINT": "http://-x"},
        PLAN,
        "S3_ENDPOINT names a host",
    ),
    "a blank in a store's name": ({"PAPERCLIP_STORAGE_S3_ENDPOINT": "http://a b"}, PLAN, "S3_ENDPOINT names a host"),
    "a sign in a store's name": ({"PAPERCLIP_STORAGE_S3_ENDPOINT": "http://ho%st"}, PLAN, "S3_ENDPOINT names a host"),
    "a break in a store's URL": ({"PAPERCLIP_STORAGE_S3_ENDPOINT": "http://a\tb"}, PLAN, "S3_ENDPOINT must be"),
    "half a store's address": ({"PAPERCLIP_STORAGE_S3_ENDPOINT": "http://[::1"}, PLAN, "S3_ENDPOINT must be"),
    "a store's address of version 6": (
        {"PAPERCLIP_STORAGE_S3_ENDPOINT": f"http://[::1]:{_SHUT}"},
        INLINE,
        "cannot be reached",
    ),
    "no name of a bucket": (
        {"PAPERCLIP_WORKER_S3_BUCKET": "my bucket"},
        INLINE,
        "S3_BUCKET is not the name of a bucket",
    ),
    "a bucket as a URL": (
        {"PAPERCLIP_WORKER_S3_BUCKET": "s3://b"},
        FROM_S3,
        "S3_BUCKET is not the name of a bucket",
    ),
    "no name of a region": (
        {"PAPERCLIP_STORAGE_S3_REGION": "eu west"},
        FROM_S3,
        "S3_REGION is not the name of a region",
    ),
    "no such profile": ({"AWS_PROFILE": "nosuch"}, FROM_S3, "AWS_PROFILE names no profile"),
    "S3 secret is no text": ({"AWS_SECRET_ACCESS_KEY": "hunter2\udcff"}, INLINE, "AWS_SECRET_ACCESS_KEY: not UTF-8"),
    "S3 key id is no text": ({"AWS_ACCESS_KEY_ID": "hunter2\udcff"}, FROM_S3, "AWS_ACCESS_KEY_ID: not UTF-8"),
    "S3 key id is no key id": ({"AWS_ACCESS_KEY_ID": "ä"}, INLINE, "store refuses.*credentials"),
    "login name is no text": ({"LOGNAME": "hunter2\udcff"}, INLINE, "login name is not UTF-8.*--actor"),
    "login name is no text for a hold": (
        {"LOGNAME": "hunter2\udcff"},
        ("holds", "add", "--table", "activity_log", "--reason", "case 7"),
        "login name is not UTF-8.*--actor",
    ),
    "no port of a store": ({"PAPERCLIP_STORAGE_S3_ENDPOINT": "http://h:99999"}, PLAN, "S3_ENDPOINT must be"),
    "no text": ({"PAPERCLIP_WORKER_S3_PREFIX": "a\udcff/"}, PLAN, "PAPERCLIP_WORKER_S3_PREFIX is not UTF-8"),
    "broker unset": ({"PAPERCLIP_WORKER_BROKER_URL": ""}, (*PRUNE, "--yes"), "BROKER_URL is not set"),
    "no store": ({"PAPERCLIP_STORAGE_S3_ENDPOINT": f"http://127.0.0.1:{_SHUT}"}, INLINE, "cannot be reached"),
    "no such bucket": ({"PAPERCLIP_WORKER_S3_BUCKET": "no-such-bucket"}, INLINE, "no-such-bucket.*NoSuchBucket"),
    "bucket unset": ({"PAPERCLIP_WORKER_S3_BUCKET": ""}, INLINE, "S3_BUCKET is not set"),
    "no bucket for a worker": (
        {"PAPERCLIP_WORKER_S3_BUCKET": ""},
        ("worker",),
        r"S3_BUCKET is not set, and the schedule archives \(prune-activity-log, prune-run-events\).*archive = false",
    ),
    "no bucket for beat": ({"PAPERCLIP_WORKER_S3_BUCKET": ""}, ("beat",), "S3_BUCKET is not set, and the schedule"),
    "no bucket to verify": ({"PAPERCLIP_WORKER_S3_BUCKET": ""}, FROM_S3, "S3_BUCKET is not set"),
    "no bucket to anchor in": (
        {"PAPERCLIP_WORKER_S3_BUCKET": ""},
        ("receipts", "anchor"),
        "S3_BUCKET is not set",
    ),
    "no key to verify by": ({"PAPERCLIP_WORKER_SIGNING_KEY_FILE": ""}, FROM_S3, "SIGNING_KEY_FILE is not set"),
    "no store to verify": (
        {"PAPERCLIP_STORAGE_S3_ENDPOINT": f"http://127.0.0.1:{_SHUT}"},
        FROM_S3,
        "cannot be reached",
    ),
    "a lock of no mode": ({"PAPERCLIP_WORKER_RECEIPT_LOCK_MODE": "firm"}, PLAN, "RECEIPT_LOCK_MODE.*compliance"),
    "a lock of no duration": ({"PAPERCLIP_WORKER_RECEIPT_LOCK": "hunter2"}, PLAN, "RECEIPT_LOCK .*is not a duration"),
    "a lock too long": (
        {"PAPERCLIP_WORKER_RECEIPT_LOCK": "999999w"},
        PLAN,
        "RECEIPT_LOCK must not be longer than 100 years",
    ),
    "wrong S3 secret": ({"AWS_SECRET_ACCESS_KEY": "hunter2"}, INLINE, "store refuses.*credentials"),
    "wrong S3 key id": ({"AWS_ACCESS_KEY_ID": "nobody"}, INLINE, "store refuses.*credentials"),
    "no S3 credentials": (
        {"AWS_ACCESS_KEY_ID": "", "AWS_SECRET_ACCESS_KEY": "", "HOME": "/nosuch"},
        INLINE,
        "no S3 credentials",
    ),
    "signing key unset": ({"PAPERCLIP_WORKER_SIGNING_KEY_FILE": ""}, INLINE, "SIGNING_KEY_FILE is not set"),
    "no path of a signing key": (
        {"PAPERCLIP_WORKER_SIGNING_KEY_FILE": "/" + "x" * 300},
        INLINE,
        "SIGNING_KEY_FILE names no file",
    ),
    "no signing key there": ({"PAPERCLIP_WORKER_SIGNING_KEY_FILE": "/nosuch"}, INLINE, "names no file"),
    "signing key is no key": ({"PAPERCLIP_WORKER_SIGNING_KEY_FILE": __file__}, INLINE, "not an Ed25519 key"),
    "catalogue file is no catalogue": (
        {"PAPERCLIP_WORKER_CATALOGUE_FILE": __file__},
        ("db", "check"),
        "is not TOML",
    ),
    "misspelt": ({"PAPERCLIP_WORKER_BITE_SECOND": "1"}, PLAN, "PAPERCLIP_WORKER_BITE_SECOND is not a setting"),
    "wrong scheme": ({"DATABASE_URL": "mysql://someone:hunter2@localhost/db"}, PLAN, "DATABASE_URL must start with"),
    "no number": ({"PAPERCLIP_WORKER_BITE_ROWS": "many"}, PLAN, "PAPERCLIP_WORKER_BITE_ROWS"),
    "out of bounds": ({"PAPERCLIP_WORKER_PARALLEL": "0"}, PLAN, "PAPERCLIP_WORKER_PARALLEL"),
    "prefix outside": ({"PAPERCLIP_WORKER_S3_PREFIX": "../app"}, PLAN, "PAPERCLIP_WORKER_S3_PREFIX"),
}


@pytest.mark.parametrize(("env", "words", "says"), _SETTINGS.values(), ids=list(_SETTINGS))
def test_bad_settings(
    standing: Deployment,
    watch: Watch,
    env: dict[str, str],
    words: tuple[str, ...],
    says: str,
) -> None:
    assert "hunter2" not in refused(standing, *words, says=says, env=env)
    watch.check_unchanged()


def test_a_wrong_password_is_not_repeated(standing: Deployment, watch: Watch) -> None:
    user, _, rest = standing.environment["DATABASE_URL"].partition("@")
    url = f"{user.rpartition(':')[0]}:hunter2@{rest}"
    line = refused(standing, *INLINE, says="DATABASE_URL", env={"DATABASE_URL": url})
    assert "hunter2" not in line
    url = f"{standing.environment['DATABASE_URL']}_not_there"
    refused(standing, *INLINE, says="DATABASE_URL", env={"DATABASE_URL": url})
    watch.check_unchanged()


def test_a_metrics_port_that_another_has(standing: Deployment, watch: Watch) -> None:
    with socket.socket() as other:
        other.bind(("0.0.0.0", 0))  # noqa: S104 - as the exposition is served
        other.listen()
        port = str(other.getsockname()[1])
        says = f"PAPERCLIP_WORKER_METRICS_PORT: {port} cannot be served on"
        refused(standing, "worker", says=says, env={"PAPERCLIP_WORKER_METRICS_PORT": port})
    watch.check_unchanged()


def test_all_faults_of_the_settings_in_one_line(standing: Deployment, watch: Watch) -> None:
    env = {
        "DATABASE_URL": "mysql://someone:hunter2@localhost/db",
        "PAPERCLIP_WORKER_BROKER_URL": "amqp://someone:hunter3@localhost",
        "PAPERCLIP_WORKER_BITE_ROWS": "hunter4",
        "PAPERCLIP_WORKER_BIGHT_ROWS": "hunter5",
        "PAPERCLIP_WORKER_SIGNING_KEY_FILE": "",
    }
    line = refused(standing, *PRUNE, "--yes", says="settings: ", env=env)
    assert all(name in line for name in env)
    assert "hunter" not in line
    watch.check_unchanged()


# Keys of an algorithm that nobody has.
_UNKNOWN_KEY = "-----BEGIN PRIVATE KEY-----\nMA8CAQAwBQYDKgMEBAMBAgM=\n-----END PRIVATE KEY-----\n"
_UNKNOWN_PUBLIC = "-----BEGIN PUBLIC KEY-----\nMA0wBQYDKgMEAwQAAQID\n-----END PUBLIC KEY-----\n"


def test_keys_of_an_unknown_algorithm(standing: Deployment, watch: Watch, tmp_path: Path) -> None:
    private, public = tmp_path / "key.pem", tmp_path / "public.pem"
    private.write_text(_UNKNOWN_KEY)
    public.write_text(_UNKNOWN_PUBLIC)
    env = {"PAPERCLIP_WORKER_SIGNING_KEY_FILE": str(private)}
    refused(standing, *INLINE, says="SIGNING_KEY_FILE is not an Ed25519 key", env=env)
    refused(standing, *FROM_S3, "--public-key", str(public), says="public.pem is not a public key in PEM")
    watch.check_unchanged()


def test_a_signing_key_that_may_not_be_read_is_not_called_another_key(tmp_path: Path) -> None:
    """Who believed that would make a new one."""
    with pytest.raises(SettingsError, match=r"SIGNING_KEY_FILE cannot be read: Is a directory$"):
        audit.Signer.load(tmp_path)
    with pytest.raises(Refused, match="cannot be read: Is a directory"):
        audit.load_public(tmp_path)


# -- a database that is not as it should be -------------------------------------------------------------


def test_an_empty_database(fresh_database: Callable[..., str], make_deployment: Callable[..., Deployment]) -> None:
    empty = make_deployment(fresh_database(), "paperclip")
    for words in (INLINE, ("runs", "list"), ("receipts", "verify"), ("runs", "show", "last")):
        refused(empty, *words, says="ledger is not there.*db init")
    for words in (PLAN, ("db", "check"), ("db", "grants"), ("rehearse", "prune-logs")):
        refused(empty, *words, says="neither the paperclip nor the guide layout")
    empty.cli("db", "init")
    refused(empty, *INLINE, says="neither the paperclip nor the guide layout")


_DAMAGES: dict[str, tuple[str, tuple[str, ...], str]] = {
    "no ledger": ("DROP SCHEMA paperclip_worker CASCADE", INLINE, "ledger is not there.*db init"),
    "older ledger": (
        "UPDATE paperclip_worker.alembic_version SET version_num = '0000'",
        INLINE,
        "older release.*init",
    ),
    "newer ledger": ("UPDATE paperclip_worker.alembic_version SET version_num = '9999'", INLINE, "newer.*upgrade"),
    "newer ledger, init": (
        "UPDATE paperclip_worker.alembic_version SET version_num = '9999'",
        ("db", "init"),
        "newer",
    ),
    "half a layout": ("ALTER TABLE issues RENAME TO elsewhere", INLINE, "nearest is paperclip, which lacks issues"),
    "a column of the log": (
        "ALTER TABLE activity_log RENAME COLUMN action TO verb",
        INLINE,
        r"lacks activity_log\.action",
    ),
    "a column of a guard": (
        "ALTER TABLE decision_effect_executions RENAME COLUMN activity_log_id TO other",
        INLINE,
        r"prune-logs needs decision_effect_executions\.activity_log_id",
    ),
    "no company": ("TRUNCATE companies CASCADE", INLINE, "no company: is DATABASE_URL the right database"),
}


@pytest.mark.parametrize(("damage", "words", "says"), _DAMAGES.values(), ids=list(_DAMAGES))
def test_a_damaged_database(released: Deployment, damage: str, words: tuple[str, ...], says: str) -> None:
    released.query(damage)
    found = world(released)
    refused(released, *words, says=says)
    assert world(released) == found
    assert keys(released) == []


def test_an_age_before_time_began(released: Deployment) -> None:
    """Further back than a date can say: refused before a run exists that could never end."""
    found = world(released)
    for words in (PLAN, INLINE):
        refused(released, *words, "--older-than", "999999w", says="--older-than")
    assert world(released) == found


# -- runs ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("record", ["{}", "[]", "{", '{"servers": {}}', '{"postgres": 1, "redis": 1, "s3": 1}'])
def test_a_directory_that_is_no_demo_s_is_not_removed(standing: Deployment, tmp_path: Path, record: str) -> None:
    """Other programs have a file of that name as well."""
    (tmp_path / "servers.json").write_text(record)
    (tmp_path / "mine").touch()
    refused(standing, "demo", "--stop", str(tmp_path), says="no servers were kept there")
    assert len(list(tmp_path.iterdir())) == 2


def test_the_same_work_twice(released: Deployment) -> None:
    run = start(released.operations)
    found = world(released)
    for words in (INLINE, (*PRUNE, "--yes"), (*PRUNE, "--yes", "--detach"), (*INLINE, "--older-than", "30d")):
        refused(released, *words, says=f"already under way: run {run}", status=3)
    assert world(released) == found


def test_runs_that_cannot_be_named_stopped_or_resumed(released: Deployment) -> None:
    for last in "12":
        released.query(
            "INSERT INTO paperclip_worker.runs (id, job, params, exclusion, layout, state, now, actor, via) VALUES "
            f"('aaaaaaaa-0000-4000-8000-00000000000{last}', 'prune-logs', '{{}}', 'x', 'paperclip', 'kept', now(), "
            "'tester', 'test')"
        )
    run = str(complete(released)["run"])
    found = world(released)
    for name in ("aaaa", "AAAAAAAA-0000"):
        refused(released, "runs", "show", name, says="runs have an id that starts with")
    refused(released, "runs", "show", "", says="an empty text names no run")
    refused(released, "runs", "stop", run, says="is kept; only a run under way")
    refused(released, "runs", "resume", run, "--inline", says="is kept; only a stopped or failed")
    assert world(released) == found


@pytest.mark.parametrize("harm", ["other bytes", "cut", "gone"])
def test_a_run_whose_archive_was_tampered_with_is_not_resumed(released: Deployment, harm: str) -> None:
    run = str(begin(released))
    released.cli("runs", "stop", run)
    found = world(released)
    environment = released.environment
    bucket, prefix = environment["PAPERCLIP_WORKER_S3_BUCKET"], environment["PAPERCLIP_WORKER_S3_PREFIX"]
    key = prefix + next(one for one in keys(released) if one.endswith(".zst"))
    client = boto3.client("s3", endpoint_url=environment["PAPERCLIP_STORAGE_S3_ENDPOINT"], region_name="us-east-1")
    body = client.get_object(Bucket=bucket, Key=key)["Body"].read()
    if harm == "gone":
        client.delete_object(Bucket=bucket, Key=key)
    else:
        changed = body[:-1] if harm == "cut" else body[:20] + bytes([body[20] ^ 1]) + body[21:]
        client.put_object(Bucket=bucket, Key=key, Body=changed)
    refused(released, "runs", "resume", run, "--inline", says="archive object .* is missing or has other bytes")
    assert world(released) == found
    client.put_object(Bucket=bucket, Key=key, Body=body)
    client.close()
    assert released.json("runs", "resume", run, "--inline")["kept"]


def test_a_terminal_is_asked_and_no_is_no(released: Deployment) -> None:
    """The typed confirmation, on a real terminal."""
    found = world(released)
    answer, out = _answer(released, "yes\n")
    assert answer == 2
    assert "type activity_log to go on" in out
    assert "not confirmed; nothing was started or changed" in out
    assert world(released) == found
    answer, out = _answer(released, "activity_log\n")
    assert answer == 0
    assert "kept" in out


def _answer(deployment: Deployment, text: str) -> tuple[int, str]:
    """Run `run prune-logs --inline` on a terminal and answer what it asks."""
    ours, theirs = os.openpty()
    try:
        os.write(ours, text.encode())
        done = subprocess.run(
            [sys.executable, str(ROOT / "cli.py"), *PRUNE, "--inline"],
            stdin=theirs,
            capture_output=True,
            text=True,
            check=False,
            timeout=120,
            env=deployment.process_environment(),
        )
    finally:
        os.close(ours)
        os.close(theirs)
    return done.returncode, done.stdout + done.stderr


def test_services_refuse_to_start_on_what_would_fail_every_message(released: Deployment, tmp_path: Path) -> None:
    for service in ("worker", "beat"):
        done = released.cli(service, ok=False, env={"PAPERCLIP_WORKER_SIGNING_KEY_FILE": str(tmp_path / "none")})
        check_refusal(done, says="SIGNING_KEY_FILE names no file", status=2)
    released.query("DROP SCHEMA paperclip_worker CASCADE")
    for service in ("worker", "beat"):
        done = released.cli(service, ok=False)
        # Services log, in JSON lines; beside those there is the one sentence.
        (line,) = [line for line in done.stderr.splitlines() if not line.startswith("{")]
        assert "ledger is not there" in line
        assert done.returncode == 2
