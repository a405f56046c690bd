"""Every fusion rule beside the controls, on the adapters that a pipeline's run has left in its home. By hand:

    python -m tests.bench.rules --home .chorus --work DIR

Every rule of the table at fixed weights, and those that --search names at weights of their own. Weights are
searched, and the best rule is chosen, on validation rows; what is shown is scored on test rows. On two ranks,
without generated replies. Nothing in the home changes. It may be stopped: DIR keeps the rows that are done,
and the same command goes on from there. Give another DIR when a rule's code has changed.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

from orchestrator.gate import lower_is_better
from orchestrator.judgement import HEADLINES
from orchestrator.plan.plan import make_plan
from orchestrator.plan.steps import Plan, PlannedJob, TrainWhat
from orchestrator.recipe.load import LoadedRecipe
from orchestrator.recipe.pipeline import load_pipeline
from tests.bench.__main__ import RESULTS
from tests.bench.record import Machine, write
from tests.bench.rules_record import FLOOR, Row, Scores, outcome
from tests.numerics.pair import two_ranks
from workers.fuse import fuse_folders
from workers.fuse.rules import RULES
from workers.host import Host
from workers.manifest import folder_digest, json_digest
from workers.ranks import Ranks
from workers.types import (
    Attach,
    BadInput,
    BaseSpec,
    Command,
    Evaluate,
    EvaluationDone,
    EvaluationSpec,
    Event,
    FuseTask,
    SearchDone,
    SearchSpec,
    SearchTask,
    SearchWeights,
    TrainingFinished,
)

GROUPS = ("self_attn", "mlp")

_hosts: list[Host] = []
"""Of a rank's process: loaded once."""


def on_host(ranks: Ranks, base: BaseSpec, command: Command) -> list[Event]:
    """What the command and the ticks after it tell."""
    if not _hosts:
        _hosts.append(Host.load(base, ranks))
    events = _hosts[0].apply(command)
    while _hosts[0].busy:
        events += _hosts[0].tick()
    return events


@dataclass(frozen=True)
class Parent:
    name: str
    recipe: LoadedRecipe
    folder: str

    @property
    def key(self) -> str:
        return f"{self.recipe.recipe.task}.{HEADLINES[self.recipe.recipe.task_type]}"

    def rows(self, split: str, most: int | None = None) -> EvaluationSpec:
        recipe = self.recipe.recipe
        datasets = tuple(replace(dataset, max_samples=most) for dataset in recipe.datasets_of(split))
        return replace(recipe.evaluation_spec(), datasets=datasets, generate_samples=0)


@dataclass(frozen=True)
class Made:
    """An adapter to be scored; None is the base. `weights` are those that a search has found."""

    folder: str | None
    weights: str = ""


@dataclass(frozen=True)
class Bench:
    base: BaseSpec
    parents: Sequence[Parent]
    work: Path
    trials: int
    samples: int
    """Validation rows of a task."""

    def told(self, command: Command) -> list[Event]:
        return two_ranks(on_host, self.base, command)

    def row(self, name: str, make: Callable[[], Made], control: bool = False) -> Row:
        """Made and scored, unless a former run has done it. Raises BadInput as `make` does."""
        file = self.path(name).with_suffix(".json")
        if file.is_file():
            return Row(**json.loads(file.read_text()))
        made = make()
        validation = self._scores(made.folder, "validation", self.samples)
        row = Row(name, validation, self._scores(made.folder, "test"), control, made.weights)
        file.write_text(json.dumps(asdict(row)))
        print(row.words, *(f"{key} {value:.4g}" for key, value in row.test.items()), sep="  ", flush=True)
        return row

    def path(self, name: str) -> Path:
        return self.work / re.sub(r"[^0-9a-z]+", "-", name)

    def _scores(self, folder: str | None, split: str, most: int | None = None) -> Scores:
        return {parent.key: self._score(parent, folder, parent.rows(split, most)) for parent in self.parents}

    def _score(self, parent: Parent, folder: str | None, rows: EvaluationSpec) -> float:
        (event,) = self.told(Evaluate("score", folder, rows))
        assert isinstance(event, EvaluationDone), event
        return event.report.metrics[parent.key.rpartition(".")[2]]

    def plan(
        self, name: str, rule: str, rank: int | None, weights: Sequence[float] | None = None
    ) -> FuseTask:
        folders = tuple(parent.folder for parent in self.parents)
        given = tuple(weights or [1.0] * len(folders))
        return FuseTask(folders, given, rule, rank, str(self.path(name)))

    def fused(self, plan: FuseTask) -> Made:
        fuse_folders(plan)
        return Made(plan.out_dir)

    def searched(self, name: str, rule: str, rank: int | None, groups: tuple[str, ...] = ()) -> Made:
        """With the best weights of some trials on validation rows."""
        tasks = tuple(
            SearchTask(
                parent.recipe.recipe.task,
                parent.key.rpartition(".")[2],
                lower_is_better(parent.key),
                parent.rows("validation", self.samples),
                FLOOR,
            )
            for parent in self.parents
        )
        plan = self.plan(name, rule, rank)
        spec = SearchSpec(plan, tasks, self.trials, f"{plan.out_dir}-trials", groups)
        *_, event = self.told(SearchWeights("search", spec))
        assert isinstance(event, SearchDone), event
        search = event.report["search"]
        weights = search["trials"][search["best"]]["weights"]
        shown = "; ".join(", ".join(f"{weight:.2g}" for weight in group) for group in weights)
        return Made(plan.out_dir, shown)

    def trained(self, what: TrainWhat) -> Made:
        """The adapter of a training that reads no other adapter."""
        spec = what.attempt("joint", 1, str(self.work / "joint"), str)
        events = self.told(Attach(spec))
        return Made(next(event.adapter_dir for event in events if isinstance(event, TrainingFinished)))


def rows(bench: Bench, plan: Plan, home: Path, searched: Sequence[str]) -> Iterator[Row]:
    yield from controls(bench, plan, home)
    rank = student(plan).spec.adapter.r // 2
    for rule in (rule for rule in RULES if rule != "random"):
        cut = rank if RULES[rule].takes_rank else None
        name = f"{rule}, rank {cut}" if cut else rule
        try:
            yield from of_rule(bench, rule, name, cut, rule in searched)
        except BadInput as error:
            print(f"{name}: left out: {error}", flush=True)
    yield bench.row(f"distill, rank {2 * rank}", lambda: Made(folder_of(plan.jobs[-1], home)))


def controls(bench: Bench, plan: Plan, home: Path) -> Iterator[Row]:
    yield bench.row("base", lambda: Made(None), control=True)
    for parent in bench.parents:
        yield bench.row(f"parent {parent.name}", partial(Made, parent.folder), control=True)
    noise = bench.plan("random", "random", None, [1.0])
    noise = replace(noise, adapter_dirs=(folder_of(plan.jobs[-1], home),))
    yield bench.row("random, of the student's norms", lambda: bench.fused(noise), control=True)
    joint = joint_step(student(plan))
    yield bench.row("joint: trained on all labels", lambda: bench.trained(joint), control=True)


def of_rule(bench: Bench, rule: str, name: str, cut: int | None, search: bool) -> Iterator[Row]:
    """At the weights 1, at equal shares, and if asked at weights that are searched."""
    many = len(bench.parents)
    for words, weight in (("weights 1", 1.0), (f"weights 1/{many}", 1 / many)):
        plan = bench.plan(f"{name}, {words}", rule, cut, [weight] * many)
        yield bench.row(f"{name}, {words}", partial(bench.fused, plan))
    for groups in ((), GROUPS) if search else ():
        words = f"{name}, searched" + (f" by {' and '.join(groups)}" if groups else "")
        yield bench.row(words, partial(bench.searched, words, rule, cut, groups))


def folder_of(job: PlannedJob, home: Path) -> str:
    return str(home / "checkpoints" / job.step("train").id / "adapter")


def student(plan: Plan) -> TrainWhat:
    what = plan.jobs[-1].step("train").what
    assert isinstance(what, TrainWhat)
    return what


def joint_step(what: TrainWhat) -> TrainWhat:
    """The recipe's distillation from the labels alone and a fresh adapter."""
    assert what.spec.distill is not None
    distill = replace(what.spec.distill, labels=1.0)
    return replace(what, spec=replace(what.spec, distill=distill), teachers=(), start=None)


def main(arguments: Sequence[str]) -> int:
    asked = parser().parse_args(arguments)
    machine, pipeline, home = Machine.read(), load_pipeline(asked.pipeline), asked.home.resolve()
    plan = make_plan(pipeline)
    parents = [Parent(job.name, pipeline.job(job.name), folder_of(job, home)) for job in plan.jobs[:-1]]
    if unknown := set(asked.search) - set(RULES):
        print(f"--search: no rule is called {', '.join(sorted(unknown))}; there are {', '.join(RULES)}")
        return 2
    work = work_of(asked.work, plan, home, asked.trials, asked.samples)
    bench = Bench(pipeline.jobs[0].base.spec, parents, work, asked.trials, asked.samples)
    found = list(rows(bench, plan, home, asked.search))
    keys = {f"parent {parent.name}": parent.key for parent in parents}
    path = write(outcome(found, keys, searches(bench)), machine, asked.out, command(asked), small=False)
    print(path.read_text())
    return 0


def command(asked: argparse.Namespace) -> list[str]:
    """What was asked, without this machine's paths."""
    options = ["--trials", str(asked.trials), "--samples", str(asked.samples), "--search", *asked.search]
    return ["python", "-m", "tests.bench.rules", "--home", "HOME", "--work", "DIR", *options]


def searches(bench: Bench) -> str:
    return (
        f"Searches: {bench.trials} trials, {bench.samples} validation rows a task, floors of {FLOOR:.0%}; in "
        "brackets the weights found, by group."
    )


def work_of(work: Path, plan: Plan, home: Path, *how: int) -> Path:
    """A folder for these adapters alone: what was done with others is not taken for theirs."""
    digests = [folder_digest(Path(folder_of(job, home))) for job in plan.jobs]
    folder = work / json_digest([digests, *how])[:12]
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(prog="python -m tests.bench.rules", description=__doc__)
    found.add_argument("--home", type=Path, default=Path(".chorus"), help="of a finished run of the pipeline")
    found.add_argument("--pipeline", type=Path, default=Path("recipes/demo.yaml"))
    found.add_argument("--work", type=Path, required=True, help="keeps what is done")
    found.add_argument("--search", nargs="*", default=["cat", "svd"], help="rules to search weights for")
    found.add_argument("--trials", type=int, default=24, help="of each search")
    found.add_argument("--samples", type=int, default=100, help="validation rows of a task")
    found.add_argument("--out", type=Path, default=RESULTS)
    return found


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
