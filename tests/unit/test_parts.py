"""The small parts: parameters, settings, canonical JSON, plan hashes, redaction, steering, states."""

from __future__ import annotations

import pwd
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tasks.prune_logs import PruneLogs
from worker import canonical, config, logs, params, states
from worker.commands import common
from worker.config import Need
from worker.errors import Refused, SettingsError
from worker.plans import Amount, Left, Plan, Tally, Target, horizon_of
from worker.states import State
from worker.throttle import Throttle

NOW = datetime(2026, 9, 20, 12, 0, 0, 123456, tzinfo=UTC)


@given(st.integers(1, 10**5), st.sampled_from("mhdw"))
def test_durations_survive(number: int, unit: str) -> None:
    value = params.duration(f"{number}{unit}")
    assert params.duration(params.duration_text(value)) == value


@pytest.mark.parametrize("text", ["", "90", "-5d", "0d", "1.5d", "d", "10y", "\uff19d", "1d ", "99999999d"])
def test_bad_durations_are_refused(text: str) -> None:
    with pytest.raises(Refused, match="duration"):
        params.duration(text)


def test_unknown_parameters_are_refused() -> None:
    with pytest.raises(Refused, match="no parameter colour"):
        params.from_json(PruneLogs, {"colour": "red"})
    with pytest.raises(Refused, match="--older-than"):
        params.from_json(PruneLogs, {"older_than": "ever"})
    with pytest.raises(Refused, match="above zero"):
        PruneLogs(older_than=timedelta(0))


def test_every_fault_of_the_settings_is_reported_at_once_without_a_value() -> None:
    environment = {
        "DATABASE_URL": "mysql://someone:hunter2@host/db",
        "PAPERCLIP_WORKER_BROKER_URL": "redis://",
        "PAPERCLIP_WORKER_BITE_ROWS": "hunter2",
        "PAPERCLIP_WORKER_TYPO": "hunter2",
    }
    with pytest.raises(SettingsError) as caught:
        config.load(environment, needs=list(Need))
    text = str(caught.value)
    names = ["DATABASE_URL", "BROKER_URL", "BITE_ROWS", "PAPERCLIP_WORKER_TYPO", "S3_BUCKET", "SIGNING_KEY_FILE"]
    assert all(name in text for name in names)
    assert "hunter2" not in text
    assert "\n" not in text


@pytest.mark.parametrize("scheme", ["postgres", "postgresql"])
def test_the_apps_forms_of_the_database_url_are_taken(scheme: str) -> None:
    url = f"{scheme}://u:p%40ss@host:5433/db?sslmode=require"
    assert config.load({"DATABASE_URL": url}).database() == url


def test_the_worker_keeps_away_from_the_apps_objects() -> None:
    shared = {"PAPERCLIP_STORAGE_S3_BUCKET": "b", "PAPERCLIP_STORAGE_S3_PREFIX": "files/live"}
    with pytest.raises(SettingsError, match="PAPERCLIP_STORAGE_S3_PREFIX"):
        config.load({**shared, "PAPERCLIP_WORKER_S3_PREFIX": "files"})
    assert config.load({**shared, "PAPERCLIP_WORKER_S3_PREFIX": "worker"}).s3_prefix == "worker/"


def test_settings_never_print_a_secret() -> None:
    settings = config.load({"DATABASE_URL": "postgres://u:hunter2@h/d"})
    assert "hunter2" not in repr(settings) + str(settings.model_dump())


_URLS = {"DATABASE_URL": "postgres://u:hunter2@h/d", "PAPERCLIP_WORKER_BROKER_URL": "redis://:hunter2@h/0"}


@pytest.mark.parametrize("end", ["", "\n", "\r\n"])
def test_a_url_may_stand_in_a_file(tmp_path: Path, end: str) -> None:
    environment = {}
    for name, url in _URLS.items():
        path = tmp_path / name
        path.write_bytes(f"{url}{end}".encode())
        environment[f"{name}_FILE"] = str(path)
    settings = config.load(environment, needs=[Need.DATABASE, Need.BROKER])
    assert (settings.database(), settings.broker()) == tuple(_URLS.values())
    assert "hunter2" not in repr(settings)
    assert set(config.FROM_FILE.values()) == set(_URLS)


_BAD_FILES = {
    "absent": (None, "names no file"),
    "binary": (b"\xff\xfe", "names no file"),
    "empty": (b"", "holds one line"),
    "blank": (b"\n", "holds one line"),
    "two lines": (b"redis://hunter2@h\nredis://h\n", "holds one line"),
    "no URL": (b"hunter2\n", "URL"),
}


@pytest.mark.parametrize(("content", "says"), _BAD_FILES.values(), ids=list(_BAD_FILES))
@pytest.mark.parametrize("name", list(_URLS))
def test_a_file_without_a_url_is_a_fault_that_quotes_nothing(
    tmp_path: Path, name: str, content: bytes | None, says: str
) -> None:
    path = tmp_path / "secret"
    if content is not None:
        path.write_bytes(content)
    environment = {f"{name}_FILE": str(path), "PAPERCLIP_WORKER_BITE_ROWS": "many"}
    with pytest.raises(SettingsError, match=says) as caught:
        config.load(environment, needs=[Need(name)])
    text = str(caught.value)
    assert name in text
    assert "BITE_ROWS" in text
    assert "hunter2" not in text
    assert str(path) not in text
    assert "is not set" not in text
    assert "\n" not in text


@pytest.mark.parametrize("name", list(_URLS))
def test_a_url_given_twice_is_a_fault(tmp_path: Path, name: str) -> None:
    path = tmp_path / "secret"
    path.write_text(_URLS[name])
    with pytest.raises(SettingsError, match=f"{name} and {name}_FILE are both set") as caught:
        config.load({name: _URLS[name], f"{name}_FILE": str(path)})
    assert "hunter2" not in str(caught.value)
    assert config.load({name: _URLS[name], f"{name}_FILE": ""})


def test_an_operator_without_an_account_is_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a container that runs under a user id of the operator's choice."""

    def nobody(uid: int) -> None:
        raise KeyError(uid)

    for name in ("LOGNAME", "USER", "LNAME", "USERNAME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(pwd, "getpwuid", nobody)
    assert common.login() == "unknown"


def test_canonical_json_has_one_spelling() -> None:
    assert canonical.encode({"b": [1, None], "a": "ü"}) == '{"a":"ü","b":[1,null]}'.encode()
    with pytest.raises(TypeError):
        canonical.encode({"a": [{"b": 1.0}]})


def _plan(**changes: Any) -> Plan:
    target = Target(table="t", company="c", rows=2, bytes=10, digest="ab")
    left = Left(table="t", company="c", reason="r", rows=1)
    values: dict[str, Any] = {
        "job": "j",
        "params": {"x": 1},
        "layout": "guide",
        "now": NOW,
        "targets": (target,),
        "left": (left,),
    }
    return Plan(**(values | changes))


def test_a_plans_hash_names_its_horizon_and_its_world() -> None:
    plan = _plan()
    assert horizon_of(plan.hash, now=NOW) == NOW
    other = Target(table="t", company="c", rows=2, bytes=10, digest="cd")
    drifted = [
        _plan(targets=(other,)),
        _plan(left=()),
        _plan(params={"x": 2}),
        _plan(layout="paperclip"),
        _plan(now=NOW + timedelta(seconds=1)),
    ]
    assert len({plan.hash, *(one.hash for one in drifted)}) == 6


@pytest.mark.parametrize("text", ["", "x", "20260920T120000.123456Z", "2026-aaaaaaaaaaaaaaaaaaaaaaaa"])
def test_what_is_no_plan_hash_is_refused(text: str) -> None:
    with pytest.raises(Refused, match="--plan"):
        horizon_of(text, now=NOW)


def test_a_horizon_in_the_future_is_refused() -> None:
    with pytest.raises(Refused, match="future"):
        horizon_of(_plan(now=NOW + timedelta(days=1)).hash, now=NOW)


def test_tallies_add_up_and_survive_json() -> None:
    one = Tally({("t", "c"): Amount(1, 10), ("t", None): Amount(2, 20)})
    both = one + Tally({("t", "c"): Amount(3, 30)})
    assert both.total == Amount(6, 60)
    assert Tally.from_json(both.to_json()) == both


def test_logs_hide_credentials() -> None:
    event = {"event": "e", "url": "postgres://u:hunter2@h/d", "api_key": "hunter2", "deep": {"token": "hunter2"}}
    assert "hunter2" not in str(logs.redact(None, "", event))


def test_a_log_line_names_an_exception_and_nothing_of_its_text() -> None:
    event = logs._name_exception(None, "", {"exc_info": ValueError("hunter2")})
    assert event == {"exception": "ValueError"}


def test_bites_are_steered_to_their_time() -> None:
    throttle = Throttle(config.load({"PAPERCLIP_WORKER_BITE_SECONDS": "0.1"}))
    first = throttle.rows(contended=False)
    throttle.observe(asked=first, seconds=0.05)
    assert throttle.rows(contended=False) == first * 2
    throttle.observe(asked=first * 2, seconds=10)
    assert throttle.rows(contended=False) == first
    assert throttle.rows(contended=True) < first


def test_rows_that_are_large_are_few_at_once() -> None:
    """However fast they go: what a bite copies out stands in files, and behind one transaction."""
    throttle = Throttle(config.load({}))
    throttle.observe(asked=1000, seconds=0.001, copied=640 << 20)
    assert throttle.rows(contended=False) == 100
    throttle.observe(asked=100, seconds=0.001, copied=6400 << 20)
    assert throttle.rows(contended=False) == 1
    throttle.observe(asked=1, seconds=0.001, copied=200)
    assert throttle.rows(contended=False) == 100


def test_a_settled_promise_never_moves_and_every_state_can_be_reached() -> None:
    assert not states.STEPS[State.KEPT]
    assert not states.STEPS[State.UNKEPT]
    assert set(states.STEPS) == set(State)
    assert set().union(*states.STEPS.values()) == set(State)
