"""A home that several submit to: keys of submissions, requests with a value, what the controller shows.

Events become append-only by the database's own hand.
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"

SQLITE = """
CREATE TRIGGER events_{verb} BEFORE {verb} ON events
BEGIN SELECT RAISE(ABORT, 'events are append-only'); END
"""
POSTGRESQL_FUNCTION = """
CREATE FUNCTION refuse_change_of_events() RETURNS trigger LANGUAGE plpgsql AS
$$ BEGIN RAISE EXCEPTION 'events are append-only'; END $$
"""
POSTGRESQL = """
CREATE TRIGGER events_append_only BEFORE UPDATE OR DELETE OR TRUNCATE ON events
FOR EACH STATEMENT EXECUTE FUNCTION refuse_change_of_events()
"""


def upgrade() -> None:
    op.add_column("runs", sa.Column("token", sa.String(200)))
    op.create_index("ix_runs_token", "runs", ["token"], unique=True)
    op.add_column("requests", sa.Column("value", sa.JSON))
    op.create_index("ix_requests_handled_at", "requests", ["handled_at"])
    op.create_table(
        "boards",
        sa.Column("name", sa.String(40), primary_key=True),
        sa.Column("value", sa.JSON, nullable=False),
        sa.Column("at", sa.Float, nullable=False),
    )
    lacking = sa.column("exported", sa.Boolean).is_(False)
    for name in ("metrics", "validations"):
        op.create_index(
            f"ix_{name}_pending", name, ["series"], sqlite_where=lacking, postgresql_where=lacking
        )
    if op.get_bind().dialect.name == "postgresql":
        op.execute(POSTGRESQL_FUNCTION)
        op.execute(POSTGRESQL)
    else:
        for verb in ("UPDATE", "DELETE"):
            op.execute(SQLITE.format(verb=verb))
