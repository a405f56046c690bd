"""The language-model head over chosen positions only, and the loss without the logits.

Logits are the largest tensor of a step: [tokens, vocabulary]. Scoring needs them at target positions alone,
and training not at all: the head computes the loss there itself, some rows of logits at a time, with the
gradient at its input, and lets go of them. So peak memory does not grow with vocabulary times tokens. The
model is still called as a whole, which keeps DeepSpeed's module trace intact.
Shapes: R rows of T tokens, H hidden features, P target positions, V words.
"""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SAME_KERNEL_ROWS = 16
"""A product with fewer rows may take another kernel and differ in the last bit; with more it does not."""
LOGITS_AT_ONCE = 1 << 24
"""Entries of [P, V] that training holds at a time: 64 MiB in float32."""


@dataclass
class Targets:
    """What the head is to compute in the next forward pass, and what it found."""

    positions_P: Tensor
    """Flat: row * T + token."""
    labels_P: Tensor | None = None
    """None: logits are wanted, not the loss."""
    weights_P: Tensor | None = None
    losses_P: Tensor | None = None
    """Found: cross-entropy of each target, without a gradient."""


class TargetHead(nn.Linear):
    """An output head that, while it has `targets`, sees only their rows of the hidden states."""

    targets: Targets | None = None

    def forward(self, input: Tensor) -> Tensor:
        targets = self.targets
        if targets is None:
            return super().forward(input)
        hidden_PH = input.flatten(0, 1).index_select(0, targets.positions_P)
        if targets.labels_P is None or targets.weights_P is None:
            return super().forward(hidden_PH)
        total, targets.losses_P = WeightedLoss.apply(
            hidden_PH, self.weight, self.bias, targets.labels_P, targets.weights_P
        )  # type: ignore[misc]
        return total.view(1, 1)


class WeightedLoss(torch.autograd.Function):
    """sum_p weight_p * CE(hidden_p W^T + bias, label_p), and each CE [P] by itself, not differentiable.

    The gradient at `hidden` is made on the way there, piece by piece, with the operations autograd would use.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden_PH: Tensor,
        weight_VH: Tensor,
        bias_V: Tensor | None,
        labels_P: Tensor,
        weights_P: Tensor,
    ) -> tuple[Tensor, Tensor]:
        pieces = -(-len(labels_P) * len(weight_VH) // LOGITS_AT_ONCE)
        pieces = max(1, min(pieces, len(labels_P) // SAME_KERNEL_ROWS))
        losses, grads = [], []
        for hidden, labels, weights in zip(
            *(tensor.tensor_split(pieces) for tensor in (hidden_PH, labels_P, weights_P)), strict=True
        ):
            loss, grad = _loss_and_gradient(
                hidden, weight_VH, bias_V, labels, weights, ctx.needs_input_grad[0]
            )
            losses.append(loss)
            grads.append(grad)
        losses_P = torch.cat(losses)
        if ctx.needs_input_grad[0]:
            ctx.save_for_backward(torch.cat(grads))
        ctx.mark_non_differentiable(losses_P)
        return (losses_P * weights_P.to(losses_P)).sum(), losses_P

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        (grad_PH,) = ctx.saved_tensors
        return (grad_PH * grad, None, None, None, None)


def _loss_and_gradient(
    hidden_PH: Tensor,
    weight_VH: Tensor,
    bias_V: Tensor | None,
    labels_P: Tensor,
    weights_P: Tensor,
    wanted: bool,
) -> tuple[Tensor, Tensor]:
    with torch.set_grad_enabled(wanted):
        hidden_PH = hidden_PH.detach().requires_grad_(wanted)
        logits_PV = F.linear(hidden_PH, weight_VH, bias_V)
        logits_PV = logits_PV.to(torch.promote_types(logits_PV.dtype, torch.float32))
        losses_P = F.cross_entropy(logits_PV, labels_P, reduction="none")
        if not wanted:
            return losses_P, hidden_PH
        (grad_PH,) = torch.autograd.grad((losses_P * weights_P.to(losses_P)).sum(), hidden_PH)
        return losses_P.detach(), grad_PH


def install(model: Any) -> None:
    """Let the output head of a Hugging Face causal LM take targets."""
    model.get_output_embeddings().__class__ = TargetHead


def target_logits(model: Any, positions_P: Tensor, **inputs: Any) -> Tensor:
    """Logits [P, V] at flat positions (row * T + token) of one forward pass of the whole model."""
    with _targets(model, _enough(Targets(positions_P))):
        return model(**inputs).logits[: len(positions_P)]


def target_loss(
    model: Any, positions_P: Tensor, labels_P: Tensor, weights_P: Tensor, **inputs: Any
) -> tuple[Tensor, Tensor]:
    """The weighted sum of cross-entropies over the targets, differentiable, and each one [P], detached."""
    if not _returns_logits_as_they_are(model.config):
        logits_PV = target_logits(model, positions_P, **inputs)
        logits_PV = logits_PV.to(torch.promote_types(logits_PV.dtype, torch.float32))
        losses_P = F.cross_entropy(logits_PV, labels_P, reduction="none")
        return (losses_P * weights_P.to(losses_P)).sum(), losses_P.detach()
    targets = _enough(Targets(positions_P, labels_P, weights_P))
    with _targets(model, targets):
        total = model(**inputs).logits.view(())
    assert targets.losses_P is not None
    return total, targets.losses_P[: len(positions_P)]


def _returns_logits_as_they_are(config: Any) -> bool:
    """False for a model that caps or scales what its head gives it (Gemma, Granite, Cohere)."""
    config = config.get_text_config()
    changes = ("final_logit_softcapping", "logits_scaling", "logit_scale")
    return all(getattr(config, name, None) in (None, 1, 1.0) for name in changes)


@contextmanager
def _targets(model: Any, targets: Targets) -> Generator[None]:
    head: TargetHead = model.get_output_embeddings()
    head.targets = targets
    try:
        yield
    finally:
        head.targets = None


def _enough(targets: Targets) -> Targets:
    """Filled up to SAME_KERNEL_ROWS with the first position again, of weight 0."""
    short = SAME_KERNEL_ROWS - len(targets.positions_P)
    if short <= 0:
        return targets

    def filled(tensor: Tensor | None, by: Tensor | None) -> Tensor | None:
        return None if tensor is None or by is None else torch.cat([tensor, by.expand(short)])

    positions, labels, weights = targets.positions_P, targets.labels_P, targets.weights_P
    return replace(
        targets,
        positions_P=torch.cat([positions, positions[:1].expand(short)]),
        labels_P=filled(labels, None if labels is None else labels[:1]),
        weights_P=filled(weights, None if weights is None else weights.new_zeros(1)),
    )
