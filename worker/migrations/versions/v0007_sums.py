"""What grows with the runs and shards ever made is found by an index, or summed once: bites, scrapes, standings."""

from alembic import op

revision = "0007"
down_revision = "0006"

_STATEMENTS = (
    # A bite looks for the next shard among those that are left, not among all of its run.
    "CREATE INDEX shards_undone ON paperclip_worker.shards (run_id, sweep, stage, number) WHERE NOT done",
    "CREATE INDEX runs_by_origin ON paperclip_worker.runs (via, created_at)",
    # What runs that have settled amount to. One that is not `in_sums`, as of a worker of the release before that was
    # up while this was made, is looked at itself.
    """
    CREATE TABLE paperclip_worker.sums (
        job text NOT NULL,
        state text NOT NULL,
        kind text NOT NULL,
        part text NOT NULL,
        amount bigint NOT NULL,
        PRIMARY KEY (job, state, kind, part)
    )
    """,
    # By their defaults: the runs are not written anew.
    "ALTER TABLE paperclip_worker.runs ADD COLUMN in_sums boolean NOT NULL DEFAULT true",
    "ALTER TABLE paperclip_worker.runs ALTER COLUMN in_sums SET DEFAULT false",
    """
    UPDATE paperclip_worker.runs SET in_sums = false
    WHERE state NOT IN ('stopped', 'failed', 'kept', 'unkept')
    """,
    "CREATE INDEX runs_not_in_sums ON paperclip_worker.runs (id) WHERE NOT in_sums",
    """
    INSERT INTO paperclip_worker.sums (job, state, kind, part, amount)
    WITH settled AS (
        SELECT id, job, state, waits, round(extract(epoch FROM settled_at - created_at) * 1000000) AS microseconds
        FROM paperclip_worker.runs WHERE in_sums
    ), work AS (
        SELECT job, state, sum(bites) AS bites, sum(rows) AS rows, sum(bytes) AS bytes,
               sum(shards.microseconds) AS microseconds
        FROM settled JOIN paperclip_worker.shards ON run_id = id GROUP BY job, state
    ), ended AS (
        SELECT job, state, microseconds FROM settled WHERE state IN ('kept', 'unkept')
    )
    SELECT job, state, 'runs', '', count(*) FROM settled GROUP BY job, state
    UNION ALL
    SELECT job, state, 'work', part, amount FROM work CROSS JOIN LATERAL (VALUES
        ('bites', bites), ('rows', rows), ('bytes', bytes), ('microseconds', work.microseconds)) parts (part, amount)
    UNION ALL
    SELECT job, state, 'rests', key, sum(value::bigint)
    FROM settled CROSS JOIN LATERAL jsonb_each_text(waits) GROUP BY job, state, key
    UNION ALL
    SELECT job, state, 'took', 'runs', count(*) FROM ended GROUP BY job, state
    UNION ALL
    SELECT job, state, 'took', 'microseconds', coalesce(sum(microseconds), 0) FROM ended GROUP BY job, state
    UNION ALL
    SELECT job, state, 'within', bound::text, count(*) FILTER (WHERE microseconds <= bound * 1000000)
    FROM ended CROSS JOIN unnest(ARRAY[1, 10, 60, 300, 900, 3600, 14400, 86400]::bigint[]) bound
    GROUP BY job, state, bound
    """,
    # Of a new column the server knows nothing, and takes half of the runs to be outside of the sums: for so many it
    # compiles the statement (JIT), which takes longer than all else of a scrape.
    "ANALYZE paperclip_worker.runs (in_sums)",
)


def upgrade() -> None:
    for statement in _STATEMENTS:
        op.execute(statement)


def downgrade() -> None:
    raise RuntimeError("the ledger only goes forward: receipts are evidence")
