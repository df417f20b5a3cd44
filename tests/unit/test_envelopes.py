"""Envelopes: what the released app sealed opens, what was altered does not, and no two are alike."""

from __future__ import annotations

import base64
import hashlib
import json
import os
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from hypothesis import given
from hypothesis import strategies as st

from worker import envelopes
from worker.envelopes import CODECS, Codec, Damaged, LocalEncrypted, NotOurs, Pbkdf2, WrongKey

VECTORS: dict[str, Any] = json.loads(
    (Path(__file__).parents[1] / "vectors" / "local_encrypted_vectors.json").read_text(encoding="utf-8")
)
KEY, OTHER = bytes(range(32)), bytes(32)
SALT = bytes(16)


def _codec(scheme: str, key: bytes = KEY) -> Codec:
    return Pbkdf2(key, salt=SALT, iterations=1) if scheme == Pbkdf2.scheme else LocalEncrypted(key)


def _text(raw: bytes) -> str:
    return base64.b64encode(raw).decode()


@pytest.mark.parametrize("vector", VECTORS["vectors"], ids=lambda v: f"{v['master_key_encoding']}-{v['case']}")
def test_what_the_app_sealed_opens_and_is_sealed_alike(vector: dict[str, Any]) -> None:
    codec = LocalEncrypted(bytes.fromhex(vector["master_key_hex"]))
    plain = codec.open(vector["material"])
    assert plain == base64.b64decode(vector["plaintext_utf8_b64"])
    assert hashlib.sha256(plain).hexdigest() == vector["value_sha256"]
    fresh = codec.seal(plain)
    assert fresh.keys() == vector["material"].keys()
    assert {name: len(str(text)) for name, text in fresh.items()} == {
        name: len(text) for name, text in vector["material"].items()
    }
    assert codec.open(fresh) == plain
    with pytest.raises(WrongKey):
        LocalEncrypted(os.urandom(32)).open(vector["material"])


def test_the_other_carriers_of_the_app_open() -> None:
    carriers = VECTORS["other_master_key_carriers"]
    teams = carriers["chat_teams_file_transfers_private_state"]
    sealed = LocalEncrypted(bytes.fromhex(teams["master_key_hex"])).open(teams["column_value"]["binding"])
    assert json.loads(sealed)["context"] == teams["seal_context"]
    registry = carriers["heartbeat_runs_context_snapshot_paperclipSecretRedactions"]
    codec = LocalEncrypted(bytes.fromhex(registry["master_key_hex"]))
    assert [codec.open(entry["material"]).decode() for entry in registry["entries"]] == registry["plaintexts"]
    proposal = carriers["company_secret_proposals_value_ciphertext"]
    assert codec.open(proposal["value_ciphertext"]).decode() == proposal["plaintext"]


@pytest.mark.parametrize("scheme", list(CODECS))
@given(plain=st.binary(max_size=300), extra=st.dictionaries(st.sampled_from(["x", "note", "n"]), st.integers()))
def test_any_bytes_come_back(scheme: str, plain: bytes, extra: dict[str, Any]) -> None:
    codec, successor = _codec(scheme), _codec(scheme, OTHER)
    old = {**extra, **codec.seal(plain)}
    new = successor.reseal(old, codec.open(old))
    assert successor.open(new) == plain
    assert new.keys() == old.keys()
    assert {name: new[name] for name in extra} == extra
    assert new["iv"] != old["iv"]
    with pytest.raises(WrongKey):
        codec.open(new)


@pytest.mark.parametrize("scheme", list(CODECS))
@pytest.mark.parametrize("part", ["iv", "tag", "ciphertext"])
def test_a_flipped_bit_does_not_open(scheme: str, part: str) -> None:
    codec = _codec(scheme)
    material = codec.seal(b"value")
    raw = base64.b64decode(str(material[part]))
    for bit in range(len(raw) * 8):
        flipped = bytes(byte ^ (1 << bit % 8 if at == bit // 8 else 0) for at, byte in enumerate(raw))
        with pytest.raises(WrongKey):
            codec.open({**material, part: _text(flipped)})


@pytest.mark.parametrize("scheme", list(CODECS))
@pytest.mark.parametrize("part", ["iv", "tag", "ciphertext"])
@pytest.mark.parametrize("value", [None, 1, True, [], {}, b"AAAA", ...])
def test_a_part_that_is_no_text_is_damage(scheme: str, part: str, value: Any) -> None:
    codec = _codec(scheme)
    material = {**codec.seal(b"value"), part: value}
    if value is ...:
        del material[part]
    with pytest.raises(Damaged):
        codec.open(material)


@pytest.mark.parametrize("scheme", list(CODECS))
def test_lengths_that_the_app_refuses_are_damage(scheme: str) -> None:
    codec = _codec(scheme)
    material = codec.seal(b"value")
    for part, lengths in {"tag": (0, 3, 5, 7, 9, 11, 17, 32), "iv": (0, 1, 7, 129)}.items():
        for length in lengths:
            with pytest.raises(Damaged):
                codec.open({**material, part: _text(bytes(length))})


@pytest.mark.parametrize("scheme", list(CODECS))
@pytest.mark.parametrize(
    "material", [{}, {"scheme": None}, {"scheme": "aws_secrets_manager_v1"}, {"scheme": ["x"]}, None, [], "text", 3]
)
def test_other_schemes_are_left_alone(scheme: str, material: Any) -> None:
    with pytest.raises(NotOurs):
        _codec(scheme).open(material)
    with pytest.raises(NotOurs):
        _codec(scheme).reseal(material, b"")


def test_one_scheme_is_not_taken_for_the_other() -> None:
    local, derived = (_codec(scheme) for scheme in (LocalEncrypted.scheme, Pbkdf2.scheme))
    for mine, other in ((local, derived), (derived, local)):
        with pytest.raises(NotOurs):
            mine.open(other.seal(b"value"))


@pytest.mark.parametrize("length", [4, 8, 12, 13, 14, 15])
def test_short_tags_are_checked_as_far_as_they_go(length: int) -> None:
    codec = LocalEncrypted(KEY)
    material = codec.seal(b"value")
    tag = base64.b64decode(str(material["tag"]))[:length]
    assert codec.open({**material, "tag": _text(tag)}) == b"value"
    with pytest.raises(WrongKey):
        codec.open({**material, "tag": _text(bytes([tag[0] ^ 1]) + tag[1:])})


@pytest.mark.parametrize("length", [8, 16, 128])
def test_ivs_of_other_lengths_are_read(length: int) -> None:
    encryptor = Cipher(algorithms.AES(KEY), modes.GCM(bytes(length))).encryptor()
    ciphertext = encryptor.update(b"value") + encryptor.finalize()
    parts = {"iv": bytes(length), "tag": encryptor.tag, "ciphertext": ciphertext}
    material = {"scheme": LocalEncrypted.scheme, **{name: _text(raw) for name, raw in parts.items()}}
    assert LocalEncrypted(KEY).open(material) == b"value"


def test_base64_is_read_as_the_app_reads_it() -> None:
    codec = LocalEncrypted(KEY)
    material = codec.seal(bytes(200))
    spelt = {
        name: str(text).rstrip("=").replace("+", "-").replace("/", "_") if name != "scheme" else text
        for name, text in material.items()
    }
    spelt["ciphertext"] = "\n".join(str(spelt["ciphertext"])[at : at + 64] for at in range(0, 300, 64)) + "=\u00e9"
    assert codec.open(spelt) == bytes(200)


def test_a_derived_key_is_the_standards() -> None:
    material = Pbkdf2(KEY, salt=SALT, iterations=7).seal(b"value")
    assert (material["kdf"], material["iterations"], material["salt"]) == ("pbkdf2-hmac-sha256", 7, _text(SALT))
    iv, tag, ciphertext = (base64.b64decode(str(material[part])) for part in ("iv", "tag", "ciphertext"))
    derived = hashlib.pbkdf2_hmac("sha256", KEY, SALT, 7, 32)
    assert AESGCM(derived).decrypt(iv, ciphertext + tag, None) == b"value"


@pytest.mark.parametrize(
    "change",
    [
        {"kdf": "scrypt"},
        {"kdf": None},
        {"salt": 1},
        {"salt": ""},
        {"iterations": 0},
        {"iterations": -1},
        {"iterations": True},
        {"iterations": "600000"},
        {"iterations": 1.0},
        {"iterations": envelopes.MOST_ITERATIONS + 1},
        {"iterations": 10**30},
    ],
    ids=str,
)
def test_a_derivation_out_of_bounds_is_damage(change: dict[str, Any]) -> None:
    codec = _codec(Pbkdf2.scheme)
    with pytest.raises(Damaged):
        codec.open({**codec.seal(b"value"), **change})


def test_an_envelope_does_not_talk_the_next_ones_down() -> None:
    weak = _codec(Pbkdf2.scheme).seal(b"value")
    codec = Pbkdf2(KEY)
    assert codec.open(weak) == b"value"
    assert codec.derivation[1] == envelopes.ITERATIONS
    strong = Pbkdf2(OTHER)
    with pytest.raises(WrongKey):
        strong.open({**weak, "iterations": envelopes.ITERATIONS + 1})
    assert strong.derivation[1] == envelopes.ITERATIONS + 1


def test_processes_given_a_derivation_share_it() -> None:
    first = Pbkdf2(KEY, iterations=2)
    salt, iterations = first.derivation
    second = Pbkdf2(KEY, salt=salt, iterations=iterations)
    assert first.seal(b"")["salt"] == second.seal(b"")["salt"] != Pbkdf2(KEY, iterations=2).seal(b"")["salt"]


@pytest.mark.parametrize("iterations", [0, envelopes.MOST_ITERATIONS + 1])
def test_iterations_out_of_bounds_are_not_written(iterations: int) -> None:
    with pytest.raises(ValueError, match="iterations"):
        Pbkdf2(KEY, iterations=iterations)


@pytest.mark.parametrize("codec", CODECS.values())
@pytest.mark.parametrize("length", [0, 16, 31, 33])
def test_a_key_of_another_length_is_refused(codec: type[Codec], length: int) -> None:
    with pytest.raises(ValueError, match="32 bytes"):
        codec(bytes(length))


def test_no_iv_is_used_twice_not_even_by_a_child() -> None:
    codec = LocalEncrypted(KEY)
    codec.seal(b"")
    ours, theirs = os.pipe()
    child = os.fork()
    if child == 0:
        # Out of the test's process in any case, and without its clean-up.
        try:
            os.write(theirs, json.dumps([codec.seal(b"")["iv"] for _ in range(100)]).encode())
        finally:
            os._exit(0)
    os.close(theirs)
    with os.fdopen(ours) as said:
        drawn = json.loads(said.read())
    os.waitpid(child, 0)
    drawn += [codec.seal(b"")["iv"] for _ in range(2000)]
    assert len(set(drawn)) == 2100


def test_what_is_raised_quotes_nothing() -> None:
    codec = LocalEncrypted(KEY)
    material = {**codec.seal(b"value"), "tag": "c2VjcmV0"}
    with pytest.raises(Damaged) as caught:
        codec.open(material)
    assert "c2VjcmV0" not in str(caught.value)
