"""What the layers of an adapter read, as X^T X: the Gram matrices by which rule `regmean` fuses.

RegMean, arXiv 2212.09849, section 3. Rows pass through base and adapter by themselves, without dropout and
without neighbours. Shapes: R rows of T tokens, N real tokens among them, D features in.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from workers.base import Base
from workers.compose import MicroBatch, cut_step
from workers.order import batch_samples
from workers.ranks import Ranks
from workers.resident import Resident
from workers.rows import Row
from workers.step import Share, forward_only, target_count


def gram_matrices(base: Base, ranks: Ranks, resident: Resident) -> dict[str, Tensor]:
    """Layer -> X^T X [D, D] in host memory, over the real tokens of the first rows in the job's own order.

    Collective: every rank reads its rows, and the sum is known to all. Empty if the job asks for none.
    """
    rows = _first_rows(resident)
    if not rows:
        return {}
    layers = {name: base.slots.layers[name] for name in base.slots[resident.slot].factors}
    share = Share(resident.slot, 0, 0, 0.0, target_count(rows))
    found = _Sums()
    for chunk in cut_step(rows, ranks.world_size, resident.chunk_tokens, base.longest):
        micro_batch = MicroBatch(chunk.padded_length, (("inputs", chunk),))
        found.real_RT = _real(chunk.rows[ranks.rank], chunk.padded_length)
        with _heard(layers, found):
            forward_only(base, ranks, micro_batch, {"inputs": share})
    # Copied: layers that read one input may hold one tensor, and the sum is made in place.
    summed = {name: ranks.sum_(found.grams[name].to(base.device, copy=True)) for name in layers}
    return {name: ((gram + gram.T) / 2).cpu() for name, gram in summed.items()}


def _first_rows(resident: Resident) -> list[Row]:
    every = [row for course in resident.courses for row in course.rows]
    count = min(resident.spec.gram_rows, len(every))
    samples = batch_samples(resident.spec.training.seed, 0, len(every), count) if count else []
    return [every[sample] for sample in samples]


class _Sums:
    """X^T X of every layer over the passes so far."""

    def __init__(self) -> None:
        self.grams: dict[str, Tensor] = {}
        self.real_RT = torch.zeros(1, 1, dtype=torch.bool)
        self._last: tuple[Tensor, Tensor] | None = None

    def add(self, name: str, x_RTD: Tensor) -> None:
        gram_DD = self._gram(x_RTD).cpu()
        self.grams[name] = self.grams[name] + gram_DD if name in self.grams else gram_DD

    def _gram(self, x_RTD: Tensor) -> Tensor:
        """Neighbours that read one input, as q, k and v do, share its product."""
        if self._last is not None and _is_same(self._last[0], x_RTD):
            return self._last[1]
        x_ND = x_RTD[self.real_RT.to(x_RTD.device)]
        x_ND = x_ND.to(torch.promote_types(x_ND.dtype, torch.float32))
        self._last = x_RTD, x_ND.T @ x_ND
        return self._last[1]

    def forget(self) -> None:
        """The pass is over: its tensors' memory may hold others now."""
        self._last = None


def _is_same(one: Tensor, other: Tensor) -> bool:
    return one.data_ptr() == other.data_ptr() and one.shape == other.shape


def _real(rows: Sequence[Row], length: int) -> Tensor:
    """[R, T]: True for tokens that are no padding; a rank without rows has one dummy row of none."""
    lengths = torch.tensor([len(row.input_ids) for row in rows] or [0])
    return torch.arange(length) < lengths[:, None]


@contextmanager
def _heard(layers: dict[str, nn.Linear], found: _Sums) -> Generator[None]:
    """Within the block, what each of `layers` reads is added to `found`."""
    hooks = [
        layer.register_forward_pre_hook(lambda _, inputs, name=name: found.add(name, inputs[0]))
        for name, layer in layers.items()
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
        found.forget()
