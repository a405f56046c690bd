"""The group of ranks that hold one base: who I am, and the few collectives the host needs.

One process alone needs no process group; several join one over gloo (CPU) or NCCL (GPU).
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from workers.hang import hang_seconds


@dataclass(frozen=True)
class Ranks:
    """This process's place in its host."""

    rank: int = 0
    world_size: int = 1

    def gather(self, value: Any) -> list[Any]:
        """`value` of every rank, in rank order, on every rank."""
        if self.world_size == 1:
            return [value]
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value)
        return values

    def broadcast(self, value: Any) -> Any:
        """Rank 0's `value`, on every rank."""
        if self.world_size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def sum_(self, tensor: torch.Tensor) -> torch.Tensor:
        """`tensor` summed over ranks, in place. Rank order is fixed, so the sum is the same every time."""
        if self.world_size > 1:
            dist.all_reduce(tensor)
        return tensor

    def begin_sum(self, tensor: torch.Tensor) -> Callable[[], object]:
        """`sum_` in the background; what is returned waits until `tensor` holds the sum."""
        if self.world_size == 1:
            return lambda: None
        return dist.all_reduce(tensor, async_op=True).wait  # type: ignore[union-attr]

    def form_group(self) -> None:
        """Make one rank a process group of its own, for a library that needs one; several are in one."""
        if not dist.is_initialized():
            os.environ.setdefault("LOCAL_RANK", "0")  # DeepSpeed reads its device from it
            dist.init_process_group(_backend(), store=dist.HashStore(), rank=self.rank, world_size=1)

    def close(self) -> None:
        if self.world_size > 1 and dist.is_initialized():
            dist.destroy_process_group()


def connect(rank: int, world_size: int, address: str, port: int) -> Ranks:
    """Join the host's process group. Collective: returns when every rank has joined."""
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=os.environ.get("LOCAL_RANK", "0"),
        WORLD_SIZE=str(world_size),
        MASTER_ADDR=address,
        MASTER_PORT=str(port),
    )
    if world_size > 1 and not dist.is_initialized():
        timeout = timedelta(seconds=hang_seconds())
        dist.init_process_group(_backend(), rank=rank, world_size=world_size, timeout=timeout)
    return Ranks(rank, world_size)


def from_environment() -> Ranks:
    """The group torchrun started, or one process alone."""
    if "RANK" not in os.environ:
        return Ranks()
    env = os.environ
    return connect(int(env["RANK"]), int(env["WORLD_SIZE"]), env["MASTER_ADDR"], int(env["MASTER_PORT"]))


def _backend() -> str:
    return "nccl" if torch.cuda.is_available() else "gloo"
