"""Alembic's entry point. `worker.ledger.init` hands over the connection; nothing is read from a file."""

from alembic import context

context.configure(
    connection=context.config.attributes["connection"],
    version_table_schema="paperclip_worker",
    transaction_per_migration=False,
)
with context.begin_transaction():
    context.run_migrations()
