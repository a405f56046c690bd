"""A merged release in the shape of Llama-3.1-8B with random weights: time beside a plain copy, and memory.

The copy reads every file of the base and writes it again in 16 MiB pieces, as a release must at least. Both
start with the base out of the page cache and end when the disk has what they wrote, and take turns in going
first. The release does what the command does: it checks the base by its digest, merges, and hashes what it
writes. Each runs in a process of its own, which reports the kernel's peak of its resident set.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import shutil
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
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
from workers.manifest import file_digest, json_digest, publish_folder
from workers.merge import BASE_CONFIG, INDEX, weight_map
from workers.shards import Block, Entry, write_shard
from workers.types import ExportTask

PIECE = 1 << 24
RANK = 16
FILE_BYTES = {"small": 200_000, "full": 5 * 10**9}
"""A file of the base is closed before it holds more, as Transformers does."""


def release(setting: Setting) -> Outcome:
    base, adapter = setting.folder / "base", setting.folder / "adapter"
    entries, digest = write_base(base, llama(setting.small), FILE_BYTES[setting.shape])
    linears = [name.removesuffix(".weight") for name in entries if "_proj" in name]
    shapes = {name: entries[f"{name}.weight"].shape for name in linears}
    added = random_adapter(1, shapes=shapes, r=RANK, lora_alpha=2 * RANK)  # type: ignore[arg-type]
    with publish_folder(adapter) as scratch:
        write_adapter(added, scratch)
    copies, releases = [], []

    def copied() -> None:
        copies.append(in_a_process(copy, base, setting.folder / "copy"))
        shutil.rmtree(setting.folder / "copy")

    def made() -> None:
        releases.append(in_a_process(released, base, setting.folder / "release", adapter, digest))
        check(base, setting.folder / "release", added, linears[-1])
        shutil.rmtree(setting.folder / "release")

    for number in range(setting.rounds):
        for turn in (copied, made) if number % 2 == 0 else (made, copied):
            turn()
    hashing = seconds_of_hashing(sum(path.stat().st_size for path in files_of(base)))
    return _outcome(base, len(linears), copies, releases, hashing)


@dataclass(frozen=True)
class Run:
    seconds: float
    cpu_seconds: float
    """User and system, of all threads."""
    peak_bytes: int
    """Of the process's resident set."""


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


def write_base(folder: Path, config: LlamaConfig, file_bytes: int) -> tuple[dict[str, Entry], str]:
    """A base folder, file by file; what each tensor is, and the digest of config and weights.

    Tensors are cut from one row of random numbers.
    """
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
    digests = {BASE_CONFIG: file_digest(folder / BASE_CONFIG)}
    for number, part in enumerate(files, 1):
        path = folder / f"model-{number:05d}-of-{len(files):05d}.safetensors"
        digests[path.name] = write_shard(path, part, fill)
        placed |= dict.fromkeys(part, path.name)
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": placed}))
    return entries, json_digest(digests)


def hash_of(name: str) -> int:
    return sum(name.encode())


def files_of(folder: Path) -> list[Path]:
    return sorted(set(weight_map(folder).values()))


def seconds_of_hashing(size: int) -> float:
    """SHA-256 of so many bytes of memory, by one thread."""
    piece, digest = bytes(PIECE), hashlib.sha256()
    began = time.perf_counter()
    for _ in range(size // PIECE):
        digest.update(piece)
    return time.perf_counter() - began


def cold(base: Path, work: Callable[[], Any]) -> Run:
    """`work` with none of the base in the page cache, and nothing on its way to the disk."""
    os.sync()
    for path in files_of(base):
        file = os.open(path, os.O_RDONLY)
        os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(file)
    began, busy = time.perf_counter(), time.process_time()
    work()
    seconds, cpu_seconds = time.perf_counter() - began, time.process_time() - busy
    status = Path("/proc/self/status").read_text().splitlines()
    peak = next(line for line in status if line.startswith("VmHWM:"))
    return Run(seconds, cpu_seconds, int(peak.split()[1]) * 1024)


def in_a_process(work: Callable[..., Run], *arguments: Any) -> Run:
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
        return process.submit(work, *arguments).result()


def copy(base: Path, to: Path) -> Run:
    def work() -> None:
        to.mkdir()
        for path in files_of(base):
            with path.open("rb", buffering=0) as source, (to / path.name).open("wb", buffering=0) as target:
                while piece := source.read(PIECE):
                    target.write(piece)
                os.fsync(target.fileno())

    return cold(base, work)


def released(base: Path, out: Path, adapter: Path, digest: str) -> Run:
    torch.set_num_threads(1)
    task = ExportTask(str(adapter), str(base), True, str(out), (), "bfloat16")
    return cold(base, lambda: export(replace(task, base_digest="b" * 64, base_weights=digest)))


def check(base: Path, out: Path, adapter: Adapter, module: str) -> None:
    """Raises AssertionError if one merged weight is not W + s B A, rounded once."""
    name = f"{module}.weight"
    with safe_open(weight_map(base)[name], "pt") as before, safe_open(weight_map(out)[name], "pt") as after:
        weight, merged = before.get_tensor(name).double(), after.get_tensor(name).double()
    a, b = (factor.double() for factor in adapter.factors[module])
    expected = weight + adapter.scaling(module) * (b @ a)
    assert torch.allclose(merged, expected, rtol=2**-8, atol=1e-4), f"{name} is not the merged weight"


def _outcome(base: Path, modules: int, copies: list[Run], releases: list[Run], hashing: float) -> Outcome:
    sizes = [path.stat().st_size for path in files_of(base)]
    largest, total = max(sizes), sum(sizes)
    pairs = list(zip(copies, releases, strict=True))
    ratio = median(made.seconds / copied.seconds for copied, made in pairs)
    rows = [
        [
            *(n, f"{copied.seconds:.1f}", f"{made.seconds:.1f}", f"{made.seconds / copied.seconds:.2f}"),
            *(f"{copied.cpu_seconds:.1f}", f"{made.cpu_seconds:.1f}", f"{made.peak_bytes / 1e9:.2f}"),
        ]
        for n, (copied, made) in enumerate(pairs, 1)
    ]
    head = ("round", "copy, s", "release, s", "ratio", "CPU of the copy, s", "of the release, s", "peak, GB")
    note = (
        f"The base: {total / 1e9:.2f} GB of bfloat16 in {len(sizes)} files, the largest of "
        f"{largest / 1e9:.2f} GB; the adapter: rank {RANK} on {modules} modules. A release takes "
        f"SHA-256 twice, of what it reads and of what it writes, in a thread each: {hashing:.1f} s of CPU a "
        "time here, which the copy does without."
    )
    return Outcome(
        "release",
        "A merged release beside a copy of its base",
        [Table("Rounds", head, rows)],
        [
            Target("time of a release over reading and writing the files", ratio, 1.3, at_least=False),
            Target(
                "peak memory in files of the base",
                max(made.peak_bytes for made in releases) / largest,
                2.0,
                at_least=False,
            ),
        ],
        Bars(
            {
                "copy": median(copied.seconds for copied in copies),
                "merged release": median(made.seconds for made in releases),
                "SHA-256, one thread, once": hashing,
            },
            "seconds",
        ),
        [note],
    )
