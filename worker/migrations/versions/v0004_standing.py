"""When the ledger was made, since when each schedule entry holds, the backlog, seconds of bites."""

from alembic import op

revision = "0004"
down_revision = "0003"

_STATEMENTS = (
    # A ledger of an earlier release counts from its upgrade: before it nobody was told of missed due times.
    "ALTER TABLE paperclip_worker.chain ADD COLUMN born timestamptz NOT NULL DEFAULT clock_timestamp()",
    # A null crontab is an entry that was switched off or removed.
    """
    CREATE TABLE paperclip_worker.entries (
        entry text PRIMARY KEY,
        crontab text,
        timezone text,
        since timestamptz NOT NULL DEFAULT clock_timestamp()
    )
    """,
    """
    CREATE TABLE paperclip_worker.backlog (
        entry text NOT NULL,
        "table" text NOT NULL,
        rows bigint NOT NULL,
        oldest timestamptz,
        measured_at timestamptz NOT NULL DEFAULT clock_timestamp(),
        PRIMARY KEY (entry, "table")
    )
    """,
    # A scrape sums over shards; the bites of some years are too many for it.
    "ALTER TABLE paperclip_worker.shards ADD COLUMN microseconds bigint NOT NULL DEFAULT 0",
    """
    UPDATE paperclip_worker.shards SET microseconds = bites.microseconds
    FROM (SELECT run_id, sweep, shard, sum(microseconds) AS microseconds
          FROM paperclip_worker.bites GROUP BY run_id, sweep, shard) bites
    WHERE (shards.run_id, shards.sweep, shards.number) = (bites.run_id, bites.sweep, bites.shard)
    """,
)


def upgrade() -> None:
    for statement in _STATEMENTS:
        op.execute(statement)


def downgrade() -> None:
    raise RuntimeError("the ledger only goes forward: receipts are evidence")
