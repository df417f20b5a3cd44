"""Which receipts are in the bucket too."""

from alembic import op

revision = "0003"
down_revision = "0002"


def upgrade() -> None:
    # No reference to the receipts: a row that outlives its receipt tells that one was removed.
    op.execute(
        """
        CREATE TABLE paperclip_worker.anchors (
            seq bigint PRIMARY KEY,
            key text NOT NULL,
            locked_until timestamptz,
            at timestamptz NOT NULL DEFAULT clock_timestamp()
        )
        """
    )


def downgrade() -> None:
    raise RuntimeError("the ledger only goes forward: receipts are evidence")
