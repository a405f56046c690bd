"""The parity matrix: a fleet that shares no setting, on every kind of host; each job alone is plain PEFT."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from tests.numerics.fleet import comings_and_goings, elsewhere, fleet
from tests.numerics.jobs import assert_same_bits, distance, drive, first_adapter, test_base
from tests.numerics.pair import one_rank, two_ranks
from tests.numerics.reference import Trained, train_alone
from workers import checkpoint
from workers.adapter import read_adapter
from workers.host import Host
from workers.ranks import Ranks
from workers.types import BaseSpec, CheckpointSaved, Detached, Event, JobSpec, StepDone, TrainingFinished

NO_PERSISTENCE = {"stage3_param_persistence_threshold": 0}
"""Otherwise DeepSpeed keeps parameters as small as these on every rank."""
PLAIN = {"zero": "none"}
PARTITIONED = {"zero": "3", "deepspeed": NO_PERSISTENCE}
SEVERAL_TICKS = 750
"""A budget at which the largest steps of the fleet are cut."""
TWO_ROWS = 150
"""A budget at which a chunk holds two of the rows of equal length."""
AT_ONCE = 16384


@dataclass(frozen=True)
class Run:
    """What a host made of the fleet."""

    losses: Mapping[str, list[float]]
    factors: Mapping[str, Mapping]
    left_at: int
    """Steps that `leaver` had done."""
    summed_over: frozenset[int]
    """Numbers of ticks over which steps summed up their gradient."""
    zero: str
    trace: str
    partitioned: bool


def run_fleet(ranks: Ranks, base: BaseSpec, script) -> Run:
    host = Host.load(base, ranks)
    summed_over = watch_accumulation(host)
    events = drive(host, script)
    steps: dict[str, dict[int, float]] = {}
    for event in events:
        if isinstance(event, StepDone):
            steps.setdefault(event.job, {})[event.step] = event.loss
    paths = {e.job: Path(e.adapter_dir) for e in events if isinstance(e, TrainingFinished)}
    leaver = next(e for e in events if isinstance(e, Detached) and e.job == "leaver")
    paths["leaver"] = next(
        Path(e.path) for e in reversed(events) if isinstance(e, CheckpointSaved) and e.job == "leaver"
    )
    assert checkpoint.load(paths["leaver"]).progress.step == leaver.step
    return Run(
        {job: [by_step[step] for step in sorted(by_step)] for job, by_step in steps.items()},
        {job: read_adapter(path).factors for job, path in paths.items()},
        leaver.step,
        frozenset(summed_over),
        host.base.zero,
        host.base.trace,
        host.base.partitioned,
    )


def watch_accumulation(host: Host) -> set[int]:
    """A set that fills with the numbers of ticks over which steps, of any job, summed up their gradient."""
    tick, worked, spans = host.tick, Counter[str](), set()

    def watched() -> list[Event]:
        waiting = {job: (each.step, len(each.chunks)) for job, each in host.residents.items()}
        for gone in worked.keys() - waiting.keys():
            del worked[gone]
        events = tick()
        done = {event.job for event in events if isinstance(event, StepDone)}
        for job, (step, chunks) in waiting.items():
            resident = host.residents.get(job)
            if job in done or (resident and (resident.step, len(resident.chunks)) != (step, chunks)):
                worked[job] += 1
        for job in done:
            spans.add(worked.pop(job))
        return events

    host.tick = watched
    return spans


class World:
    """A base, two fleets on it, and each job alone, trained once a dtype."""

    def __init__(self, folder: Path) -> None:
        self.base = test_base(folder)
        self.mixed = fleet(folder / "mixed")
        self.equal = fleet(folder / "equal", same_length=True)
        self._alone: dict[tuple, Trained] = {}
        self._runs = 0

    def run(self, jobs: list[JobSpec], world_size: int = 1, **base) -> Run:
        self._runs += 1
        script = comings_and_goings(elsewhere(jobs, str(self._runs)), seed=self._runs)
        spec = replace(self.base, **base)
        if world_size == 2:
            return two_ranks(run_fleet, spec, script)
        return one_rank(run_fleet, spec, script) if spec.zero == "3" else run_fleet(Ranks(), spec, script)

    def alone(self, job: JobSpec, dtype: str, steps: int | None = None, hooked: bool = False) -> Trained:
        key = (job, dtype, steps, hooked)
        if key not in self._alone:
            base = replace(self.base, dtype=dtype)
            self._alone[key] = train_alone(base, job, first_adapter(base, job), steps, hooked)
        return self._alone[key]


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> World:
    return World(tmp_path_factory.mktemp("matrix"))


HOSTS = {"plain": (1, PLAIN), "zero-3": (1, PARTITIONED), "zero-3 on two ranks": (2, PARTITIONED)}


@pytest.mark.parametrize("kind", HOSTS)
@pytest.mark.parametrize(("dtype", "bound"), [("float32", 1e-5), ("float64", 1e-12)])
def test_parity_steps_split_over_ticks_and_ranks_agrees(world, kind, dtype, bound):
    world_size, host = HOSTS[kind]
    run = world.run(world.mixed, world_size, dtype=dtype, tokens_per_tick=SEVERAL_TICKS // world_size, **host)
    assert (run.zero, run.partitioned) == (host["zero"], host["zero"] == "3")
    assert run.trace in ("none", "COMPLETE")
    assert {1, 2} <= run.summed_over
    assert_agrees(world, run, world.mixed, dtype, bound)


@pytest.mark.parametrize(
    ("kind", "dtype", "bound"), [("plain", "float32", 1e-5), ("zero-3 on two ranks", "float64", 1e-12)]
)
def test_parity_gradients_summed_over_one_to_five_ticks_agree(world, kind, dtype, bound):
    world_size, host = HOSTS[kind]
    jobs = [
        replace(job, training=replace(job.training, global_batch_size=batch, num_epochs=None, max_steps=50))
        for job, batch in zip(world.equal, (1, 3, 5, 7, 9, 2), strict=True)
    ]
    run = world.run(jobs, world_size, dtype=dtype, tokens_per_tick=TWO_ROWS // world_size, **host)
    assert run.summed_over == {1, 2, 3, 4, 5}
    assert_agrees(world, run, jobs, dtype, bound)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", ["plain", "zero-3"])
def test_parity_one_rank_steps_in_one_tick_is_bit_identical(world, kind, dtype):
    """Under ZeRO-3 to the sums in the order in which DeepSpeed's hooks make autograd take them."""
    _, host = HOSTS[kind]
    run = world.run(world.equal, dtype=dtype, tokens_per_tick=AT_ONCE, **host)
    assert_bit_identical(world, run, world.equal, dtype, hooked=kind == "zero-3")


@pytest.mark.parametrize("kind", ["plain", "zero-3 on two ranks"])
def test_parity_bfloat16_errs_no_more_than_twice_what_peft_does(world, kind):
    """Both start from the same bfloat16 weights and are held against them in float64: rounding alone differs.

    Two rounding errors of equal size and independent sign may come out as different as 1 and 2; a wrong
    operand or a lost scaling is a hundred times that.
    """
    world_size, host = HOSTS[kind]
    budget = SEVERAL_TICKS // world_size
    run = world.run(world.mixed, world_size, dtype="bfloat16", tokens_per_tick=budget, **host)
    for job in world.mixed:
        steps = run.left_at if job.job == "leaver" else None
        exact, peft = (world.alone(job, dtype, steps) for dtype in ("float64", "bfloat16"))
        own = distance(run.factors[job.job], exact.factors)
        assert own <= 2 * distance(peft.factors, exact.factors), job.job


@pytest.mark.parametrize("kind", ["plain", "zero-3 on two ranks"])
def test_parity_activation_checkpointing_agrees(world, kind):
    world_size, host = HOSTS[kind]
    budget = SEVERAL_TICKS // world_size
    run = world.run(world.mixed, world_size, activation_checkpointing=True, tokens_per_tick=budget, **host)
    assert_agrees(world, run, world.mixed, "float32", 1e-5)


def test_parity_activation_checkpointing_in_one_tick_is_bit_identical(world):
    run = world.run(world.equal, activation_checkpointing=True, tokens_per_tick=AT_ONCE)
    assert_bit_identical(world, run, world.equal, "float32")


def assert_agrees(world: World, run: Run, jobs: list[JobSpec], dtype: str, bound: float) -> None:
    for job in jobs:
        alone = world.alone(job, dtype, run.left_at if job.job == "leaver" else None)
        gaps = [abs(f - e) / abs(e) for f, e in zip(run.losses[job.job], alone.losses, strict=True)]
        assert max(gaps) < bound, job.job
        assert distance(run.factors[job.job], alone.factors) < bound, job.job


def assert_bit_identical(
    world: World, run: Run, jobs: list[JobSpec], dtype: str, hooked: bool = False
) -> None:
    for job in jobs:
        alone = world.alone(job, dtype, run.left_at if job.job == "leaver" else None, hooked)
        assert run.losses[job.job] == alone.losses, job.job
        assert_same_bits(run.factors[job.job], alone.factors, job.job)
