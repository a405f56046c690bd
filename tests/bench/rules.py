"""Every fusion rule beside the controls, on the adapters that a pipeline's run has left in its home. By hand:

    python -m tests.bench.rules --home .chorus

Weights are searched, and the best rule is chosen, on validation rows; what is shown is scored on test rows.
On two ranks, without generated replies. Nothing in the home changes.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from orchestrator.gate import lower_is_better, retained
from orchestrator.judgement import HEADLINES
from orchestrator.plan.plan import make_plan
from orchestrator.plan.steps import Plan, TrainWhat
from orchestrator.recipe.load import LoadedRecipe
from orchestrator.recipe.pipeline import load_pipeline
from tests.bench.__main__ import RESULTS
from tests.bench.record import Bars, Machine, Outcome, Table, Target, write
from tests.numerics.pair import two_ranks
from workers.fuse import fuse_folders
from workers.fuse.rules import RULES
from workers.host import Host
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

FLOOR = 0.95
"""Of each parent's test score, as the issue asks."""
EQUAL = "cat, weights 1"
GROUPS = ("self_attn", "mlp")
Scores = Mapping[str, float]

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
class Row:
    name: str
    validation: Scores
    test: Scores
    control: bool = False


@dataclass(frozen=True)
class Bench:
    base: BaseSpec
    parents: Sequence[Parent]
    scratch: Path
    trials: int
    samples: int
    """Validation rows of a task."""

    def told(self, command: Command) -> list[Event]:
        return two_ranks(on_host, self.base, command)

    def scored(self, name: str, folder: str | None, control: bool = False) -> Row:
        validation = self._scores(folder, "validation", self.samples)
        row = Row(name, validation, self._scores(folder, "test"), control)
        print(name, *(f"{key} {value:.4g}" for key, value in row.test.items()), sep="  ", flush=True)
        return row

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
        return FuseTask(folders, given, rule, rank, str(self.scratch / name.replace(" ", "-")))

    def searched(self, name: str, rule: str, rank: int | None, groups: tuple[str, ...] = ()) -> Row:
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
        (event,) = self.told(SearchWeights("search", spec))
        assert isinstance(event, SearchDone), event
        search = event.report["search"]
        weights = search["trials"][search["best"]]["weights"]
        shown = "; ".join(", ".join(f"{weight:.2g}" for weight in group) for group in weights)
        return self.scored(f"{name} ({shown})", plan.out_dir)

    def trained(self, what: TrainWhat) -> str:
        """The adapter of a training that reads no other adapter."""
        spec = what.attempt("joint", 1, str(self.scratch / "joint"), str)
        events = self.told(Attach(spec))
        return next(event.adapter_dir for event in events if isinstance(event, TrainingFinished))


def fixed(bench: Bench, rank: int) -> Iterator[Row]:
    """Every rule in the table, at the weights 1 and at equal shares; those that cut, at `rank`."""
    share = 1 / len(bench.parents)
    for rule in (rule for rule in RULES if rule != "random"):
        cut = rank if RULES[rule].takes_rank else None
        for words, weight in (("weights 1", 1.0), (f"weights 1/{len(bench.parents)}", share)):
            name = ", ".join(filter(None, [rule, f"rank {cut}" if cut else "", words]))
            plan = bench.plan(name, rule, cut, [weight] * len(bench.parents))
            try:
                fuse_folders(plan)
            except BadInput as error:
                print(f"{name}: left out: {error}", flush=True)
                continue
            yield bench.scored(name, plan.out_dir)


def rows(bench: Bench, plan: Plan, home: Path) -> Iterator[Row]:
    yield bench.scored("base", None, control=True)
    for parent in bench.parents:
        yield bench.scored(f"parent {parent.name}", parent.folder, control=True)
    student = plan.jobs[-1].step("train")
    assert isinstance(student.what, TrainWhat)
    rank = student.what.spec.adapter.r
    folder = str(home / "checkpoints" / student.id / "adapter")
    noise = replace(bench.plan("random", "random", None, [1.0]), adapter_dirs=(folder,))
    fuse_folders(noise)
    yield bench.scored("random, of the student's norms", noise.out_dir, control=True)
    yield bench.scored("joint: trained on all labels", bench.trained(joint_step(plan)), control=True)
    yield from fixed(bench, rank // 2)
    yield bench.searched("cat, searched", "cat", None)
    yield bench.searched(f"cat, searched by {' and '.join(GROUPS)}", "cat", None, GROUPS)
    yield bench.searched(f"svd, rank {rank // 2}, searched", "svd", rank // 2)
    yield bench.scored(f"distill, rank {rank}", folder)


def joint_step(plan: Plan) -> TrainWhat:
    """The recipe's distillation from the labels alone and a fresh adapter."""
    what = plan.jobs[-1].step("train").what
    assert isinstance(what, TrainWhat)
    assert what.spec.distill is not None
    distill = replace(what.spec.distill, labels=1.0)
    return replace(what, spec=replace(what.spec, distill=distill), teachers=(), start=None)


# ---- the record -----------------------------------------------------------------------------------------


def kept(scores: Scores, parents: Scores) -> Scores:
    return {key: retained(key, scores[key], parents[key]) for key in parents}


def outcome(found: Sequence[Row], bench: Bench) -> Outcome:
    of = {row.name: row for row in found}
    whole = [(parent.key, of[f"parent {parent.name}"]) for parent in bench.parents]
    test = {key: row.test[key] for key, row in whole}
    validation = {key: row.validation[key] for key, row in whole}
    best = max(
        (row for row in found if not row.control), key=lambda r: min(kept(r.validation, validation).values())
    )
    single = max((row for _, row in whole), key=lambda row: min(kept(row.validation, validation).values()))
    lines = [
        [
            f"**{row.name}**" if row is best else row.name,
            *(f"{row.test[key]:.4g} ({kept(row.test, test)[key]:.0%})" for key in test),
            f"{min(kept(row.test, test).values()):.0%}",
            f"{min(kept(row.validation, validation).values()):.0%}",
        ]
        for row in found
    ]
    header = ("adapter", *test, "least kept", "least kept, validation")
    targets = [
        Target(f"{best.name}: {key} kept", value, FLOOR) for key, value in kept(best.test, test).items()
    ]
    targets += [
        Target(f"{key}: {best.name} over {EQUAL}", value, 1.0)
        for key, value in kept(best.test, of[EQUAL].test).items()
    ]
    least = {row.name: max(0.0, min(kept(row.test, test).values())) for row in found}
    notes = (
        "In brackets what is kept of the score of that task's parent: score/parent, or parent/score for "
        "perplexity. The bold row was chosen by its least kept share on validation rows. Searches: "
        f"{bench.trials} trials, {bench.samples} validation rows a task, floors of {FLOOR:.0%}; in brackets "
        f"the weights found, by group. Best single parent over all tasks: {single.name}. `joint` is the "
        "student's training from the labels alone and from a fresh adapter, with the student's rows, steps "
        "and rate. `random` has the student's norm in every module.",
    )
    table = Table("Test rows, headline metric of each task", header, lines)
    title = "Fusion rules on the demo's three adapters"
    return Outcome(
        "rules", title, [table], targets, Bars(least, "least share kept of a parent's score"), notes
    )


def main(arguments: Sequence[str]) -> int:
    asked = parser().parse_args(arguments)
    machine, pipeline, home = Machine.read(), load_pipeline(asked.pipeline), asked.home.resolve()
    plan = make_plan(pipeline)
    parents = [
        Parent(job.name, pipeline.job(job.name), str(home / "checkpoints" / job.step("train").id / "adapter"))
        for job in plan.jobs[:-1]
    ]
    base = pipeline.jobs[0].base.spec
    with tempfile.TemporaryDirectory(prefix="rules-") as scratch:
        bench = Bench(base, parents, Path(scratch), asked.trials, asked.samples)
        found = outcome(list(rows(bench, plan, home)), bench)
    command = ["python", "-m", "tests.bench.rules", *arguments]
    path = write(found, machine, asked.out, command, small=False)
    print(path.read_text())
    return 0


def parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(prog="python -m tests.bench.rules", description=__doc__)
    found.add_argument("--home", type=Path, default=Path(".chorus"), help="of a finished run of the pipeline")
    found.add_argument("--pipeline", type=Path, default=Path("recipes/demo.yaml"))
    found.add_argument("--trials", type=int, default=24, help="of each search")
    found.add_argument("--samples", type=int, default=100, help="validation rows of a task")
    found.add_argument("--out", type=Path, default=RESULTS)
    return found


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
