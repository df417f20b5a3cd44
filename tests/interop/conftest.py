"""A deployment whose database the real release's own migrations made."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import sqlalchemy as sa

from tests.conftest import NOW, Deployment
from tests.interop import release
from worker import ledger
from worker.layouts import demo_schema


@pytest.fixture
def real(fresh_database: Callable[..., str], make_deployment: Callable[..., Deployment]) -> Deployment:
    """A seeded deployment on the release's schema."""
    release.require()
    url = fresh_database()
    release.apply_release(url)
    engine = sa.create_engine(url.replace("postgres://", "postgresql+psycopg://", 1))
    with engine.begin() as connection:
        demo_schema.seed(connection, "paperclip", rows=3_000, now=NOW)
    ledger.init(engine)
    engine.dispose()
    return make_deployment(url, "paperclip")
