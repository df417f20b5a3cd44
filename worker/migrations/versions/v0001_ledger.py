"""Runs, their shards and bites, archive objects, the chain of receipts."""

from alembic import op

revision = "0001"
down_revision = None

_STATEMENTS = (
    """
    CREATE TABLE paperclip_worker.runs (
        id uuid PRIMARY KEY,
        job text NOT NULL,
        params jsonb NOT NULL,
        exclusion text NOT NULL,
        layout text NOT NULL,
        state text NOT NULL,
        sweep int NOT NULL DEFAULT 1,
        now timestamptz NOT NULL,
        plan_hash text,
        plan jsonb,
        planned_rows bigint,
        actor text NOT NULL,
        reason text,
        via text NOT NULL,
        findings jsonb NOT NULL DEFAULT '[]',
        left_rows jsonb NOT NULL DEFAULT '[]',
        waits jsonb NOT NULL DEFAULT '{}',
        waiting text,
        error text,
        rescues int NOT NULL DEFAULT 0,
        created_at timestamptz NOT NULL DEFAULT clock_timestamp(),
        touched_at timestamptz NOT NULL DEFAULT clock_timestamp(),
        settled_at timestamptz
    )
    """,
    # One run per exclusion at a time, decided by the database and not by a check before the insert.
    """
    CREATE UNIQUE INDEX runs_one_under_way ON paperclip_worker.runs (exclusion)
    WHERE state IN ('queued', 'running', 'verifying', 'finishing', 'stopping')
    """,
    "CREATE INDEX runs_by_time ON paperclip_worker.runs (created_at DESC)",
    """
    CREATE TABLE paperclip_worker.shards (
        run_id uuid NOT NULL REFERENCES paperclip_worker.runs (id),
        sweep int NOT NULL,
        number int NOT NULL,
        key text NOT NULL,
        planned_rows bigint NOT NULL,
        spec jsonb NOT NULL,
        cursor jsonb,
        done boolean NOT NULL DEFAULT false,
        bites int NOT NULL DEFAULT 0,
        rows bigint NOT NULL DEFAULT 0,
        bytes bigint NOT NULL DEFAULT 0,
        tally jsonb NOT NULL DEFAULT '[]',
        touched_at timestamptz NOT NULL DEFAULT clock_timestamp(),
        PRIMARY KEY (run_id, sweep, number)
    )
    """,
    """
    CREATE TABLE paperclip_worker.bites (
        run_id uuid NOT NULL,
        sweep int NOT NULL,
        shard int NOT NULL,
        number int NOT NULL,
        rows bigint NOT NULL,
        bytes bigint NOT NULL,
        microseconds bigint NOT NULL,
        cursor jsonb,
        at timestamptz NOT NULL DEFAULT clock_timestamp(),
        PRIMARY KEY (run_id, sweep, shard, number),
        FOREIGN KEY (run_id, sweep, shard) REFERENCES paperclip_worker.shards (run_id, sweep, number)
    )
    """,
    """
    CREATE TABLE paperclip_worker.objects (
        run_id uuid NOT NULL REFERENCES paperclip_worker.runs (id),
        key text NOT NULL,
        "table" text NOT NULL,
        company text,
        rows bigint NOT NULL,
        bytes bigint NOT NULL,
        raw_bytes bigint NOT NULL,
        sha256 text NOT NULL,
        first text NOT NULL,
        last text NOT NULL,
        PRIMARY KEY (run_id, key)
    )
    """,
    """
    CREATE TABLE paperclip_worker.receipts (
        seq bigint PRIMARY KEY,
        run_id uuid NOT NULL REFERENCES paperclip_worker.runs (id),
        body text NOT NULL,
        hash text NOT NULL,
        signer text NOT NULL,
        signature text NOT NULL,
        at timestamptz NOT NULL DEFAULT clock_timestamp()
    )
    """,
    "CREATE INDEX receipts_by_run ON paperclip_worker.receipts (run_id)",
    # The one row is the chain's lock, and tells a shortened chain from a short one.
    """
    CREATE TABLE paperclip_worker.chain (
        one boolean PRIMARY KEY DEFAULT true CHECK (one),
        seq bigint NOT NULL,
        hash text NOT NULL
    )
    """,
    f"INSERT INTO paperclip_worker.chain (seq, hash) VALUES (0, '{'0' * 64}')",
)


def upgrade() -> None:
    for statement in _STATEMENTS:
        op.execute(statement)


def downgrade() -> None:
    raise RuntimeError("the ledger only goes forward: receipts are evidence")
