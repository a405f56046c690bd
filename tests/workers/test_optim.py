"""A job's optimizer: what a step that is not finite leaves as it was, in both arithmetics."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from workers.optim import JobOptimizer
from workers.slots import Slots
from workers.types import AdapterSpec, TrainingSpec


class OnGpu(torch.Tensor):
    """A number that says that it lies on a GPU."""

    is_cuda = True


def optimizer(arithmetic) -> JobOptimizer:
    slots = Slots({"layer": nn.Linear(8, 6)}, torch.float32, torch.device("cpu"), arithmetic)
    return JobOptimizer(slots.create(0, AdapterSpec(2, 4), 0), TrainingSpec(1e-2, 2, 64, max_steps=9), 9)


def step(job: JobOptimizer, gradient: float) -> None:
    job.slot.weights.grad.fill_(gradient)
    job.step()


@pytest.mark.parametrize("arithmetic", ["exact", "fused"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_optimizer_step_that_is_not_finite_changes_nothing_that_a_later_one_sees(arithmetic, value):
    plain, poisoned = optimizer(arithmetic), optimizer(arithmetic)
    step(plain, 0.5)
    step(plain, 0.25)
    for gradient in (value, 0.5, value, 0.25):
        step(poisoned, gradient)
    assert torch.equal(poisoned.slot.weights, plain.slot.weights)
    assert poisoned.tensors().keys() == plain.tensors().keys()
    assert all(torch.equal(x, plain.tensors()[name]) for name, x in poisoned.tensors().items())


@pytest.mark.parametrize("arithmetic", ["exact", "fused"])
def test_optimizer_on_a_gpu_takes_the_same_steps_in_either_arithmetic(arithmetic, monkeypatch):
    plain, job = optimizer(arithmetic), optimizer(arithmetic)
    step(plain, 0.5)
    norm_of = nn.utils.get_total_norm
    monkeypatch.setattr(nn.utils, "get_total_norm", lambda grads: norm_of(grads).as_subclass(OnGpu))
    step(job, 0.5)
    assert torch.equal(job.slot.weights, plain.slot.weights)
