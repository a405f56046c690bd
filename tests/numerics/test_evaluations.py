"""Evaluations that share passes: the report of each is, bit for bit, the one it gets alone."""

from __future__ import annotations

import math
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.models import write_rows
from tests.numerics.jobs import WORDS, adapters, assert_same_bits, attach, drive, run, test_base, three_jobs
from tests.numerics.pair import two_ranks
from workers import checkpoint
from workers.host import Host
from workers.ranks import Ranks
from workers.reading import Chunk, share_passes
from workers.types import (
    AdapterSpec,
    BaseSpec,
    DatasetSpec,
    Evaluate,
    EvaluationDone,
    EvaluationFailed,
    EvaluationReport,
    EvaluationSpec,
    Event,
)

LABELS = ("down", "flat", "up")
SPECS = {
    "wide": AdapterSpec(r=8, lora_alpha=16),
    "narrow": AdapterSpec(r=2, lora_alpha=3, target_modules=("q_proj", "down_proj")),
    "rslora": AdapterSpec(r=8, lora_alpha=5, use_rslora=True),
}


def phrase(draw: random.Random, most: int) -> str:
    return " ".join(draw.choices(WORDS, k=draw.randint(1, most)))


def row(kind: str, draw: random.Random) -> dict[str, Any]:
    if kind == "classification":
        return {"text": phrase(draw, 6), "label": draw.choice(LABELS)}
    if kind == "chat":
        roles = ("user", "assistant") * draw.randint(1, 2)
        return {"messages": [{"role": role, "content": phrase(draw, 4)} for role in roles]}
    candidates = sorted({phrase(draw, 3) for _ in range(4)})
    return {"history": [phrase(draw, 3)], "candidates": candidates, "target": draw.choice(candidates)}


def tasks(folder: Path, rows: int = 9) -> dict[str, EvaluationSpec]:
    """One of every kind, and a second chat of other rows; the first rows alone are replied to."""
    found = {}
    for name, kind in (
        ("chat", "chat"),
        ("more", "chat"),
        ("label", "classification"),
        ("rank", "recommendation"),
    ):
        draw = random.Random(name)
        file = write_rows(folder / f"{name}.jsonl", [row(kind, draw) for _ in range(rows)])
        data = DatasetSpec(str(file), kind, labels=LABELS if kind == "classification" else ())
        found[name] = EvaluationSpec((data,), 256, max_new_tokens=6, generate_samples=5)
    return found


def write_adapters(folder: Path, base: BaseSpec) -> dict[str, str]:
    """Of different ranks, scales and modules, large enough to change every answer."""
    host = Host.load(replace(base, zero="none"), Ranks())
    for seed, (name, spec) in enumerate(SPECS.items()):
        slot = host.base.slots.create(seed, spec, seed)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            slot.weights.copy_(0.3 * torch.randn(slot.weights.shape, generator=generator))
        checkpoint.save_adapter(folder / name, host.base.slots.export(seed, spec, base.name), base.digest)
    return {name: str(folder / name) for name in SPECS}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("evaluations")
    base = test_base(folder)
    return base, write_adapters(folder, base), tasks(folder)


def questions(world, prefix: str = "") -> list[Evaluate]:
    """The base and every adapter on every task."""
    _, folders, of = world
    candidates = {"base": None, **folders}
    return [
        Evaluate(f"{prefix}{name}.{task}", folder, spec)
        for name, folder in candidates.items()
        for task, spec in of.items()
    ]


def reports(events: list[Event]) -> dict[str, EvaluationReport]:
    return {event.request: event.report for event in events if isinstance(event, EvaluationDone)}


@pytest.mark.parametrize(("world_size", "zero"), [(1, "none"), (2, "3")])
def test_evaluations_in_one_tick_have_the_reports_of_each_alone(world, world_size, zero):
    base, *_ = world
    alone = {tick: [command] for tick, command in enumerate(questions(world, "alone "), 1)}
    found = reports(run(replace(base, zero=zero), {0: questions(world), **alone}, world_size))
    assert len(found) == 2 * 16
    for command in questions(world):
        assert found[command.request] == found[f"alone {command.request}"], command.request
    metrics = [tuple(found[f"{name}.chat"].metrics.values()) for name in ("base", *SPECS)]
    assert len(set(metrics)) == 4, "the adapters do not show in the scores"


def test_evaluations_in_one_tick_share_their_forward_passes(world):
    host = Host.load(world[0], Ranks())
    passes = []
    host.base.model.register_forward_pre_hook(lambda *_: passes.append(1))
    counts = []
    for commands in ([questions(world)[0]], questions(world)[::4], questions(world)):
        before = len(passes)
        drive(host, {0: list(commands)})
        counts.append(len(passes) - before)
    one, four_adapters, all_tasks = counts
    # A pass over the rows, and one for each token of the replies: no more of them for more adapters.
    assert one == four_adapters == 1 + 6
    assert all_tasks <= 2 * (1 + 6) + 2 * 4


def test_evaluations_of_more_adapters_than_slots_take_turns(world):
    base, *_ = world
    host = Host.load(replace(base, slots=2), Ranks())
    expected = reports(drive(Host.load(base, Ranks()), {0: questions(world)}))
    for command in questions(world):
        host.apply(command)
    first, second = reports(host.tick()), reports(host.tick())
    assert {request.partition(".")[0] for request in first} == {"base", "wide", "narrow"}
    assert {request.partition(".")[0] for request in second} == {"rslora"}
    assert first | second == expected
    assert not host.busy


def test_evaluation_that_cannot_be_made_keeps_no_other_from_its_report(world, tmp_path):
    base, folders, of = world
    poisoned = Host.load(base, Ranks())
    slot = poisoned.base.slots.create(0, SPECS["wide"], 0)
    slot.weights.data.fill_(math.nan)
    checkpoint.save_adapter(
        tmp_path / "nan", poisoned.base.slots.export(0, SPECS["wide"], base.name), base.digest
    )
    lost = replace(of["chat"], datasets=(replace(of["chat"].datasets[0], path="nowhere.jsonl"),))
    spoilt = [
        Evaluate("diverged", str(tmp_path / "nan"), of["chat"]),
        Evaluate("no adapter", str(tmp_path / "none"), of["chat"]),
        Evaluate("no rows", folders["wide"], lost),
    ]
    clean = reports(drive(Host.load(base, Ranks()), {0: questions(world)}))
    events = drive(Host.load(base, Ranks()), {0: [*spoilt, *questions(world)]})
    failed = {event.request: event.message for event in events if isinstance(event, EvaluationFailed)}
    assert list(failed) == ["diverged", "no adapter", "no rows"]
    assert "the adapter has diverged" in failed["diverged"]
    assert str(tmp_path / "none") in failed["no adapter"]
    assert "nowhere.jsonl" in failed["no rows"]
    assert reports(events) == clean


def lost_on_one_rank(ranks: Ranks, base: BaseSpec, folders: list[str], spec: EvaluationSpec):
    """What is told, and the bytes of adapters that are left on each rank."""
    host = Host.load(base, ranks)
    events = drive(host, {0: [Evaluate("lost", folders[ranks.rank], spec)]})
    return events, ranks.gather(host.base.slots.arenas.bytes)


def test_evaluation_of_an_adapter_that_one_rank_cannot_read_leaves_no_slot_on_the_other(world, tmp_path):
    base, folders, of = world
    places = [folders["wide"], str(tmp_path / "none")]
    (failed,), left = two_ranks(lost_on_one_rank, base, places, of["label"])
    assert isinstance(failed, EvaluationFailed)
    assert str(tmp_path / "none") in failed.message
    assert left == [0, 0]


def test_evaluations_beside_training_jobs_change_no_bit_of_them(world, tmp_path):
    base, *_ = world
    jobs = attach(*three_jobs(tmp_path / "with", steps=6))
    beside = adapters(run(base, {0: jobs, 2: questions(world), 4: questions(world, "again ")}))
    alone = adapters(run(base, {0: attach(*three_jobs(tmp_path / "without", steps=6))}))
    for job, adapter in alone.items():
        assert_same_bits(beside[job].factors, adapter.factors, job)


# ---- which chunks share a pass ----------------------------------------------------------------------


def chunk(candidate: int, length: int, share: float, item: int = 0) -> Chunk:
    return Chunk(candidate, candidate, (item,), (length,), share)


@pytest.mark.parametrize(("world_size", "passes"), [(1, [12]), (2, [6, 6]), (4, [3, 3, 3, 3])])
def test_share_passes_small_chunks_of_one_length_fill_a_pass_a_rank(world_size, passes):
    found = share_passes([chunk(candidate, 64, 1 / 12) for candidate in range(12)], world_size)
    assert [len(one) for one in found] == passes


def test_share_passes_full_chunks_have_passes_of_their_own():
    found = share_passes([chunk(0, 64, 1.0), chunk(1, 64, 0.9), chunk(2, 64, 1.7), chunk(3, 64, 0.1)], 1)
    assert sorted(tuple(one.candidate for one in each) for each in found) == [(0,), (1, 3), (2,)]


@given(
    st.lists(st.tuples(st.sampled_from([16, 32, 64]), st.floats(0.01, 1.5)), max_size=30),
    st.integers(1, 4),
)
def test_share_passes_holds_every_chunk_once_beside_its_like_and_no_pass_too_much(sizes, world_size):
    chunks = [chunk(number, length, share) for number, (length, share) in enumerate(sizes)]
    passes = share_passes(chunks, world_size)
    assert sorted(one.candidate for each in passes for one in each) == list(range(len(chunks)))
    for each in passes:
        assert len({one.kind for one in each}) == 1
        assert len(each) == 1 or sum(one.share for one in each) <= 1
    lengths = [each[0].kind[0] for each in passes]
    assert lengths == sorted(lengths, reverse=True)
