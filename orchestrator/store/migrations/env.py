"""What Alembic runs: the migrations beside this file, in the transaction that `schema` has opened."""

from __future__ import annotations

from alembic import context

context.configure(connection=context.config.attributes["connection"])
context.run_migrations()
