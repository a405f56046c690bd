"""`simulate`: what a policy would make of a trace on so many GPUs, as a table and a picture."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console

from orchestrator.commands.output import Format, duration, emit, grid
from orchestrator.commands.parts import Parts
from orchestrator.home import Home
from orchestrator.recipe.teams import load_policy
from orchestrator.simulate.event_log import read_events
from orchestrator.simulate.picture import write_picture
from orchestrator.simulate.policies import PolicyName
from orchestrator.simulate.simulation import Outcome, simulate
from orchestrator.simulate.traces import TraceJob, read_trace
from orchestrator.simulate.world import Setting
from workers.types import BadInput

COLUMNS = {
    "mean": "mean_completion",
    "median": "median_completion",
    "p99": "p99_completion",
    "waiting": "mean_waiting",
    "longest wait": "longest_waiting",
    "makespan": "makespan",
}


@dataclass(frozen=True)
class SimulateOptions:
    trace: Path
    setting: Setting
    policies: Sequence[PolicyName]
    teams: Path | None
    """A `teams.yaml`; None: that of the home."""
    steps_per_second: float | None
    picture: Path | None


def policy_names(names: Sequence[str]) -> list[PolicyName]:
    """Each once, in the order given. Raises BadInput."""
    known = [name.value for name in PolicyName]
    for name in names:
        if name not in known:
            raise BadInput(f"--policy {name}: there is no such policy; write one of {', '.join(known)}")
    return [PolicyName(name) for name in dict.fromkeys(names)]


def run(parts: Parts, home: Home, options: SimulateOptions, format: Format) -> None:
    """Raises BadInput."""
    if options.teams is not None and not options.teams.exists():
        raise BadInput(f"{options.teams} does not exist: give a teams.yaml, or leave --teams out")
    policy = load_policy(options.teams or home.folder / "teams.yaml")
    jobs = _jobs(parts, options)
    outcomes = [simulate(jobs, options.setting, name, policy) for name in options.policies]
    if options.picture is not None:
        write_picture(outcomes, options.picture)
    emit([_json(outcome) for outcome in outcomes], format, lambda out: _table(out, outcomes, options))


def _jobs(parts: Parts, options: SimulateOptions) -> tuple[TraceJob, ...]:
    path = options.trace
    if not path.is_dir():
        return read_trace(path, options.steps_per_second)
    log = Home(path.absolute())
    if not (path / "chorus.db").exists():
        raise BadInput(f"{path} is no home of chorus: it has no chorus.db")
    with parts.store(log) as store:
        jobs = read_events(store)
    if not jobs:
        raise BadInput(f"{path} has no job that ran and has ended: there is nothing to simulate")
    return jobs


def _json(outcome: Outcome) -> dict[str, object]:
    return {"policy": outcome.policy.value, "too_large": outcome.too_large, **asdict(outcome.summary)}


def _table(out: Console, outcomes: Sequence[Outcome], options: SimulateOptions) -> None:
    figures = ["slowdown", "share error", "worst", "Jain", "preemptions", "decision p50", "decision p99"]
    header = ["policy", *COLUMNS, *figures]
    out.print(grid(header, [_row(outcome) for outcome in outcomes], right=header[1:]))
    first = outcomes[0]
    words = f"{first.summary.jobs:,} jobs on {options.setting.ranks:,} GPUs; times in h:mm:ss."
    if first.too_large:
        words += f" Left out: {first.too_large:,} that need more GPUs than there are."
    out.print(words, soft_wrap=True)
    if options.picture is not None:
        out.print(f"picture: {options.picture}", soft_wrap=True)


def _row(outcome: Outcome) -> list[object]:
    found = outcome.summary
    times = [duration(getattr(found, key)) for key in COLUMNS.values()]
    return [
        outcome.policy.value,
        *times,
        f"{found.mean_slowdown:.2f}",
        f"{found.share_error:.1%}",
        f"{found.worst_share_error:.1%}",
        f"{found.jain:.4f}",
        f"{found.preemptions:,}",
        f"{found.median_decision * 1e3:.1f} ms",
        f"{found.p99_decision * 1e3:.1f} ms",
    ]
