"""Fusion in factors against the dense way, each in a fresh process; and in the shape of an 8B model.

    python -m tests.bench.fusion svd      4 adapters of rank 16 against PEFT's `svd`
    python -m tests.bench.fusion knots    6 adapters of rank 16 against the dense computation
    python -m tests.bench.fusion model    8 adapters of rank 64, 224 modules, files to a file, each rule

`--small` tries the script at small shapes.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import shutil
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from tests.adapters import random_adapter
from tests.bench.__main__ import RESULTS
from tests.bench.record import Bars, Machine, Outcome, Table, Target, write
from workers.adapter import Adapter, open_adapter, write_adapter
from workers.fuse import fuse
from workers.fuse.factors import Factors
from workers.fuse.factors import svd as factor_svd
from workers.fuse.rule import Options
from workers.fuse.ties import ties
from workers.manifest import publish_folder
from workers.memory import forget_peak, peak_bytes
from workers.rules import ROWS
from workers.task import run
from workers.types import FuseTask, RuleOptions

MIB = 2**20
SMALL = 8
"""By what `--small` divides sizes."""


# ---- measuring in a process of its own ------------------------------------------------------------------


def measured(work: Callable[..., Any], *arguments: Any) -> tuple[Any, float, float]:
    """What `work` returned, its seconds, and how many MiB it took beyond what its fresh process held."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_measure, (work, arguments))


def _measure(work: Callable[..., Any], arguments: tuple[Any, ...]) -> tuple[Any, float, float]:
    warnings.simplefilter("ignore")
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    prepared = work(*arguments)
    forget_peak()  # of preparing
    before, start = peak_bytes(), time.perf_counter()
    result = prepared()
    return result, time.perf_counter() - start, (peak_bytes() - before) / MIB


def adapters(count: int, rank: int, m: int, n: int) -> list[Adapter]:
    return [
        random_adapter(seed, r=rank, lora_alpha=2 * rank, shapes={"layer": (m, n)}) for seed in range(count)
    ]


# ---- svd against PEFT -------------------------------------------------------------------------------------


WANTED = (1.0, 0.5, 0.7, -0.4)
"""The weights of the four."""


def exact_svd(rank: int, m: int, n: int) -> Callable[[], list[float]]:
    """The largest singular values of the dense sum D in float64: roots of the eigenvalues of D D^T."""
    parts = adapters(4, rank, m, n)

    def work() -> list[float]:
        whole = torch.zeros(m, n, dtype=torch.float64)
        for part, weight in zip(parts, WANTED, strict=True):
            a, b = part.factors["layer"]
            whole.addmm_(b.double(), a.double(), alpha=weight * part.scaling("layer"))
        return torch.linalg.eigvalsh(whole @ whole.T).flip(0)[:rank].sqrt().tolist()

    return work


def apart(values: Sequence[float], exact: Sequence[float]) -> float:
    """The greatest difference, as a part of the largest value."""
    return max(abs(x - y) for x, y in zip(values, exact, strict=True)) / exact[0]


def singular_values(factors: tuple[torch.Tensor, torch.Tensor]) -> list[float]:
    a, b = factors
    return factor_svd(Factors(a.double(), b.double())).s.tolist()


def ours_svd(rank: int, m: int, n: int) -> Callable[[], tuple[torch.Tensor, torch.Tensor]]:
    parts = adapters(4, rank, m, n)
    fuse(adapters(2, 2, 64, 64), [1.0, 1.0], "svd", 2)  # the libraries' first call

    def work() -> tuple[torch.Tensor, torch.Tensor]:
        fused, _ = fuse(parts, WANTED, "svd", rank)
        return fused.factors["layer"]

    return work


def peft_svd(rank: int, m: int, n: int) -> Callable[[], tuple[torch.Tensor, torch.Tensor]]:
    from peft import LoraConfig, get_peft_model

    parts = adapters(4, rank, m, n)
    base = torch.nn.ModuleDict({"layer": torch.nn.Linear(n, m, bias=False)})
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=["layer"])
    model = get_peft_model(base, config, adapter_name="0")
    for i in range(1, 4):
        model.add_adapter(str(i), config)
    layer: Any = base["layer"] if hasattr(base["layer"], "lora_A") else model.base_model.model["layer"]
    with torch.no_grad():
        for i, part in enumerate(parts):
            a, b = part.factors["layer"]
            layer.lora_A[str(i)].weight.copy_(a)
            layer.lora_B[str(i)].weight.copy_(b)

    def work() -> tuple[torch.Tensor, torch.Tensor]:
        names, weights = ["0", "1", "2", "3"], list(WANTED)
        model.add_weighted_adapter(names, weights, "all", combination_type="svd", svd_rank=rank)
        return layer.lora_A["all"].weight.detach(), layer.lora_B["all"].weight.detach()

    return work


def svd(small: bool) -> Outcome:
    rows, targets, bars = [], [], {}
    for (m, n), faster in {(4096, 4096): 300.0, (4096, 14336): 1000.0}.items():
        m, n = (m // SMALL, n // SMALL) if small else (m, n)
        rank, shape = 16, f"{m}x{n}"
        theirs, slow, wide = measured(peft_svd, rank, m, n)
        own = [measured(ours_svd, rank, m, n) for _ in range(3)]
        fast, narrow = sorted(time for _, time, _ in own)[1], max(memory for _, _, memory in own)
        exact, _, _ = measured(exact_svd, rank, m, n)
        peft, chorus = singular_values(theirs), singular_values(own[0][0])
        off = (apart(chorus, peft), apart(chorus, exact), apart(peft, exact))
        figures = (f"{slow:.2f}", f"{fast:.4f}", f"{wide:.0f}", f"{narrow:.0f}")
        rows.append([shape, *figures, *(f"{one:.1e}" for one in off)])
        bars |= {f"{shape}: PEFT": slow, f"{shape}: ours": fast}
        targets += [
            Target(f"{shape}: times faster than PEFT", slow / fast, faster),
            Target(f"{shape}: times less memory", wide / max(narrow, 1.0), 20.0),
            Target(f"{shape}: singular values off PEFT's, of the largest", off[0], 1e-6, at_least=False),
            Target(f"{shape}: off dense float64's", off[1], 1e-6, at_least=False),
        ]
    header = ("shape", "PEFT, s", "ours, s", "PEFT, MiB", "ours, MiB")
    header += ("singular values, ours off PEFT's", "ours off float64's", "PEFT's off float64's")
    table = Table("4 adapters of rank 16 to rank 16", header, rows)
    notes = (
        "Each measurement in a fresh process with all cores; memory is the peak of the resident set "
        "during the call, less what it was before. Ours is `fuse`, with its certificate, the middle of "
        "three. Float64's: roots of the largest eigenvalues of the dense sum times its transpose.",
    )
    return Outcome(
        "fusion-svd", "Truncated SVD in factors and in PEFT", [table], targets, Bars(bars, "seconds"), notes
    )


# ---- KnOTS against the dense computation ------------------------------------------------------------------


WEIGHTS = (1.0, 0.5, 0.7, 1.0, 0.3, 0.8)


def ours_knots(rank: int, m: int, n: int) -> Callable[[], list[list[float]]]:
    parts = adapters(6, rank, m, n)
    fuse(adapters(2, 2, 64, 64), [1.0, 1.0], "knots", 2)

    def work() -> tuple[Any, Any]:
        fused, _ = fuse(parts, WEIGHTS, "knots", options=RuleOptions(density=0.3))
        a, b = fused.factors["layer"]
        return a.numpy(), b.numpy()

    return work


def dense_knots(rank: int, m: int, n: int) -> Callable[[], Any]:
    parts = adapters(6, rank, m, n)

    def work() -> Any:
        whole = []
        for part in parts:
            a, b = part.factors["layer"]
            whole.append(part.scaling("layer") * (b.double() @ a.double()))
        u, s, vh = torch.linalg.svd(torch.cat(whole, dim=1), full_matrices=False)
        k = int((s > 1e-10 * s[0]).sum())
        rights = torch.stack(vh[:k].split(n, dim=1))
        best = ties(rights, torch.tensor(WEIGHTS, dtype=torch.float64), Options(density=0.3), 0)
        return ((u[:, :k] * s[:k]) @ best).numpy()

    return work


def knots(small: bool) -> Outcome:
    size = 4096 // SMALL if small else 4096
    dense, slow, wide = measured(dense_knots, 16, size, size)
    (a, b), fast, narrow = min(
        (measured(ours_knots, 16, size, size) for _ in range(3)), key=lambda one: one[1]
    )
    exact = torch.from_numpy(dense)
    found = torch.from_numpy(b).double() @ torch.from_numpy(a).double()
    off = float(torch.linalg.matrix_norm(found - exact) / torch.linalg.matrix_norm(exact))
    targets = [
        Target("times faster than dense", slow / fast, 1000.0),
        Target("relative Frobenius distance", off, 1e-6, at_least=False),
    ]
    rows = [["dense, float64", f"{slow:.2f}", f"{wide:.0f}"], ["ours", f"{fast:.4f}", f"{narrow:.0f}"]]
    table = Table(f"KnOTS-TIES, 6 adapters of rank 16, {size}x{size}", ("", "s", "MiB"), rows)
    bars = Bars({"dense": slow, "ours": fast}, "seconds")
    notes = (
        "Each in a fresh process with all cores. Ours is `fuse`, with its certificate, the best of three.",
    )
    return Outcome("fusion-knots", "KnOTS in factors and dense", [table], targets, bars, notes)


# ---- an 8B model's shape ----------------------------------------------------------------------------------


def llama_8b(layers: int, divide: int) -> dict[str, tuple[int, int]]:
    h, kv, wide = 4096 // divide, 1024 // divide, 14336 // divide
    shapes = {"self_attn.q_proj": (h, h), "self_attn.k_proj": (kv, h), "self_attn.v_proj": (kv, h)}
    shapes |= {"self_attn.o_proj": (h, h), "mlp.gate_proj": (wide, h), "mlp.up_proj": (wide, h)}
    shapes |= {"mlp.down_proj": (h, wide)}
    return {f"model.layers.{i}.{name}": shape for i in range(layers) for name, shape in shapes.items()}


def fuse_files(folders: tuple[str, ...], rule: str, rank: int | None, out: str) -> Callable[[], float]:
    """Seconds of processor time, over all threads."""

    def work() -> float:
        began = time.process_time()
        run(FuseTask(folders, (1.0,) * len(folders), rule, rank, out))
        return time.process_time() - began

    return work


SLOW = ("random", "regmean", "ties_dense", "dare_dense", "della_dense", "breadcrumbs_dense")
"""Not rules in factor space: a control, one that solves for whole inputs, and oracles on whole matrices."""


@dataclass(frozen=True)
class Fused:
    """One rule, measured; kept in a file, so that a run that was stopped goes on."""

    rule: str
    rank: int | None
    modules: int
    seconds: float
    mib: float
    processor: float
    load: float
    """Average of the last minute before it began: what others brought."""


def model(small: bool, rules: Sequence[str], work: Path) -> Outcome:
    layers, divide, rank = (2, 16, 8) if small else (32, 1, 64)
    shapes = llama_8b(layers, divide)
    folders = _adapter_files(work / f"adapters-{layers}-{divide}-{rank}", shapes, rank)
    done = [_measured_once(work, folders, rule, rank) for rule in rules]
    targets, rows = [], []
    for one in done:
        figures = (f"{one.seconds:.1f}", f"{one.processor:.1f}", f"{one.mib:.0f}", f"{one.load:.1f}")
        rows.append([one.rule, one.rank or "", one.modules, *figures])
        targets += [
            Target(f"{one.rule}: seconds", one.seconds, 60.0, at_least=False),
            Target(f"{one.rule}: peak of the resident set, MiB", one.mib, 3 * 1024, at_least=False),
        ]
    header = ("rule", "cut to", "modules", "s", "s of a core", "MiB added to the peak", "load before")
    table = Table(f"8 adapters of rank {rank}, bfloat16 files to a float32 file", header, rows)
    notes = (
        "From `run(FuseTask)` to the published folder: digests, reading, fusion, certificate, writing; each "
        "rule in a process of its own. `cat` takes no rank and writes all 512. Load is the average of the "
        "minute before.",
    )
    bars = Bars({one.rule: one.seconds for one in done}, "seconds")
    return Outcome("fusion-model", "Fusion in the shape of an 8B model", [table], targets, bars, notes)


def _adapter_files(folder: Path, shapes: dict[str, tuple[int, int]], rank: int) -> tuple[str, ...]:
    folders = tuple(folder / str(i) for i in range(8))
    for i, path in enumerate(folders):
        if not path.exists():
            with publish_folder(path) as scratch:
                drawn = random_adapter(i, r=rank, shapes=shapes, dtype=torch.bfloat16, base_model="8b")
                write_adapter(drawn, scratch)
    return tuple(map(str, folders))


def _measured_once(work: Path, folders: tuple[str, ...], rule: str, rank: int) -> Fused:
    file, out = work / f"{rule}-{rank}.json", work / "fused"
    if not file.is_file():
        load, cut = os.getloadavg()[0], None if ROWS[rule].cut == "refused" else rank
        shutil.rmtree(out, ignore_errors=True)
        processor, seconds, memory = measured(fuse_files, folders, rule, cut, str(out))
        written = len(open_adapter(out).factors)
        file.write_text(json.dumps(asdict(Fused(rule, cut, written, seconds, memory, processor, load))))
        shutil.rmtree(out)
    found = Fused(**json.loads(file.read_text()))
    print(f"{rule}: {found.seconds:.1f} s, {found.mib:.0f} MiB", flush=True)
    return found


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.fusion", description=__doc__)
    parser.add_argument("case", choices=("svd", "knots", "model"))
    every = [rule for rule in ROWS if rule not in SLOW]
    parser.add_argument("--rules", nargs="+", default=every, choices=list(ROWS), help="of case model")
    parser.add_argument("--work", type=Path, help="of case model: keeps what is done, for a run that goes on")
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--out", type=Path, default=RESULTS)
    asked = parser.parse_args(arguments)
    machine = Machine.read()
    if asked.case == "model":
        with tempfile.TemporaryDirectory(prefix="fusion-") as scratch:
            found = model(asked.small, asked.rules, asked.work or Path(scratch))
    else:
        found = {"svd": svd, "knots": knots}[asked.case](asked.small)
    command = ["python", "-m", "tests.bench.fusion", asked.case]
    command += ["--rules", *asked.rules] if asked.case == "model" and asked.rules != every else []
    print(write(found, machine, asked.out, command, asked.small).read_text())
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
