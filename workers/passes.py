"""A forward and backward pass that all ranks do, or none: what happens when memory runs out in it.

After each pass ranks agree, in a group of their own, whether it fitted everywhere. Under ZeRO-3 a pass is
full of collectives: a rank that fails in the middle leaves the others waiting in a gather, where nothing
reaches them. So the agreement is reached when all ranks fail, or one fails after its last gather; otherwise
the rank that failed raises after `PATIENCE` and the host is given up.
"""

from __future__ import annotations

import gc
from collections.abc import Mapping
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from workers.base import Base
from workers.compose import MicroBatch
from workers.hang import hang_seconds
from workers.memory import is_out_of_memory
from workers.ranks import Ranks
from workers.step import Share, forward_backward

PATIENCE = timedelta(seconds=20)
"""A rank whose pass failed waits so long for the others to come out of theirs."""


class Passes:
    """The passes of one host. Making it is collective."""

    def __init__(self, base: Base, ranks: Ranks) -> None:
        self.base = base
        self.ranks = ranks
        self._group: Any = None
        if ranks.world_size > 1:
            # Not the ranks' own group: there, the agreement could pair up with another rank's gather.
            self._group = dist.new_group(backend="gloo", timeout=timedelta(seconds=hang_seconds()))

    def run(self, micro_batch: MicroBatch, shares: Mapping[str, Share]) -> dict[str, Tensor] | None:
        """This rank's part of each job's loss; None, on every rank, if memory ran out on any.

        Gradients of the jobs in a pass that ran out are worth nothing afterwards. Raises what else went
        wrong, and MemoryError when the other ranks cannot be told.
        """
        losses, problem = None, ""
        try:
            losses = forward_backward(self.base, self.ranks, micro_batch, shares)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            problem = str(error).splitlines()[0] if str(error) else type(error).__name__
        if not self._failed_anywhere(problem, micro_batch):
            return losses
        del losses
        self.base.abandon_pass()
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        return None

    def _failed_anywhere(self, problem: str, micro_batch: MicroBatch) -> bool:
        if self._group is None:
            return bool(problem)
        failed = torch.tensor([int(bool(problem))])
        waiting: Any = dist.all_reduce(failed, group=self._group, async_op=True)
        if not problem:
            waiting.wait()
            return bool(failed)
        try:
            waiting.wait(PATIENCE)
        except RuntimeError as error:
            jobs = ", ".join(job for job, _ in micro_batch.chunks)
            raise MemoryError(
                f"out of memory in a pass of {micro_batch.tokens} tokens ({jobs}), while the other ranks "
                f"wait in a gather: lower tokens_per_tick and chunk_tokens in the base file ({problem})"
            ) from error
        return True
