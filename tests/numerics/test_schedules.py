"""A job's adapter does not depend on its schedule: who else is resident, when, on what token budget."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.numerics.fleet import elsewhere
from tests.numerics.jobs import adapters, assert_same_bits, attach, drive, job, test_base
from tests.numerics.pair import two_ranks
from workers.host import Host
from workers.ranks import Ranks
from workers.types import AdapterSpec, Attach, BaseSpec, Command, Detach, Event, JobSpec, TrainingSpec

CHUNK_TOKENS = 256
"""Of the base file: below the largest steps of these jobs, which it cuts, and above some of the budgets."""


@dataclass(frozen=True)
class Stay:
    """One job's part of a schedule, in ticks from the start."""

    joins: int
    absences: tuple[tuple[int, int], ...]
    """(ticks until it is preempted, ticks until it comes back), one after the other."""
    leaves: int | None
    """Cancelled for good so many ticks after it came; None for staying to the end."""


@dataclass(frozen=True)
class Schedule:
    stays: tuple[Stay, ...]
    tokens_per_tick: int


stays = st.builds(
    Stay,
    joins=st.integers(0, 12),
    absences=st.lists(st.tuples(st.integers(1, 9), st.integers(1, 6)), max_size=2).map(tuple),
    leaves=st.none() | st.integers(1, 25),
)
schedules = st.builds(
    Schedule, st.tuples(stays, stays, stays, stays), st.sampled_from([160, 512, 700, 1100, 8192])
)


def small_jobs(folder: Path) -> list[JobSpec]:
    """Four jobs of a few steps with dropout, whose rows have up to four padded lengths."""
    settings = {
        "all": (AdapterSpec(8, 16, 0.2), TrainingSpec(5e-3, 4, 256, max_steps=5, seed=1), (1, 12)),
        "attention": (
            AdapterSpec(4, 8, 0.1, ("q_proj", "v_proj"), use_rslora=True),
            TrainingSpec(1e-2, 3, 256, max_steps=6, lr_scheduler="linear", seed=2),
            (1, 4),
        ),
        "one": (
            AdapterSpec(3, 3, target_modules=("down_proj",)),
            TrainingSpec(2e-2, 1, 256, max_steps=7, max_grad_norm=None, weight_decay=0.1, seed=3),
            (2, 16),
        ),
        "epochs": (AdapterSpec(16, 8, 0.5), TrainingSpec(3e-3, 4, 256, num_epochs=0.3, seed=4), (6, 9)),
    }
    return [job(folder, name, *settings[name]) for name in settings]


def script_of(schedule: Schedule, jobs: Sequence[JobSpec]) -> dict[int, list[Command]]:
    script: dict[int, list[Command]] = {}
    for spec, stay in zip(jobs, schedule.stays, strict=True):
        tick, attempt = stay.joins, 1
        script.setdefault(tick, []).append(Attach(spec))
        for stayed, away in stay.absences:
            script.setdefault(tick + stayed, []).append(Detach(spec.job, attempt))
            tick, attempt = tick + stayed + away, attempt + 1
            script.setdefault(tick, []).append(Attach(replace(spec, attempt=attempt)))
        if stay.leaves is not None:
            script.setdefault(tick + stay.leaves, []).append(Detach(spec.job, attempt))
    return script


def run_on(ranks: Ranks, base: BaseSpec, script) -> list[Event]:
    return drive(Host.load(base, ranks), script)


class World:
    """Some jobs, and each one's adapter when it is trained alone on so many ranks."""

    def __init__(self, folder: Path, world_size: int) -> None:
        self.base = test_base(folder)
        self.jobs = small_jobs(folder)
        self.world_size = world_size
        self._runs = count()
        self.alone = {
            spec.job: self.run({0: attach(*elsewhere([spec], "alone"))}, 8192)[spec.job].factors
            for spec in self.jobs
        }

    def run(self, script, tokens_per_tick: int):
        base = replace(self.base, tokens_per_tick=tokens_per_tick, chunk_tokens=CHUNK_TOKENS)
        if self.world_size == 2:
            return adapters(two_ranks(run_on, base, script))
        return adapters(run_on(Ranks(), base, script))

    def check(self, schedule: Schedule) -> None:
        """Every job that came to its end has the bits it has alone."""
        jobs = elsewhere(self.jobs, str(next(self._runs)))
        found = self.run(script_of(schedule, jobs), schedule.tokens_per_tick)
        stayed = {j.job for j, stay in zip(jobs, schedule.stays, strict=True) if stay.leaves is None}
        assert stayed <= found.keys()
        for name, adapter in found.items():
            assert_same_bits(adapter.factors, self.alone[name], name)


@pytest.fixture(scope="module")
def one(tmp_path_factory) -> World:
    return World(tmp_path_factory.mktemp("one"), 1)


@pytest.fixture(scope="module")
def two(tmp_path_factory) -> World:
    return World(tmp_path_factory.mktemp("two"), 2)


@given(schedule=schedules)
@settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
def test_schedule_on_one_rank_changes_no_bit(one, schedule):
    one.check(schedule)


@given(schedule=schedules)
@settings(max_examples=6, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
def test_schedule_on_two_ranks_changes_no_bit(two, schedule):
    two.check(schedule)
