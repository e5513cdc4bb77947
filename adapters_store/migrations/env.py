"""What alembic runs: the migrations, in the transaction of whoever opens the catalogue."""

from alembic import context

from spallm_serve.adapters_store.schema import metadata

context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=metadata,
    render_as_batch=True,
)
context.run_migrations()
