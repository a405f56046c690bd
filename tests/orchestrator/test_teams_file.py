"""`teams.yaml` of a home: what it says, what is refused, and that a running controller follows it."""

from __future__ import annotations

import logging
import os

import pytest

from orchestrator.policy import HOUR, Policy, Team
from orchestrator.recipe.teams import PolicyFile, load_policy
from tests.orchestrator.recipe_files import write_yaml
from workers.types import BadInput


def test_teams_file_that_is_absent_or_says_nothing_is_the_default_policy(tmp_path):
    path = tmp_path / "teams.yaml"
    assert load_policy(path) == Policy()
    write_yaml(path, {"version": 1})
    assert load_policy(path) == Policy()


def test_teams_file_gives_claims_and_figures(tmp_path):
    said = {
        "version": 1,
        "teams": {"desk": {"weight": 3, "quota": 8}},
        "half_life": "2h",
        "most_waiting": "48h",
        "most_preempted": 16,
        "levels": ["1h", "8h"],
    }
    policy = load_policy(write_yaml(tmp_path / "teams.yaml", said))
    assert policy.team("desk") == Team(3, 8)
    assert policy.team("another") == Team()
    assert (policy.half_life, policy.most_waiting) == (2 * HOUR, 48 * HOUR)
    assert (policy.most_preempted, policy.protection) == (16, Policy.protection)
    assert [policy.level(hours * HOUR) for hours in (0.9, 1.0, 8.0)] == [0, 1, 2]


@pytest.mark.parametrize(
    ("said", "words"),
    [
        ({"teams": {"desk": {"weight": 0}}}, "weight"),
        ({"teams": {"desk": {"quota": -1}}}, "quota"),
        ({"most_preempted": 0}, "most_preempted"),
        ({"half_live": "4h"}, "half_live"),
        ({"levels": ["8h", "1h"]}, "must rise"),
    ],
)
def test_teams_file_that_is_wrong_is_refused_by_file_and_key(tmp_path, said, words):
    path = write_yaml(tmp_path / "teams.yaml", {"version": 1, **said})
    with pytest.raises(BadInput, match=words) as caught:
        load_policy(path)
    assert "teams.yaml" in str(caught.value)


def test_teams_file_is_followed_when_it_changes_and_kept_when_it_is_wrong(tmp_path, caplog):
    path = tmp_path / "teams.yaml"
    file = PolicyFile(path)
    write_yaml(path, {"version": 1, "half_life": "1h"})
    assert file.read().half_life == HOUR
    write_yaml(path, {"version": 1, "half_life": "never"})
    os.utime(path, ns=(1, 1))
    with caplog.at_level(logging.ERROR):
        assert file.read().half_life == HOUR
    assert "stay as they were" in caplog.text
