"""What the benchmarks train: a random Llama, and jobs whose rows have exactly so many tokens each.

A quarter of a row's tokens is learned, the rest is prompt. All jobs of a point are alike but for their rows,
their seeds and their first A; so one job's step stands for another's.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.models import make_base, write_rows
from workers.types import AdapterSpec, BaseSpec, DatasetSpec, JobSpec, TrainingSpec

SHAPES: dict[str, dict[str, Any]] = {
    "full": {
        "vocab_size": 4096,
        "hidden_size": 256,
        "intermediate_size": 688,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "max_position_embeddings": 512,
    },
    "small": {"max_position_embeddings": 512},
}
"""`full` is the issue's; `small` is the tests' tiny Llama, for trying the scripts."""

TEMPLATE_TOKENS = 21
"""What the tests' chat template and byte tokenizer add to one question and its answer."""
FOREVER = 10**9
PERSISTENT = {
    "full": {"stage3_param_persistence_threshold": 10_000},
    "small": {"stage3_param_persistence_threshold": 0},
}
"""DeepSpeed's default would keep much of a base of this size on every rank, and gather little."""


@dataclass(frozen=True)
class Point:
    """One measured load: `tokens` are those of one job, on one rank, in one of its steps."""

    jobs: int
    tokens: int
    ranks: int = 1
    longest_row: int = 128
    r: int = 8
    dtype: str = "float32"
    pass_tokens: int = 8192
    """Padded tokens a rank holds in one pass; for every system the same."""

    @property
    def row_tokens(self) -> int:
        return min(self.tokens, self.longest_row)

    @property
    def batch(self) -> int:
        """Rows of a job's step, over all ranks."""
        return self.ranks * self.tokens // self.row_tokens

    def __str__(self) -> str:
        return f"{self.jobs} jobs x {self.tokens} tokens, {self.ranks} rank{'s' * (self.ranks > 1)}"


def base_folder(folder: Path, shape: str) -> Path:
    """The model of that shape, made once."""
    path = folder / f"base-{shape}"
    return path if (path / "config.json").is_file() else make_base(path, **SHAPES[shape])


def base_spec(path: Path, point: Point, **overrides: Any) -> BaseSpec:
    given = {
        "dtype": point.dtype,
        "slots": point.jobs + 1,
        "tokens_per_tick": point.pass_tokens,
        "name": "bench/random",
    }
    return BaseSpec(str(path), **{**given, **overrides})


def chat_rows(seed: int, count: int, tokens: int) -> list[dict[str, Any]]:
    """`count` dialogues of exactly `tokens` tokens under the tests' byte tokenizer."""
    draw = random.Random(seed)
    answer = tokens // 4 - 1
    question = tokens - TEMPLATE_TOKENS - answer

    def letters(length: int) -> str:
        return "".join(draw.choices("abcdefghijklmnopqrstuvwxyz", k=length))

    return [
        {
            "messages": [
                {"role": "user", "content": letters(question)},
                {"role": "assistant", "content": letters(answer)},
            ]
        }
        for _ in range(count)
    ]


def make_jobs(
    folder: Path, point: Point, steps: int = FOREVER, rows: int | None = None, **training: Any
) -> list[JobSpec]:
    """The point's jobs. `rows` is the size of each data set, one step's rows unless given."""
    return [
        make_job(folder, point, index, steps, rows or point.batch, **training) for index in range(point.jobs)
    ]


def make_job(folder: Path, point: Point, index: int, steps: int, rows: int, **training: Any) -> JobSpec:
    name = f"job{index:02d}"
    file = folder / f"{name}-{rows}x{point.row_tokens}.jsonl"
    if not file.is_file():
        write_rows(file, chat_rows(index, rows, point.row_tokens))
    given = {
        "learning_rate": 1e-3,
        "global_batch_size": point.batch,
        "sequence_len": point.row_tokens,
        "max_steps": steps,
        "lr_scheduler": "constant",
        "evals_per_epoch": 0,
        "saves_per_epoch": 0,
        "seed": index,
    }
    return JobSpec(
        name,
        1,
        AdapterSpec(r=point.r, lora_alpha=2 * point.r),
        TrainingSpec(**{**given, **training}),
        (DatasetSpec(str(file), "chat"),),
        (),
        str(folder / "checkpoints" / f"{point.ranks}ranks-{steps}steps" / name),
    )
