"""What `mlflow.pyfunc.load_model` makes of a registered version: a base with its adapter that answers rows.

MLflow finds this module by its name in the `MLmodel` file of a version (`orchestrator.registry.answers`), so
the name stays. A row is what a data set of the task holds, without the answer. It is answered by the code
that scored the version.

    model = mlflow.pyfunc.load_model("models:/tiny.support@champion", model_config={"base": "models/tiny"})
    model.predict([{"messages": [{"role": "user", "content": "Hello"}]}])
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from orchestrator.recipe.base_file import anchor, load_base
from orchestrator.recipe.file import Place
from orchestrator.registry.answers import read_answers
from workers.manifest import verify_listed
from workers.types import BadInput, BaseSpec, EvaluationReport, EvaluationSpec

FIELDS = {"chat": "messages", "classification": "text", "recommendation": "history"}
"""Task type -> the field by which a row of it is known."""
ADVICE = "give its folder: load_model(..., model_config={'base': FOLDER})"
NO_REPLY = "-"
"""Stands where the answer would be: a row of a data set has one."""


def _load_pyfunc(  # pyright: ignore[reportUnusedFunction]
    path: str, model_config: Mapping[str, Any] | None = None
) -> Answering:
    """Called by MLflow. Raises CorruptFolder if a file was altered, BadInput for another base or none."""
    folder = Path(path)
    verify_listed(folder)
    answers = read_answers(folder)
    reference = str((model_config or {}).get("base") or answers.base_name)
    try:
        found = load_base(anchor(reference, Path.cwd()), Place(Path(reference), 1))
    except BadInput as error:
        raise BadInput(f"no base to put the version on; {ADVICE} ({error})") from error
    if found.digests.all != answers.base_digest:
        raise BadInput(
            f"{reference} is not the base that this version was trained on, its digest differs; {ADVICE}"
        )
    return Answering(replace(found.spec, dtype=answers.dtype, zero="none"), folder, answers.tasks)


class Answering:
    """A base in this process with one adapter on it."""

    def __init__(self, spec: BaseSpec, adapter: Path, tasks: Mapping[str, EvaluationSpec]) -> None:
        # Heavy, and wanted by those alone who load a version.
        from workers import base as workers_base
        from workers.adapter import read_adapter
        from workers.ranks import Ranks

        self._ranks = Ranks()
        self._base = workers_base.load_base(spec, self._ranks)
        self._base.slots.load(0, read_adapter(adapter))
        self._tasks = tasks

    def predict(self, model_input: Any, params: Mapping[str, Any] | None = None) -> list[dict[str, Any]]:  # noqa: ARG002
        """An answer a row: {"reply"}, {"label", "probabilities"}, or {"ranking", "log_likelihoods"}.

        `model_input` is a list of rows or a DataFrame of them. A row names its `task` where the version
        answers several of its kind. Raises BadInput naming the row, counted from 1.
        """
        rows = _rows(model_input)
        tasks = [self._task_of(number, row) for number, row in enumerate(rows, 1)]
        answered: dict[int, dict[str, Any]] = {}
        for task in dict.fromkeys(tasks):
            mine = [place for place, other in enumerate(tasks) if other == task]
            answers = self._answers(task, [rows[place] for place in mine])
            answered |= dict(zip(mine, answers, strict=True))
        return [answered[place] for place in range(len(rows))]

    def _task_of(self, number: int, row: Mapping[str, Any]) -> str:
        named = row.get("task")
        if named is not None and named not in self._tasks:
            raise BadInput(f"row {number}: no task '{named}'; this version answers {', '.join(self._tasks)}")
        fitting = [name for name, spec in self._tasks.items() if FIELDS[spec.datasets[0].type] in row]
        if named is not None:
            return str(named)
        if len(fitting) != 1:
            words = ", ".join(f"{name} ('{FIELDS[s.datasets[0].type]}')" for name, s in self._tasks.items())
            raise BadInput(f"row {number}: its fields do not tell its task; add 'task': one of {words}")
        return fitting[0]

    def _answers(self, task: str, rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        spec = self._tasks[task]
        kind, labels = spec.datasets[0].type, spec.datasets[0].labels
        with tempfile.TemporaryDirectory() as scratch:
            file = Path(scratch) / "rows.jsonl"
            file.write_text("".join(json.dumps(_with_answer(kind, labels, row)) + "\n" for row in rows))
            data = replace(spec.datasets[0], path=str(file))
            try:
                report = self._evaluate(replace(spec, datasets=(data,), generate_samples=len(rows)))
            except BadInput as error:
                raise BadInput(str(error).replace(f"{file}:", f"{task}, row ")) from error
        return [_ANSWERS[kind](prediction) for prediction in report.predictions]

    def _evaluate(self, spec: EvaluationSpec) -> EvaluationReport:
        from workers.evaluate import evaluate
        from workers.lora import Segment

        base = self._base
        with base.adapters.rows([Segment(0, 0, sys.maxsize)]):
            return evaluate(base.model, base.tokenizer, self._ranks, spec, base.device)


def _rows(model_input: Any) -> list[dict[str, Any]]:
    """Raises BadInput for anything that is no list of objects."""
    rows: Any = model_input.to_dict("records") if hasattr(model_input, "to_dict") else model_input
    if not _is_list_of_objects(rows):
        raise BadInput("the input is not a list of rows, each an object; give a list of dicts or a DataFrame")
    # A DataFrame fills with NaN what a row does not have.
    return [{key: value for key, value in row.items() if value == value} for row in rows]


def _is_list_of_objects(given: Any) -> bool:
    return isinstance(given, list) and all(isinstance(row, dict) for row in given)  # pyright: ignore[reportUnknownVariableType]


def _with_answer(kind: str, labels: Sequence[str], row: Mapping[str, Any]) -> dict[str, Any]:
    """The row as a data set would hold it; what is wrong with it is left for the reader to say."""
    if kind == "classification":
        return {**row, "label": labels[0]}
    if kind == "recommendation":
        return {**row, "target": next(iter(row.get("candidates") or [""]))}
    turns = row.get("messages")
    return {"messages": [*turns, {"role": "assistant", "content": NO_REPLY}] if turns else []}


def _ranking(prediction: Mapping[str, Any]) -> dict[str, Any]:
    logs: dict[str, float] = prediction["log_likelihoods"]
    return {"ranking": sorted(logs, key=logs.__getitem__, reverse=True), "log_likelihoods": logs}


_ANSWERS: dict[str, Callable[[Mapping[str, Any]], dict[str, Any]]] = {
    "chat": lambda found: {"reply": found["reply"]},
    "classification": lambda found: {"label": found["predicted"], "probabilities": found["probabilities"]},
    "recommendation": _ranking,
}
