"""Fixtures of the controller's tests."""

import pytest

from orchestrator.store import engine as store_engine
from tests.postgres import postgres  # noqa: F401 (a fixture)
from workers import manifest


@pytest.fixture
def unsynced(monkeypatch):
    """Leave out fsync: a simulated kill ends no machine, and waiting for the disk takes most of the time."""
    monkeypatch.setattr(store_engine, "SQLITE_PRAGMAS", ("synchronous = OFF", "foreign_keys = ON"))
    monkeypatch.setattr(manifest.os, "fsync", lambda descriptor: None)


@pytest.fixture(params=["sqlite", "postgresql"])
def store_url(request, tmp_path):
    """Of an empty store: the tests of the store run on both of its databases."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path}/home/chorus.db"
    return request.getfixturevalue("postgres").new_database()
