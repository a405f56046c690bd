"""The language-model head over chosen positions only.

Logits are the largest tensor of a step: [tokens, vocabulary]. Training and scoring need them at target
positions alone, so the head is wrapped to select those first. The model is still called as a whole, which
keeps its own treatment of logits (soft-capping, scaling) and DeepSpeed's module trace intact.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

SAME_KERNEL_ROWS = 16
"""A product with fewer rows may take another kernel and differ in the last bit; with more it does not."""


class TargetHead(nn.Module):
    """An output head that, while `positions` is set, sees only those rows of the flattened hidden states."""

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.positions: Tensor | None = None

    @property
    def weight(self) -> Any:
        """Hugging Face reads the head's weight to tie and to count it."""
        return self.base_layer.weight

    def forward(self, hidden_RTH: Tensor) -> Tensor:
        if self.positions is None:
            return self.base_layer(hidden_RTH)
        return self.base_layer(hidden_RTH.flatten(0, 1).index_select(0, self.positions))


def install(model: Any) -> None:
    """Wrap the output head of a Hugging Face causal LM in place."""
    model.set_output_embeddings(TargetHead(model.get_output_embeddings()))


def target_logits(model: Any, positions_P: Tensor, **inputs: Any) -> Tensor:
    """Logits [P, V] at flat positions (row * T + token) of one forward pass of the whole model."""
    head: TargetHead = model.get_output_embeddings()
    short = SAME_KERNEL_ROWS - len(positions_P)
    head.positions = positions_P if short <= 0 else torch.cat([positions_P, positions_P[:1].expand(short)])
    try:
        return model(**inputs).logits[: len(positions_P)]
    finally:
        head.positions = None
