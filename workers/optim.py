"""One job's own optimizer: AdamW, learning-rate schedule, clipping, and whether a step is finite.

torch's AdamW on the slot's one flat buffer and transformers' schedules, one instance a job, so that no job's
hyper-parameters, norm or state can touch another's. In fused arithmetic nothing here waits for the device.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from transformers.optimization import get_scheduler

from workers.slots import Slot
from workers.types import TrainingSpec


class JobOptimizer:
    def __init__(self, slot: Slot, training: TrainingSpec, num_steps: int) -> None:
        self.slot = slot
        self.training = training
        self.adamw = torch.optim.AdamW(
            [slot.weights],
            lr=training.learning_rate,
            betas=(training.adam_beta1, training.adam_beta2),
            eps=training.adam_epsilon,
            weight_decay=training.weight_decay,
            fused=slot.fused,
        )
        warmup = math.ceil(training.warmup_ratio * num_steps)
        name = "constant_with_warmup" if training.lr_scheduler == "constant" else training.lr_scheduler
        schedule = get_scheduler(name, self.adamw, num_warmup_steps=warmup, num_training_steps=num_steps)
        (self._factor,) = schedule.lr_lambdas
        self.set_step(0)

    @property
    def learning_rate(self) -> float:
        return self.adamw.param_groups[0]["lr"]

    def set_step(self, steps_done: int) -> None:
        """Take the learning rate of the step after `steps_done`."""
        self.adamw.param_groups[0]["lr"] = self.training.learning_rate * self._factor(steps_done)

    def step(self) -> Tensor:
        """Clip, step, clear gradients. A non-finite gradient changes no weight.

        Returns the gradient's Euclidean norm before clipping, a scalar on the weights' device.
        """
        # PEFT's norm is one of the factors' norms; the flat gradient's is the same but for the last bits.
        grads = [self.slot.weights.grad] if self.slot.fused else self.slot.grads
        norm = nn.utils.get_total_norm([grad for grad in grads if grad is not None])
        if self.training.max_grad_norm is not None:
            nn.utils.clip_grads_with_norm_([self.slot.weights], self.training.max_grad_norm, norm)
        if self.slot.fused:
            # The fused kernel leaves everything as it was where this says 1; the others refuse it.
            self.adamw.found_inf = (~norm.isfinite()).float()
            self.adamw.step()
        elif math.isfinite(norm):
            self.adamw.step()
        self.slot.weights.grad.zero_()  # type: ignore[union-attr]
        self.slot.refresh()
        return norm

    def tensors(self) -> dict[str, Tensor]:
        """A copy in host memory of everything AdamW remembers, by name."""
        state = self.adamw.state.get(self.slot.weights, {})
        return {name: self._outward(tensor.detach()).to("cpu", copy=True) for name, tensor in state.items()}

    def _outward(self, x: Tensor) -> Tensor:
        return self.slot.outward(x) if x.ndim else x

    def _inward(self, x: Tensor) -> Tensor:
        return self.slot.inward(x) if x.ndim else x

    def restore(self, tensors: dict[str, Tensor], steps_done: int) -> None:
        state = {0: {name: self._inward(x) for name, x in tensors.items()}} if tensors else {}
        self.adamw.load_state_dict({**self.adamw.state_dict(), "state": state})
        self.set_step(steps_done)
