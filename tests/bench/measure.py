"""One point of a curve: the four systems on one load, and whether they do the same training at all."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tests.bench.rounds import Seconds, System, interleaved
from tests.bench.systems import BaseAlone, PeftLoop, Residents
from tests.bench.workload import PERSISTENT, Point, base_folder, base_spec, make_jobs
from tests.numerics.jobs import distance
from tests.numerics.pair import two_ranks
from workers.adapter import Adapter, read_adapter
from workers.data import encode_all
from workers.ranks import Ranks
from workers.types import BaseSpec, Event, JobSpec, TrainingFinished

TOGETHER, ALONE, PEFT, LIMIT = "together", "one resident", "PEFT", "base alone"
SYSTEMS = (TOGETHER, ALONE, PEFT, LIMIT)
SAMPLED_TOKENS = 4096
"""Systems that take jobs one after another are timed over so many tokens: their jobs are alike."""
CHECK_STEPS = 5
PARITY = 1e-5
"""The contract in float32: adapters further apart did not get the same training."""


class Skipped(Exception):
    """What a case needs is not here; its message says what."""


@dataclass(frozen=True)
class Setting:
    """How a run of the benchmarks was asked for."""

    folder: Path
    """For models, data and checkpoints; thrown away afterwards."""
    small: bool = False
    rounds: int = 5
    arithmetic: str = "exact"
    """Of the host's adapters."""

    @property
    def shape(self) -> str:
        return "small" if self.small else "full"

    @property
    def least_seconds(self) -> float:
        return 0.0 if self.small else 0.3

    def base(self, point: Point, **overrides: Any) -> BaseSpec:
        path = base_folder(self.folder, self.shape)
        return base_spec(
            path, point, deepspeed=PERSISTENT[self.shape], arithmetic=self.arithmetic, **overrides
        )


def on_ranks(world_size: int, function: Callable[..., Any], *arguments: Any) -> Any:
    """`function(ranks, *arguments)` in this process, or on the pair of processes; rank 0's result."""
    return function(Ranks(), *arguments) if world_size == 1 else two_ranks(function, *arguments)


def measured(setting: Setting, point: Point) -> Seconds:
    """Seconds in which every job of the point does one step, for each system and round."""
    jobs = make_jobs(setting.folder, point)
    return on_ranks(point.ranks, _measure, setting, point, setting.base(point), jobs)


def _measure(
    ranks: Ranks, setting: Setting, point: Point, base: BaseSpec, jobs: Sequence[JobSpec]
) -> Seconds:
    return interleaved(build(point, base, jobs, ranks), setting.rounds, ranks, setting.least_seconds)


def build(point: Point, base: BaseSpec, jobs: Sequence[JobSpec], ranks: Ranks) -> list[System]:
    together, alone = Residents(base, jobs, ranks), Residents(base, jobs[:1], ranks)
    loop = PeftLoop(base, jobs[0], ranks)
    rows = [
        row
        for job in jobs
        for row in encode_all(together.host.base.tokenizer, job.train, job.training.sequence_len)
    ]
    mine = rows[ranks.rank :: ranks.world_size]
    per_pass = max(1, min(len(mine), point.pass_tokens // point.row_tokens))
    limit = BaseAlone(base, mine[:per_pass], ranks)
    sampled = max(1, min(point.jobs, SAMPLED_TOKENS // point.tokens))
    return [
        System(TOGETHER, together.steps, point.jobs, point.jobs),
        System(ALONE, alone.steps, sampled, point.jobs),
        System(PEFT, loop.steps, sampled, point.jobs),
        System(LIMIT, limit.passes, 1, len(mine) / per_pass),
    ]


# ---- are they the same training? --------------------------------------------------------------------------


def largest_gap(setting: Setting, ranks: int, tokens: int = 32, **point: Any) -> float:
    """Largest relative distance of a job's adapter after CHECK_STEPS steps, together, alone and by PEFT."""
    load = Point(2, tokens, ranks, **point)
    jobs = make_jobs(setting.folder, load, steps=CHECK_STEPS, rows=3 * load.batch)
    return on_ranks(ranks, _gap, setting.base(load), jobs)


def _gap(ranks: Ranks, base: BaseSpec, jobs: Sequence[JobSpec]) -> float:
    together = _adapters(Residents(base, _named("together", jobs), ranks).train())
    host = Residents(base, (), ranks)
    firsts = {job.job: first_adapter(host, job) for job in _named("first", jobs)}
    gaps = []
    for job in _named("alone", jobs):
        # Two ways that both trained nothing would agree.
        assert distance(together[job.job].factors, firsts[job.job].factors) > 100 * PARITY, (
            "nothing was trained"
        )
        host.attach(job)
        alone = _adapters(host.train())[job.job].factors
        loop = PeftLoop(base, job, ranks, firsts[job.job])
        loop.steps(CHECK_STEPS)
        found = together[job.job].factors
        gaps += [distance(found, alone), distance(found, loop.factors())]
    return max(gaps)


def first_adapter(host: Residents, job: JobSpec) -> Adapter:
    """What a host starts the job with: its adapter after one step of learning rate 0."""
    still = replace(job.training, learning_rate=0.0, max_steps=1)
    host.attach(replace(job, training=still))
    return _adapters(host.train())[job.job]


def _adapters(events: Sequence[Event]) -> dict[str, Adapter]:
    return {e.job: read_adapter(Path(e.adapter_dir)) for e in events if isinstance(e, TrainingFinished)}


def _named(run: str, jobs: Sequence[JobSpec]) -> list[JobSpec]:
    """The same jobs with checkpoints of their own, so that none goes on where another ended."""
    return [replace(job, checkpoint_dir=f"{job.checkpoint_dir}-{run}") for job in jobs]
