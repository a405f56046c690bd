"""The order of samples: each once an epoch, a function of seed and epoch alone."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from workers.data import batch_samples, epoch_order, num_steps, steps_per_epoch
from workers.types import TrainingSpec

SEEDS = st.integers(-(2**63), 2**64 - 1)
TRAINING = TrainingSpec(learning_rate=1e-3, global_batch_size=8, sequence_len=64)


@given(SEEDS, st.integers(0, 1000), st.integers(1, 300), st.integers(1, 64))
def test_batch_samples_over_an_epoch_take_each_sample_once(seed, epoch, rows, batch):
    steps = steps_per_epoch(rows, batch)
    batches = [batch_samples(seed, epoch * steps + step, rows, batch) for step in range(steps)]
    assert [sample for samples in batches for sample in samples] == epoch_order(seed, epoch, rows)
    assert sorted(epoch_order(seed, epoch, rows)) == list(range(rows))
    assert all(len(samples) == batch for samples in batches[:-1])
    assert 1 <= len(batches[-1]) <= batch


@given(SEEDS, st.integers(0, 1000))
def test_epoch_order_of_another_seed_or_epoch_is_another(seed, epoch):
    order = epoch_order(seed, epoch, 200)
    assert order != epoch_order(seed + 1, epoch, 200)
    assert order != epoch_order(seed, epoch + 1, 200)


def test_epoch_order_is_the_same_on_every_machine():
    # Frozen: an order that changes would break the resumption of every running job.
    assert epoch_order(0, 0, 8) == [0, 2, 1, 5, 4, 3, 6, 7]
    assert epoch_order(7, 3, 8) == [2, 5, 7, 3, 0, 6, 4, 1]


def test_epoch_order_places_each_sample_everywhere_about_equally():
    places = [epoch_order(seed, 0, 4).index(0) for seed in range(2000)]
    assert all(430 <= places.count(place) <= 570 for place in range(4))


@pytest.mark.parametrize(
    ("num_epochs", "rows", "expected"),
    [(1, 16, 2), (1, 17, 3), (3, 17, 9), (0.5, 17, 2), (0.1, 240, 3), (0.01, 8, 1)],
)
def test_num_steps_of_epochs_rounds_up_to_a_step(num_epochs, rows, expected):
    assert num_steps(replace(TRAINING, num_epochs=num_epochs), rows) == expected


def test_num_steps_max_steps_wins():
    assert num_steps(replace(TRAINING, max_steps=5), 1000) == 5
