"""A process without a name in the user table, as in some containers, works all the same."""

from __future__ import annotations

import os

import pytest

from orchestrator.api.service import caller
from orchestrator.who import user_at_machine
from tests.orchestrator.cli_world import CliWorld


@pytest.mark.usefixtures("unsynced")
@pytest.mark.parametrize("error", [KeyError, OSError])
def test_run_of_a_user_without_a_name_goes_by_the_number(tmp_path, monkeypatch, error):
    def nobody():
        raise error("getpwuid(): uid not found")

    monkeypatch.setattr("getpass.getuser", nobody)
    world = CliWorld(tmp_path)
    assert world.chorus("run", world.one_job()).exit_code == 0
    assert world.read("events", "finance")[0]["who"] == caller() == str(os.getuid())
    assert user_at_machine().startswith(f"{os.getuid()}@")
