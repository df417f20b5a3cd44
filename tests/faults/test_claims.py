"""One Redis database, one deployment: a second one is refused by name, and takes nothing of the first."""

from __future__ import annotations

import redis

from tests.cli.helpers import INLINE, PRUNE, check_refusal
from tests.conftest import Deployment
from worker import brokers

OTHER = b"00000000-0000-4000-8000-00000000000f"
SAYS = f"BROKER_URL: this database of Redis is another deployment's .ledger {OTHER.decode()}.*redis-cli -u URL DEL "


def test_a_second_deployment_is_refused(released: Deployment) -> None:
    with redis.Redis.from_url(released.environment["PAPERCLIP_WORKER_BROKER_URL"]) as client:
        client.set(brokers.CLAIM, OTHER)
        for words in ((*PRUNE, "--yes"), (*PRUNE, "--yes", "--detach"), ("beat",), ("worker",)):
            line = check_refusal(released.cli(*words, ok=False), says=SAYS, status=2)
            assert f"this one is {released.operations.require_ledger()}" in line
        assert released.query("SELECT count(*) FROM paperclip_worker.runs") == [(0,)]
        assert client.keys() == [brokers.CLAIM.encode()]
        assert client.get(brokers.CLAIM) == OTHER
        # What it says to do helps, and what asks for no broker never minded.
        assert released.json(*INLINE)["kept"]
        client.delete(brokers.CLAIM)
        released.cli(*PRUNE, "--yes", "--detach")
        assert client.get(brokers.CLAIM) == str(released.operations.require_ledger()).encode()


def test_an_own_claim_is_found_again(released: Deployment) -> None:
    with redis.Redis.from_url(released.environment["PAPERCLIP_WORKER_BROKER_URL"]) as client:
        for _ in range(2):
            released.cli(*PRUNE, "--yes", "--detach")
            released.cli("runs", "stop", "last")
            assert client.get(brokers.CLAIM) == str(released.operations.require_ledger()).encode()
        client.flushdb()
        released.cli(*PRUNE, "--yes", "--detach")
        assert client.get(brokers.CLAIM) == str(released.operations.require_ledger()).encode()
