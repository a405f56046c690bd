"""Bisection of suspects: who takes hosts down is found alone, and the others are free again."""

from __future__ import annotations

from math import log2

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.poison import Poison, after_death, apart


def deaths_until_found(jobs: list[str], culprit: str) -> int:
    """Each host holds as many as may share; the culprit's host dies each time, nobody gets further."""
    poison = Poison()
    for death in range(1, 50):
        suspects = poison.suspects
        aboard = [job for job in jobs if not apart(suspects, job, [culprit])]
        poison, found = after_death(poison, dict.fromkeys(aboard, 7))
        if found is not None:
            assert found == culprit
            assert not poison.groups or culprit not in set().union(*poison.groups)
            return death
    raise AssertionError("never found")


@given(st.integers(1, 64), st.data())
def test_poison_one_culprit_among_residents_is_found_alone_within_the_stated_deaths(count, data):
    jobs = [f"job-{number}" for number in range(count)]
    culprit = data.draw(st.sampled_from(jobs))
    assert deaths_until_found(jobs, culprit) <= log2(count) + 4


def test_poison_second_death_keeps_the_groups_of_the_untouched_as_frozen_sets():
    poison, _ = after_death(Poison(), dict.fromkeys("abcd", 3))
    poison, _ = after_death(poison, dict.fromkeys("abcd", 3))
    poison, _ = after_death(poison, dict.fromkeys("ab", 3))
    assert all(isinstance(group, frozenset) for group in poison.groups)
    assert {frozenset("cd"), frozenset("a"), frozenset("b")} == set(poison.groups)


@pytest.mark.parametrize("steps", [{"a": 4, "b": 4}, {"a": 9, "b": 5}])
def test_poison_jobs_that_got_further_since_the_last_death_are_no_suspects(steps):
    poison, _ = after_death(Poison(), {"a": 3, "b": 3})
    poison, found = after_death(poison, steps)
    assert not poison.groups
    assert found is None
