"""Ciphertext in JSON text: whatever is around an envelope stays byte for byte, whatever is in one opens as before."""

from __future__ import annotations

import base64
import json
import re
from dataclasses import replace
from hashlib import sha256
from typing import Any

import pytest
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from hypothesis import given
from hypothesis import strategies as st

from worker import keyring
from worker.envelopes import LocalEncrypted
from worker.reseal import Census, Resealer

SCHEME = LocalEncrypted.scheme
OLD, NEW, THIRD = (LocalEncrypted(keyring.generate().raw) for _ in range(3))
RESEALER = Resealer(OLD, NEW)
# No JSON text that hypothesis makes has one.
_HOLE = "\x00"

_texts = st.one_of(
    st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\x00")),
    st.sampled_from(
        [
            '{"scheme": "local_encrypted_v1"}',
            "}{",
            '\\"}',
            "local_encrypted_v1",
            '"scheme": "local_encrypted_v1", "iv": "", "tag": "", "ciphertext": ""}',
            "größe 顧客 😀",
        ]
    ),
)
_strings = st.builds(lambda text, ascii_: json.dumps(text, ensure_ascii=ascii_), _texts, st.booleans())
_numbers = st.sampled_from(["12345678901234567890", "0.10", "1.0000000000000000000000001", "-0", "1" * 400])
_leaves = st.one_of(_strings, _numbers, st.sampled_from(["null", "true", "false", _HOLE, _HOLE]))
_documents = st.recursive(
    _leaves,
    lambda inner: st.one_of(
        st.lists(inner, max_size=4).map(lambda items: f"[{', '.join(items)}]"),
        st.lists(st.tuples(_strings, inner), max_size=4).map(
            lambda items: "{" + ", ".join(f"{name}: {value}" for name, value in items) + "}"
        ),
    ),
    max_leaves=12,
)


def reseal(resealer: Resealer, text: bytes) -> tuple[bytes | None, Census]:
    (found,) = resealer.resealed([text], [b""])
    return found


def count(resealer: Resealer, text: bytes, digest: bytes = b"", *, new_first: bool = False) -> Census:
    (found,) = resealer.counted([text], [digest], new_first=new_first)
    return found


def _filled(document: str, envelopes: list[dict[str, Any]]) -> bytes:
    parts = document.split(_HOLE)
    texts = [json.dumps(one, ensure_ascii=False) for one in envelopes]
    return "".join(part + text for part, text in zip(parts, [*texts, ""], strict=True)).encode()


@given(document=_documents, data=st.data())
def test_only_what_the_old_key_opens_differs_afterwards(document: str, data: st.DataObject) -> None:
    holes = document.count(_HOLE)
    keys = data.draw(st.lists(st.sampled_from(["old", "new", "third"]), min_size=holes, max_size=holes))
    values = data.draw(st.lists(_texts, min_size=holes, max_size=holes))
    codecs = {"old": OLD, "new": NEW, "third": THIRD}
    sealed = [codecs[key].seal(value.encode()) for key, value in zip(keys, values, strict=True)]
    text = _filled(document, sealed)
    found, census = reseal(RESEALER, text)
    assert census == Census(old=keys.count("old"), new=keys.count("new"), lost=keys.count("third"))
    counted = count(RESEALER, text, b"")
    assert counted == replace(census, other=int(OLD.scheme.encode() not in text))
    if "old" not in keys:
        assert found is None
        return
    assert found is not None
    # Each literal part of the document is found again in its place, and between them one envelope each.
    literal = [re.escape(part) for part in document.split(_HOLE)]
    match = re.fullmatch(r"(\{[^{}]*\})".join(literal), found.decode(), re.DOTALL)
    assert match is not None
    for key, value, before, after in zip(keys, values, sealed, match.groups(), strict=True):
        if key == "old":
            assert NEW.open(json.loads(after)).decode() == value
        else:
            assert after == json.dumps(before, ensure_ascii=False)
    assert reseal(RESEALER, found)[0] is None


@pytest.mark.parametrize(
    "extra",
    [
        '"note": "größe {", ',
        '"number": 12345678901234567890, ',
        '"number": 0.10, ',
        '"number": 1.00000000000000000000000010, "more": {"iv": "x", "deep": [1.50, {"tag": null}]}, ',
        '"flag": true, "nothing": null, "list": [], ',
    ],
)
def test_other_fields_of_an_envelope_stay_as_they_are(extra: str) -> None:
    envelope = OLD.seal("größe".encode())
    rest = json.dumps(envelope)[1:]
    for before, after in (("", ""), ('{"a": [1.10, ', ', "é"]}')):
        found, census = reseal(RESEALER, f"{before}{{{extra}{rest}{after}".encode())
        assert found is not None
        assert census == Census(old=1)
        text = found.decode()
        # Spaces between fields are not the column's to keep: jsonb has none.
        assert _dense(text).startswith(_dense(f"{before}{{{extra}"))
        assert text.endswith(after)
        inner = text[len(before) : len(text) - len(after)]
        assert NEW.open(json.loads(inner)).decode() == "größe"


def _dense(text: str) -> str:
    return re.sub(r"([:,]) ", r"\1", text)


def test_an_envelope_within_another_is_not_the_apps() -> None:
    inner = json.dumps(OLD.seal(b"inner"))
    outer = OLD.seal(b"outer")
    text = json.dumps({"first": OLD.seal(b"first"), "outer": {**outer, "extra": json.loads(inner)}}).encode()
    found, census = reseal(RESEALER, text)
    assert found is not None
    assert census == Census(old=2)
    assert inner.encode() in found
    assert NEW.open(json.loads(found)["first"]) == b"first"
    assert NEW.open(json.loads(found)["outer"]) == b"outer"


@pytest.mark.parametrize("iv", [8, 12, 16, 60])
def test_an_iv_of_another_length_is_opened(iv: int) -> None:
    raw, key = b"\x07" * iv, keyring.generate()
    sealed = AESGCM(key.raw).encrypt(raw, b"value", None)
    parts = {"iv": raw, "tag": sealed[-16:], "ciphertext": sealed[:-16]}
    envelope = {"scheme": SCHEME, **{name: base64.b64encode(one).decode() for name, one in parts.items()}}
    found, census = reseal(Resealer(LocalEncrypted(key.raw), NEW), json.dumps(envelope).encode())
    assert found is not None
    assert census == Census(old=1)
    assert NEW.open(json.loads(found)) == b"value"
    assert len(base64.b64decode(json.loads(found)["iv"])) == 12


@pytest.mark.parametrize("size", [4, 8, 12, 13, 14, 15])
def test_a_short_tag_becomes_a_whole_one(size: int) -> None:
    envelope = OLD.seal(b"value")
    envelope["tag"] = base64.b64encode(base64.b64decode(str(envelope["tag"]))[:size]).decode()
    found, _ = reseal(RESEALER, json.dumps(envelope).encode())
    assert found is not None
    assert len(base64.b64decode(json.loads(found)["tag"])) == 16
    assert NEW.open(json.loads(found)) == b"value"


@pytest.mark.parametrize(
    "damage",
    [{"tag": None}, {"iv": 5}, {"ciphertext": []}, {"tag": "AAAA"}, {"iv": ""}, {"tag": {"scheme": "x"}}],
)
def test_a_damaged_envelope_is_counted_and_left(damage: dict[str, Any]) -> None:
    whole, broken = OLD.seal(b"whole"), {**OLD.seal(b"broken"), **damage}
    alone = json.dumps(broken).encode()
    assert reseal(RESEALER, alone) == (None, Census(lost=1))
    found, census = reseal(RESEALER, json.dumps([whole, broken]).encode())
    assert found is not None
    assert census == Census(old=1, lost=1)
    assert found.endswith(b", " + alone + b"]")


def test_a_digest_that_does_not_fit_is_odd() -> None:
    text = json.dumps(OLD.seal(b"value")).encode()
    fits, other = (sha256(one).hexdigest().encode() for one in (b"value", b"other"))
    assert count(RESEALER, text, fits) == Census(old=1)
    assert count(RESEALER, text, other) == Census(old=1, odd=1)
    assert count(RESEALER, text, other, new_first=True) == Census(old=1, odd=1)
    assert count(RESEALER, text, b"") == Census(old=1)


def test_without_a_new_key_nothing_is_sealed_and_all_is_counted() -> None:
    look = Resealer(OLD, None)
    text = json.dumps([OLD.seal(b"x"), NEW.seal(b"y")]).encode()
    assert count(look, text, b"") == Census(old=1, lost=1)
    with pytest.raises(ValueError, match="no key to seal with"):
        reseal(look, text)


def _sealed(codec: LocalEncrypted) -> str:
    return json.dumps(codec.seal(b"x"))


@pytest.mark.parametrize(
    ("text", "all_new"),
    [
        (_sealed(NEW), True),
        (f'{{"a": [{_sealed(NEW)}, {_sealed(NEW)}]}}', True),
        (f"kept: {_sealed(NEW)}; and {{braces}}", True),
        (_sealed(OLD), False),
        (_sealed(THIRD), False),
        (f"[{_sealed(NEW)}, {_sealed(OLD)}]", False),
        (f"[{_sealed(NEW)}, {_sealed(THIRD)}]", False),
        # In a string, escaped; in what is no JSON; in mere talk: nobody can tell.
        (json.dumps({"a": _sealed(NEW)}), False),
        (f"}} {_sealed(NEW)}", False),
        (f'{{"{SCHEME}', False),
        (f"the scheme is {SCHEME}, with its ciphertext", False),
        (f'[{_sealed(NEW)}, "{SCHEME}"]', False),
    ],
)
def test_of_any_text_it_is_told_whether_all_is_plainly_under_the_new_key(text: str, all_new: bool) -> None:
    assert RESEALER.all_new(text.encode()) is all_new


@given(text=_texts | _documents)
def test_of_no_text_without_an_envelope_is_that_said(text: str) -> None:
    assert RESEALER.all_new(text.encode()) is (SCHEME not in text)


# As deep as PostgreSQL takes it, and as long; no parser of ours does.
_DEEP = "[" * 3_000 + "1" + "]" * 3_000
_LONG = "1" + "0" * 6_000


@pytest.mark.parametrize(
    "odd", [_DEEP, '{"a":' * 3_000 + "1" + "}" * 3_000, _LONG], ids=["lists", "objects", "number"]
)
@pytest.mark.parametrize("place", ["beside", "around", "alone"])
def test_what_no_parser_reads_is_stepped_over(odd: str, place: str) -> None:
    """An agent may have put it there; nothing but an envelope needs to be parsed."""
    sealed = json.dumps(OLD.seal("größe".encode()))
    mention = json.dumps(SCHEME)
    before, after = {
        "beside": (f'{{"odd": {odd}, "said": {mention}, "found": [', "]}"),
        "around": (f'{{"found": [{odd}, ', f", {mention}, {odd}]}}"),
        "alone": (f"[{mention}, {odd}]", None),
    }[place]
    if after is None:
        assert reseal(RESEALER, before.encode()) == (None, Census())
        assert count(RESEALER, before.encode()) == Census()
        return
    found, census = reseal(RESEALER, f"{before}{sealed}{after}".encode())
    assert census == Census(old=1)
    assert count(RESEALER, f"{before}{sealed}{after}".encode(), new_first=True) == Census(old=1)
    assert found is not None
    assert found.startswith(before.encode())
    assert found.endswith(after.encode())
    assert NEW.open(json.loads(found[len(before) : -len(after)])) == "größe".encode()


@pytest.mark.parametrize("odd", [_DEEP, _LONG], ids=["lists", "number"])
def test_an_envelope_that_no_parser_reads_is_a_damaged_one(odd: str) -> None:
    sealed, broken = json.dumps(OLD.seal(b"whole")), f'{{"odd": {odd}, {json.dumps(OLD.seal(b"broken"))[1:]}'
    assert reseal(RESEALER, broken.encode()) == (None, Census(lost=1))
    assert not RESEALER.all_new(broken.encode())
    found, census = reseal(RESEALER, f"[{sealed}, {broken}]".encode())
    assert census == Census(old=1, lost=1)
    assert found is not None
    assert found.endswith(f", {broken}]".encode())


@pytest.mark.parametrize("more", [{}, {"iv": "AAAA", "tag": "AAAA", "ciphertext": "AAAA"}])
def test_what_no_key_opens_hides_no_envelope_in_it(more: dict[str, str]) -> None:
    """The app reads that one by its place, whatever the document around it says of itself."""
    outer = {"scheme": SCHEME, **more, "paperclipSecretRedactions": [{"material": OLD.seal(b"inner")}]}
    found, census = reseal(RESEALER, json.dumps({"first": OLD.seal(b"first"), "outer": outer}).encode())
    assert census == Census(old=2, lost=1)
    assert found is not None
    after = json.loads(found)
    assert NEW.open(after["first"]) == b"first"
    assert NEW.open(after["outer"].pop("paperclipSecretRedactions")[0]["material"]) == b"inner"
    assert after["outer"] == {"scheme": SCHEME, **more}
