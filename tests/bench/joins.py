"""Joining and leaving a busy host: time outside the tick, ticks lost, and DeepSpeed's trace."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

from tests.bench.measure import Setting, on_ranks
from tests.bench.record import Bars, Outcome, Table, Target
from tests.bench.rounds import spread
from tests.bench.systems import Residents, refuse_stopped
from tests.bench.workload import FOREVER, Point, make_job, make_jobs
from workers.joins import AT_ONCE
from workers.ranks import Ranks
from workers.types import Attach, BaseSpec, Command, Detach, Event, JobSpec, StepDone

BOUND_MS = 50.0
WAITED_TICKS = 200
"""For a guest's first step."""


@dataclass(frozen=True)
class Changes:
    """What `times` joins and leaves of one guest did to the residents."""

    join_ms: list[float]
    leave_ms: list[float]
    tick_ms: list[float]
    missed_steps: int
    """Of residents, in the ticks around a join or a leave."""
    first_step: list[int]
    """Ticks from a join to the guest's first step, 1 being the next tick."""
    traces: set[str]


def joins(setting: Setting) -> Outcome:
    point = Point(2 if setting.small else 8, 32, 2)
    sizes = (8,) if setting.small else (64, 1000)
    times = 2 if setting.small else 20
    found = {size: _changes(setting, point, size, times) for size in sizes}
    rows = [
        [
            size,
            spread(changes.join_ms),
            spread(changes.leave_ms),
            spread(changes.tick_ms),
            changes.missed_steps,
            max(changes.first_step),
            ", ".join(sorted(changes.traces)),
        ]
        for size, changes in found.items()
    ]
    header = (
        "rows of the guest",
        "join, ms",
        "leave, ms",
        "tick, ms",
        "missed steps",
        "ticks to its first step",
        "trace",
    )
    bars = {
        f"{what}, {size} rows": spread(values).median
        for size, changes in found.items()
        for what, values in (
            ("join", changes.join_ms),
            ("leave", changes.leave_ms),
            ("tick", changes.tick_ms),
        )
    }
    return Outcome(
        "joins",
        f"Joining and leaving {point.jobs} residents, 2 ranks ZeRO-3",
        [Table(f"{times} joins and leaves: medians, least and greatest", header, rows)],
        [target for size, changes in found.items() for target in _targets(size, changes)],
        Bars(bars, "ms"),
        [
            "A join is what ticks wait for: attaching the guest, and all that they do to take it in. "
            f"Data of more than {AT_ONCE // 1024} KiB is encoded by a process beside them meanwhile, here on "
            "the ranks' own cores. A leave saves a checkpoint, fsynced. Both are timed on rank 0. "
            "A step is missed when a resident does none in a tick."
        ],
    )


def _targets(size: int, changes: Changes) -> list[Target]:
    return [
        Target(f"join, {size} rows: ms outside the tick", spread(changes.join_ms).median, BOUND_MS, False),
        Target(f"leave, {size} rows: ms outside the tick", spread(changes.leave_ms).median, BOUND_MS, False),
        Target(f"{size} rows: steps the residents missed", changes.missed_steps, 0, False),
        Target(
            f"{size} rows: ticks in which the trace was not COMPLETE",
            len(changes.traces - {"COMPLETE"}),
            0,
            False,
        ),
    ]


def _changes(setting: Setting, point: Point, rows: int, times: int) -> Changes:
    guest = make_job(setting.folder, point, point.jobs, FOREVER, rows)
    guest = replace(guest, checkpoint_dir=f"{guest.checkpoint_dir}-{rows}rows")
    return on_ranks(2, _measure, setting.base(point), make_jobs(setting.folder, point), guest, times)


def _measure(ranks: Ranks, base: BaseSpec, jobs: Sequence[JobSpec], guest: JobSpec, times: int) -> Changes:
    residents = Residents(base, jobs, ranks)
    residents.steps(3 * len(jobs))
    changes = Changes([], [], [], 0, [], set())
    taking_in = _timed(residents)
    everyone, missed = {job.job for job in jobs}, 0
    for attempt in range(times):
        name = f"guest{attempt}"
        spec = replace(guest, job=name, checkpoint_dir=f"{guest.checkpoint_dir}/{name}")
        taking_in.clear()
        attached = _apply(residents, Attach(spec), ranks)
        ticks = [_tick(residents, changes)]
        while name not in ticks[-1] and len(ticks) < WAITED_TICKS:
            ticks.append(_tick(residents, changes))
        changes.first_step.append(len(ticks))
        changes.join_ms.append(attached + sum(taking_in))
        ticks += [_tick(residents, changes) for _ in range(2)]
        changes.leave_ms.append(_apply(residents, Detach(name, spec.attempt), ranks))
        ticks += [_tick(residents, changes) for _ in range(2)]
        missed += sum(len(everyone - stepped) for stepped in ticks)
    return replace(changes, missed_steps=missed)


def _timed(residents: Residents) -> list[float]:
    """Milliseconds of every `take_in` from now on."""
    taken: list[float] = []
    take_in = residents.host.take_in

    def timed(seconds: float = 0.0) -> list[Event]:
        started = time.perf_counter()
        events = take_in(seconds)
        taken.append((time.perf_counter() - started) * 1e3)
        return events

    residents.host.take_in = timed  # type: ignore[method-assign]
    return taken


def _apply(residents: Residents, command: Command, ranks: Ranks) -> float:
    """Milliseconds."""
    ranks.gather(None)
    started = time.perf_counter()
    refuse_stopped(residents.host.apply(command))
    return (time.perf_counter() - started) * 1e3


def _tick(residents: Residents, changes: Changes) -> set[str]:
    """One tick; the jobs that did a step in it."""
    started = time.perf_counter()
    events = residents.host.tick()
    changes.tick_ms.append((time.perf_counter() - started) * 1e3)
    changes.traces.add(residents.host.base.trace)
    refuse_stopped(events)
    return {event.job for event in events if isinstance(event, StepDone)}
