"""The order of waiting jobs."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from orchestrator.job import Reason, Status
from orchestrator.queue import Need, Waiting, in_order, parents_verdict


def job(name: str = "j", priority: int = 0, at: float = 0.0, parents: tuple[Status, ...] = ()) -> Waiting:
    return Waiting(name, Need.SLOT, "b", 1, 1, priority, at, parents)


jobs = st.builds(job, st.uuids().map(str), st.integers(-2, 2), st.floats(0, 5))


@given(st.lists(jobs))
def test_in_order_puts_higher_priority_first_then_older(waiting):
    keys = [(-j.priority, j.submitted_at, j.job) for j in in_order(waiting)]
    assert keys == sorted(keys)
    assert len(keys) == len(waiting)


@given(st.lists(st.sampled_from(Status)))
def test_parents_verdict_lets_go_only_when_all_succeeded(parents):
    verdict = parents_verdict(job(parents=tuple(parents)))
    assert (verdict is None) == all(status is Status.SUCCEEDED for status in parents)
    assert (verdict is Reason.PARENT_FAILED) == bool({Status.FAILED, Status.CANCELLED} & set(parents))
