"""A merged release in the shape of Llama-3.1-8B with random weights: time beside a plain copy, and memory.

The copy reads every file of the base and writes it again in 16 MiB pieces, as a release must at least. Both
start with the base out of the page cache and end when the disk has what they wrote. The release runs in a
process of its own, which reports the kernel's peak of its resident set, mapped files included.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from statistics import median
from typing import Any

import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, LlamaConfig

from tests.adapters import random_adapter
from tests.bench.measure import Setting
from tests.bench.record import Bars, Outcome, Table, Target
from workers.adapter import Adapter, write_adapter
from workers.export import export
from workers.manifest import file_digest, publish_folder
from workers.merge import INDEX, weight_map
from workers.shards import Block, Entry, write_shard
from workers.types import ExportTask

PIECE = 1 << 24
RANK = 16
FILE_BYTES = {"small": 200_000, "full": 5 * 10**9}
"""A file of the base is closed before it holds more, as Transformers does."""


def release(setting: Setting) -> Outcome:
    base, adapter = setting.folder / "base", setting.folder / "adapter"
    entries = write_base(base, llama(setting.small), FILE_BYTES[setting.shape])
    linears = [name.removesuffix(".weight") for name in entries if "_proj" in name]
    shapes = {name: entries[f"{name}.weight"].shape for name in linears}
    added = random_adapter(1, shapes=shapes, r=RANK, lora_alpha=2 * RANK)  # type: ignore[arg-type]
    with publish_folder(adapter) as scratch:
        write_adapter(added, scratch)
    copies, releases, peaks = [], [], []
    for number in range(setting.rounds):
        copies.append(cold(base, lambda to=setting.folder / f"copy-{number}": copy(base, to)))
        seconds, peak = in_a_process(base, adapter, setting.folder / f"release-{number}")
        releases.append(seconds)
        peaks.append(peak)
        check(base, setting.folder / f"release-{number}", added, linears[-1])
        shutil.rmtree(setting.folder / f"release-{number}")
        shutil.rmtree(setting.folder / f"copy-{number}")
    named = cold(base, lambda: [file_digest(path) for path in files_of(base)])
    return _outcome(base, len(linears), copies, releases, peaks, named)


def llama(small: bool) -> LlamaConfig:
    layers, hidden, inner, heads, key_heads, words = (
        (2, 64, 128, 4, 2, 512) if small else (32, 4096, 14336, 32, 8, 128256)
    )
    return LlamaConfig(
        num_hidden_layers=layers,
        hidden_size=hidden,
        intermediate_size=inner,
        num_attention_heads=heads,
        num_key_value_heads=key_heads,
        vocab_size=words,
        tie_word_embeddings=False,
        architectures=["LlamaForCausalLM"],
        dtype="bfloat16",
    )


def write_base(folder: Path, config: LlamaConfig, file_bytes: int) -> dict[str, Entry]:
    """A base folder, file by file; what each tensor is. Tensors are cut from one row of random numbers."""
    with torch.device("meta"):
        state = AutoModelForCausalLM.from_config(config).state_dict()
    entries = {name: Entry(tuple(tensor.shape), torch.bfloat16) for name, tensor in state.items()}
    files: list[dict[str, Entry]] = [{}]
    for name, entry in entries.items():
        if files[-1] and sum(e.nbytes for e in files[-1].values()) + entry.nbytes > file_bytes:
            files.append({})
        files[-1][name] = entry
    folder.mkdir()
    config.save_pretrained(folder)
    row = (0.02 * torch.randn(PIECE, generator=torch.Generator().manual_seed(0))).bfloat16()

    def fill(block: Block, into: torch.Tensor) -> None:
        begin = (hash_of(block.name) + block.start) % PIECE
        into.copy_(torch.cat([row[begin:], row[:begin]])[: block.elements])

    placed: dict[str, str] = {}
    for number, part in enumerate(files, 1):
        path = folder / f"model-{number:05d}-of-{len(files):05d}.safetensors"
        write_shard(path, part, fill)
        placed |= dict.fromkeys(part, path.name)
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": placed}))
    return entries


def hash_of(name: str) -> int:
    return sum(name.encode())


def files_of(folder: Path) -> list[Path]:
    return sorted(set(weight_map(folder).values()))


def cold(base: Path, work: Callable[[], Any]) -> float:
    """Seconds of `work` with none of the base in the page cache."""
    for path in files_of(base):
        file = os.open(path, os.O_RDONLY)
        os.fsync(file)
        os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(file)
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def copy(base: Path, to: Path) -> None:
    to.mkdir()
    for path in files_of(base):
        with path.open("rb", buffering=0) as source, (to / path.name).open("wb", buffering=0) as target:
            while piece := source.read(PIECE):
                target.write(piece)
            os.fsync(target.fileno())


def in_a_process(base: Path, adapter: Path, out: Path) -> tuple[float, int]:
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
        return process.submit(released, base, adapter, out).result()


def released(base: Path, adapter: Path, out: Path) -> tuple[float, int]:
    """Seconds of the release, and the peak of this process's resident set in bytes."""
    torch.set_num_threads(1)
    # The command names the base by the digest it has just verified, which the record times by itself.
    task = ExportTask(str(adapter), str(base), True, str(out), (), "bfloat16", base_digest="b" * 64)
    seconds = cold(base, lambda: export(task))
    status = Path("/proc/self/status").read_text().splitlines()
    peak = next(line for line in status if line.startswith("VmHWM:"))
    return seconds, int(peak.split()[1]) * 1024


def check(base: Path, out: Path, adapter: Adapter, module: str) -> None:
    """Raises AssertionError if one merged weight is not W + s B A, rounded once."""
    name = f"{module}.weight"
    with safe_open(weight_map(base)[name], "pt") as before, safe_open(weight_map(out)[name], "pt") as after:
        weight, merged = before.get_tensor(name).double(), after.get_tensor(name).double()
    a, b = (factor.double() for factor in adapter.factors[module])
    expected = weight + adapter.scaling(module) * (b @ a)
    assert torch.allclose(merged, expected, rtol=2**-8, atol=1e-4), f"{name} is not the merged weight"


def _outcome(
    base: Path,
    modules: int,
    copies: list[float],
    releases: list[float],
    peaks: list[int],
    named: float,
) -> Outcome:
    sizes = [path.stat().st_size for path in files_of(base)]
    largest, total = max(sizes), sum(sizes)
    ratio = median(r / c for r, c in zip(releases, copies, strict=True))
    rows = [
        [n, f"{c:.1f}", f"{r:.1f}", f"{r / c:.2f}", f"{p / 1e9:.2f}"]
        for n, (c, r, p) in enumerate(zip(copies, releases, peaks, strict=True), 1)
    ]
    note = (
        f"The base: {total / 1e9:.2f} GB of bfloat16 in {len(sizes)} files, the largest of "
        f"{largest / 1e9:.2f} GB; the adapter: rank {RANK} on {modules} modules. Before a release the "
        f"command verifies the base by its digest, which reads it once more: {named:.1f} s here, not in "
        "the figures above."
    )
    return Outcome(
        "release",
        "A merged release beside a copy of its base",
        [Table("Rounds", ("round", "copy, s", "release, s", "ratio", "peak memory, GB"), rows)],
        [
            Target("time of a release over reading and writing the files", ratio, 1.3, at_least=False),
            Target("peak memory in files of the base", max(peaks) / largest, 2.0, at_least=False),
        ],
        Bars(
            {"copy": median(copies), "merged release": median(releases), "verify the base": named}, "seconds"
        ),
        [note],
    )
