"""What a host is known to hold: when its residents fill its ticks."""

from __future__ import annotations

from orchestrator.control.fleet import Host
from workers.types import HostMeasured, MemoryModel

MEMORY = MemoryModel(1 << 30, 1 << 20, 100.0, 16)


def host(budget: int | None, calibrating: bool = False, half: int | None = None, **steps: int) -> Host:
    measured = None if budget is None else HostMeasured(budget, calibrating, budget, MEMORY, 1 << 20, half)
    return Host("h", "b", 2, 8, False, measured=measured, step_tokens=steps)


def test_host_is_saturated_once_steps_of_its_residents_take_a_tick_of_its_budget():
    assert not host(512, a=512, b=511).saturated
    assert host(512, a=512, b=512).saturated


def test_host_that_has_not_found_its_budget_is_not_saturated():
    assert not host(None, a=10_000).saturated
    assert not host(512, calibrating=True, a=10_000).saturated


def test_host_is_crowded_once_steps_of_its_residents_are_more_than_half_of_a_tick():
    assert not host(512, half=64, a=64, b=64).crowded
    assert host(512, half=64, a=64, b=65).crowded
    assert host(512, half=0, a=1).crowded
    assert not host(512, half=0).crowded


def test_host_whose_budget_was_given_is_crowded_once_it_is_saturated():
    assert not host(512, a=512, b=511).crowded
    assert host(512, a=512, b=512).crowded
