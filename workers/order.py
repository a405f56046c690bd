"""The order in which a job meets its samples: a function of (seed, epoch) alone. Pure.

Counter-based, so a job resumed at any step, on any host, goes on exactly where it was.
"""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from workers.types import TrainingSpec


def epoch_order(seed: int, epoch: int, rows: int) -> list[int]:
    """The permutation of range(rows) that epoch 0, 1, ... of a job with this seed goes through."""
    return _permutation(seed, epoch, rows).tolist()


def steps_per_epoch(rows: int, batch: int) -> int:
    """Steps in which every sample occurs once; the last one may be shorter."""
    return math.ceil(rows / batch)


def num_steps(training: TrainingSpec, rows: int) -> int:
    """All steps of a job: `max_steps`, or `num_epochs` (which may be fractional) rounded up to a step."""
    if training.max_steps is not None:
        return training.max_steps
    assert training.num_epochs is not None, "a recipe sets num_epochs or max_steps"
    steps = training.num_epochs * steps_per_epoch(rows, training.global_batch_size)
    return max(1, math.ceil(round(steps, 6)))  # 0.1 * 30 is not 3 in floating point


def batch_samples(seed: int, step: int, rows: int, batch: int) -> list[int]:
    """The samples of 0-based `step`; an epoch's last batch is what remains of it."""
    epoch, index = divmod(step, steps_per_epoch(rows, batch))
    return _permutation(seed, epoch, rows)[index * batch : (index + 1) * batch].tolist()


@lru_cache(maxsize=64)
def _permutation(seed: int, epoch: int, rows: int) -> NDArray[np.intp]:
    # Philox's raw words are promised to stay the same across NumPy releases; `Generator.permutation` is not.
    words = np.random.Philox(key=(epoch << 64) | (seed % 2**64)).random_raw(rows)
    return np.argsort(words, kind="stable")
