"""Bytes of weights gathered for one step of one job, counted by DeepSpeed's own communication logger."""

from __future__ import annotations

from collections.abc import Sequence

from tests.bench.measure import Setting, on_ranks
from tests.bench.record import Lines, Outcome, Table, Target
from tests.bench.systems import PeftLoop, Residents
from tests.bench.workload import Point, make_jobs
from workers.ranks import Ranks
from workers.types import BaseSpec, JobSpec

COUNTED_TICKS = 3


def bytes_gathered(setting: Setting) -> Outcome:
    counts = (1, 2) if setting.small else (1, 2, 4, 8, 16, 32)
    loads = [Point(count, 32, 2) for count in counts]
    per_step = {point.jobs: _per_job_and_step(setting, point) for point in loads}
    peft = on_ranks(2, _counted_peft, setting.base(loads[0]), make_jobs(setting.folder, loads[0])[0])
    alone = per_step[1]
    return Outcome(
        "bytes",
        "Bytes gathered for one step of one job, 2 ranks ZeRO-3",
        [
            Table(
                "whole tensors, as every rank holds them after a gather",
                ("residents", "bytes per job and step", "one resident's / N", "share of one resident's x N"),
                [
                    [n, f"{found:,.0f}", f"{alone / n:,.0f}", f"{found * n / alone:.4f}"]
                    for n, found in per_step.items()
                ],
            ),
            Table("the plain loop", ("system", "bytes per job and step"), [["PEFT, ZeRO-3", f"{peft:,.0f}"]]),
        ],
        [
            Target(
                f"{n} residents: N times the bytes of one job's step, over one resident's",
                found * n / alone,
                1,
                False,
            )
            for n, found in per_step.items()
            if n > 1
        ],
        Lines(
            counts, {"host": list(per_step.values()), "PEFT": [peft] * len(counts)}, ("residents", "bytes")
        ),
        [
            f"Counted over {COUNTED_TICKS} ticks once the trace is complete; 32 tokens per job and rank. "
            "DeepSpeed's logger counts the shard a rank brings to a gather; it is taken times the ranks."
        ],
    )


def _per_job_and_step(setting: Setting, point: Point) -> float:
    return on_ranks(2, _counted_host, setting.base(point), make_jobs(setting.folder, point))


def _counted_host(ranks: Ranks, base: BaseSpec, jobs: Sequence[JobSpec]) -> float:
    residents = Residents(base, jobs, ranks)
    residents.steps(3 * len(jobs))
    assert residents.host.base.trace == "COMPLETE", residents.host.base.trace
    with Gathered() as gathered:
        residents.steps(COUNTED_TICKS * len(jobs))
    return gathered.bytes / COUNTED_TICKS / len(jobs)


def _counted_peft(ranks: Ranks, base: BaseSpec, job: JobSpec) -> float:
    loop = PeftLoop(base, job, ranks)
    loop.steps(3)
    with Gathered() as gathered:
        loop.steps(COUNTED_TICKS)
    return gathered.bytes / COUNTED_TICKS


class Gathered:
    """Within the block DeepSpeed logs its collectives; afterwards `bytes` are those it gathered, whole."""

    bytes = 0

    def __enter__(self) -> Gathered:
        import deepspeed.comm as comm
        from deepspeed.comm.comm import comms_logger

        comms_logger.comms_dict.clear()
        comm.configure(enabled=True, prof_all=True, verbose=False)
        return self

    def __exit__(self, *_: object) -> None:
        import deepspeed.comm as comm
        from deepspeed.comm.comm import comms_logger

        comm.configure(enabled=False)
        self.bytes = comm.get_world_size() * sum(
            size * entry[0]
            for name, sizes in comms_logger.comms_dict.items()
            if "all_gather" in name
            for size, entry in sizes.items()
        )
        if not self.bytes:
            raise RuntimeError(f"DeepSpeed logged no all-gather, only {sorted(comms_logger.comms_dict)}")
