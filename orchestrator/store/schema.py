"""Bring a database to the tables of this version: make them, or take over and migrate those that are there.

Alembic's migrations are in `migrations/versions`. One transaction under a lock, so processes that open a new
store at the same moment make it once, and a killed one leaves the old tables or the new.
"""

from __future__ import annotations

from pathlib import Path

from sqlalchemy import Connection, Engine, inspect, text

from orchestrator.store.tables import WRITES
from workers.types import BadInput

HEAD = "0004"
"""Revision of the newest migration: a store that has it is used as it is, and Alembic is not imported."""
FIRST = "0001"
"""The tables as they were before there were migrations."""
LOCK = 0x63686F72
"""PostgreSQL's advisory lock of a migration: any number that only we take."""


def migrate(engine: Engine) -> None:
    """Raises BadInput for a store that a newer version has migrated further."""
    with engine.connect() as connection:
        if _revision(connection) == HEAD:
            return
    with engine.execution_options(**{WRITES: True}).begin() as connection:
        if connection.dialect.name == "postgresql":
            connection.execute(text(f"SELECT pg_advisory_xact_lock({LOCK})"))
        found = _revision(connection)
        if found != HEAD:
            _upgrade(connection, found)


def _revision(connection: Connection) -> str | None:
    """None where nothing was ever migrated."""
    if not inspect(connection).has_table("alembic_version"):
        return None
    return connection.execute(text("SELECT version_num FROM alembic_version")).scalar()


def _upgrade(connection: Connection, found: str | None) -> None:
    # It takes 0.2 s to import, and most commands find the store as it should be.
    from alembic import command
    from alembic.config import Config
    from alembic.script import ScriptDirectory

    config = Config(attributes={"connection": connection})
    config.set_main_option("script_location", str(Path(__file__).parent / "migrations"))
    config.set_main_option("path_separator", "os")
    known = {script.revision for script in ScriptDirectory.from_config(config).walk_revisions()}
    if found is not None and found not in known:
        raise BadInput(
            f"the store was last used by a newer version of chorus (its tables are at {found}, this version "
            f"knows {HEAD}); use that version"
        )
    if found is None and inspect(connection).has_table("jobs"):
        command.stamp(config, FIRST)
    command.upgrade(config, HEAD)
