"""Servers as production has them, for every benchmark of a module."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.benchmarks.bench import Bench
from worker import audit, embedded


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    key = tmp_path_factory.mktemp("key") / "signing.pem"
    audit.keygen(key)
    settings = {"shared_buffers": "2GB", "max_wal_size": "8GB", "checkpoint_timeout": "30min"}
    with embedded.start(postgres_settings=settings) as servers:
        yield Bench(servers, key)
