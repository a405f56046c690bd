"""Where a tick's time goes: self time by operator under torch's profiler, beside that of the base alone."""

from __future__ import annotations

from collections.abc import Mapping

from torch.profiler import ProfilerActivity, profile

from tests.bench.measure import LIMIT, TOGETHER, Setting, build
from tests.bench.record import Bars, Outcome, Table
from tests.bench.rounds import System
from tests.bench.workload import Point, make_jobs
from workers.ranks import Ranks

TICKS = 10
SHOWN = 16


def operators(setting: Setting) -> Outcome:
    """The load of the table's first case, on one rank: what the host adds to the base alone."""
    point = Point(2 if setting.small else 8, 32)
    systems = build(point, setting.base(point), make_jobs(setting.folder, point), Ranks())
    found = {system.name: _self_ms(system) for system in systems if system.name in (TOGETHER, LIMIT)}
    host, base = found[TOGETHER], found[LIMIT]
    added = {name: ms - base.get(name, 0.0) for name, ms in host.items()}
    most = sorted(added, key=lambda name: -added[name])[:SHOWN]
    rows = [[f"`{name}`", *_cells(host[name], base.get(name, 0.0))] for name in most]
    rest = [sum(ms for name, ms in times.items() if name not in most) for times in (host, base)]
    rows += [["all others", *_cells(*rest)], ["all", *_cells(sum(host.values()), sum(base.values()))]]
    return Outcome(
        "operators",
        f"Where a tick's time goes: {point}",
        [Table("ms a tick", ("operator", "host", "base alone", "added"), rows)],
        [],
        Bars({name.removeprefix("aten::"): added[name] for name in most[:8]}, "ms added to the base alone"),
        [
            f"Self time on the CPU over {TICKS} ticks. The profiler takes microseconds a call: what is "
            "many short calls looks longer than it is."
        ],
    )


def _self_ms(system: System) -> Mapping[str, float]:
    """Operator -> milliseconds for the whole load once."""
    system.run(3 * system.sampled)
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        system.run(TICKS * system.sampled)
    loads = TICKS * system.sampled / system.units
    return {event.key: event.self_cpu_time_total / 1000 / loads for event in profiler.key_averages()}


def _cells(host: float, base: float) -> list[str]:
    return [f"{host:.2f}", f"{base:.2f}", f"{host - base:.2f}"]
