"""Which keys and files a rotation refuses, in one line, before there is a run."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cli.helpers import refused
from tests.rotation import steps
from tests.rotation.vault import VALUES, Vault
from worker import keyring
from worker.errors import Refused

RUN = ("run", "rotate-master-key", "--inline", "--yes")


def _says(vault: Vault, says: str, *words: str, env: dict[str, str] | None = None) -> None:
    """Refused in one line, with nothing changed anywhere: no run, no row, no file."""
    before = steps.everything(vault)
    refused(vault.deployment, *RUN, *words, says=says, env=env)
    assert steps.everything(vault) == before


def test_a_key_that_opens_nothing(vault: Vault) -> None:
    other = keyring.generate()
    vault.file.write_text(other.text)
    _says(vault, f"the key {other.fingerprint} opens none of the [0-9]+ ciphertexts", "--generate")
    vault.file.write_text(vault.key.text)
    assert vault.run("--generate")["kept"] is True


def test_the_key_in_use(vault: Vault) -> None:
    path, _ = steps.key_file(vault, key=vault.key)
    _says(vault, "is the one in use already", "--new-key-file", str(path))
    path.write_text(vault.key.raw.hex())
    _says(vault, "is the one in use already", "--new-key-file", str(path))


@pytest.mark.parametrize("content", ["", "  \n", "too short", "0x" + "a" * 64, "a" * 63, "x" * 70_000])
def test_a_new_key_file_that_holds_no_key(released_vault: Vault, content: str) -> None:
    path, _ = steps.key_file(released_vault)
    path.write_text(content)
    _says(released_vault, str(path), "--new-key-file", str(path))


def test_a_new_key_file_that_is_not_there(released_vault: Vault, tmp_path: Path) -> None:
    _says(released_vault, str(tmp_path / "none"), "--new-key-file", str(tmp_path / "none"))
    _says(released_vault, "not a regular file", "--new-key-file", str(tmp_path))


@pytest.mark.parametrize("path", ["new.key", "./new.key", "../new.key", "~/new.key", ""])
def test_a_new_key_file_that_another_worker_would_look_for_elsewhere(released_vault: Vault, path: str) -> None:
    _says(released_vault, "--new-key-file must be an absolute path", "--new-key-file", path)


def test_a_key_that_was_retired(released_vault: Vault) -> None:
    vault = released_vault
    assert vault.run("--generate")["kept"] is True
    vault.deployment.cli("keys", "retire", vault.key.fingerprint, "--inline", "--yes")
    path, _ = steps.key_file(vault, key=vault.key)
    _says(vault, f"the key {vault.key.fingerprint} was retired for good", "--new-key-file", str(path))


def test_a_key_file_with_another_name(released_vault: Vault) -> None:
    """The server may read it by that one, which would keep the old key."""
    vault = released_vault
    other = vault.file.parent.parent / "the-servers-name.key"
    other.hardlink_to(vault.file)
    _says(vault, f"{vault.file} has 2 names .hard links.", "--generate")
    other.unlink()
    assert vault.run("--generate")["kept"] is True


def test_a_key_file_that_is_not_there(released_vault: Vault) -> None:
    vault = released_vault
    vault.file.unlink()
    _says(vault, "there is no master key file", "--generate")
    assert not vault.file.exists()


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ((), "just one of --new-key-file, --generate and --rollback"),
        (("--generate", "--new-key-file", "x"), "just one of --new-key-file, --generate and --rollback"),
        (("--generate", "--cutover", "manual"), "--generate writes beside the key file"),
        (("--generate", "--cutover", "both"), "--cutover must be file or manual"),
        (("--generate", "--retire-after", "0d"), "--retire-after"),
        (("--generate", "--retire-after", "3651d"), "--retire-after must be above zero and at most 3650d"),
        (("--rollback", "ffffffff"), "no run has an id that starts with"),
    ],
)
def test_parameters_that_say_no_rotation(released_vault: Vault, words: tuple[str, ...], says: str) -> None:
    _says(released_vault, says, *words)


def test_a_key_in_the_environment_is_not_replaced_by_a_file(vault: Vault) -> None:
    env = {"PAPERCLIP_SECRETS_MASTER_KEY": vault.key.text}
    _says(vault, "no file replaces; use --cutover manual", "--generate", env=env)


def test_a_deployment_without_ciphertext(vault: Vault) -> None:
    for table in {table for table, _ in vault.held}:
        vault.deployment.query(f"SET session_replication_role = replica; DELETE FROM {table}")
    _says(vault, "there is no ciphertext of a master key in the database", "--generate")


def test_no_key_leaves_the_key_files_and_the_codecs(released_vault: Vault) -> None:
    """Neither of the two keys, in no encoding, no value, and no digest of one, anywhere that we write."""
    vault = released_vault
    path, new = steps.key_file(vault)
    log = []
    words = ("rotate-master-key", "--new-key-file", str(path))
    for verb in ("plan", "rehearse"):
        done = vault.deployment.cli("--debug", verb, *words)
        log += [done.stdout, done.stderr]
    done = vault.deployment.cli("--debug", *RUN, *words[1:], "--json")
    log += [done.stdout, done.stderr]
    for (table,) in vault.deployment.query("SELECT tablename FROM pg_tables WHERE schemaname = 'paperclip_worker'"):
        log += [row[0] for row in vault.deployment.query(f"SELECT t::text FROM paperclip_worker.{table} t")]
    log += [row[0] for row in vault.deployment.query("SELECT t::text FROM activity_log t WHERE action LIKE 'maint%'")]
    store = vault.deployment.operations.store
    assert store is not None
    log += [b"".join(store.read(one)).decode("utf-8", "replace") for one in store.keys("")]
    text = "\n".join(log)
    assert new.fingerprint in text
    assert vault.key.fingerprint in text
    query = "SELECT DISTINCT value_sha256 FROM company_secret_versions WHERE length(value_sha256) = 64"
    digests = [row[0] for row in vault.deployment.query(query)]
    assert len(digests) == len(VALUES)
    keys = [
        one for key in (vault.key, new) for one in (key.text, key.text[:20], key.raw.hex(), key.raw.hex().upper())
    ]
    values = {value for held in vault.held.values() for value in held if len(value) > 4}
    for number, secret in enumerate((*keys, *digests, *values)):
        assert secret not in text, f"secret {number} was written"


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """A folder that everybody may pass through, unlike those of pytest."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        yield Path(folder)


@pytest.mark.parametrize(("mode", "says"), [(0o755, "cannot be written"), (0o777, "must belong to user 0")])
def test_a_key_file_that_we_may_only_read(released_vault: Vault, open_folder: Path, mode: int, says: str) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root can be another user; the strangers of test_keyring.py are the same guard")
    secrets, signing = open_folder / "secrets", open_folder / "signing.pem"
    secrets.mkdir()
    secrets.chmod(mode)
    (secrets / "master.key").write_text(released_vault.key.text)
    signing.write_bytes(Path(released_vault.deployment.environment["PAPERCLIP_WORKER_SIGNING_KEY_FILE"]).read_bytes())
    vault = steps.with_environment(
        released_vault,
        PAPERCLIP_SECRETS_MASTER_KEY_FILE=str(secrets / "master.key"),
        PAPERCLIP_WORKER_SIGNING_KEY_FILE=str(signing),
    )
    # The object store's client looks into the home directory.
    assert vault.deployment.operations.store is not None
    before = steps.everything(vault)
    os.seteuid(54321)
    try:
        with pytest.raises(Refused, match=says):
            steps.start(vault, generate=True)
    finally:
        os.seteuid(0)
    assert steps.everything(vault) == before


def test_a_key_file_that_changes_before_the_run_begins_is_found_out(vault: Vault) -> None:
    """What was counted when the run was entered was counted with another key."""
    run = steps.start(vault, generate=True, allow_undecryptable=10_000)
    other = keyring.generate()
    vault.file.write_text(other.text)
    before = vault.deployment.digest()
    with pytest.raises(Refused, match=f"the key {other.fingerprint} opens none"):
        steps.work(vault, run)
    assert vault.deployment.digest() == before
    assert vault.now == other
    assert [one.name for one in vault.file.parent.iterdir()] == ["master.key"]
    assert vault.opened(vault.key) == vault.held


def test_a_run_that_an_earlier_release_made_ready_does_not_go_on(released_vault: Vault) -> None:
    vault = released_vault
    run = steps.start(vault, generate=True)
    steps.work_until(vault, run, steps.CUT_OVER)
    vault.deployment.query(
        "UPDATE paperclip_worker.shards SET cursor = '{\"done\": true}' WHERE run_id = %s AND key ~ '^make-ready'",
        run,
    )
    with pytest.raises(Refused, match="begun by an earlier release"):
        steps.work(vault, run)
    assert vault.now == vault.key
    assert vault.opened(vault.key) == vault.held
