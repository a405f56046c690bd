"""Budgets move work between ticks and passes and change no result; neither does running out of memory."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch

from tests.numerics import jobs as made
from tests.numerics.jobs import adapters, attach, distance, drive, test_base, three_jobs
from tests.numerics.pair import two_ranks
from workers import budget, passes
from workers.host import Host
from workers.ranks import Ranks
from workers.types import (
    AdapterSpec,
    BaseSpec,
    Detach,
    HostMeasured,
    JobSpec,
    JobStopped,
    OutOfMemory,
    StepDone,
    TrainingSpec,
)

SMALL_RUNGS = (64, 128, 256, 512, 1024)
CHUNK = 256
"""`chunk_tokens` of every host here: the largest chunk of `wide` has so many tokens."""


def elsewhere(jobs: list[JobSpec], name: str) -> list[JobSpec]:
    return [replace(job, checkpoint_dir=f"{job.checkpoint_dir}-{name}") for job in jobs]


def on(world_size: int, function, *arguments):
    return function(Ranks(), *arguments) if world_size == 1 else two_ranks(function, *arguments)


def steps_of(events, job: str) -> list[int]:
    return [event.step for event in events if isinstance(event, StepDone) and event.job == job]


def assert_bit_identical(expected, found, jobs):
    for job in jobs:
        for name, pair in expected[job].factors.items():
            assert torch.equal(found[job].factors[name][0], pair[0]), (job, name)
            assert torch.equal(found[job].factors[name][1], pair[1]), (job, name)


# ---- a measured budget ------------------------------------------------------------------------------------


def run_with_small_rungs(ranks: Ranks, base: BaseSpec, script) -> tuple[list, list[int]]:
    """Rungs that the tests' few rows can fill; events, and the budget after every tick."""
    budget.RUNGS, kept = SMALL_RUNGS, budget.RUNGS
    try:
        host = Host.load(base, ranks)
        seen: list[int] = []
        tick = host.tick

        def watched():
            events = tick()
            seen.append(host.capacity.tokens_per_tick)
            assert len(set(ranks.gather(seen[-1]))) == 1
            return events

        host.tick = watched
        return drive(host, script), seen
    finally:
        budget.RUNGS = kept


@pytest.mark.parametrize("world_size", [1, 2])
def test_budget_measured_on_ticks_agrees_on_all_ranks_and_changes_no_bit(tmp_path, world_size):
    base = test_base(tmp_path, chunk_tokens=CHUNK)
    jobs = three_jobs(tmp_path, steps=15)
    fixed, _ = on(world_size, run_with_small_rungs, replace(base, tokens_per_tick=2048), {0: attach(*jobs)})
    measured = replace(base, tokens_per_tick="auto")
    events, seen = on(world_size, run_with_small_rungs, measured, {0: attach(*elsewhere(jobs, "auto"))})
    assert len(set(seen)) > 2, "the budget moved while the jobs trained"
    assert_bit_identical(adapters(fixed), adapters(events), ["wide", "rslora", "small"])
    told = [event for event in events if isinstance(event, HostMeasured)]
    assert told
    assert told[0].tokens_per_pass <= told[0].tokens_per_tick
    assert told[0].memory.fixed_bytes > 0


# ---- out of memory ----------------------------------------------------------------------------------------


@contextmanager
def memory_for(host: Host, tokens: int, where: str, ranks: tuple[int, ...]):
    """Passes of more than `tokens` fail on `ranks`: in the middle of forward or backward, or after both."""
    state = {"tight": False}

    def fail(*_):
        if state["tight"]:
            raise torch.OutOfMemoryError("injected")

    def run(base, own_ranks, micro_batch, shares):
        state["tight"] = micro_batch.tokens > tokens and own_ranks.rank in ranks
        losses = real(base, own_ranks, micro_batch, shares)
        if where == "after":
            fail()
        return losses

    layer = host.base.model.model.layers[1]
    hooks = {
        "forward": lambda: [layer.mlp.register_forward_hook(fail)],
        "backward": lambda: [layer.mlp.register_full_backward_hook(fail)],
        "after": list,
    }[where]()
    real, passes.forward_backward = passes.forward_backward, run
    try:
        yield
    finally:
        passes.forward_backward = real
        for hook in hooks:
            hook.remove()


def run_short(ranks: Ranks, base: BaseSpec, script, tokens: int, where: str, failing: tuple[int, ...]):
    host = Host.load(base, ranks)
    with memory_for(host, tokens, where, failing):
        events = drive(host, script)
    assert host.base.trace in ("none", "COMPLETE")
    return events


def run_whole(ranks: Ranks, base: BaseSpec, script):
    return drive(Host.load(base, ranks), script)


FAILURES = [
    pytest.param(1, "none", "forward", (0,), id="one rank, forward"),
    pytest.param(1, "none", "backward", (0,), id="one rank, backward"),
    pytest.param(1, "3", "backward", (0,), id="one rank, ZeRO-3, backward"),
    pytest.param(2, "3", "forward", (0, 1), id="both ranks, ZeRO-3, forward"),
    pytest.param(2, "3", "backward", (0, 1), id="both ranks, ZeRO-3, backward"),
    pytest.param(2, "3", "after", (1,), id="one of two ranks, ZeRO-3, after its last gather"),
    pytest.param(2, "none", "forward", (1,), id="one of two ranks, each with the whole base"),
]


@pytest.mark.parametrize(("world_size", "zero", "where", "failing"), FAILURES)
def test_out_of_memory_passes_shrink_and_no_step_and_no_bit_is_lost(
    tmp_path, world_size, zero, where, failing
):
    base = test_base(tmp_path, zero=zero, tokens_per_tick=1024, chunk_tokens=CHUNK)
    jobs = three_jobs(tmp_path, steps=8, same_length=True)  # so that they share passes
    whole = on(world_size, run_whole, base, {0: attach(*jobs)})
    short = {0: attach(*elsewhere(jobs, "short"))}
    events = on(world_size, run_short, base, short, CHUNK, where, failing)
    told = [event for event in events if isinstance(event, OutOfMemory)]
    assert told, "the memory was short"
    assert all(event.most_tokens <= event.tokens // 2 for event in told)
    for job in ("wide", "rslora", "small"):
        assert steps_of(events, job) == list(range(1, 9))
    assert_bit_identical(adapters(whole), adapters(events), ["wide", "rslora", "small"])


def test_out_of_memory_of_a_chunk_alone_cuts_it_and_stays_within_the_contract(tmp_path):
    base = test_base(tmp_path, dtype="float64", tokens_per_tick=1024, chunk_tokens=512)
    jobs = three_jobs(tmp_path, steps=8)
    whole = adapters(on(1, run_whole, base, {0: attach(*jobs)}))
    short = {0: attach(*elsewhere(jobs, "short"))}
    events = on(1, run_short, base, short, 200, "backward", (0,))
    found = adapters(events)
    for job in ("wide", "rslora", "small"):
        assert steps_of(events, job) == list(range(1, 9))
        assert distance(found[job].factors, whole[job].factors) < 1e-12
    assert any(event.most_tokens < 512 and event.job == "wide" for event in events if is_short(event))


def is_short(event) -> bool:
    return isinstance(event, OutOfMemory)


def test_out_of_memory_of_a_single_row_stops_that_job_alone(tmp_path):
    base = test_base(tmp_path, tokens_per_tick=1024, chunk_tokens=CHUNK)
    jobs = three_jobs(tmp_path, steps=8)
    whole = adapters(on(1, run_whole, base, {0: attach(*jobs)}))
    short = {0: attach(*elsewhere(jobs, "short"))}
    events = on(1, run_short, base, short, 80, "forward", (0,))
    stopped = [event for event in events if isinstance(event, JobStopped)]
    assert [(event.job, event.code) for event in stopped] == [("wide", "out_of_memory")]
    assert "does not fit; lower sequence_len" in stopped[0].message
    found = adapters(events)
    assert found.keys() == {"rslora", "small"}
    for job in found:
        assert distance(found[job].factors, whole[job].factors) < 1e-5


def run_without_memory_for(ranks: Ranks, base: BaseSpec, jobs: list[JobSpec], short: str, detach: bool):
    """Events of each tick; every pass that holds the job `short` fails, and it may be detached after the
    first tick."""

    def run(base, own_ranks, micro_batch, shares):
        if any(name == short for name, _ in micro_batch.chunks):
            raise torch.OutOfMemoryError("injected")
        return real(base, own_ranks, micro_batch, shares)

    host = Host.load(base, ranks)
    real, passes.forward_backward = passes.forward_backward, run
    try:
        ticks = [[event for command in attach(*jobs) for event in host.apply(command)] + host.tick()]
        if detach:
            host.apply(Detach(short, 1))
        while host.busy:
            ticks.append(host.tick())
        return ticks
    finally:
        passes.forward_backward = real


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize(("rows", "told"), [(1, JobStopped), (4, OutOfMemory)])
def test_out_of_memory_of_a_later_pass_leaves_the_step_of_a_job_that_was_done_before_it(
    tmp_path, world_size, rows, told
):
    """The job's one chunk is of longer rows, so it runs first; then nobody else is there to be trained."""
    base = test_base(tmp_path, tokens_per_tick=1024, chunk_tokens=CHUNK)
    done = made.job(
        tmp_path, "done", AdapterSpec(2, 4), TrainingSpec(1e-3, 1, 256, max_steps=3, seed=1), (11, 12)
    )
    short = made.job(tmp_path, "short", AdapterSpec(2, 4), TrainingSpec(1e-3, rows, 256, max_steps=3), (1, 2))
    alone = adapters(on(world_size, run_whole, base, {0: attach(*elsewhere([done], "alone"))}))
    ticks = on(world_size, run_without_memory_for, base, [done, short], "short", told is OutOfMemory)
    assert [type(event) for event in ticks[0] if event.job == "short"][-1] is told
    assert [steps_of(events, "done") for events in ticks[:3]] == [[1], [2], [3]]
    found = adapters([event for events in ticks for event in events])
    assert_bit_identical(alone, found, ["done"])
