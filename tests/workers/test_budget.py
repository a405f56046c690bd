"""The search for the knee, against hosts whose speed is known."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest

from workers.budget import COUNTED_TICKS, KNEE, RUNGS, WARM_TICKS, Knee

TICKS = (WARM_TICKS + COUNTED_TICKS) * len(RUNGS)


def search(seconds: Callable[[int], float], offered: int = 1 << 30) -> Knee:
    """Ticks of min(offered, budget) tokens that take `seconds(tokens)`."""
    knee = Knee()
    for _ in range(TICKS):
        tokens = min(offered, knee.budget)
        knee = knee.seen(tokens, seconds(tokens))
    return knee


@pytest.mark.parametrize(("overhead", "expected"), [(0.0, 512), (256.0, 2048), (1024.0, 8192)])
def test_knee_of_a_host_with_a_fixed_cost_a_tick_is_where_it_has_nine_tenths_of_the_speed(overhead, expected):
    """tokens / (tokens + overhead) of the top speed; the best one seen is below the top."""
    knee = search(lambda tokens: (tokens + overhead) / 1e5)
    best = max(speed for _, speed in knee.measured)
    speeds = dict(knee.measured)
    assert knee.settled == expected
    assert speeds[expected] >= KNEE * best
    assert all(speed < KNEE * best for budget, speed in knee.measured if budget < expected)


@pytest.mark.parametrize("overhead", [0.0, 64.0, 256.0, 1024.0])
def test_half_of_the_best_speed_is_where_a_tick_is_half_its_fixed_cost(overhead):
    knee = search(lambda tokens: (tokens + overhead) / 1e5)
    assert knee.half == pytest.approx(overhead, abs=1)
    assert search(lambda tokens: (tokens + overhead) / 1e5, offered=300).half is None
    assert Knee(settled=4096).half is None


def test_knee_of_a_slow_host_tries_no_tick_that_commands_would_wait_for_too_long():
    knee = search(lambda tokens: (tokens + 1024) / 350)  # 1024 tokens take 5.9 s, twice as many at most 11.7
    assert [budget for budget, _ in knee.measured] == [512, 1024]
    assert knee.settled == 1024


def test_knee_first_slow_ticks_of_a_rung_do_not_count():
    seen: set[int] = set()

    def seconds(tokens: int) -> float:
        slow = 9.0 if tokens not in seen else 0.0
        seen.add(tokens)
        return (tokens + 256) / 1e5 + slow

    assert search(seconds).settled == 2048


def test_knee_survives_a_noisy_clock():
    draw = random.Random(3)
    knee = search(lambda tokens: (tokens + 256) / 1e5 * draw.choice([1.0, 1.02, 0.99, 1.8]))
    assert knee.settled in (1024, 2048, 4096)


def test_knee_waits_at_the_first_rung_that_the_jobs_do_not_fill_and_goes_on_when_they_do():
    waiting = search(lambda tokens: (tokens + 256) / 1e5, offered=700)
    assert waiting.settled is None
    assert waiting.budget == 1024
    for _ in range(TICKS):
        waiting = waiting.seen(waiting.budget, (waiting.budget + 256) / 1e5)
    assert waiting.settled == 2048


def test_knee_chunks_larger_than_a_rung_skip_it():
    knee = Knee().seen(4096, 1.0)
    for _ in range(10):
        knee = knee.seen(4096, 1.0)
    assert knee.budget == 8192
    assert [budget for budget, _ in knee.measured] == [4096]


def test_knee_once_settled_stays():
    assert Knee(settled=700).seen(10_000, 1e-9) == Knee(settled=700)
