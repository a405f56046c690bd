"""What a host's memory holds: a line fitted to measured peaks, and what still fits under the limit.

    peak of a rank = fixed + bytes_per_parameter * adapter parameters + bytes_per_token * tokens of a pass

The middle term is exact (weight, gradient and AdamW's two moments of every adapter); the others are fitted.
Reads the GPU's allocator, or what the kernel tells of this process and its cgroup. No collectives.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from workers.types import MemoryModel

COPIES = 4
"""Of each adapter parameter: itself, its gradient, AdamW's two moments."""
KEPT_FREE = 0.1
"""Share of the limit that no plan counts on: fragments, other processes, what was not measured."""
STATUS, CLEAR_REFS = Path("/proc/self/status"), Path("/proc/self/clear_refs")
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
"""Numbers of mallopt(3)'s parameters."""
MEMINFO, CGROUP = Path("/proc/meminfo"), Path("/sys/fs/cgroup")


# ---- the model -------------------------------------------------------------------------------------------


@dataclass
class Peaks:
    """Peaks of this rank in the ticks since its base was loaded, against the largest pass so far."""

    bytes_per_parameter: int
    samples: dict[int, int] = field(default_factory=dict[int, int])
    """Tokens of the largest pass so far -> highest peak of a tick with such a pass, less the bytes of the
    slots that were there in that tick. 0: as loaded."""
    _before: int = 0
    """The peak when the tick began."""

    def begin(self) -> None:
        """Before a tick's passes: what others held, who may have left, is no part of its peak."""
        forget_peak()
        self._before = peak_bytes()

    def seen(self, tokens: int, adapter_parameters: int) -> None:
        """After passes of up to `tokens` padded tokens beside slots of `adapter_parameters` in all.

        A resident set keeps what former ticks have freed, and a peak may not be forgotten: a tick that holds
        no more than was held before it tells nothing, unless its passes are larger than all before.
        """
        most = max(self.samples, default=-1)
        if tokens < most:
            return
        peak = peak_bytes()
        if not peak or (tokens == most and peak <= self._before):
            return  # a system that does not tell has no model
        own = peak - self.bytes_per_parameter * adapter_parameters
        self.samples[tokens] = max(own, self.samples.get(tokens, own))

    def fit(self, limit_bytes: int) -> MemoryModel | None:
        """None before any pass was seen."""
        passes = {tokens: peak for tokens, peak in self.samples.items() if tokens > 0}
        if not passes:
            return None
        # As loaded, nothing is warm yet; that point serves only while passes are too much alike for a slope.
        points = passes if max(passes) >= 2 * min(passes) else self.samples
        slope, fixed = upper_line(list(points.items()))
        return MemoryModel(limit_bytes, round(fixed), round(slope, 1), self.bytes_per_parameter)


def upper_line(points: Sequence[tuple[int, int]]) -> tuple[float, float]:
    """(slope, intercept) of the least-squares line, not falling, lifted until no point lies above it."""
    count = len(points)
    mean_x, mean_y = sum(x for x, _ in points) / count, sum(y for _, y in points) / count
    spread = sum((x - mean_x) ** 2 for x, _ in points)
    slope = sum((x - mean_x) * (y - mean_y) for x, y in points) / spread if spread else 0.0
    slope = max(slope, 0.0)
    return slope, max(y - slope * x for x, y in points)


def worst(models: Sequence[MemoryModel]) -> MemoryModel:
    """One model that holds for every rank."""
    return MemoryModel(
        min(model.limit_bytes for model in models),
        max(model.fixed_bytes for model in models),
        max(model.bytes_per_token for model in models),
        max(model.bytes_per_parameter for model in models),
    )


def adapter_room(model: MemoryModel, tokens: int) -> int:
    """Adapter parameters that fit beside passes of `tokens`, all slots together."""
    free = (1 - KEPT_FREE) * model.limit_bytes - model.fixed_bytes - model.bytes_per_token * tokens
    return max(0, int(free / model.bytes_per_parameter))


def pass_room(model: MemoryModel, adapter_parameters: int) -> int:
    """Tokens a pass may hold beside slots of `adapter_parameters` in all; 0 if none."""
    slots = model.bytes_per_parameter * adapter_parameters
    free = (1 - KEPT_FREE) * model.limit_bytes - model.fixed_bytes - slots
    return max(0, int(free / max(model.bytes_per_token, 1.0)))


# ---- reading the machine ---------------------------------------------------------------------------------


def peak_bytes() -> int:
    """Highest memory this rank has held since `forget_peak`: the GPU allocator's, or the resident set."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return _kib(STATUS, "VmHWM")


def forget_peak() -> None:
    """Begin to measure peaks anew: from what is held now."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        return
    # Where the kernel refuses, a higher peak of before stays in the model, which then promises too little.
    with contextlib.suppress(OSError):
        CLEAR_REFS.write_text("5")


def keep_freed_memory() -> None:
    """Let this process keep up to 2 GiB that it frees, and reuse it, where the C library is glibc.

    glibc hands a pass's activations back to the system after each one; the next pass then faults them in
    again, page by page. The memory model counts peaks, so what is kept is counted already.
    """
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(M_TRIM_THRESHOLD, (1 << 31) - 1)
        libc.mallopt(M_MMAP_THRESHOLD, 1 << 30)


def limit_bytes(sharers: int) -> int:
    """What this rank may hold, if `sharers` ranks of one machine share what is free on it."""
    if torch.cuda.is_available():
        free, _ = torch.cuda.mem_get_info()
        return free + torch.cuda.memory_reserved()
    return _kib(STATUS, "VmRSS") + free_bytes() // sharers


def free_bytes() -> int:
    """Of this machine's main memory, or of the control group's if that is less.

    Of the files that a group has in the page cache those not in use are free, as they are to the kubelet: the
    kernel lets go of them before anything fails. (A group's usage counts them, `MemAvailable` does not.)
    """
    found = [_kib(MEMINFO, "MemAvailable")]
    for folder, most, used, cache in (
        (CGROUP, "memory.max", "memory.current", "inactive_file"),
        (CGROUP / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    ):
        if (folder / most).is_file() and (text := (folder / most).read_text().strip()).isdigit():
            held = int((folder / used).read_text()) - _figure(folder / "memory.stat", cache)
            found.append(int(text) - max(0, held))
    return max(0, min(found))


def _kib(path: Path, key: str) -> int:
    """The bytes in a line like `VmHWM:  1024 kB`."""
    return _figure(path, f"{key}:") * 1024


def _figure(path: Path, key: str) -> int:
    """The number behind a word that begins a line; 0 where the system has no such file, or no such line."""
    lines = path.read_text().splitlines() if path.is_file() else []
    return next((int(line.split()[1]) for line in lines if line.split()[:1] == [key]), 0)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed: torch's error on a GPU, Python's, the kernel's (of an arena), or the CPU
    allocator's plain one."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    return isinstance(error, RuntimeError) and any(
        words in str(error) for words in ("can't allocate memory", "not enough memory")
    )
