"""Which ledger this is, for what leaves the database: receipts, and the claim on a broker.

Workers of 0.5.1 refuse a ledger of this version, and so are kept apart from runs of later ones: where they settle a
run they remove from the bucket what they do not know, manifests that receipts name among it.
"""

from alembic import op

revision = "0006"
down_revision = "0005"

_STATEMENTS = (
    """
    CREATE TABLE paperclip_worker.identity (
        one boolean PRIMARY KEY DEFAULT true CHECK (one),
        id uuid NOT NULL DEFAULT gen_random_uuid()
    )
    """,
    "INSERT INTO paperclip_worker.identity DEFAULT VALUES",
)


def upgrade() -> None:
    for statement in _STATEMENTS:
        op.execute(statement)


def downgrade() -> None:
    raise RuntimeError("the ledger only goes forward: receipts are evidence")
