"""What alembic runs: on the connection and in the transaction that Store.open gives it."""

from alembic import context

from forkypig.controller.store.tables import metadata

context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=metadata,
    render_as_batch=True,  # SQLite can't alter a column in place
)
context.run_migrations()
