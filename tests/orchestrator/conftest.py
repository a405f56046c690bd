"""Fixtures of the controller's tests."""

import pytest

from orchestrator.store import tables as store_tables
from workers import manifest


@pytest.fixture
def unsynced(monkeypatch):
    """Leave out fsync: a simulated kill ends no machine, and waiting for the disk takes most of the time."""
    monkeypatch.setattr(store_tables, "SQLITE_PRAGMAS", ("synchronous = OFF", "foreign_keys = ON"))
    monkeypatch.setattr(manifest.os, "fsync", lambda descriptor: None)
