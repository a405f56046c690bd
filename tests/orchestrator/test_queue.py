"""The order of waiting jobs."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from orchestrator.job import Reason, Status
from orchestrator.policy import HOUR, Policy
from orchestrator.queue import Need, Waiting, by_team, in_order, parents_verdict


def job(name: str = "j", priority: int = 0, at: float = 0.0, parents: tuple[Status, ...] = ()) -> Waiting:
    return Waiting(name, Need.SLOT, "b", 1, 1, priority, at, parents)


jobs = st.builds(job, st.uuids().map(str), st.integers(-2, 2), st.floats(0, 5))


@given(st.lists(jobs))
def test_in_order_puts_higher_priority_first_then_older(waiting):
    keys = [(-j.priority, j.submitted_at, j.job) for j in in_order(waiting, Policy(), now=5.0)]
    assert keys == sorted(keys)
    assert len(keys) == len(waiting)


def names(*jobs: Waiting, now: float = 100.0) -> list[str]:
    return [job.job for job in in_order(jobs, Policy(), now)]


def test_in_order_puts_what_has_had_little_before_what_has_had_much():
    assert names(replace(job("old"), attained=5 * HOUR), replace(job("new", at=9.0), attained=HOUR)) == [
        "new",
        "old",
    ]


def test_in_order_trusts_what_is_left_more_than_what_was_had():
    nearly = replace(job("nearly done", at=9.0), attained=900 * HOUR, remaining=HOUR)
    assert names(replace(job("begun"), attained=5 * HOUR), nearly) == ["nearly done", "begun"]


def test_in_order_puts_who_waited_to_the_bound_before_any_priority():
    bound = Policy().most_waiting
    late = replace(job("late", at=9.0), waiting_since=bound)
    assert names(job("aged", -5), replace(late, priority=5), now=bound + 1) == ["aged", "late"]


several = st.builds(
    Waiting,
    job=st.uuids().map(str),
    need=st.just(Need.SLOT),
    base=st.just("b"),
    world_size=st.just(1),
    slots=st.just(1),
    priority=st.integers(-1, 1),
    submitted_at=st.integers(0, 3).map(float),
    team=st.sampled_from("abc"),
    attained=st.sampled_from([0.0, 4 * HOUR, 40 * HOUR]),
    remaining=st.sampled_from([None, HOUR, 300 * HOUR]),
    waiting_since=st.sampled_from([None, 0.0, 2.0, 50 * HOUR]),
)


@given(st.lists(several, max_size=30), st.sampled_from([3.0, 24 * HOUR, 24 * HOUR + 2.0, 60 * HOUR]))
def test_by_team_is_the_order_of_each_team(waiting, now):
    found = by_team(waiting, Policy(), now)
    assert found.keys() == {each.team for each in waiting}
    for team, line in found.items():
        assert line == list(in_order([each for each in waiting if each.team == team], Policy(), now))


@given(st.lists(st.sampled_from(Status)))
def test_parents_verdict_lets_go_only_when_all_succeeded(parents):
    verdict = parents_verdict(job(parents=tuple(parents)))
    assert (verdict is None) == all(status is Status.SUCCEEDED for status in parents)
    assert (verdict is Reason.PARENT_FAILED) == bool({Status.FAILED, Status.CANCELLED} & set(parents))
