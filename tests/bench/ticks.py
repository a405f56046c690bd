"""A tick against one resident at a time, plain PEFT and the base alone: the points and both curves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

from tests.bench.measure import ALONE, LIMIT, PARITY, PEFT, SYSTEMS, TOGETHER, Setting, largest_gap, measured
from tests.bench.record import Bars, Lines, Outcome, Table, Target
from tests.bench.rounds import Seconds, ratio, spread
from tests.bench.workload import Point

LIMIT_SHARE = 0.8
HEADER = ("load", *(f"{name}, tokens/s" for name in SYSTEMS), "vs one resident", "vs PEFT", "of base alone")


def refuse_unequal(setting: Setting, ranks: Sequence[int]) -> str:
    """Nothing is timed before the systems are seen to end with the same adapters. Raises RuntimeError."""
    gaps = {count: _gap(setting.small, count) for count in ranks}
    if max(gaps.values()) > PARITY:
        raise RuntimeError(
            f"together, alone and PEFT end with adapters {gaps} apart by ranks: nothing to time"
        )
    said = ", ".join(f"{gap:.1e} on {count} rank{'s' * (count > 1)}" for count, gap in gaps.items())
    return (
        "Checked before timing: two jobs of five steps trained together, one resident at a time and by the "
        f"PEFT loop end with adapters at most so far apart, in relative norm: {said}."
    )


@cache
def _gap(small: bool, ranks: int) -> float:
    """Once a process: what is checked does not depend on the case."""
    with TemporaryDirectory() as folder:
        return largest_gap(Setting(Path(folder), small), ranks)


def points(setting: Setting) -> Outcome:
    """The rows of the table that compare ticks."""
    checked = refuse_unequal(setting, (1, 2))
    short, long = (32, 32) if setting.small else (32, 512)
    jobs = 2 if setting.small else 8
    loads = [Point(jobs, tokens, ranks) for ranks in (2, 1) for tokens in (short, long)]
    found = {point: measured(setting, point) for point in dict.fromkeys(loads)}
    two_short, two_long, one_short, one_long = loads
    targets = [
        _times(found, two_short, ALONE, 4),
        _times(found, two_short, PEFT, 5),
        _times(found, one_short, PEFT, 2),
        *(_times(found, point, ALONE, 0.95) for point in (two_long, one_long)),
        *(_times(found, point, PEFT, 1) for point in (two_long, one_long)),
        *(_times(found, point, LIMIT, LIMIT_SHARE) for point in loads),
    ]
    bars = {
        f"{name}, {point}": ratio(found[point], name, TOGETHER).median
        for point in loads
        for name in (ALONE, PEFT, LIMIT)
    }
    return Outcome(
        "ticks",
        "A tick of many residents against one at a time, PEFT, and the base alone",
        [Table("medians, least and greatest of the rounds", HEADER, _rows(found))],
        targets,
        Bars(bars, "times as fast as"),
        [checked, HOW],
    )


def tokens_curve(setting: Setting) -> Outcome:
    checked = refuse_unequal(setting, (2,))
    sizes = (32,) if setting.small else (32, 128, 512, 2048, 8192)
    loads = [Point(2 if setting.small else 8, tokens, 2) for tokens in sizes]
    title = (
        f"Tokens a second against tokens per job, rank and tick: {loads[0].jobs} residents, 2 ranks ZeRO-3"
    )
    return _curve(setting, "tokens", title, loads, sizes, "tokens per job, rank and tick", checked)


def residents_curve(setting: Setting) -> Outcome:
    checked = refuse_unequal(setting, (2,))
    counts = (1,) if setting.small else (1, 2, 4, 8, 16, 32)
    loads = [Point(jobs, 32, 2) for jobs in counts]
    title = "Tokens a second against residents: 32 tokens per job, rank and tick, 2 ranks ZeRO-3"
    return _curve(setting, "residents", title, loads, counts, "residents", checked)


def _curve(
    setting: Setting,
    case: str,
    title: str,
    loads: Sequence[Point],
    x: Sequence[int],
    label: str,
    checked: str,
) -> Outcome:
    found = {point: measured(setting, point) for point in loads}
    lines = {name: [spread(_speeds(p, found[p][name])).median for p in loads] for name in SYSTEMS}
    eight = [point for point in loads if point.jobs == 8]
    return Outcome(
        case,
        title,
        [Table("medians, least and greatest of the rounds", HEADER, _rows(found))],
        [_times(found, point, LIMIT, LIMIT_SHARE) for point in eight],
        Lines(x, lines, (label, "tokens/s, both ranks")),
        [checked, HOW],
    )


HOW = (
    "Tokens a second are those of all jobs on all ranks. Systems take turns within a round; a ratio is "
    "taken in each round and its median quoted with the least and the greatest. Jobs that run one after "
    "another are alike, so beyond 4,096 tokens some of them stand for all, and beyond 8,192 one pass of the "
    "base for all. All run in the host's process, whose allocator keeps what it frees. One thread a rank. A "
    "quarter of the tokens is learned; PEFT's loop computes the logits of all positions, as such loops do."
)


def _times(found: Mapping[Point, Seconds], point: Point, other: str, bound: float) -> Target:
    share = ratio(found[point], other, TOGETHER).median
    return Target(f"{point}: times as fast as {other}", share, bound)


def _rows(found: Mapping[Point, Seconds]) -> list[list[object]]:
    return [
        [
            point,
            *(f"{spread(_speeds(point, seconds[name])).median:,.0f}" for name in SYSTEMS),
            *(ratio(seconds, name, TOGETHER) for name in (ALONE, PEFT, LIMIT)),
        ]
        for point, seconds in found.items()
    ]


def _speeds(point: Point, seconds: Sequence[float]) -> list[float]:
    return [point.jobs * point.tokens * point.ranks / value for value in seconds]
