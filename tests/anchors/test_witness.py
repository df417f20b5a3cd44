"""An auditor with the bucket and a public key: every way to tamper with the receipts there is found."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.anchors.conftest import Bucket
from tests.cli.helpers import check_refusal
from worker import anchors, audit, canonical, chains
from worker.anchors import Signed
from worker.storage import LARGEST

Chain = dict[str, bytes]


def _key(chain: Chain, seq: int) -> str:
    return next(key for key in chain if key.startswith(f"receipts/{seq:012d}-"))


def _head(seq: int) -> str:
    return f"receipts/heads/{seq:012d}.json"


def _edit(chain: Chain, key: str, **values: str) -> None:
    chain[key] = canonical.encode(json.loads(chain[key]) | values)


def _rename(chain: Chain, old: str, new: str) -> None:
    chain[new] = chain.pop(old)


def _swap(chain: Chain, one: str, other: str) -> None:
    chain[one], chain[other] = chain[other], chain[one]


def _forge(chain: Chain, seq: int) -> None:
    """Another body, with its own hash and name."""
    key = _key(chain, seq)
    signed = Signed.decode(chain.pop(key))
    body = signed.body.replace('"actor":"tester"', '"actor":"nobody"')
    assert body != signed.body
    digest = hashlib.sha256(body.encode()).hexdigest()
    made = Signed(body=body, hash=digest, signer=signed.signer, signature=signed.signature)
    chain[f"receipts/{seq:012d}-{digest[:16]}.json"] = made.encode()


def _change_body(chain: Chain, seq: int) -> None:
    key = _key(chain, seq)
    _edit(chain, key, body=json.loads(chain[key])["body"].replace('"actor":"tester"', '"actor":"nobody"'))


def _second(chain: Chain, seq: int) -> None:
    kept, key = dict(chain), _key(chain, seq)
    _forge(chain, seq)
    chain[key] = kept[key]


def _odd_body(chain: Chain, seq: int, body: str) -> None:
    digest = hashlib.sha256(body.encode()).hexdigest()
    key = _key(chain, seq)
    _edit(chain, key, body=body, hash=digest)
    _rename(chain, key, f"receipts/{seq:012d}-{digest[:16]}.json")


def _drop(*keys: Callable[[Chain], str]) -> Callable[[Chain], None]:
    def tamper(chain: Chain) -> None:
        for key in [key(chain) for key in keys]:
            del chain[key]

    return tamper


_BOMB = "[" * 200_000
_TAMPERS: dict[str, tuple[Callable[[Chain], object], str]] = {
    "forged": (lambda c: _forge(c, 2), "signature does not fit|does not name this receipt"),
    "changed body": (lambda c: _change_body(c, 2), "receipt 2: the body was changed"),
    "changed signature": (lambda c: _edit(c, _key(c, 2), signature="00" * 64), "receipt 2: the signature"),
    "a signature spelled otherwise": (
        lambda c: _edit(c, _key(c, 2), signature=json.loads(c[_key(c, 2)])["signature"].upper() + " "),
        "receipt 2: the signature",
    ),
    "a body with a float": (lambda c: _odd_body(c, 2, '{"settled_at":1.5}'), "receipt 2: "),
    "a name that writes on": (
        lambda c: c.update({"receipts/x\n\x1b[31mpaperclip-worker: chain intact": b"x"}),
        r"receipts/x\\n.*\[31mpaperclip-worker: chain intact is no name of ours",
    ),
    "no signature": (lambda c: _edit(c, _key(c, 2), signature="none"), "receipt 2: the signature"),
    "other signer": (lambda c: _edit(c, _key(c, 2), signer="0" * 16), "receipt 2: signed by 0+, a key that"),
    "first dropped": (_drop(lambda c: _key(c, 1), lambda _: _head(1)), "receipt 1 is missing"),
    "middle dropped": (_drop(lambda c: _key(c, 2)), "receipt 2: .*its receipt is not"),
    "middle dropped with its head": (_drop(lambda c: _key(c, 2), lambda _: _head(2)), "receipt 2 is missing"),
    "last dropped": (_drop(lambda c: _key(c, 4)), "receipt 4: .*its receipt is not"),
    "all receipts dropped": (_drop(*(lambda c, n=n: _key(c, n) for n in range(1, 5))), "its receipt is not"),
    "everything dropped": (lambda c: c.clear(), "receipt 0: there is no receipt|was deleted"),
    "swapped": (lambda c: _swap(c, _key(c, 2), _key(c, 3)), "receipt 2: .*renamed, or swapped"),
    "renamed out of the way": (lambda c: _rename(c, _key(c, 2), "receipts/mine.json"), "its receipt is not|no name"),
    "renamed to another hash": (
        lambda c: _rename(c, _key(c, 2), f"receipts/{2:012d}-{'0' * 16}.json"),
        "receipt 2: .*renamed",
    ),
    "renamed to the end": (
        lambda c: _rename(c, _key(c, 2), _key(c, 2).replace(f"{2:012d}", f"{5:012d}")),
        "receipt 2: .*its receipt is not",
    ),
    "a second receipt of a number": (lambda c: _second(c, 2), "receipt 2: .*(another receipt 2|does not name)"),
    "something beside": (lambda c: c.update({"receipts/notes.txt": b"hello"}), "no name of ours"),
    "not JSON": (lambda c: c.update({_key(c, 2): b"\xff"}), "receipt 2: .*other bytes than a receipt's"),
    "a JSON bomb": (lambda c: c.update({_key(c, 2): _BOMB.encode()}), "receipt 2: .*other bytes"),
    "more than we write": (lambda c: _edit(c, _key(c, 2), more="yes"), "receipt 2: .*other bytes"),
    "laid out otherwise": (
        lambda c: c.update({_key(c, 2): json.dumps(json.loads(c[_key(c, 2)])).encode()}),
        "receipt 2: .*other bytes",
    ),
    "a body that is a list": (lambda c: _odd_body(c, 2, "[]"), "receipt 2: "),
    "a body that is a bomb": (lambda c: _odd_body(c, 2, _BOMB), "receipt 2: "),
    "too large": (lambda c: c.update({_key(c, 2): b" " * (LARGEST + 1)}), "receipt 2: .*too large"),
    "newest head missing": (_drop(lambda _: _head(4)), "receipt 4: its head is missing"),
    "a head missing": (_drop(lambda _: _head(2)), "receipt 2: its head is missing"),
    "a head of another receipt": (lambda c: c.update({_head(4): c[_head(3)]}), "receipt 4: .*does not name this"),
    "a head with another hash": (lambda c: _edit(c, _head(4), hash="0" * 64), "receipt 4: .*does not have its hash"),
    "a head forged": (lambda c: _edit(c, _head(4), signature="00" * 64), "receipt 4: .*signature does not fit"),
    "a head that is none": (lambda c: c.update({_head(4): b"{}"}), "receipt 4: .*does not name this"),
    "a head beyond the end": (lambda c: c.update({_head(5): c[_head(4)]}), "receipt 5: .*its receipt is not"),
}


def test_an_untouched_chain_is_intact(bucket: Bucket) -> None:
    done = bucket.verify("--json")
    assert (done.returncode, done.stderr) == (0, "")
    found = json.loads(done.stdout)
    assert (found["receipts"], found["heads"], found["intact"], found["flaws"]) == (4, 4, True, [])
    assert found["head"]["seq"] == 4
    assert (found["locked"], found["locked_until"]) == (False, None)
    assert bucket.verify().stdout.startswith("4 receipts, chain intact, not locked; head 4 ")


@pytest.mark.parametrize(("tamper", "says"), _TAMPERS.values(), ids=list(_TAMPERS))
def test_tampering_is_found(bucket: Bucket, chain: Chain, tamper: Callable[[Chain], object], says: str) -> None:
    """Without versions by what is there; with versions at the latest by what was there before."""
    now = dict(chain)
    tamper(now)
    assert now != chain
    for key in chain.keys() - now.keys():
        bucket.delete(key)
    for key, body in now.items():
        if chain.get(key) != body:
            bucket.put(key, body)
    if bucket.name != "locked":
        check_refusal(bucket.verify(), says=says, status=1)
        return
    done = bucket.verify("--json")
    assert done.returncode == 1
    assert len(done.stderr.splitlines()) == 1
    found = json.loads(done.stdout)
    assert found["intact"] is False
    told = [one["what"] for one in found["flaws"]]
    for key in chain.keys() - now.keys():
        assert f"{key} was deleted: the bucket has a delete marker for it" in told
    for key in chain.keys() & now.keys():
        if chain[key] != now[key] and "too large" not in says:
            assert f"{key} was written again with other bytes" in told


def test_the_signing_key_alone_does_not_rewrite_a_bucket_with_versions(
    bucket: Bucket, chain: Chain, signing_key: Path
) -> None:
    """The whole chain made anew with the true key: a bucket without versions cannot tell, one with versions does."""
    for key in chain:
        bucket.delete(key)
    for key, body in rewritten(chain, audit.Signer.load(signing_key)).items():
        bucket.put(key, body)
    done = bucket.verify()
    if bucket.name == "locked":
        check_refusal(done, says="receipt 1: .*was deleted", status=1)
    else:
        assert done.returncode == 0


def test_another_key_does_not_rewrite_a_chain(bucket: Bucket, chain: Chain, tmp_path: Path) -> None:
    for key in chain:
        bucket.delete(key)
    for key, body in rewritten(chain, audit.keygen(tmp_path / "forger.pem")).items():
        bucket.put(key, body)
    done = bucket.verify("--json")
    assert done.returncode == 1
    assert _untrusted(done.stdout) == {1, 2, 3, 4}


@pytest.mark.parametrize("first", [True, False], ids=["before", "after"])
def test_a_second_receipt_is_judged_wherever_its_name_sorts(
    bucket: Bucket, chain: Chain, tmp_path: Path, first: bool
) -> None:
    forger = audit.keygen(tmp_path / "forger.pem")
    forged = next(
        made
        for made in (rewritten(chain, forger, actor=f"nobody {number}") for number in itertools.count())
        if (_key(made, 2) < _key(chain, 2)) is first
    )
    bucket.put(_key(forged, 2), forged[_key(forged, 2)])
    done = bucket.verify("--json")
    assert done.returncode == 1
    assert _untrusted(done.stdout) == {2}
    other = _key(chain if first else forged, 2)
    assert f"there is another receipt 2, {other}" in [one["what"] for one in json.loads(done.stdout)["flaws"]]


def _untrusted(found: str) -> set[int]:
    """The numbers of the receipts that a key signed which nobody trusts."""
    return {one["seq"] for one in json.loads(found)["flaws"] if "a key that is not trusted" in one["what"]}


def test_a_prefix_with_nothing_in_it_is_no_success(bucket: Bucket) -> None:
    done = bucket.auditor.cli(
        *("receipts", "verify", "--from-s3", "--public-key", str(bucket.public)),
        ok=False,
        env={"PAPERCLIP_WORKER_S3_PREFIX": "nothing-here/"},
    )
    check_refusal(done, says="there is no receipt", status=1)


def rewritten(chain: Chain, signer: audit.Signer, *, actor: str = "nobody") -> Chain:
    """The chain with another's name in it, whole in itself, as somebody with this key can make it."""
    made: Chain = {}
    previous = chains.GENESIS
    for seq in range(1, 5):
        body = json.loads(Signed.decode(chain[_key(chain, seq)]).body)
        body |= {"actor": actor, "prev": previous, "signer": signer.fingerprint}
        text = canonical.encode(body).decode()
        previous = anchors.sha256(text)
        signed = Signed(body=text, hash=previous, signer=signer.fingerprint, signature=signer.sign(previous))
        made[f"receipts/{seq:012d}-{previous[:16]}.json"] = signed.encode()
        facts = {"v": 1, "head": True, "seq": seq, "hash": previous, "time": body["settled_at"]}
        head = canonical.encode({**facts, "signer": signer.fingerprint}).decode()
        digest = anchors.sha256(head)
        made[_head(seq)] = Signed(
            body=head, hash=digest, signer=signer.fingerprint, signature=signer.sign(digest)
        ).encode()
    return made
