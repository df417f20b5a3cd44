"""Stages of a run, and the master keys: which there were, their rotations, ciphertext made ready for a cut-over."""

from alembic import op

revision = "0005"
down_revision = "0004"

_STATEMENTS = (
    # A shard of a later stage is not taken before every shard of the earlier ones is done.
    "ALTER TABLE paperclip_worker.shards ADD COLUMN stage bigint NOT NULL DEFAULT 0",
    # `horizon`: row versions of older transactions were seen when the rows were made ready. `sealed` is the old key
    # under the new one; null once it was retired for good.
    """
    CREATE TABLE paperclip_worker.rotations (
        run_id uuid PRIMARY KEY REFERENCES paperclip_worker.runs,
        old_key text NOT NULL,
        new_key text NOT NULL,
        rolls_back uuid,
        salt text,
        iterations bigint,
        horizon xid8 NOT NULL,
        sealed jsonb,
        permitted_at timestamptz,
        permitted_by text,
        cut_over_at timestamptz,
        cut_over_by xid8,
        lock_microseconds bigint,
        readers_waited boolean,
        proved_at timestamptz,
        swept_at timestamptz,
        finished_at timestamptz,
        retire_after timestamptz,
        retired_at timestamptz,
        retired_by text,
        envelopes jsonb NOT NULL DEFAULT '{}'
    )
    """,
    # Unlogged: after a crash of the server it is empty, and the pass before the cut-over fills it again.
    """
    CREATE UNLOGGED TABLE paperclip_worker.resealed (
        run_id uuid NOT NULL,
        carrier text NOT NULL,
        key uuid NOT NULL,
        place tid NOT NULL,
        version xid NOT NULL,
        rest bigint NOT NULL,
        value jsonb NOT NULL
    )
    """,
    """
    CREATE TABLE paperclip_worker.master_keys (
        fingerprint text PRIMARY KEY,
        first_seen timestamptz NOT NULL DEFAULT clock_timestamp(),
        sealed bigint NOT NULL DEFAULT 0,
        found bigint,
        counted_at timestamptz,
        current boolean NOT NULL DEFAULT false
    )
    """,
)


def upgrade() -> None:
    for statement in _STATEMENTS:
        op.execute(statement)


def downgrade() -> None:
    raise RuntimeError("the ledger only goes forward: receipts are evidence")
