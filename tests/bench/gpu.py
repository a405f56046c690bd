"""The four cases for one GPU of Hopper's kind: bf16, random weights, LoRA r 16 on every linear layer.

    python -m tests.bench.gpu check saturated underfilled offload    on the GPU, any of them by name
    python -m tests.bench.gpu --shape tiny --device cpu              all of them at a small shape, anywhere

Needs torch, transformers, peft, safetensors, tokenizers, scikit-learn, sacrebleu and matplotlib; no Ray, no
MLflow. `offload` needs deepspeed as well, and deepspeed needs pydantic. Each case stays well inside ten
minutes; `check saturated underfilled` go into one call of a lent machine, `check offload` into another. With
the `device` tool the working tree travels as it is, and the command is

    python3 -m tests.bench.gpu check saturated underfilled --out $OUT

What that machine lacks for `offload` travels as wheels in a folder that git ignores, named in `carry` and
installed as the tool's README says: `hjson`, `pydantic`, `pydantic-core` of the version that pydantic names,
`annotated-types`, `typing-inspection`, and deepspeed, which the index has as source only: build its wheel by
`DS_BUILD_OPS=0 pip wheel --no-deps --no-build-isolation deepspeed==0.19.8` where torch is installed.

Systems run one after another, each alone on the GPU: four copies of the base and their activations would not
fit. The weights never touch a disk. Nothing is measured until the check has passed, when it is named.
"""

from __future__ import annotations

import argparse
import gc
import os
import sys
import tempfile
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig

from tests.bench.measure import PARITY, Setting, largest_gap
from tests.bench.record import Bars, Lines, Machine, Outcome, Table, Target, write
from tests.bench.rounds import Spread, System, interleaved, spread
from tests.bench.systems import BaseAlone, PeftLoop, Residents, device
from tests.bench.workload import Point, base_spec, make_jobs
from tests.models import byte_tokenizer
from tests.numerics.pair import free_port
from workers.data import encode_all
from workers.ranks import Ranks, connect
from workers.types import BaseSpec

RESULTS = Path(__file__).parent / "results"
LORAFUSION = 14_400
"""Tokens a second of LoRAFusion on an H100: 8B, r 16, four adapters."""
BF16_LOSS = 2e-2
"""Largest relative gap of a first step's loss between two orders of bf16 sums."""
LLAMA_8B = {
    "vocab_size": 128_256,
    "hidden_size": 4096,
    "intermediate_size": 14_336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 2048,
}
LLAMA_32B = {
    **LLAMA_8B,
    "vocab_size": 152_064,
    "hidden_size": 5120,
    "intermediate_size": 27_648,
    "num_hidden_layers": 64,
    "num_attention_heads": 40,
}
TINY = {
    "vocab_size": 259,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}


@dataclass(frozen=True)
class Sizes:
    """What is loaded and how much of it a tick holds."""

    base: dict[str, int]
    large: dict[str, int]
    saturated: Point
    underfilled: Point
    offload_counts: tuple[int, ...]
    offload_tokens: int
    rounds: int


H200 = Sizes(
    LLAMA_8B,
    LLAMA_32B,
    Point(8, 2048, 1, longest_row=1024, r=16, dtype="bfloat16", pass_tokens=16_384),
    Point(16, 256, 1, longest_row=256, r=16, dtype="bfloat16", pass_tokens=16_384),
    (1, 2, 4, 8, 16),
    256,
    5,
)
SMALL = Sizes(
    TINY,
    TINY,
    Point(2, 64, 1, longest_row=64, r=4, dtype="bfloat16", pass_tokens=256),
    Point(2, 32, 1, longest_row=32, r=4, dtype="bfloat16", pass_tokens=256),
    (1, 2),
    32,
    2,
)


@dataclass(frozen=True)
class Run:
    folder: Path
    sizes: Sizes
    ranks: Ranks

    def spec(self, point: Point, shape: dict[str, int], **overrides: Any) -> BaseSpec:
        return base_spec(_config_folder(self.folder, shape), point, **overrides)


# ---- the cases --------------------------------------------------------------------------------------------


def check(run: Run) -> Outcome:
    """Float32 to the parity contract, bf16 by a first step's loss. Raises RuntimeError if they differ."""
    with tempfile.TemporaryDirectory() as folder:
        gap = largest_gap(Setting(Path(folder), small=True), 1)
    with random_weights():
        loss, varlen = _bf16_loss_gap(run), _bf16_loss_gap(run, attention="varlen")
    found = {
        "float32: adapters, relative norm": (gap, PARITY),
        "bf16: loss of a first step": (loss, BF16_LOSS),
        "bf16, varlen: loss of a first step": (varlen, BF16_LOSS),
    }
    wrong = {what: value for what, (value, bound) in found.items() if not value <= bound}
    if wrong:
        raise RuntimeError(f"the host and PEFT do not do the same training: {wrong}")
    targets = [Target(what, value, bound, False) for what, (value, bound) in found.items()]
    bars = Bars({what: value for what, (value, _) in found.items()}, "difference")
    return Outcome("gpu-check", "The host against PEFT on this device", [], targets, bars)


def _bf16_loss_gap(run: Run, **overrides: Any) -> float:
    point = Point(1, 32, 1, dtype="bfloat16")
    base, (job,) = run.spec(point, TINY), make_jobs(run.folder, point)
    host = Residents(replace(base, **overrides), (job,), run.ranks)
    loss = next(event.loss for event in host.host.tick() if hasattr(event, "loss"))
    expected = PeftLoop(base, job, run.ranks).step()
    return abs(loss - expected) / abs(expected)


def saturated(run: Run) -> Outcome:
    """A full tick of several residents, one job alone with as many tokens, PEFT, and the base alone."""
    point = run.sizes.saturated
    alone = replace(point, jobs=1, tokens=point.jobs * point.tokens)
    together = _speed_of(run, point, _residents)
    one_job = _speed_of(run, alone, _residents)
    peft = _best([_speed_of(run, replace(alone, tokens=alone.tokens // cut), _peft) for cut in (1, 2, 4)])
    limit = _speed_of(run, point, _base_alone)
    speeds = {
        f"host, {point.jobs} residents": together,
        "host, one job with as many tokens": one_job,
        "PEFT, one job, its best batch": peft,
        "base alone": limit,
    }
    single = max(one_job.median, peft.median)
    return _speeds(
        "gpu-saturated",
        f"Saturated: {point.jobs} residents, {point.jobs * point.tokens:,} tokens a tick, no recomputation",
        speeds,
        [
            Target("tokens/s", together.median, 16_000),
            Target("times as fast as the best single-job loop", together.median / single, 1),
            Target("time over the base alone's", limit.median / together.median, 1.15, False),
        ],
        [f"LoRAFusion on an H100, 8B, r 16: {LORAFUSION:,} tokens/s, as published."],
    )


def underfilled(run: Run) -> Outcome:
    point = run.sizes.underfilled
    one = replace(point, jobs=1)
    speeds = {
        f"host, {point.jobs} residents": _speed_of(run, point, _residents),
        "the same, rows end to end (varlen)": _speed_of(run, point, _residents_end_to_end),
        "host, one resident at a time": _speed_of(run, one, _residents),
        "PEFT, one job after another": _speed_of(run, one, _peft),
        "base alone": _speed_of(run, point, _base_alone),
    }
    together, _, alone, peft, _ = (speed.median for speed in speeds.values())
    return _speeds(
        "gpu-underfilled",
        f"Underfilled: {point.jobs} residents, {point.tokens} tokens each",
        speeds,
        [
            Target("times as fast as one resident at a time", together / alone, 5),
            Target("times as fast as PEFT", together / peft, 6),
        ],
    )


def offload(run: Run) -> Outcome:
    """A base in host memory: one gather serves all residents, until the copy is hidden."""
    counts = run.sizes.offload_counts
    point = replace(run.sizes.underfilled, jobs=counts[-1], tokens=run.sizes.offload_tokens)
    where = {"offload_param": {"device": "cpu", "pin_memory": torch.cuda.is_available()}}
    base = run.spec(point, run.sizes.large, zero="3", deepspeed=where)
    jobs = make_jobs(run.folder, point)
    speeds: dict[int, Spread] = {}
    with random_weights():
        host = Residents(base, (), run.ranks)
        for count in counts:
            for job in jobs[len(host.host.residents) : count]:
                host.attach(job)
            speeds[count] = _timed(run, System("host", host.steps, count, count), count * point.tokens)
    first = speeds[counts[0]].median
    rows = [[n, speed, f"{speed.median / first:.2f}"] for n, speed in speeds.items()]
    header = ("residents", "tokens/s: median, least and greatest", "times one resident's")
    lines = Lines(
        counts,
        {"found": [s.median for s in speeds.values()], "proportional": [n * first for n in counts]},
        ("residents", "tokens/s"),
    )
    title = f"A large base offloaded to host memory under ZeRO-3, {point.tokens} tokens a resident"
    notes = ["No figure is required here: close to proportional until the copy is hidden."]
    return Outcome("gpu-offload", title, [Table("tokens a second", header, rows)], [], lines, notes)


CASES: dict[str, Callable[[Run], Outcome]] = {
    "check": check,
    "saturated": saturated,
    "underfilled": underfilled,
    "offload": offload,
}


def _speeds(
    case: str, title: str, speeds: dict[str, Spread], targets: list[Target], notes: Sequence[str] = ()
) -> Outcome:
    table = Table("tokens a second", ("system", "median, least and greatest"), list(speeds.items()))
    bars = Bars({name: speed.median for name, speed in speeds.items()}, "tokens/s")
    return Outcome(case, title, [table], targets, bars, notes)


# ---- systems, one at a time -------------------------------------------------------------------------------


def _residents(run: Run, point: Point, base: BaseSpec) -> System:
    host = Residents(base, make_jobs(run.folder, point), run.ranks)
    return System("host", host.steps, point.jobs, point.jobs)


def _residents_end_to_end(run: Run, point: Point, base: BaseSpec) -> System:
    return _residents(run, point, replace(base, attention="varlen"))


def _peft(run: Run, point: Point, base: BaseSpec) -> System:
    return System("PEFT", PeftLoop(base, make_jobs(run.folder, point)[0], run.ranks).steps, 1, 1)


def _base_alone(run: Run, point: Point, base: BaseSpec) -> System:
    jobs = make_jobs(run.folder, point)
    rows = [row for job in jobs for row in encode_all(byte_tokenizer(), job.train, point.row_tokens)]
    per_pass = min(len(rows), point.pass_tokens // point.row_tokens)
    limit = BaseAlone(base, rows[:per_pass], run.ranks)
    return System("base alone", limit.passes, 1, len(rows) / per_pass)


def _speed_of(run: Run, point: Point, build: Callable[[Run, Point, BaseSpec], System]) -> Spread:
    """Tokens a second. A load that does not fit is tried again in passes of half the size; 0 if none fits."""
    for pass_tokens in (point.pass_tokens, point.pass_tokens // 2, point.pass_tokens // 4):
        smaller = replace(point, pass_tokens=pass_tokens)
        _forget()
        try:
            with random_weights():
                system = build(run, smaller, run.spec(smaller, run.sizes.base))
            return _timed(run, system, point.jobs * point.tokens)
        except torch.cuda.OutOfMemoryError:
            print(f"{build.__name__}: {smaller} does not fit in passes of {pass_tokens} tokens", flush=True)
        if build is _peft:
            break  # its passes are its batches
    return Spread(0.0, 0.0, 0.0)


def _timed(run: Run, system: System, tokens: int) -> Spread:
    (seconds,) = interleaved([system], run.sizes.rounds, run.ranks, least_seconds=0.0).values()
    found = spread([tokens / value for value in seconds])
    print(f"  {found} tokens/s", flush=True)
    return found


def _best(speeds: Sequence[Spread]) -> Spread:
    return max(speeds, key=lambda speed: speed.median)


def _forget() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


# ---- weights that never were on a disk --------------------------------------------------------------------


def _config_folder(folder: Path, shape: dict[str, int]) -> Path:
    """A model folder without weights: configuration and tokenizer."""
    path = folder / f"shape-{shape['hidden_size']}-{shape['num_hidden_layers']}"
    if not path.is_dir():
        LlamaConfig(**shape, pad_token_id=0, eos_token_id=2, bos_token_id=None).save_pretrained(path)
        byte_tokenizer().save_pretrained(path)
    return path


@contextmanager
def random_weights() -> Generator[None]:
    """Within the block a model is made from its configuration, on the device, instead of being read."""
    original = AutoModelForCausalLM.from_pretrained

    def build(path: Any, dtype: torch.dtype, attn_implementation: str, **_: Any) -> Any:
        torch.manual_seed(0)
        config = AutoConfig.from_pretrained(path)
        with torch.device(device()):
            return AutoModelForCausalLM.from_config(
                config, dtype=dtype, attn_implementation=attn_implementation
            )

    AutoModelForCausalLM.from_pretrained = build  # type: ignore[method-assign]
    try:
        yield
    finally:
        AutoModelForCausalLM.from_pretrained = original  # type: ignore[method-assign]


# ---- the command ------------------------------------------------------------------------------------------


def main(arguments: Sequence[str]) -> int:
    asked = _parser().parse_args(arguments)
    if asked.device == "cuda" and not torch.cuda.is_available():
        print("there is no GPU here; try the script with --shape tiny --device cpu", file=sys.stderr)
        return 2
    if asked.device == "cpu":
        os.environ["DS_ACCELERATOR"] = "cpu"
    machine = Machine.read()
    outcomes = []
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        run = Run(Path(folder), SMALL if asked.shape == "tiny" else H200, _one_rank())
        for case in [name for name in CASES if name in (asked.cases or CASES)]:
            print(case, flush=True)
            outcomes.append(CASES[case](run))
    command = ["python", "-m", "tests.bench.gpu", *arguments]
    paths = [write(outcome, machine, asked.out, command, asked.shape == "tiny") for outcome in outcomes]
    print("\n\n".join(path.read_text() for path in paths))
    return 0


def _one_rank() -> Ranks:
    """A rank whose environment says so: DeepSpeed asks for it even of one."""
    return connect(0, 1, "127.0.0.1", free_port())


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.gpu")
    parser.add_argument("cases", nargs="*", choices=[*CASES, []], help=f"of {', '.join(CASES)}; all if none")
    parser.add_argument("--shape", choices=("full", "tiny"), default="full")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the records")
    return parser


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
