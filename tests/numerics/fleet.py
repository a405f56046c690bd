"""Five jobs that share no setting, a sixth that leaves for good, and a script of joins and preemptions."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from tests.numerics.jobs import attach, job
from workers.types import AdapterSpec, Attach, Command, Detach, JobSpec, TrainingSpec

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
LAST_LAYER = ("layers.1.self_attn.o_proj", "layers.1.mlp.down_proj")
LEAVES_AT = 20
"""The tick before which `leaver` is cancelled."""


def fleet(folder: Path, same_length: bool = False, dropout: float = 0.0) -> list[JobSpec]:
    """Fifty steps each: ranks, alphas, rsLoRA, targets, batches, lengths, epochs, schedules and clipping
    all differ. With `same_length` every row has five words, so a step is one chunk padded as it is alone."""

    def make(name: str, adapter: AdapterSpec, training: TrainingSpec, words: tuple[int, int]) -> JobSpec:
        spec = replace(adapter, lora_dropout=dropout)
        return job(folder, name, spec, training, (5, 5) if same_length else words)

    return [
        make(
            "r4",
            AdapterSpec(4, 8, target_modules=("q_proj", "v_proj"), use_rslora=True),
            TrainingSpec(5e-3, 4, 256, max_steps=50, lr_scheduler="linear", max_grad_norm=None, seed=1),
            (1, 4),
        ),
        make(
            "r8",
            AdapterSpec(8, 16),
            TrainingSpec(2e-3, 8, 256, num_epochs=8.3, warmup_ratio=0.1, weight_decay=0.01, seed=2),
            (3, 12),
        ),
        make(
            "r16",
            AdapterSpec(16, 4, target_modules=("gate_proj", "up_proj", "down_proj")),
            TrainingSpec(
                1e-2,
                6,
                256,
                max_steps=50,
                lr_scheduler="constant",
                max_grad_norm=0.5,
                weight_decay=0.1,
                seed=3,
            ),
            (6, 9),
        ),
        make(
            "r24",
            AdapterSpec(24, 24, target_modules=LAST_LAYER, use_rslora=True),
            TrainingSpec(
                3e-3, 1, 256, max_steps=50, adam_beta1=0.8, adam_beta2=0.95, adam_epsilon=1e-6, seed=4
            ),
            (10, 16),
        ),
        make(
            "r64",
            AdapterSpec(64, 128, target_modules=ATTENTION),
            TrainingSpec(
                1e-3,
                11,
                256,
                num_epochs=10,
                lr_scheduler="linear",
                warmup_ratio=0.2,
                max_grad_norm=0.1,
                seed=5,
            ),
            (2, 6),
        ),
        make("leaver", AdapterSpec(2, 2), TrainingSpec(4e-3, 3, 256, max_steps=50, seed=6), (4, 10)),
    ]


def comings_and_goings(jobs: Sequence[JobSpec], seed: int) -> dict[int, list[Command]]:
    """Joins before ticks 0, 7 and 31, one job leaving for good, and three preemptions at random ticks."""
    r4, r8, r16, r24, r64, leaver = jobs
    script = {
        0: attach(r4, r8, leaver),
        7: attach(r16, r64),
        31: attach(r24),
        LEAVES_AT: [Detach("leaver", 1)],
    }
    draw = random.Random(seed)
    for spec in draw.sample([r4, r8, r16, r64], 3):
        away, back = sorted(draw.sample(range(8, 45), 2))
        script.setdefault(away, []).append(Detach(spec.job, 1))
        script.setdefault(back, []).append(Attach(replace(spec, attempt=2)))
    return script


def elsewhere(jobs: Sequence[JobSpec], name: str) -> list[JobSpec]:
    """The same jobs with checkpoints of their own."""
    return [replace(spec, checkpoint_dir=f"{spec.checkpoint_dir}-{name}") for spec in jobs]
