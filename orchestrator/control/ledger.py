"""Finished steps and the folders they made: what a job can skip, and what its next step is.

Reads and writes the store's `steps`. A folder is verified whenever a step needs it; one that is gone is
fetched from the object store of checkpoints, if there is one that has it; else one that is gone or altered
makes its step undone, so that it is done again.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any
from uuid import uuid4

from pydantic import TypeAdapter

from orchestrator.contracts import Scores
from orchestrator.control.submission import Order
from orchestrator.plan.steps import EvaluateWhat, Step
from orchestrator.store.store import Store
from workers.manifest import CorruptFolder, folder_digest, verify_folder
from workers.types import EvaluationDone, EvaluationReport

_REPORT = TypeAdapter(EvaluationReport)


class LostFolder(Exception):
    """What step `step` made is gone or altered."""

    def __init__(self, step: str, folder: Path, words: str) -> None:
        super().__init__(words)
        self.step = step
        self.folder = folder


class Ledger:
    """The steps of the jobs at hand, in memory over the store; this process is their only writer."""

    def __init__(self, store: Store, home: Path, checkpoints: str = "") -> None:
        """`checkpoints`: the URL of an object store that has them as well; empty for none."""
        self._store = store
        self._home = home
        self._checkpoints = checkpoints
        self._results: dict[str, Mapping[str, Any]] = {}
        self.changes = 0
        """How often a step was done or undone."""

    def learn(self, order: Order) -> None:
        """Read from the store what is finished of a job's steps. Once a job: who submitted it may have
        forgotten a step that was known to be done, as what it made is gone."""
        steps = {step.id for step in order.job.steps}
        rows = self._store.steps.read(steps)
        for step in steps - rows.keys():
            self._results.pop(step, None)
        self._results |= {step: row.result for step, row in rows.items()}

    def keep_only(self, orders: Iterable[Order]) -> None:
        """Forget the results of other jobs' steps; the store has them."""
        kept = {step.id for order in orders for step in order.job.steps}
        self._results = {step: result for step, result in self._results.items() if step in kept}

    def remaining(self, order: Order) -> tuple[Step, ...]:
        return tuple(step for step in order.job.steps if step.id not in self._results)

    def registered(self, order: Order) -> bool:
        """Whether a job has made its version, at hand or long finished."""
        step = order.job.step("register").id
        return step in self._results or bool(self._store.steps.finished({step}))

    def result(self, step: str) -> Mapping[str, Any]:
        """A finished step's result. Raises KeyError. An errand may ask: this changes nothing."""
        if (known := self._results.get(step)) is not None:
            return known
        # Done by a job that is not at hand any more.
        return self._store.steps.read({step})[step].result

    def finish(self, step: str, kind: str, job: str, result: Mapping[str, Any]) -> None:
        self._store.steps.finish(step, kind, job, result)
        self._results[step] = result
        self.changes += 1

    def forget(self, lost: LostFolder) -> None:
        """Make a step undone; an altered folder is moved aside, as a published one is never overwritten."""
        self._store.steps.forget(lost.step)
        self.changes += 1
        self._results.pop(lost.step, None)
        if lost.folder.exists():
            lost.folder.rename(lost.folder.with_name(f"{lost.folder.name}.altered-{uuid4().hex[:8]}"))

    # ---- folders ---------------------------------------------------------------------------------------

    def checkpoint_dir(self, step: str) -> Path:
        """Equal training has one folder, whichever job does it."""
        return self._home / "checkpoints" / step

    def checkpoint_url(self, step: str) -> str:
        """Where the object store has what `checkpoint_dir` holds; empty without one."""
        return f"{self._checkpoints}/{step}" if self._checkpoints else ""

    def search_dir(self, step: str) -> Path:
        """Where a search keeps its table of trials."""
        return self._home / "searches" / step

    def fusion_dir(self, step: str) -> Path:
        return self._home / "fusions" / step

    def adapter_dir(self, step: str) -> Path:
        """The adapter that a finished step made, verified. Raises LostFolder."""
        result = self.result(step)
        folder = self._home / result["adapter_dir"]
        try:
            verify_folder(folder)
        except CorruptFolder as error:
            raise LostFolder(step, folder, str(error)) from error
        if folder_digest(folder) != result["digest"]:
            raise LostFolder(step, folder, f"{folder} is not the adapter that was made there")
        return folder

    def elsewhere(self, step: str) -> bool:
        """Whether the adapter of a finished training is not in this home, but may be in the object store."""
        folder = self._home / self.result(step)["adapter_dir"]
        trained = folder.parent == self.checkpoint_dir(step)
        return bool(self._checkpoints) and trained and not folder.exists()

    def fetch(self, step: str) -> None:
        """Have the adapter of a finished step in this home. An errand may ask, and several for one adapter.

        Raises LostFolder if the object store has none that is whole and the one that was made,
        CheckpointsAway.
        """
        if not self.elsewhere(step):
            return
        # Here: only who has named a store needs what speaks to it.
        from workers.object_store import ObjectStore, shown

        result, url = self.result(step), self.checkpoint_url(step)
        folder, store = self._home / result["adapter_dir"], ObjectStore(url)
        for stored in store.whole(folder.name):
            if stored.digest == result["digest"]:
                with suppress(CorruptFolder, FileExistsError):
                    store.fetch(stored, folder)
        if not folder.exists():
            raise LostFolder(step, folder, f"{folder} is gone, and {shown(url)} has no copy of it")

    def adapter_result(self, folder: Path, **more: Any) -> dict[str, Any]:
        """The result of a step that made an adapter. Raises CorruptFolder, OSError."""
        verify_folder(folder)
        inside = folder.is_relative_to(self._home)
        path = folder.relative_to(self._home) if inside else folder
        return {"adapter_dir": str(path), "digest": folder_digest(folder), **more}

    # ---- scores ----------------------------------------------------------------------------------------

    def scores(self, evaluations: Mapping[str, str]) -> tuple[Scores, ...]:
        """The reports of finished evaluations, given as task -> step."""
        return tuple(self._scores(task, self.result(step)) for task, step in evaluations.items())

    def _scores(self, task: str, result: Mapping[str, Any]) -> Scores:
        report = _REPORT.validate_python(result["report"])
        return Scores(task, result["dataset"], result["dataset_digest"], report)


def evaluation_result(what: EvaluateWhat, event: EvaluationDone) -> dict[str, Any]:
    report = _REPORT.dump_python(event.report, mode="json")
    # JSON has no NaN: a figure that is not finite is stored as a word, which reads back as the figure.
    metrics = {key: value if math.isfinite(value) else str(value) for key, value in report["metrics"].items()}
    return {
        "report": report | {"metrics": metrics},
        "dataset": ", ".join(dataset.path for dataset in what.evaluation.datasets),
        "dataset_digest": what.dataset_digest,
        "seconds": event.seconds,
    }


def flat(scores: Iterable[Scores]) -> dict[str, float]:
    """`<task>.<metric>` -> value."""
    return {
        f"{score.task}.{metric}": value for score in scores for metric, value in score.report.metrics.items()
    }
