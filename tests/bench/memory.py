"""What one more resident costs in memory: what it keeps between ticks, and what a tick holds for it.

State is counted twice: as bytes of all live tensors, and as the process's resident set. Activations are the
bytes that autograd saves for the backward pass of one tick.
"""

from __future__ import annotations

import gc
from collections.abc import Sequence
from dataclasses import dataclass, replace

import psutil
import torch
from torch import Tensor

from tests.bench.measure import Setting
from tests.bench.record import Bars, Outcome, Table, Target
from tests.bench.systems import Residents
from tests.bench.workload import Point, make_jobs
from workers.arena import Arenas
from workers.ranks import Ranks
from workers.types import Attached, BaseSpec, JobSpec

BYTES_PER_WEIGHT = 4 * 4
"""float32: the weight, its gradient, and AdamW's two moments."""


@dataclass(frozen=True)
class Held:
    """Bytes of one process with so many residents."""

    residents: int
    tensors: int
    resident_set: int
    activations: int


def memory(setting: Setting) -> Outcome:
    counts = (1, 2, 3) if setting.small else (1, 9, 17, 25)
    point = Point(counts[-1], 32, 1)
    base = setting.base(point, slots=counts[-1])
    trainable, held = _grow(base, make_jobs(setting.folder, point), counts)
    first, last = held[0], held[-1]
    more = last.residents - first.residents
    tensors = (last.tensors - first.tensors) / more
    resident_set = (last.resident_set - first.resident_set) / more
    activations = (last.activations - first.activations) / more
    state = trainable * BYTES_PER_WEIGHT
    header = ("residents", "live tensors, MiB", "resident set, MiB", "saved for one backward pass, MiB")
    rows = [
        [h.residents, *(f"{v / 2**20:.2f}" for v in (h.tensors, h.resident_set, h.activations))] for h in held
    ]
    per_resident = {
        "weights, gradients and Adam state": state / 2**20,
        "live tensors": tensors / 2**20,
        "activations": activations / 2**20,
        "resident set": resident_set / 2**20,
    }
    return Outcome(
        "memory",
        "Memory of one more resident, 1 rank",
        [
            Table("the whole process", header, rows),
            Table("one more resident", ("what", "MiB"), [[k, f"{v:.3f}"] for k, v in per_resident.items()]),
        ],
        [
            Target("live tensors over weights, gradients and Adam state", tensors / state, 1.1, False),
            Target(
                "resident set over 1.1 x state + activations",
                resident_set / (1.1 * state + activations),
                1,
                False,
            ),
        ],
        Bars(per_resident, "MiB per resident"),
        [
            f"{trainable:,} weights a job, {point.tokens} tokens a job and tick. Read between ticks, after "
            "three of them with that many residents: gradients that a host frees between ticks count as not "
            "held. The resident set keeps what the allocator has not given back."
        ],
    )


def _grow(base: BaseSpec, jobs: Sequence[JobSpec], counts: Sequence[int]) -> tuple[int, list[Held]]:
    """Trainable weights of a job, and what is held at each count."""
    residents = Residents(base, (), Ranks())
    left = [replace(job, checkpoint_dir=f"{job.checkpoint_dir}-memory") for job in jobs]
    held, trainable = [], 0
    for count in counts:
        while len(jobs) - len(left) < count:
            events = residents.attach(left.pop(0))
            trainable = next(e.trainable_parameters for e in events if isinstance(e, Attached))
        residents.steps(3 * count)
        held.append(
            Held(
                count,
                _live_bytes(residents.host.base.slots.arenas),
                _resident_set(),
                _saved_bytes(residents, count),
            )
        )
    return trainable, held


def _live_bytes(arenas: Arenas) -> int:
    """Of an arena, those of its rows that some adapter has."""
    others = [size for address, size in _live_storages().items() if address not in arenas.addresses]
    return sum(others) + arenas.bytes


def _live_storages() -> dict[int, int]:
    """Address -> bytes of every storage that some Python tensor holds."""
    gc.collect()
    storages = {}
    for found in gc.get_objects():
        if issubclass(type(found), Tensor) and not found.is_meta:
            for tensor in (found, found.grad) if found.is_leaf else (found,):
                if tensor is not None:
                    storage = tensor.untyped_storage()
                    storages[storage.data_ptr()] = storage.nbytes()
    return storages


def _resident_set() -> int:
    return int(psutil.Process().memory_info().rss)


def _saved_bytes(residents: Residents, count: int) -> int:
    """Bytes autograd saves in one tick beyond what lives anyway: each storage once."""
    living = _live_storages()
    saved: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in living:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        residents.steps(count)
    return sum(saved.values())
