"""One job's own optimizer: AdamW, learning-rate schedule, clipping, and whether a step is finite.

torch's AdamW and transformers' schedules, one instance a job, so that no job's hyper-parameters, norm or
state can touch another's.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers.optimization import get_scheduler

from workers.types import TrainingSpec


@dataclass(frozen=True)
class StepOutcome:
    grad_norm: float
    """Before clipping, Euclidean, over the job's own adapter."""
    learning_rate: float
    finite: bool


class JobOptimizer:
    def __init__(self, parameters: Sequence[nn.Parameter], training: TrainingSpec, num_steps: int) -> None:
        self.parameters = list(parameters)
        self.training = training
        self.adamw = torch.optim.AdamW(
            self.parameters,
            lr=training.learning_rate,
            betas=(training.adam_beta1, training.adam_beta2),
            eps=training.adam_epsilon,
            weight_decay=training.weight_decay,
        )
        warmup = math.ceil(training.warmup_ratio * num_steps)
        name = "constant_with_warmup" if training.lr_scheduler == "constant" else training.lr_scheduler
        self.schedule = get_scheduler(name, self.adamw, num_warmup_steps=warmup, num_training_steps=num_steps)

    def step(self) -> StepOutcome:
        """Clip, step, advance the schedule, clear gradients. A non-finite gradient changes no weight."""
        rate = self.adamw.param_groups[0]["lr"]
        limit = self.training.max_grad_norm
        norm = float(nn.utils.clip_grad_norm_(self.parameters, math.inf if limit is None else limit))
        finite = math.isfinite(norm)
        if finite:
            self.adamw.step()
        self.adamw.zero_grad()
        _quietly_advance(self.schedule)
        return StepOutcome(norm, rate, finite)

    def tensors(self) -> dict[str, Tensor]:
        """Everything AdamW remembers, by `<parameter index>.<name>`."""
        state = self.adamw.state_dict()["state"]
        return {
            f"{index}.{name}": value for index, entries in state.items() for name, value in entries.items()
        }

    def restore(self, tensors: dict[str, Tensor], steps_done: int) -> None:
        state: dict[int, dict[str, Tensor]] = {}
        for key, value in tensors.items():
            index, _, name = key.partition(".")
            state.setdefault(int(index), {})[name] = value
        self.adamw.load_state_dict({**self.adamw.state_dict(), "state": state})
        self._fast_forward(steps_done)

    def _fast_forward(self, steps_done: int) -> None:
        self.schedule.last_epoch = steps_done
        for group, base, factor in zip(
            self.adamw.param_groups, self.schedule.base_lrs, self.schedule.lr_lambdas, strict=True
        ):
            group["lr"] = base * factor(steps_done)
        self.schedule._last_lr = [group["lr"] for group in self.adamw.param_groups]


def _quietly_advance(schedule: torch.optim.lr_scheduler.LambdaLR) -> None:
    """Advance by one. torch warns when no step came first, which is right here: a bad step is left out."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Detected call of `lr_scheduler.step\\(\\)`")
        schedule.step()
