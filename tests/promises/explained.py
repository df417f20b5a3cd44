"""How the server carries out a query, by its own account."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import sqlalchemy as sa


def plan(connection: sa.Connection, statement: str, parameters: Any = None) -> dict[str, Any]:
    """The plan of a query that is carried out for it, with what each node of it read."""
    explain = f"EXPLAIN (ANALYZE, BUFFERS, FORMAT JSON) {statement}"
    found: dict[str, Any] = connection.exec_driver_sql(explain, parameters).scalar_one()[0]["Plan"]
    return found


def nodes(plan: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """A plan's nodes, from the top."""
    yield plan
    for below in plan.get("Plans", ()):
        yield from nodes(below)
