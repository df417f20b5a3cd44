"""Where the released schema keeps ciphertext of the master key. Facts: reference/paperclip-secrets.md §3.1."""

from __future__ import annotations

import sqlalchemy as sa
from sqlalchemy.dialects.postgresql import JSONB

from worker.layouts.model import Carrier
from worker.layouts.paperclip.tables import table

SCHEME = "local_encrypted_v1"


def _table(name: str, column: str, **columns: object) -> sa.Table:
    return table(name, wide=True, id=sa.Uuid, **columns, **{column: JSONB})


SECRETS = table("company_secrets", wide=True, id=sa.Uuid, company_id=sa.Uuid)
_VERSIONS = _table("company_secret_versions", "material", secret_id=sa.Uuid, value_sha256=sa.Text)


def _owned(name: str, column: str, *, fresh: bool = False) -> Carrier:
    found = _table(name, column, company_id=sa.Uuid)
    return Carrier(table=found, key=found.c.id, column=found.c[column], owner=found.c.company_id, fresh=fresh)


# In the order the app locks them.
CARRIERS = (
    Carrier(
        table=_VERSIONS,
        key=_VERSIONS.c.id,
        column=_VERSIONS.c.material,
        owner=_VERSIONS.c.secret_id,
        owners=(SECRETS.c.id, SECRETS.c.company_id),
        digest=_VERSIONS.c.value_sha256,
        fresh=True,
    ),
    _owned("company_secret_proposals", "value_ciphertext", fresh=True),
    # Entries are copied from run to run, and from runs into requests to wake up.
    _owned("heartbeat_runs", "context_snapshot"),
    _owned("agent_wakeup_requests", "payload"),
    _owned("chat_teams_file_transfers", "private_state"),
)
