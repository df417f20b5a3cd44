"""Legal holds, retention policies and what archive-tasks archived."""

from alembic import op

revision = "0002"
down_revision = "0001"

_STATEMENTS = (
    """
    CREATE TABLE paperclip_worker.holds (
        id uuid PRIMARY KEY,
        kind text NOT NULL CHECK (kind IN ('company', 'user', 'task', 'table')),
        target text NOT NULL,
        reason text NOT NULL,
        actor text NOT NULL,
        created_at timestamptz NOT NULL DEFAULT clock_timestamp(),
        until timestamptz,
        released_at timestamptz,
        released_by text,
        release_reason text
    )
    """,
    # A policy is never changed: another version replaces it, and one without `keep_seconds` takes it back.
    """
    CREATE TABLE paperclip_worker.policies (
        "table" text NOT NULL,
        company uuid,
        version int NOT NULL,
        keep_seconds bigint CHECK (keep_seconds > 0),
        reason text NOT NULL,
        actor text NOT NULL,
        created_at timestamptz NOT NULL DEFAULT clock_timestamp(),
        UNIQUE NULLS NOT DISTINCT ("table", company, version)
    )
    """,
    # `mark` is what the app would have changed had somebody touched the task since.
    """
    CREATE TABLE paperclip_worker.archived_tasks (
        run_id uuid NOT NULL,
        task uuid NOT NULL,
        company uuid NOT NULL,
        mark text NOT NULL,
        undone_by uuid,
        PRIMARY KEY (run_id, task)
    )
    """,
)


def upgrade() -> None:
    for statement in _STATEMENTS:
        op.execute(statement)


def downgrade() -> None:
    raise RuntimeError("the ledger only goes forward: holds and policies are evidence")
