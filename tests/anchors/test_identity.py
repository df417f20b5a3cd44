"""Receipts name their ledger: those of another deployment do not pass for ours, though its key be the same."""

from __future__ import annotations

import hashlib
import json
from typing import Any
from uuid import UUID, uuid4

import pytest

from tests.anchors.conftest import Bucket
from tests.cli.helpers import check_refusal, complete, refused
from tests.conftest import Deployment
from worker import canonical, chains, ledger
from worker.audit import Signer
from worker.chains import Receipt

OTHER = "00000000-0000-4000-8000-00000000000f"
SAYS = "it is of another ledger"


def _signed(signer: Signer, *ledgers: str | None) -> list[Receipt]:
    """A chain of receipts, each of the ledger given, or of none, as a release before 0.7.0 wrote them."""
    made: list[Receipt] = []
    for seq, name in enumerate(ledgers, 1):
        run = uuid4()
        facts: dict[str, Any] = {"seq": seq, "run": str(run), "signer": signer.fingerprint}
        facts |= {"prev": made[-1].hash if made else chains.GENESIS} | ({"ledger": name} if name else {})
        body = canonical.encode(facts).decode()
        digest = hashlib.sha256(body.encode()).hexdigest()
        made.append(
            Receipt(
                seq=seq,
                run_id=run,
                body=body,
                hash=digest,
                signer=signer.fingerprint,
                signature=signer.sign(digest),
            )
        )
    return made


@pytest.mark.parametrize(
    ("ledgers", "of", "flaws"),
    [
        ((None, None, "a", "a"), None, []),
        ((None, "a", "a"), "a", []),
        ((None, None), "a", []),
        (("a", "b", "a"), None, [(2, SAYS)]),
        (("b", "b"), "a", [(1, SAYS), (2, SAYS)]),
        (("a", None, "a"), None, [(2, "it names no ledger, and earlier ones do")]),
    ],
)
def test_a_chain_is_of_one_ledger(
    signing_key: Any, ledgers: tuple[str | None, ...], of: str | None, flaws: list[tuple[int, str]]
) -> None:
    signer = Signer.load(signing_key)
    chain = chains.verify(_signed(signer, *ledgers), [signer.public], of=of)
    assert len(chain.flaws) == len(flaws), chain.flaws
    for flaw, (seq, says) in zip(chain.flaws, flaws, strict=True):
        assert flaw.seq == seq
        assert flaw.what.startswith(says)


def test_an_auditor_can_demand_a_ledger(bucket: Bucket, standing: Deployment) -> None:
    own = standing.json("receipts", "verify")["ledger"]
    assert UUID(own) == standing.operations.require_ledger()
    told = json.loads(bucket.verify("--json", "--ledger", own).stdout)
    assert (told["intact"], told["ledger"]) == (True, own)
    assert bucket.verify().stdout.endswith(f"; ledger {own}\n")
    check_refusal(bucket.verify("--ledger", OTHER), says=f"receipt 1: {SAYS}.*3 more", status=1)
    check_refusal(bucket.verify("--ledger", "mine"), says="--ledger.*not a valid UUID", status=2)
    refused(standing, "receipts", "verify", "--ledger", own, says="--ledger goes with --from-s3")


def test_the_chain_of_another_deployment_in_the_place_of_ours(released: Deployment) -> None:
    """Signed with our key, in our database and in our bucket: it is another's all the same."""
    complete(released)
    assert released.json("receipts", "verify", "--anchors")["intact"]
    released.query("UPDATE paperclip_worker.identity SET id = %s", OTHER)
    for words in ((), ("--anchors",)):
        check_refusal(released.cli("receipts", "verify", *words, ok=False), says=f"receipt 1: {SAYS}", status=1)
    refused(
        released, "run", "restore-logs", "--run", "last", "--inline", "--yes", says=f"receipt 1 .*{SAYS}", status=2
    )


def test_a_ledger_without_its_id_begins_nothing(released: Deployment) -> None:
    """A run that could not name its ledger could not end."""
    released.query("DELETE FROM paperclip_worker.identity")
    for words in (("run", "prune-logs", "--inline", "--yes"), ("worker",), ("db", "init")):
        refused(released, *words, says="the ledger has lost its id")
    assert released.query("SELECT count(*) FROM paperclip_worker.runs") == [(0,)]


def test_the_id_is_the_owner_s_to_write(released: Deployment) -> None:
    assert released.json("db", "init")["ledger"] == str(released.operations.require_ledger())
    grants = [line for line in released.cli("db", "grants", "--role", "w").stdout.splitlines() if ".identity" in line]
    assert [line.split(" ON ")[0] for line in grants] == ["GRANT SELECT", "REVOKE UPDATE", "REVOKE INSERT"]
    with released.operations.transaction(read_only=True) as connection:
        assert ledger.identity(connection) == released.operations.require_ledger()
