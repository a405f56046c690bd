"""Whether vLLM, SGLang and llama.cpp's converter would serve an adapter as it was scored, and the repair.

Each reads the configuration in its own way, and a server that reads a scale wrongly says nothing. What each
does was read in its source: vLLM `lora/peft_helper.py` (scale lora_alpha / r, or / sqrt(r) with rsLoRA, of
the whole adapter; no patterns; ranks up to 512), SGLang `srt/lora/lora.py` and `utils.py`
(lora_alpha / r, no rsLoRA; a fixed list of layers), llama.cpp `convert_lora_to_gguf.py` (lora_alpha over the
module's own rank; no head of a base that ties it). Which models a server knows is up to its version.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from workers.adapter import Adapter
from workers.fuse.basis import one_thread
from workers.fuse.factors import Factors, svd
from workers.merge import tied_head
from workers.outline import served_scale
from workers.rules import BUCKETS

MOST = BUCKETS[-1]
CLOSE = 1e-6
SERVERS = ("vLLM", "SGLang", "llama.cpp")
SGLANG_MODULES = frozenset(
    {"q_proj", "k_proj", "v_proj", "qkv_proj", "o_proj", "out_proj", "gate_proj", "up_proj", "gate_up_proj"}
    | {"down_proj", "in_proj", "in_proj_qkv", "in_proj_q", "in_proj_k", "in_proj_v", "in_proj_z", "lm_head"}
    | {"q_a_proj", "kv_a_proj_with_mqa", "q_b_proj", "kv_b_proj", "fc1_latent_proj", "fc2_latent_proj"}
)
"""Last parts of the names of linear layers that SGLang puts adapters on, whatever the model."""


@dataclass(frozen=True)
class Obstacle:
    """Why one server would refuse the adapter, or serve something else."""

    server: str
    words: str
    repairable: bool
    """Whether `repaired` takes it away."""


def obstacles(adapter: Adapter, base: Path) -> list[Obstacle]:
    """Empty if all three serve the adapter as it is."""
    found = [obstacle for server in SERVERS for obstacle in _scales(adapter, server)]
    rank = max(adapter.r, highest_rank(adapter))
    if rank > MOST:
        found.append(Obstacle("vLLM", f"its rank is {rank}, and vLLM takes at most {MOST}", True))
    if strange := [name for name in adapter.factors if name.rpartition(".")[2] not in SGLANG_MODULES]:
        words = f"it puts no adapter on a layer named like '{strange[0]}'; release it merged"
        found.append(Obstacle("SGLang", words, False))
    tied = tied_head(base)
    if tied is not None and tied[0].removesuffix(".weight") in adapter.factors:
        words = "it changes an output head that the base shares with its embedding; release it merged"
        found.append(Obstacle("llama.cpp", words, False))
    return found


def _scales(adapter: Adapter, server: str) -> Iterator[Obstacle]:
    """The first module that the server would scale otherwise than PEFT does."""
    for module, (a, _) in adapter.factors.items():
        own = adapter.scaling(module)
        served = served_scale(server, adapter.lora_alpha, adapter.r, a.shape[0], adapter.use_rslora)
        if not math.isclose(own, served, rel_tol=CLOSE):
            words = f"it would scale module '{module}' by {served:.4g}, not by {own:.4g}"
            yield Obstacle(server, words, True)
            return


def highest_rank(adapter: Adapter) -> int:
    return max(a.shape[0] for a, _ in adapter.factors.values())


def vllm_rank(adapter: Adapter) -> int:
    """The smallest `--max-lora-rank` that holds the adapter."""
    needed = min(max(adapter.r, highest_rank(adapter)), MOST)
    return next(rank for rank in BUCKETS if rank >= needed)


def repaired(adapter: Adapter) -> Adapter:
    """The same adapter as every server reads it: one rank, scale 1, no rsLoRA.

    The scale is folded into A; a module of lower rank gets rows and columns of zeros. Above the largest rank
    of vLLM it is the nearest adapter of that rank (Eckart and Young 1936), no longer the same.
    """
    rank = min(highest_rank(adapter), MOST)
    with one_thread():
        factors = {name: _of_rank(adapter, name, rank) for name in adapter.factors}
    return replace(
        adapter, factors=factors, r=rank, lora_alpha=float(rank), use_rslora=False, alpha_pattern={}
    )


def _of_rank(adapter: Adapter, module: str, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    a, b = adapter.factors[module]
    dtype = torch.promote_types(a.dtype, torch.float32)
    wide_a, wide_b = adapter.scaling(module) * a.double(), b.double()
    if a.shape[0] > rank:
        u, s, vh = svd(Factors(wide_a, wide_b))
        wide_a, wide_b = vh[:rank], u[:, :rank] * s[:rank]
    missing = rank - wide_a.shape[0]
    wide_a = torch.nn.functional.pad(wide_a, (0, 0, 0, missing))
    wide_b = torch.nn.functional.pad(wide_b, (0, missing))
    return wide_a.to(dtype), wide_b.to(dtype)


def lost(adapter: Adapter, fixed: Adapter) -> float:
    """|D - D'| / |D| in the Frobenius norm over all modules; of factors alone, so right to about 1e-7."""
    whole = gone = 0.0
    for module, (a, b) in adapter.factors.items():
        wide_a, wide_b = adapter.scaling(module) * a.double(), b.double()
        other_a, other_b = (factor.double() for factor in fixed.factors[module])
        whole += _squared(wide_a, wide_b)
        gone += _squared(
            torch.cat([wide_a, other_a]), torch.cat([wide_b, -fixed.scaling(module) * other_b], 1)
        )
    return math.sqrt(max(gone, 0.0) / whole) if whole else 0.0


def _squared(a: torch.Tensor, b: torch.Tensor) -> float:
    """|B A|^2 = tr(B^T B A A^T), [r, r] alone."""
    return float(((b.T @ b) * (a @ a.T).T).sum())


BASE_VARIABLE = '"$BASE"'
"""Stands in a card for the folder of a base that has no id on the hub."""


def base_of_card(named: str) -> str:
    """The base as a command in a card names it: `named` by the adapter, if that can be looked up anywhere."""
    return named if "/" in named else BASE_VARIABLE


def commands(name: str, base: str, merged: bool, rank: int) -> dict[str, str]:
    """Server -> the command that serves the release folder, given from within it.

    What llama.cpp's converter writes goes beside the folder: a file more in it would break its signature.
    """
    short = name.rpartition(".")[2] or name
    gguf = f"../{short}.gguf"
    if merged:
        return {
            "vLLM": f"vllm serve . --served-model-name {short}",
            "SGLang": f"python -m sglang.launch_server --model-path . --served-model-name {short}",
            "llama.cpp": f"python convert_hf_to_gguf.py . --outfile {gguf} && llama-server -m {gguf}",
        }
    return {
        "vLLM": f"vllm serve {base} --enable-lora --max-lora-rank {rank} --lora-modules {short}=$PWD",
        "SGLang": f"python -m sglang.launch_server --model-path {base} --lora-paths {short}=$PWD",
        "llama.cpp": f"python convert_hf_to_gguf.py {base} --outfile ../base.gguf && "
        f"python convert_lora_to_gguf.py . --base {base} --outfile {gguf} && "
        f"llama-server -m ../base.gguf --lora {gguf}",
    }
