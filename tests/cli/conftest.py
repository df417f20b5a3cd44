"""The deployment that a whole module shares, watched."""

from __future__ import annotations

import pytest

from tests.cli.helpers import keys, world
from tests.conftest import Deployment


class Watch:
    """The shared deployment as it was when last looked at, so that one harm fails one test."""

    def __init__(self, deployment: Deployment) -> None:
        self._deployment = deployment
        self._last = (world(deployment), keys(deployment))

    def check_unchanged(self) -> None:
        before, self._last = self._last, (world(self._deployment), keys(self._deployment))
        assert self._last == before


@pytest.fixture(scope="module")
def watch(standing: Deployment) -> Watch:
    return Watch(standing)
