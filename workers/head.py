"""The language-model head over chosen positions only, and the loss without the logits.

Logits are the largest tensor of a step: [tokens, vocabulary]. Scoring needs them at target positions alone,
and training not at all: the head computes the loss there itself, some rows of logits at a time, with the
gradient at its input, and lets go of them. So peak memory does not grow with vocabulary times tokens. The
model is still called as a whole, which keeps DeepSpeed's module trace intact.
Shapes: R rows of T tokens, H hidden features, P target positions, V words.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
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
TAUGHT_LOGITS = 4
"""Tensors of that size that a teacher's targets take beside the plain ones."""


@dataclass(frozen=True)
class Taught:
    """Targets [start, stop) that a teacher has read: its last hidden states there, not its logits."""

    start: int
    stop: int
    hidden_SH: Tensor
    labels: float
    temperature: float


@dataclass
class Targets:
    """What the head is to compute in the next forward pass, and what it found."""

    positions_P: Tensor
    """Flat: row * T + token."""
    labels_P: Tensor | None = None
    """None: logits are wanted, not the loss."""
    weights_P: Tensor | None = None
    taught: tuple[Taught, ...] = ()
    losses_P: Tensor | None = None
    """Found: the loss of each target, without a gradient."""
    hidden_wanted: bool = False
    """Neither logits nor loss: what the head would read."""
    hidden_PH: Tensor | None = None


class TargetHead(nn.Linear):
    """An output head that, while it has `targets`, sees only their rows of the hidden states."""

    targets: Targets | None = None

    def forward(self, input: Tensor) -> Tensor:
        targets = self.targets
        if targets is None:
            return super().forward(input)
        hidden_PH = input.flatten(0, 1).index_select(0, targets.positions_P)
        if targets.hidden_wanted:
            targets.hidden_PH = hidden_PH.detach()
            return hidden_PH.new_zeros(1, 1)
        if targets.labels_P is None or targets.weights_P is None:
            return super().forward(hidden_PH)
        total, targets.losses_P = WeightedLoss.apply(
            hidden_PH, self.weight, self.bias, targets.labels_P, targets.weights_P, targets.taught
        )  # type: ignore[misc]
        return total.view(1, 1)


class WeightedLoss(torch.autograd.Function):
    """sum_p weight_p * loss_p, and each loss [P] by itself, not differentiable.

    loss_p is CE(hidden_p W^T + bias, label_p), or at a taught target the mix of `_with_teacher`. The gradient
    at `hidden` is made on the way there, piece by piece, with the operations autograd would use.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden_PH: Tensor,
        weight_VH: Tensor,
        bias_V: Tensor | None,
        labels_P: Tensor,
        weights_P: Tensor,
        taught: tuple[Taught, ...] = (),
    ) -> tuple[Tensor, Tensor]:
        at_once = LOGITS_AT_ONCE // (TAUGHT_LOGITS if taught else 1)
        pieces = -(-len(labels_P) * len(weight_VH) // at_once)
        pieces = max(1, min(pieces, len(labels_P) // SAME_KERNEL_ROWS))
        losses, grads, done = [], [], 0
        for hidden, labels, weights in zip(
            *(tensor.tensor_split(pieces) for tensor in (hidden_PH, labels_P, weights_P)), strict=True
        ):
            here = _within(taught, done, done + len(labels))
            loss, grad = _loss_and_gradient(
                hidden, weight_VH, bias_V, labels, weights, ctx.needs_input_grad[0], here
            )
            losses.append(loss)
            grads.append(grad)
            done += len(labels)
        losses_P = torch.cat(losses)
        if ctx.needs_input_grad[0]:
            ctx.save_for_backward(torch.cat(grads))
        ctx.mark_non_differentiable(losses_P)
        return (losses_P * weights_P.to(losses_P)).sum(), losses_P

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        (grad_PH,) = ctx.saved_tensors
        return (grad_PH * grad, None, None, None, None, None)


def _loss_and_gradient(
    hidden_PH: Tensor,
    weight_VH: Tensor,
    bias_V: Tensor | None,
    labels_P: Tensor,
    weights_P: Tensor,
    wanted: bool,
    taught: Sequence[Taught] = (),
) -> tuple[Tensor, Tensor]:
    with torch.set_grad_enabled(wanted):
        hidden_PH = hidden_PH.detach().requires_grad_(wanted)
        logits_PV = _logits(hidden_PH, weight_VH, bias_V)
        losses_P = F.cross_entropy(logits_PV, labels_P, reduction="none")
        for part in taught:
            losses_P = _with_teacher(losses_P, logits_PV, part, weight_VH, bias_V)
        if not wanted:
            return losses_P, hidden_PH
        (grad_PH,) = torch.autograd.grad((losses_P * weights_P.to(losses_P)).sum(), hidden_PH)
        return losses_P.detach(), grad_PH


def _logits(hidden_PH: Tensor, weight_VH: Tensor, bias_V: Tensor | None) -> Tensor:
    logits_PV = F.linear(hidden_PH, weight_VH, bias_V)
    return logits_PV.to(torch.promote_types(logits_PV.dtype, torch.float32))


def _with_teacher(
    losses_P: Tensor, logits_PV: Tensor, part: Taught, weight_VH: Tensor, bias_V: Tensor | None
) -> Tensor:
    """`losses_P` with labels * CE + (1 - labels) * T^2 * KL(teacher_T || student_T) at the part's targets.

    As arXiv 1503.02531 section 2: both distributions are softened by the temperature T, and T^2 keeps the
    size of the gradient. KL instead of the cross-entropy with the teacher differs by the teacher's entropy
    alone, which has no gradient: it is 0 where the student has learned all there is.
    """
    rows = part.stop - part.start
    with torch.no_grad():
        # As many rows as one kernel takes: else a teacher's last bits would depend on the neighbours.
        filled_SH = F.pad(part.hidden_SH, (0, 0, 0, max(0, SAME_KERNEL_ROWS - rows)))
        theirs_SV = F.log_softmax(_logits(filled_SH, weight_VH, bias_V)[:rows] / part.temperature, dim=1)
    own_SV = F.log_softmax(logits_PV[part.start : part.stop] / part.temperature, dim=1)
    apart_S = F.kl_div(own_SV, theirs_SV, reduction="none", log_target=True).sum(1) * part.temperature**2
    mixed_S = part.labels * losses_P[part.start : part.stop] + (1 - part.labels) * apart_S
    return torch.cat([losses_P[: part.start], mixed_S, losses_P[part.stop :]])


def _within(taught: Sequence[Taught], start: int, stop: int) -> list[Taught]:
    """What of `taught` lies in [start, stop), counted from `start`."""
    found: list[Taught] = []
    for part in taught:
        first, last = max(part.start, start), min(part.stop, stop)
        if first < last:
            hidden_SH = part.hidden_SH[first - part.start : last - part.start]
            found.append(replace(part, start=first - start, stop=last - start, hidden_SH=hidden_SH))
    return found


def install(model: Any) -> None:
    """Let the output head of a Hugging Face causal LM take targets."""
    model.get_output_embeddings().__class__ = TargetHead


def target_logits(model: Any, positions_P: Tensor, **inputs: Any) -> Tensor:
    """Logits [P, V] at flat positions (row * T + token) of one forward pass of the whole model."""
    with _targets(model, _enough(Targets(positions_P))):
        return model(**inputs).logits[: len(positions_P)]


def target_hidden(model: Any, positions_P: Tensor, **inputs: Any) -> Tensor:
    """What the head would read at flat positions [P, H], without a gradient: a teacher's logits in small."""
    targets = Targets(positions_P, hidden_wanted=True)
    with _targets(model, targets), torch.no_grad():
        model(**inputs)
    assert targets.hidden_PH is not None
    return targets.hidden_PH


def target_loss(
    model: Any,
    positions_P: Tensor,
    labels_P: Tensor,
    weights_P: Tensor,
    taught: tuple[Taught, ...] = (),
    **inputs: Any,
) -> tuple[Tensor, Tensor]:
    """The weighted sum of the targets' losses, differentiable, and each one [P], detached.

    `taught` needs a model that returns its logits as they are: `returns_logits_as_they_are`.
    """
    if not returns_logits_as_they_are(model.config):
        logits_PV = target_logits(model, positions_P, **inputs)
        logits_PV = logits_PV.to(torch.promote_types(logits_PV.dtype, torch.float32))
        losses_P = F.cross_entropy(logits_PV, labels_P, reduction="none")
        return (losses_P * weights_P.to(losses_P)).sum(), losses_P.detach()
    targets = _enough(Targets(positions_P, labels_P, weights_P, taught))
    with _targets(model, targets):
        total = model(**inputs).logits.view(())
    assert targets.losses_P is not None
    return total, targets.losses_P[: len(positions_P)]


def returns_logits_as_they_are(config: Any) -> bool:
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
