"""The servers of compose.yml: their very commands, with the secrets that the manual makes, on real programs."""

from __future__ import annotations

import contextlib
import json
import os
import re
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import redis

from tests.conftest import ROOT
from tests.docker.test_compose import DOCUMENT, RUN_SECRETS, SERVICES, env_file
from worker import config, embedded


@pytest.fixture
def secrets(tmp_path: Path) -> Path:
    """The files that the manual's recipe leaves."""
    text = (ROOT / "docs" / "docker.md").read_text(encoding="utf-8")
    (recipe,) = [one for one in re.findall(r"^```sh\n(.*?)^```$", text, re.MULTILINE | re.DOTALL) if "random" in one]
    # What follows on the page is called where this was.
    done = subprocess.run(["sh", "-euc", f"{recipe}pwd"], cwd=tmp_path, check=True, capture_output=True, text=True)
    assert tmp_path.samefile(done.stdout.strip())
    made = tmp_path / "docker" / "secrets"
    assert made.stat().st_mode & 0o777 == 0o700
    assert {path.stat().st_mode & 0o777 for path in made.iterdir()} == {0o644}
    return made


def test_the_recipe_makes_every_secret_but_the_signing_key(secrets: Path) -> None:
    assert {path.name for path in secrets.iterdir()} == set(DOCUMENT["secrets"]) - {"signing_key"}
    files = {
        "DATABASE_URL_FILE": str(secrets / "database_url"),
        "PAPERCLIP_WORKER_BROKER_URL_FILE": str(secrets / "broker_url"),
    }
    settings = config.load(files)
    database, broker = urlsplit(settings.database()), urlsplit(settings.broker())
    environment = SERVICES["postgres"]["environment"]
    assert (database.hostname, broker.hostname) == ("postgres", "redis")
    assert (database.username, database.path) == (environment["POSTGRES_USER"], f"/{environment['POSTGRES_DB']}")
    assert database.password == (secrets / "postgres_password").read_text()
    assert broker.password == (secrets / "redis_password").read_text()
    values = [(secrets / name).read_text() for name in ("postgres_password", "redis_password")]
    assert len(set(values)) == 2
    assert all(re.fullmatch(r"[0-9a-f]{48}", value) for value in values)


def _port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
        return port


@contextmanager
def _running(command: list[str], directory: Path, answers: Callable[[], Any]) -> Iterator[subprocess.Popen[bytes]]:
    """The command while it runs, from when it answers; it must end cleanly when told to."""
    process = subprocess.Popen(
        command,
        cwd=directory,
        env={"PATH": f"{directory / 'bin'}:{os.defpath}", "HOME": str(directory), "TMPDIR": str(directory)},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        deadline = time.monotonic() + 60
        while True:
            assert process.poll() is None, process.returncode
            with contextlib.suppress(OSError, redis.RedisError, urllib.error.URLError):
                if answers():
                    break
            assert time.monotonic() < deadline
            time.sleep(0.05)
        yield process
        process.terminate()
        assert process.wait(60) == 0
    finally:
        process.kill()
        process.wait()


def _program(directory: Path, name: str, found: Path) -> None:
    (directory / "bin").mkdir()
    (directory / "bin" / name).symlink_to(found)


def _script(service: str, secrets: Path) -> list[str]:
    """A service's command as Compose hands it over, with the secrets where they are here."""
    return [word.replace("$$", "$").replace(RUN_SECRETS, f"{secrets}/") for word in SERVICES[service]["command"]]


def test_the_broker_asks_for_its_password_keeps_what_it_has_and_forgets_nothing(
    secrets: Path, tmp_path: Path
) -> None:
    _program(tmp_path, "valkey-server", embedded._find_redis())
    port, data = _port(), tmp_path / "data"
    data.mkdir()
    command = _script("redis", secrets)
    assert "dir /data\n" in command[-1]
    command[-1] = command[-1].replace("dir /data\n", f"dir {data}\nbind 127.0.0.1\nport {port}\n")
    url = (secrets / "broker_url").read_text().strip().replace("redis:6379", f"127.0.0.1:{port}")
    with contextlib.closing(redis.Redis.from_url(url)) as client:
        with _running(command, tmp_path, client.ping) as process:
            with contextlib.closing(redis.Redis(port=port)) as stranger, pytest.raises(redis.AuthenticationError):
                stranger.ping()
            assert client.config_get("maxmemory-policy") == {"maxmemory-policy": "noeviction"}
            limit = int(str(client.config_get("maxmemory")["maxmemory"]))
            words = Path(f"/proc/{process.pid}/cmdline")
            if words.exists():
                assert (secrets / "redis_password").read_text() not in words.read_text()
            client.set("run", "one")
        with _running(command, tmp_path, client.ping):
            assert client.get("run") == b"one"
    assert SERVICES["redis"]["deploy"]["resources"]["limits"]["memory"] == "512M"
    assert limit == 256 << 20, "a fork to rewrite the file needs room beside it"


@pytest.mark.parametrize(("content", "says"), [(None, "No such file"), ("", "password")], ids=["absent", "empty"])
def test_a_broker_without_a_password_does_not_start(
    secrets: Path, tmp_path: Path, content: str | None, says: str
) -> None:
    _program(tmp_path, "valkey-server", embedded._find_redis())
    path = secrets / "redis_password"
    path.unlink()
    if content is not None:
        path.write_text(content)
    command = _script("redis", secrets)
    command[-1] = command[-1].replace("dir /data\n", f"dir {tmp_path}\nbind 127.0.0.1\nport {_port()}\n")
    done = subprocess.run(
        command,
        env={"PATH": f"{tmp_path / 'bin'}:{os.defpath}", "LC_ALL": "C"},
        timeout=20,
        check=False,
        capture_output=True,
        text=True,
    )
    assert done.returncode > 0
    assert says in done.stderr
    assert done.stdout == "", "the server did not even begin"


def test_the_store_serves_the_bucket_to_who_has_its_keys(secrets: Path, tmp_path: Path) -> None:
    _program(tmp_path, "weed", embedded._find_weed())
    data = tmp_path / "data"
    data.mkdir()
    ports: dict[str, int] = {}
    for part in ("s3", "master", "volume", "filer"):
        ports |= {f"{part}.port": _port(), f"{part}.port.grpc": _port()}
    command = ["weed", *_script("s3", secrets), *(f"-{flag}={port}" for flag, port in ports.items())]
    # Nothing but the port that asks for keys is open beyond loopback; here not even that.
    assert [word for word in command if "0.0.0.0" in word] == ["-s3.ip.bind=0.0.0.0"]  # noqa: S104
    assert "-ip.bind=127.0.0.1" in command
    command = [word.replace("0.0.0.0", "127.0.0.1") for word in command]  # noqa: S104
    command = [word.replace("-dir=/data", f"-dir={data}") for word in command]
    command += [f"-{part}.localSocket={tmp_path / part}.sock" for part in ("s3", "filer")]
    endpoint = f"http://127.0.0.1:{ports['s3.port']}"

    def healthy() -> bool:
        # The health check's own address, on this port.
        (_, script) = SERVICES["s3"]["healthcheck"]["test"]
        address = script.split()[-1].replace("http://127.0.0.1:8333", endpoint)
        with urllib.request.urlopen(address, timeout=2) as answer:  # noqa: S310
            return bool(answer.status == 200)

    with _running(command, tmp_path, healthy):
        for _ in range(2):
            assert _bucket(endpoint, secrets / "s3_credentials") == 0
        wrong = secrets / "wrong"
        wrong.write_text("[default]\naws_access_key_id=paperclip\naws_secret_access_key=hunter2\n")
        assert _bucket(endpoint, wrong) != 0


def _bucket(endpoint: str, credentials: Path) -> int:
    """The one-shot that makes the bucket, as Compose runs it; its exit status."""
    one = SERVICES["bucket"]
    program, *words = one["entrypoint"]
    assert (program, words) == ("python", ["-c"])
    settings = env_file("servers.env") | {
        "PAPERCLIP_STORAGE_S3_ENDPOINT": endpoint,
        "AWS_SHARED_CREDENTIALS_FILE": str(credentials),
        "AWS_EC2_METADATA_DISABLED": "true",
    }
    check = "\nassert name in [one['Name'] for one in store.list_buckets()['Buckets']]\n"
    script = one["command"][0].replace("$$", "$") + check
    done = subprocess.run(
        [sys.executable, *words, script], env=settings, timeout=60, check=False, capture_output=True, text=True
    )
    return done.returncode


def test_the_keys_of_the_store_are_the_worker_s(secrets: Path) -> None:
    (identity,) = json.loads((secrets / "s3_identities").read_text())["identities"]
    (pair,) = identity["credentials"]
    lines = (secrets / "s3_credentials").read_text().splitlines()
    assert lines == [
        "[default]",
        f"aws_access_key_id={pair['accessKey']}",
        f"aws_secret_access_key={pair['secretKey']}",
    ]
