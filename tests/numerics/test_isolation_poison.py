"""Isolation: what one resident holds, is given or asks for changes no bit of its neighbours."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.models import write_rows
from tests.numerics.fleet import elsewhere
from tests.numerics.jobs import adapters, assert_same_bits, attach, drive, test_base, three_jobs
from tests.numerics.pair import two_ranks
from tests.numerics.slots import clear_gradients, factors, gradients, put
from workers.adapter import Adapter
from workers.compose import Chunk, MicroBatch
from workers.host import Host
from workers.ranks import Ranks
from workers.rows import Row
from workers.step import Share, forward_backward
from workers.types import (
    AdapterSpec,
    Attach,
    BaseSpec,
    Command,
    DatasetSpec,
    Detach,
    Event,
    JobSpec,
    JobStopped,
    StepDone,
    TrainingFinished,
)

BAD = "wide"
POISONED_AT = 3


def run_poisoned(ranks: Ranks, base: BaseSpec, script: Mapping[int, list[Command]], value: float | None):
    """The script's events. Before tick 3 one element of the bad job's first A becomes `value`, if given."""
    host = Host.load(base, ranks)
    tick, ticks = host.tick, iter(range(1 << 20))

    def poisoning() -> list[Event]:
        if next(ticks) == POISONED_AT and value is not None:
            with torch.no_grad():
                factors(host.base.slots, host.residents[BAD].slot)[0][0][0, 0] = value
        return tick()

    host.tick = poisoning
    return drive(host, script)


class World:
    """Three jobs, and what the two healthy ones become beside a healthy third, on so many ranks."""

    def __init__(self, folder: Path, world_size: int) -> None:
        self.folder = folder
        self.world_size = world_size
        self.base = test_base(folder)
        self.jobs = three_jobs(folder, steps=8)
        self.bad, *self.healthy = self.jobs
        self._runs = 0
        self.clean = adapters(self.run({0: attach(*self.jobs)}))

    def run(
        self, script: Mapping[int, list[Command]], value: float | None = None, tokens_per_tick: int = 1024
    ) -> list[Event]:
        base = replace(self.base, tokens_per_tick=tokens_per_tick)
        if self.world_size == 2:
            return two_ranks(run_poisoned, base, script, value)
        return run_poisoned(Ranks(), base, script, value)

    def fresh(self, *jobs: JobSpec) -> list[JobSpec]:
        self._runs += 1
        return elsewhere(jobs, f"fresh{self._runs}")


@pytest.fixture(scope="module", params=[1, 2], ids=["one rank", "two ranks"])
def world(request, tmp_path_factory) -> World:
    return World(tmp_path_factory.mktemp("poison"), request.param)


def assert_neighbours_untouched(world: World, found: Mapping[str, Adapter]) -> None:
    for job in world.healthy:
        assert_same_bits(found[job.job].factors, world.clean[job.job].factors, job.job)


def assert_stopped_as_diverged(events: list[Event]) -> None:
    stopped = [event for event in events if isinstance(event, JobStopped)]
    assert [(event.job, event.code) for event in stopped] == [(BAD, "diverged")]
    assert stopped[0].message == "the gradient was not finite in 3 steps in a row"


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_isolation_poisoned_weights_leave_the_neighbours_bit_identical(world, value):
    events = world.run({0: attach(*world.fresh(*world.jobs))}, value)
    assert_stopped_as_diverged(events)
    assert_neighbours_untouched(world, adapters(events))


@pytest.mark.parametrize("kind", ["learning rate", "alpha"])
def test_isolation_overflowing_loss_leaves_the_neighbours_bit_identical(world, kind):
    if kind == "alpha":
        huge = replace(world.bad, adapter=replace(world.bad.adapter, lora_alpha=1e38))
    else:
        huge = replace(world.bad, training=replace(world.bad.training, learning_rate=1e30, warmup_ratio=0.0))
    events = world.run({0: attach(*world.fresh(huge, *world.healthy))})
    steps = [event for event in events if isinstance(event, StepDone) and event.job == BAD]
    assert not all(math.isfinite(step.loss + step.grad_norm) for step in steps)
    assert_stopped_as_diverged(events)
    assert_neighbours_untouched(world, adapters(events))


def test_isolation_cancel_in_mid_accumulation_leaves_the_neighbours_bit_identical(world):
    budget = 300  # a step of the bad job takes several ticks
    undisturbed = adapters(world.run({0: attach(*world.fresh(*world.jobs))}, tokens_per_tick=budget))
    script = {0: attach(*world.fresh(*world.jobs)), 4: [Detach(BAD, 1)]}
    found = adapters(world.run(script, tokens_per_tick=budget))
    assert BAD not in found
    for job in world.healthy:
        assert_same_bits(found[job.job].factors, undisturbed[job.job].factors, job.job)


# ---- refused at the door ----------------------------------------------------------------------------


def chat_rows(folder: Path, name: str, question: str, answer: str) -> DatasetSpec:
    turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return DatasetSpec(str(write_rows(folder / name, [{"messages": turns}])), "chat")


def bad_data(folder: Path) -> dict[str, tuple[DatasetSpec, str]]:
    """What is wrong -> the data, and words of its refusal."""
    label = {"type": "classification", "labels": ("positive",)}
    broken, cut = folder / "broken.jsonl", folder / "cut.jsonl"
    broken.write_text('{"text": "a", "label": "positive"}\n{"text": \n')
    cut.write_bytes(b'{"text": "\xff')
    unforeseen: Any = "a type that no check foresees"
    long = write_rows(folder / "long.jsonl", [{"text": "a" * 400, "label": "positive"}])
    return {
        "empty target": (chat_rows(folder, "empty.jsonl", "x", " "), "nothing to learn from"),
        "labels of -100 alone": (
            chat_rows(folder, "masked.jsonl", "x" * 300, "yes"),
            "none of the assistant's",
        ),
        "row too long": (DatasetSpec(str(long), **label), "the row has 429 tokens; raise sequence_len"),
        "broken file": (DatasetSpec(str(broken), **label), "broken.jsonl:2: is not a JSON object"),
        "not text": (DatasetSpec(str(cut), **label), "is not UTF-8 text at byte 10"),
        "no file": (DatasetSpec(str(folder / "none.jsonl"), **label), "no such data file"),
        "unforeseen exception": (DatasetSpec(str(long), unforeseen, labels=("positive",)), "KeyError"),
    }


def refusals(events: list[Event]) -> dict[str, JobStopped]:
    return {event.job: event for event in events if isinstance(event, JobStopped)}


def test_isolation_jobs_refused_at_the_door_leave_the_residents_bit_identical(world):
    script: dict[int, list[Command]] = {0: attach(*world.fresh(*world.jobs))}
    expected = bad_data(world.folder)
    for tick, (name, (data, _)) in enumerate(expected.items(), 1):
        script[tick] = attach(*world.fresh(replace(world.bad, job=name, train=(data,))))
    events = world.run(script)
    refused = refusals(events)
    assert refused.keys() == expected.keys()
    for name, (_, words) in expected.items():
        assert refused[name].code == "bad_data"
        assert words in refused[name].message
        assert "\n" not in refused[name].message
    assert_neighbours_untouched(world, adapters(events))
    assert_same_bits(adapters(events)[BAD].factors, world.clean[BAD].factors)


def test_isolation_unusable_settings_and_checkpoints_leave_the_residents_bit_identical(world):
    (first,) = world.fresh(replace(world.bad, job="other shape"))
    reshaped = replace(first, attempt=2, adapter=replace(first.adapter, r=4))
    settings: dict[str, Callable[[], JobSpec]] = {
        "length": lambda: replace(world.bad, training=replace(world.bad.training, sequence_len=257)),
        "targets": lambda: replace(world.bad, adapter=replace(world.bad.adapter, target_modules=("nope",))),
        "rate": lambda: replace(world.bad, training=replace(world.bad.training, learning_rate=math.nan)),
        "rank": lambda: replace(world.bad, adapter=replace(world.bad.adapter, r=0)),
    }
    unusable = world.fresh(*(replace(make(), job=name) for name, make in settings.items()))
    script = {
        0: attach(*world.fresh(*world.healthy), first),
        3: [Detach("other shape", 1), *attach(reshaped)],
    }
    script[5] = [Attach(job) for job in unusable]
    events = world.run(script)
    refused = refusals(events)
    assert refused.keys() == {"other shape", *settings}
    assert all(event.code == "bad_data" and "\n" not in event.message for event in refused.values())
    finished = {event.job for event in events if isinstance(event, TrainingFinished)}
    assert finished == {job.job for job in world.healthy}
    assert_neighbours_untouched(world, adapters(events))


# ---- within one pass --------------------------------------------------------------------------------


def one_chunk(*rows: Row, length: int = 32) -> Chunk:
    return Chunk(length, (rows,))


def test_isolation_rows_of_minus_100_give_no_gradient_and_touch_no_neighbour(tmp_path):
    host = Host.load(test_base(tmp_path), Ranks())
    tokens = tuple(range(3, 30))
    healthy = one_chunk(Row(0, tokens, tokens), Row(1, tokens[::-1], tokens[::-1]))
    learned, masked = (one_chunk(Row(0, tokens, labels)) for labels in (tokens, (-100,) * len(tokens)))
    shares = {name: Share(slot, 0, 0, 0.0, 26) for slot, name in enumerate(("bad", "good"))}
    for share in shares.values():
        put(host.base.slots, share.slot, AdapterSpec(4, 8))
        with torch.no_grad():
            for _, b in factors(host.base.slots, share.slot):
                b.add_(0.01)
    grads = {}
    for kind, chunk in (("learned", learned), ("masked", masked)):
        micro_batch = MicroBatch(32, (("bad", chunk), ("good", healthy)))
        losses = forward_backward(host.base, Ranks(), micro_batch, shares)
        assert (float(losses["bad"]) == 0) == (kind == "masked")
        for name, share in shares.items():
            grads[kind, name] = gradients(host.base.slots, share.slot)
            clear_gradients(host.base.slots, share.slot)
    assert any(bool(grad.any()) for grad in grads["learned", "bad"])
    assert not any(bool(grad.any()) for grad in grads["masked", "bad"])
    assert all(map(torch.equal, grads["learned", "good"], grads["masked", "good"]))
