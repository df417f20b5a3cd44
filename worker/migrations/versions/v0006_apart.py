"""Nothing more to keep: workers and commands of 0.5.1 refuse the ledger, and are kept apart from runs of later ones.

Where they settle a run they remove from the bucket what they do not know, manifests that receipts name among it.
"""

revision = "0006"
down_revision = "0005"


def upgrade() -> None:
    """The version says it."""


def downgrade() -> None:
    raise RuntimeError("the ledger only goes forward: receipts are evidence")
