"""Search for the weights of a fusion: each trial is a small product and its scores on the resident base.

A search goes on by one trial at a time, between two ticks, so that residents keep training. Its table of
trials is a file of one line a trial; what comes next is a function of that table and the seed alone, so a
search taken up again goes on as if it had never stopped. Owns the space, the aim, and the table.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from workers.adapter import Adapter, open_adapter
from workers.fuse import fuse
from workers.types import BadInput, FuseTask, SearchSpec, SearchTask

TRIALS = "trials.jsonl"
MOST_WEIGHT = 1.5
"""Weights are looked for between 0 and this: at 1 an adapter is whole."""
FIRST_DRAWN = 8
"""Trials drawn at random before the sampler's model has a say (Bergstra et al., NeurIPS 2011)."""


@dataclass(frozen=True)
class Trial:
    """One choice of weights and how much of each parent's score it keeps."""

    number: int
    weights: tuple[tuple[float, ...], ...]
    """One tuple a group of modules, a weight an adapter in it."""
    retention: Mapping[str, float]
    """`<task>.<metric>` -> share of the parent's score."""
    scores: Mapping[str, float | None]
    """None where the fused adapter yields no finite number."""
    aim: float = 0.0
    meets_floors: bool = False
    pareto: bool = False
    """No other trial keeps as much of every task and more of one. Known when the search is over."""


@dataclass
class Search:
    """Where one search stands; the same on every rank."""

    spec: SearchSpec
    parents: dict[str, float] = field(default_factory=dict[str, float])
    """`<task>.<metric>` -> the parent's own score on these rows."""
    trials: list[Trial] = field(default_factory=list[Trial])

    @property
    def finished(self) -> bool:
        return len(self.trials) >= self.spec.trials

    @property
    def best(self) -> Trial:
        """One that meets the floors if any does; the first among equals."""
        return max(self.trials, key=lambda trial: (trial.meets_floors, trial.aim))

    def next_weights(self) -> tuple[tuple[float, ...], ...]:
        """The recipe's own weights first, then equal ones, then what the sampler suggests."""
        adapters, groups = len(self.spec.plan.adapter_dirs), max(1, len(self.spec.groups))
        if not self.trials:
            return (self.spec.plan.weights,) * groups
        if len(self.trials) == 1:
            return ((1.0,) * adapters,) * groups
        return _suggest(self.spec.seed, adapters, groups, self.trials)

    def judge(self, weights: tuple[tuple[float, ...], ...], scores: Mapping[str, float | None]) -> Trial:
        """The trial that these scores make.

        aim = mean_t min(r_t, 1) - sum_t max(0, floor_t - r_t): a task that has all of its parent's score
        gains nothing by more, and one below its floor costs more than another can bring in.
        """
        kept = {key_of(task): _retained(task, scores, self.parents) for task in self.spec.tasks}
        short = math.fsum(max(0.0, task.floor - kept[key_of(task)]) for task in self.spec.tasks)
        mean = math.fsum(min(value, 1.0) for value in kept.values()) / len(kept)
        return Trial(len(self.trials), weights, kept, dict(scores), mean - short, short == 0.0)

    def report(self) -> dict[str, Any]:
        """The table, with the trials marked that no other dominates."""
        marked = [asdict(trial) | {"pareto": _undominated(trial, self.trials)} for trial in self.trials]
        return {
            "groups": list(self.spec.groups),
            "floors": {key_of(task): task.floor for task in self.spec.tasks},
            "parents": self.parents,
            "best": self.best.number,
            "trials": marked,
        }


def key_of(task: SearchTask) -> str:
    return f"{task.task}.{task.metric}"


def _retained(task: SearchTask, scores: Mapping[str, float | None], parents: Mapping[str, float]) -> float:
    """As a gate's retention: score/parent, or parent/score where lower is better; 0 if there is none."""
    score, parent = scores[key_of(task)], parents[key_of(task)]
    if score is None:
        return 0.0
    over, under = (parent, score) if task.lower_is_better else (score, parent)
    return over / under if under else float(over >= 0)


def _undominated(trial: Trial, others: Sequence[Trial]) -> bool:
    def beats(other: Trial) -> bool:
        pairs = [(other.retention[key], trial.retention[key]) for key in trial.retention]
        return all(a >= b for a, b in pairs) and any(a > b for a, b in pairs)

    return not any(beats(other) for other in others)


def fused_by(plan: FuseTask, groups: Sequence[str], weights: Sequence[tuple[float, ...]]) -> Adapter:
    """The plan's adapter with other weights, in memory alone."""
    task = _with_weights(plan, groups, weights)
    folders = [Path(folder) for folder in task.adapter_dirs]
    adapters = [open_adapter(folder) for folder in folders]
    return fuse(
        adapters, task.weights, task.rule, task.rank, task.adapter_dirs, task.groups, task.options, folders
    )[0]


def best_plan(search: Search) -> FuseTask:
    """What the best trial fused, to be written into the plan's folder."""
    return _with_weights(search.spec.plan, search.spec.groups, search.best.weights)


def _with_weights(plan: FuseTask, groups: Sequence[str], weights: Sequence[tuple[float, ...]]) -> FuseTask:
    if not groups:
        return replace(plan, weights=weights[0])
    return replace(plan, groups=tuple(zip(groups, weights, strict=True)))


# ---- the sampler ------------------------------------------------------------------------------------------


def _suggest(seed: int, adapters: int, groups: int, trials: Sequence[Trial]) -> tuple[tuple[float, ...], ...]:
    """Optuna's TPE over the trials so far, with a sampler of its own: nothing else is remembered."""
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    space: dict[str, Any] = {
        f"{group}.{adapter}": optuna.distributions.FloatDistribution(0.0, MOST_WEIGHT)
        for group in range(groups)
        for adapter in range(adapters)
    }
    sampler = optuna.samplers.TPESampler(seed=seed + len(trials), n_startup_trials=FIRST_DRAWN)
    study = optuna.create_study(direction="maximize", sampler=sampler)
    for trial in trials:
        if all(0 <= weight <= MOST_WEIGHT for group in trial.weights for weight in group):
            study.add_trial(
                optuna.trial.create_trial(
                    params={
                        f"{group}.{adapter}": weight
                        for group, weights in enumerate(trial.weights)
                        for adapter, weight in enumerate(weights)
                    },
                    distributions=space,
                    value=trial.aim,
                )
            )
    params = study.ask(space).params
    return tuple(
        tuple(round(params[f"{group}.{adapter}"], 4) for adapter in range(adapters))
        for group in range(groups)
    )


# ---- the table --------------------------------------------------------------------------------------------


def read_table(spec: SearchSpec) -> Search:
    """What a former attempt has done; a torn last line is forgotten. Raises BadInput for another's table."""
    file, found = Path(spec.trials_dir) / TRIALS, Search(spec)
    if not file.is_file():
        return found
    for line in file.read_text(errors="replace").splitlines():
        try:
            value = json.loads(line)
        except ValueError:
            logging.getLogger(__name__).warning("%s: a torn line is done again", file)
            break
        try:
            _take_up(found, value)
        except (KeyError, TypeError, ValueError) as error:
            raise BadInput(f"{file} is not the table of this search; remove it") from error
    return found


def _take_up(search: Search, value: Any) -> None:
    """One line of the table. Raises KeyError, TypeError or ValueError for a line of something else."""
    if "parents" in value:
        search.parents = {key_of(task): float(value["parents"][key_of(task)]) for task in search.spec.tasks}
        return
    trial = Trial(**{**value, "weights": tuple(tuple(group) for group in value["weights"])})
    groups, adapters = max(1, len(search.spec.groups)), len(search.spec.plan.adapter_dirs)
    if trial.number != len(search.trials) or [len(group) for group in trial.weights] != [adapters] * groups:
        raise ValueError(trial)
    search.trials.append(trial)


def write_table(search: Search) -> None:
    """Anew and renamed: a reader finds whole lines. OSError where the disk is full."""
    folder = Path(search.spec.trials_dir)
    folder.mkdir(parents=True, exist_ok=True)
    lines = [{"parents": search.parents}, *(asdict(trial) for trial in search.trials)]
    scratch = folder / f"{TRIALS}.new"
    scratch.write_text("".join(json.dumps(line) + "\n" for line in lines))
    scratch.replace(folder / TRIALS)
