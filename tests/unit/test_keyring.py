"""The master key: read as the server reads it, looked for where it looks, replaced so that it always finds one."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.unit.test_envelopes import VECTORS
from worker import config, keyfile, keyring, nodejs
from worker.errors import Refused, SettingsError
from worker.keyring import BadKey, Kind, MasterKey

KEY, OTHER = MasterKey(bytes(range(32))), MasterKey(bytes(32))
AS_ROOT = os.geteuid() == 0
_ALPHABET = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"


@pytest.mark.parametrize("vector", VECTORS["vectors"], ids=lambda v: f"{v['master_key_encoding']}-{v['case']}")
def test_the_apps_keys_are_read_as_the_app_reads_them(vector: dict[str, Any]) -> None:
    for given_as in (vector["master_key_text"], vector["master_key_text"].encode()):
        key = keyring.decode(given_as)
        assert key.raw.hex() == vector["master_key_hex"]
        assert key.fingerprint == vector["master_key_fingerprint12"]


@pytest.mark.parametrize("rejected", VECTORS["rejected_master_keys"], ids=lambda r: r["label"])
def test_what_the_app_rejects_is_refused_unquoted(rejected: dict[str, Any]) -> None:
    with pytest.raises(BadKey) as caught:
        keyring.decode(rejected["text"])
    assert rejected["text"] not in str(caught.value)


@pytest.mark.parametrize("around", ["\n", "\r\n", "\ufeff", " \t", "\u00a0", "\u2028", "\u3000"])
def test_what_javascript_trims_is_trimmed(around: str) -> None:
    assert keyring.decode(f"{around}{KEY.raw.hex()}{around}".encode()) == KEY


@pytest.mark.parametrize("around", ["\u0085", "\x1c", "\x1f", "\u180e", "\u200b"])
def test_what_only_python_trims_is_not(around: str) -> None:
    assert nodejs.trim(f"{around}x{around}") == f"{around}x{around}"
    with pytest.raises(BadKey):
        keyring.decode(around + KEY.raw.hex())
    raw = "~" * (32 - len(around.encode())) + around
    assert keyring.decode(raw).raw == raw.encode()


def test_bytes_that_are_no_text_are_replaced_as_node_does() -> None:
    assert keyring.decode(b"~" * 29 + b"\xff").raw == b"~" * 29 + b"\xef\xbf\xbd"
    with pytest.raises(BadKey):
        keyring.decode(b"\xff" * 32)


def _independent(text: str) -> bytes:
    bits = ""
    for unit in memoryview(text.encode("utf-16-le", "surrogatepass")).cast("H"):
        letter = {"-": "+", "_": "/"}.get(chr(unit & 255), chr(unit & 255))
        if letter == "=":
            break
        if letter in _ALPHABET:
            bits += format(_ALPHABET.index(letter), "06b")
    return bytes(int(bits[at : at + 8], 2) for at in range(0, len(bits) - 7, 8))


_NEARLY_BASE64 = st.text(st.sampled_from(_ALPHABET + "-_= \n!\u00e9\u0141\u013d\U0001f600"))


@given(text=_NEARLY_BASE64 | st.text())
def test_base64_is_nodes(text: str) -> None:
    assert nodejs.base64(text) == _independent(text)


@pytest.mark.parametrize(
    ("text", "found"),  # as Node 20 prints them
    [
        ("QUJ=DQUJD", "4142"),
        ("QQ", "41"),
        ("Q", ""),
        ("QUJDR", "414243"),
        ("QR==", "41"),
        ("=QUJD", ""),
        ("QU-_", "414fbf"),
        ("\u0141UJD", "014243"),
        ("Q\u013dUJD", ""),
        ("\U0001f600QUJD", ""),
        ("QUJDRA===", "41424344"),
    ],
)
def test_base64_as_node_was_seen_to_read_it(text: str, found: str) -> None:
    assert nodejs.base64(text).hex() == found


@given(raw=st.binary() | st.text() | _NEARLY_BASE64)
def test_any_input_is_a_key_or_refused(raw: bytes | str) -> None:
    try:
        key = keyring.decode(raw)
    except BadKey:
        return
    assert len(key.raw) == 32


@given(raw=st.binary(min_size=32, max_size=32))
def test_what_we_write_is_read_back(raw: bytes) -> None:
    key = MasterKey(raw)
    assert keyring.decode(key.text) == keyring.decode(key.text.encode()) == keyring.decode(raw.hex().upper()) == key
    assert len(key.text) == 44


def test_a_key_is_never_printed() -> None:
    key = keyring.generate()
    assert keyring.generate() != key
    for shown in (repr(key), str(key), repr(keyring.Source(kind=Kind.ENV, path=None, key=key))):
        assert key.fingerprint in shown
        assert not any(part in shown for part in (key.text, key.raw.hex(), repr(key.raw)))
    with pytest.raises(BadKey):
        MasterKey(bytes(31))


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """A server's home with a key in its default place."""
    path = _default(tmp_path)
    path.parent.mkdir(parents=True, mode=0o700)
    path.write_text(KEY.text)
    path.chmod(0o600)
    return tmp_path


def _default(home: Path) -> Path:
    return home / "instances" / "default" / "secrets" / "master.key"


def _locate(home: Path, **variables: str) -> keyring.Source:
    return keyring.locate(config.load({"PAPERCLIP_HOME": str(home), **variables}))


def _another(home: Path, name: str = "other.key", key: MasterKey = OTHER) -> Path:
    path = home / name
    path.write_text(key.text)
    path.chmod(0o600)
    return path


def test_the_environment_goes_before_any_file(home: Path) -> None:
    file = str(_another(home))
    found = _locate(home, PAPERCLIP_SECRETS_MASTER_KEY=f" {KEY.raw.hex()}\n", PAPERCLIP_SECRETS_MASTER_KEY_FILE=file)
    assert (found.kind, found.path, found.key, found.warnings) == (Kind.ENV, None, KEY, ())
    found = _locate(home, PAPERCLIP_SECRETS_MASTER_KEY=" \ufeff\n", PAPERCLIP_SECRETS_MASTER_KEY_FILE=file)
    assert (found.kind, found.path, found.key) == (Kind.FILE, Path(file), OTHER)


def test_a_bad_key_in_the_environment_does_not_fall_back(home: Path) -> None:
    with pytest.raises(BadKey, match="PAPERCLIP_SECRETS_MASTER_KEY is") as caught:
        _locate(home, PAPERCLIP_SECRETS_MASTER_KEY="hunter2")
    assert "hunter2" not in str(caught.value)
    assert "hunter2" not in repr(config.load({"PAPERCLIP_SECRETS_MASTER_KEY": "hunter2"}))


def test_the_file_is_found_where_the_server_finds_it(home: Path) -> None:
    assert _locate(home).path == _default(home)
    blank = _locate(home, PAPERCLIP_SECRETS_MASTER_KEY_FILE=" \n", PAPERCLIP_CONFIG="/nowhere")
    assert blank.path == _default(home)
    _default(home).parent.parent.rename(home / "instances" / "b-1_X")
    assert _locate(home, PAPERCLIP_INSTANCE_ID="b-1_X").key == KEY
    given_ = f"\ufeff{home}/gone/../{_another(home).name}\n"
    assert _locate(home, PAPERCLIP_SECRETS_MASTER_KEY_FILE=given_).path == home / "other.key"


def test_the_servers_configuration_names_the_file(home: Path) -> None:
    text = json.dumps({"secrets": {"localEncrypted": {"keyFilePath": str(_another(home))}}})
    (home / "given.json").write_text(text)
    assert _locate(home, PAPERCLIP_CONFIG=str(home / "given.json")).key == OTHER
    assert _locate(home).key == KEY
    (home / "instances" / "default" / "config.json").write_text(text)
    assert _locate(home).key == OTHER
    named = _another(home, "named.key", KEY)
    assert _locate(home, PAPERCLIP_SECRETS_MASTER_KEY_FILE=str(named)).path == named


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("{}", "has no secrets.localEncrypted.keyFilePath"),
        ("[]", "has no secrets.localEncrypted.keyFilePath"),
        ('{"secrets": {"localEncrypted": {}}}', "has no secrets.localEncrypted.keyFilePath"),
        ('{"secrets": {"localEncrypted": {"keyFilePath": 3}}}', "not a path"),
        ('{"secrets": {"localEncrypted": {"keyFilePath": ""}}}', "not a path"),
        ('{"secrets": {"localEncrypted": {"keyFilePath": "~/.paperclip/instances/default/x"}}}', "starts with ~"),
        ('{"secrets": {"localEncrypted": {"keyFilePath": "secrets/master.key"}}}', "not an absolute path"),
        ("{", "JSON"),
        ("[" * 100_000, "JSON"),
    ],
    ids=lambda value: value[:60],
)
def test_a_configuration_that_leaves_the_file_open_is_refused(home: Path, text: str, says: str) -> None:
    (home / "instances" / "default" / "config.json").write_text(text)
    with pytest.raises(Refused, match=says) as caught:
        _locate(home)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("PAPERCLIP_SECRETS_MASTER_KEY_FILE", "~/master.key", "starts with ~"),
        ("PAPERCLIP_SECRETS_MASTER_KEY_FILE", "~", "starts with ~"),
        ("PAPERCLIP_SECRETS_MASTER_KEY_FILE", "~paperclip/master.key", "not an absolute path"),
        ("PAPERCLIP_SECRETS_MASTER_KEY_FILE", "secrets/master.key", "not an absolute path"),
        ("PAPERCLIP_SECRETS_MASTER_KEY_FILE", "./master.key", "not an absolute path"),
        ("PAPERCLIP_HOME", "~/.paperclip", "starts with ~"),
        ("PAPERCLIP_HOME", "data", "not an absolute path"),
        ("PAPERCLIP_CONFIG", "config.json", "not an absolute path"),
        ("PAPERCLIP_CONFIG", "/nowhere/config.json", "names no file"),
    ],
)
def test_a_path_the_server_may_read_otherwise_is_refused(home: Path, name: str, value: str, says: str) -> None:
    with pytest.raises(Refused, match=says) as caught:
        _locate(home, **{name: value})
    assert str(caught.value).startswith(name)


@pytest.mark.parametrize("name", ["../b", "a/b", "a b", ".", "a\n", "\u00e9"])
def test_an_instance_has_a_plain_name(name: str) -> None:
    with pytest.raises(SettingsError, match="PAPERCLIP_INSTANCE_ID"):
        config.load({"PAPERCLIP_INSTANCE_ID": name})


def _remove(path: Path) -> None:
    path.unlink()


def _directory(path: Path) -> None:
    path.unlink()
    path.mkdir()


def _fifo(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def _loop(path: Path) -> None:
    path.unlink()
    path.symlink_to(path)


_UNUSABLE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "absent": (_remove, "there is no master key file"),
    "a directory": (_directory, "not a regular file"),
    "a FIFO": (_fifo, "not a regular file"),
    "a loop": (_loop, "cannot be read"),
    "empty": (lambda path: path.write_bytes(b""), "is empty"),
    "blank": (lambda path: path.write_bytes("\ufeff\r\n".encode()), "is empty"),
    "no key": (lambda path: path.write_bytes(b"hunter2"), "not a master key"),
    "huge": (lambda path: path.write_bytes(b" " * (1 << 20)), "too large"),
}


@pytest.mark.parametrize(("change", "says"), _UNUSABLE.values(), ids=list(_UNUSABLE))
def test_a_file_without_a_key_is_refused_and_none_is_made(
    home: Path, change: Callable[[Path], Any], says: str
) -> None:
    change(_default(home))
    before = sorted(home.rglob("*"))
    with pytest.raises(Refused, match=says) as caught:
        _locate(home)
    assert sorted(home.rglob("*")) == before
    assert str(_default(home)) in str(caught.value)
    assert "hunter2" not in str(caught.value)


@pytest.mark.skipif(AS_ROOT, reason="root reads whatever the mode says; the strangers below are the same guard")
def test_a_file_that_may_not_be_read_is_refused(home: Path) -> None:
    _default(home).chmod(0)
    with pytest.raises(Refused, match="cannot be read: Permission denied"):
        _locate(home)


def test_what_should_not_be_is_warned_of(home: Path) -> None:
    assert _locate(home).warnings == ()
    _default(home).chmod(0o640)
    (warning,) = _locate(home).warnings
    assert "mode 0640" in warning
    link = home / "link.key"
    link.symlink_to(_another(home))
    (warning,) = _locate(home, PAPERCLIP_SECRETS_MASTER_KEY_FILE=str(link)).warnings
    assert "symbolic link" in warning


def _names(directory: Path) -> set[str]:
    return {path.name for path in directory.iterdir()}


def test_a_key_is_replaced_and_both_are_kept(home: Path) -> None:
    path = _default(home)
    path.write_text(KEY.raw.hex() + "\n")
    keyfile.room(path)
    keyfile.writable(path)
    old, new = keyfile.stage(path, KEY, "old"), keyfile.stage(path, OTHER, "new")
    assert (keyring.read(old), keyring.read(new), keyring.read(path)) == (KEY, OTHER, KEY)
    keyfile.swap(path, new, expected=KEY)
    assert path.read_text() == OTHER.text
    assert _names(path.parent) == {"master.key", "old", "new"}
    assert {stat.S_IMODE(file.stat().st_mode) for file in path.parent.iterdir()} == {0o600}
    inode = path.stat().st_ino
    keyfile.swap(path, new, expected=KEY)
    assert path.stat().st_ino == inode
    keyfile.swap(path, old, expected=OTHER)
    assert path.read_text() == KEY.text
    for staged in (old, new, new):
        keyfile.unstage(staged)
    assert _names(path.parent) == {"master.key"}


def test_a_file_of_a_group_stays_the_groups(home: Path) -> None:
    path = _default(home)
    path.chmod(0o640)
    if AS_ROOT:
        os.chown(path, 12345, 23456)
    before = path.stat()
    staged = keyfile.stage(path, OTHER, "new")
    keyfile.swap(path, staged, expected=KEY)
    for file, mode in ((path, 0o640), (staged, 0o600)):
        now = file.stat()
        assert (now.st_uid, now.st_gid, stat.S_IMODE(now.st_mode)) == (before.st_uid, before.st_gid, mode)


def test_a_link_stays_one_and_leads_to_the_new_key(home: Path) -> None:
    link = home / "link.key"
    link.symlink_to(_default(home))
    staged = keyfile.stage(link, OTHER, "new")
    assert staged.parent == _default(home).parent
    keyfile.swap(link, staged, expected=KEY)
    assert link.is_symlink()
    assert keyring.read(_default(home)) == OTHER


def test_staging_twice_is_once_and_another_key_is_refused(home: Path) -> None:
    path = _default(home)
    staged = keyfile.stage(path, OTHER, "new")
    inode = staged.stat().st_ino
    assert keyfile.stage(path, OTHER, "new") == staged
    assert staged.stat().st_ino == inode
    with pytest.raises(Refused, match="exists and is not the key") as caught:
        keyfile.stage(path, KEY, "new")
    assert OTHER.text not in str(caught.value)
    assert keyring.read(staged) == OTHER


def test_a_staged_name_that_is_a_link_is_refused(home: Path) -> None:
    path = _default(home)
    (path.parent / "new").symlink_to(_another(home))
    with pytest.raises(Refused, match="exists"):
        keyfile.stage(path, OTHER, "new")


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "/a", "master.key"])
def test_a_staged_name_is_another_file_of_the_directory(home: Path, name: str) -> None:
    with pytest.raises(ValueError, match="name"):
        keyfile.stage(_default(home), OTHER, name)
    assert keyring.read(_default(home)) == KEY


def test_what_a_killed_writer_left_is_no_obstacle_and_goes(home: Path) -> None:
    path, victim = _default(home), _another(home)
    (path.parent / ".new.paperclip-worker-part").symlink_to(victim)
    (path.parent / ".master.key.paperclip-worker-part").write_text("half")
    staged = keyfile.stage(path, KEY, "new")
    keyfile.swap(path, keyfile.stage(path, OTHER, "other"), expected=KEY)
    assert victim.read_text() == OTHER.text
    (path.parent / ".new.paperclip-worker-part").write_text("half")
    keyfile.unstage(staged)
    assert _names(path.parent) == {"master.key", "other"}


def test_a_key_that_is_not_the_expected_one_stays(home: Path) -> None:
    path = _default(home)
    staged = keyfile.stage(path, OTHER, "new")
    third = keyring.generate()
    path.write_text(third.text)
    with pytest.raises(keyfile.KeyFileChanged, match=third.fingerprint):
        keyfile.swap(path, staged, expected=KEY)
    assert path.read_text() == third.text
    path.unlink()
    with pytest.raises(Refused, match="there is no master key file"):
        keyfile.swap(path, staged, expected=KEY)
    assert not path.exists()


_PROBE = """
import os, resource, signal, sys
from pathlib import Path
from worker import keyfile, keyring
path, act = Path(sys.argv[1]), sys.argv[2]
key, old = keyring.MasterKey(bytes(32)), keyring.MasterKey(bytes(range(32)))
if act.startswith("full"):
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20, 20))
if act.startswith("stranger") and os.geteuid() == 0:
    os.setgroups([])
    os.setgid(54321)
    os.setuid(54321)
try:
    if act.endswith("stage"):
        keyfile.stage(path, key, "new")
    elif act.endswith("swap"):
        keyfile.swap(path, path.with_name("staged"), expected=old)
    elif act.endswith("read"):
        keyring.read(path)
    else:
        keyfile.writable(path)
except keyfile.Refused as error:
    sys.exit(f"refused: {error}")
"""


def _probe(path: Path, act: str) -> str:
    ran = subprocess.run(
        [sys.executable, "-B", "-c", _PROBE, str(path), act],
        check=False,
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[2],
        timeout=60,
    )
    return ran.stderr.strip()


@pytest.mark.parametrize("act", ["stage", "swap"])
def test_a_full_disk_changes_nothing(home: Path, act: str) -> None:
    path = _default(home)
    keyfile.stage(path, OTHER, "staged")
    said = _probe(path, f"full-{act}")
    assert said.startswith("refused: ")
    assert "cannot be written: File too large" in said
    assert "\n" not in said
    assert path.read_text() == KEY.text
    assert _names(path.parent) == {"master.key", "staged"}


@pytest.fixture
def open_home() -> Iterator[Path]:
    """A directory that any user can reach, which pytest's own is not."""
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        directory.chmod(0o755)
        path = directory / "master.key"
        path.write_text(KEY.text)
        path.chmod(0o600)
        yield path


needs_root = pytest.mark.skipif(not AS_ROOT, reason="only root can become a stranger to the file")


@needs_root
@pytest.mark.parametrize(
    ("act", "mode", "says"),
    [
        ("read", 0o755, "cannot be read: Permission denied"),
        ("stage", 0o755, "cannot be written: Permission denied"),
        ("stage", 0o777, "must belong to user 0 and group 0"),
        ("writable", 0o755, "cannot be written"),
        ("writable", 0o777, "must belong to user 0 and group 0"),
        ("writable", 0o1777, "is sticky"),
    ],
)
def test_a_stranger_is_refused_and_leaves_nothing(open_home: Path, act: str, mode: int, says: str) -> None:
    open_home.parent.chmod(mode)
    said = _probe(open_home, f"stranger-{act}")
    assert said.startswith("refused: ")
    assert says in said
    assert "\n" not in said
    assert _names(open_home.parent) == {"master.key"}
    assert open_home.read_text() == KEY.text


@pytest.mark.skipif(AS_ROOT, reason="no mode keeps root out; the strangers above are the same guard")
def test_a_read_only_directory_is_refused(home: Path) -> None:
    path = _default(home)
    path.parent.chmod(0o500)
    try:
        for act in (lambda: keyfile.writable(path), lambda: keyfile.stage(path, OTHER, "new")):
            with pytest.raises(Refused, match="cannot be written"):
                act()
    finally:
        path.parent.chmod(0o700)


def test_a_filesystem_that_takes_nothing_has_no_room() -> None:
    with pytest.raises(Refused, match="no room"):
        keyfile.room(Path("/proc/version"))


def test_a_retired_key_is_sealed_under_its_successor() -> None:
    sealed = keyring.seal_key(KEY, under=OTHER)
    assert json.loads(json.dumps(sealed)) == sealed
    assert all(isinstance(value, str) for value in sealed.values())
    assert not any(secret in str(sealed) for secret in (KEY.text, KEY.raw.hex(), OTHER.text))
    assert keyring.open_key(sealed, under=OTHER) == KEY
    with pytest.raises(BadKey, match="not sealed under"):
        keyring.open_key(sealed, under=keyring.generate())
    assert keyring.seal_key(KEY, under=OTHER)["iv"] != sealed["iv"]


@pytest.mark.parametrize("name", ["v", "purpose", "key", "under", "iv", "tag", "ciphertext"])
@pytest.mark.parametrize("value", ["", "AAAA", "0" * 12, 3, None])
def test_a_sealed_key_that_was_altered_does_not_open(name: str, value: Any) -> None:
    with pytest.raises(BadKey):
        keyring.open_key({**keyring.seal_key(KEY, under=OTHER), name: value}, under=OTHER)
    without = keyring.seal_key(KEY, under=OTHER)
    del without[name]
    with pytest.raises(BadKey):
        keyring.open_key(without, under=OTHER)
