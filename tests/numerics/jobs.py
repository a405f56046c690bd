"""Jobs that differ in everything, and a way to run them through a host, on one rank or two."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from tests.models import make_base, write_rows
from tests.numerics.pair import two_ranks
from workers.adapter import Adapter, read_adapter
from workers.host import Host
from workers.ranks import Ranks
from workers.types import (
    AdapterSpec,
    Attach,
    BaseSpec,
    Command,
    DatasetSpec,
    Event,
    JobSpec,
    TrainingFinished,
    TrainingSpec,
)

WORDS = ("gain", "fall", "rise", "bank", "loss", "oils", "gold", "rate", "euro", "cuts", "beat", "miss")


def headline_rows(seed: int, rows: int, words: tuple[int, int]) -> list[dict[str, Any]]:
    draw = random.Random(seed)
    return [
        {
            "text": " ".join(draw.choices(WORDS, k=draw.randint(*words))),
            "label": draw.choice(["negative", "neutral", "positive"]),
        }
        for _ in range(rows)
    ]


def job(
    folder: Path, name: str, adapter: AdapterSpec, training: TrainingSpec, words: tuple[int, int]
) -> JobSpec:
    path = write_rows(folder / f"{name}.jsonl", headline_rows(training.seed, 48, words))
    data = DatasetSpec(str(path), "classification", labels=("negative", "neutral", "positive"))
    return JobSpec(name, 1, adapter, training, (data,), (), str(folder / "checkpoints" / name))


def three_jobs(folder: Path, steps: int = 50, same_length: bool = False) -> list[JobSpec]:
    """Different rank, alpha, targets, batch, length, learning rate, schedule, clipping and weight decay."""

    def words(low: int, high: int) -> tuple[int, int]:
        return (5, 5) if same_length else (low, high)

    return [
        job(
            folder,
            "wide",
            AdapterSpec(r=8, lora_alpha=16),
            TrainingSpec(2e-3, 8, 256, max_steps=steps, warmup_ratio=0.1, weight_decay=0.01, seed=1),
            words(3, 12),
        ),
        job(
            folder,
            "rslora",
            AdapterSpec(r=4, lora_alpha=8, use_rslora=True, target_modules=("q_proj", "v_proj")),
            TrainingSpec(5e-3, 4, 256, max_steps=steps, lr_scheduler="linear", max_grad_norm=None, seed=2),
            words(1, 4),
        ),
        job(
            folder,
            "small",
            AdapterSpec(r=2, lora_alpha=2, target_modules=("q_proj", "k_proj", "o_proj", "down_proj")),
            TrainingSpec(1e-2, 6, 256, max_steps=steps, lr_scheduler="constant", max_grad_norm=0.5, seed=3),
            words(6, 9),
        ),
    ]


def test_base(folder: Path, **overrides: Any) -> BaseSpec:
    path = make_base(folder / "base")
    return replace(BaseSpec(str(path), name="tests/random"), **overrides)


test_base.__test__ = False  # type: ignore[attr-defined]


def drive(host: Host, script: Mapping[int, list[Command]]) -> list[Event]:
    """Apply each tick's commands before that tick, until nobody is resident and the script is over."""
    events: list[Event] = []
    tick, last = 0, max(script)
    while host.busy or tick <= last:
        for command in script.get(tick, []):
            events += host.apply(command)
        if host.busy:
            events += host.tick()
        tick += 1
    return events


def run(base: BaseSpec, script: Mapping[int, list[Command]], world_size: int = 1) -> list[Event]:
    """The script through a real host of `world_size` processes; rank 0's events."""
    if world_size == 1:
        return run_here(Ranks(), base, script)
    return two_ranks(run_here, base, script)


def run_here(ranks: Ranks, base: BaseSpec, script: Mapping[int, list[Command]]) -> list[Event]:
    return drive(Host.load(base, ranks), script)


def attach(*jobs: JobSpec) -> list[Command]:
    return [Attach(spec) for spec in jobs]


def adapters(events: list[Event]) -> dict[str, Adapter]:
    return {e.job: read_adapter(Path(e.adapter_dir)) for e in events if isinstance(e, TrainingFinished)}


def first_adapter(base: BaseSpec, spec: JobSpec) -> Adapter:
    """The adapter a host starts `spec` with."""
    host = Host.load(replace(base, zero="none"), Ranks())
    host.base.slots.create(0, spec.adapter, spec.training.seed)
    return host.base.slots.export(0, spec.adapter, base.name)


def distance(found: Mapping[str, Any], expected: Mapping[str, Any]) -> float:
    """Relative distance of two adapters in Frobenius norm over all factors."""
    assert found.keys() == expected.keys()
    pairs = [(f, e) for name in found for f, e in zip(found[name], expected[name], strict=True)]
    gap = sum(float((f.double() - e.double()).square().sum()) for f, e in pairs)
    return (gap / sum(float(e.double().square().sum()) for _, e in pairs)) ** 0.5


def assert_same_bits(found: Mapping[str, Any], expected: Mapping[str, Any], job: str = "") -> None:
    assert found.keys() == expected.keys(), job
    for name, (a, b) in expected.items():
        assert torch.equal(found[name][0], a), (job, name)
        assert torch.equal(found[name][1], b), (job, name)
