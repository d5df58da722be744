"""Runs the revisions on the connection, and inside the transaction, that `database.migrate` opened."""

from alembic import context

from recoup_jobs.tables import metadata

context.configure(connection=context.config.attributes["connection"], target_metadata=metadata)
context.run_migrations()
