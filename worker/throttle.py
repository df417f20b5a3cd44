"""How much a bite takes, and when a run rests: batch size steered by time, rest on replica lag or WAL pressure."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import sqlalchemy as sa

if TYPE_CHECKING:
    from worker.config import Settings

# Small, for tasks cost a quarter of a millisecond each; where rows are cheap, a few bites double it to what is right.
_FIRST_ROWS = 250
# A bite has a fixed cost (planning, the set of open issues) that fewer rows do not lower.
_LEAST_ROWS = 100
# With what others hold left out, a bite locks before it copies; it stays small so that nobody waits for it.
_CONTENDED_ROWS = 200
# What a bite copies out stands in files and behind one transaction until it is stored.
_MOST_COPIED = 64 << 20
# Where no index has rows by company, each object of a batch is one company's, and the store takes a while for each.
_MOST_OBJECTS = 500
_LOOK_EVERY = 2.0


@dataclass(frozen=True, kw_only=True)
class Pressure:
    """Why the run rests: the kind adds up in the ledger, the text is for the operator."""

    kind: str
    text: str


class Throttle:
    """Steers one worker's bites to the time a row may stay locked."""

    def __init__(self, settings: Settings) -> None:
        self._target = settings.bite_seconds
        self._most = settings.bite_rows
        self._max_lag = settings.max_replica_lag
        self._max_wal = settings.max_retained_wal
        self._rows = min(_FIRST_ROWS, self._most)
        self._looked_at = float("-inf")

    def rows(self, *, contended: bool) -> int:
        """How many rows the next bite should take."""
        return min(self._rows, _CONTENDED_ROWS) if contended else self._rows

    def observe(self, *, asked: int, seconds: float, copied: int = 0, objects: int = 0) -> None:
        """Learn from a bite: the rows asked for, how long it held its locks, the bytes and objects it copied out.

        At most doubled or halved at once, so one odd bite does not throw the size off; but rows that are large are
        large, so what was copied counts in full, down to a single row.
        """
        factor = min(2.0, max(0.5, self._target / max(seconds, 1e-6)))
        by_time = max(_LEAST_ROWS, round(asked * factor))
        by_size = max(1, round(asked * _MOST_COPIED / max(copied, 1)))
        by_objects = max(1, round(asked * _MOST_OBJECTS / max(objects, 1)))
        self._rows = min(self._most, by_time, by_size, by_objects)

    def shrink(self) -> None:
        """Take half as much after a conflict."""
        self._rows = max(1, self._rows // 2)

    def due(self) -> bool:
        """Whether it is time to look at the pressure again."""
        return time.monotonic() - self._looked_at >= _LOOK_EVERY

    def pressure(self, connection: sa.Connection) -> Pressure | None:
        """Why to rest now, or None. Reads the server's own views; never waits."""
        self._looked_at = time.monotonic()
        lag, wal, failing = connection.execute(_PRESSURE).one()
        if lag is not None and lag > self._max_lag:
            return Pressure(kind="replica_lag", text=f"a replica is {lag:.0f} s behind")
        if wal is not None and wal > self._max_wal:
            return Pressure(kind="retained_wal", text=f"a replication slot retains {wal / 2**20:.0f} MiB of WAL")
        if failing:
            return Pressure(kind="wal_archiver", text="the WAL archiver is failing")
        return None


def _view(name: str, *columns: str) -> sa.TableClause:
    return sa.table(name, *map(sa.column, columns), schema="pg_catalog")


_replication = _view("pg_stat_replication", "replay_lag")
_slots = _view("pg_replication_slots", "restart_lsn", "wal_status")
_archiver = _view("pg_stat_archiver", "last_failed_time", "last_archived_time")
_PRESSURE = sa.select(
    sa.select(sa.func.max(sa.extract("epoch", _replication.c.replay_lag))).scalar_subquery(),
    # One that the server has given up retains nothing, though it says where it was.
    sa.select(sa.func.max(sa.func.pg_wal_lsn_diff(sa.func.pg_current_wal_lsn(), _slots.c.restart_lsn)))
    .where(_slots.c.wal_status.is_distinct_from("lost"))
    .scalar_subquery(),
    sa.select(
        sa.and_(
            sa.func.current_setting("archive_mode") != "off",
            _archiver.c.last_failed_time.is_not(None),
            sa.or_(
                _archiver.c.last_archived_time.is_(None),
                _archiver.c.last_failed_time > _archiver.c.last_archived_time,
            ),
        )
    ).scalar_subquery(),
)
