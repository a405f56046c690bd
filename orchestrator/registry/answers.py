"""What lets a version answer: `MLmodel`, by which MLflow loads it, and `answers.json`, its tasks and base.

Owns both forms. Imports no mlflow: it stamps a time and an id into its own `MLmodel`, and a registration that
is done again must stage the same bytes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

from workers.types import BadInput, DatasetSpec, EvaluationSpec

MLMODEL, ANSWERS = "MLmodel", "answers.json"
LOADER = "orchestrator.pyfunc"
DTYPE_TAG = "base.dtype"
Dtype = Literal["float32", "float64", "bfloat16"]


@dataclass(frozen=True)
class Answers:
    base_name: str
    base_digest: str
    dtype: Dtype
    """Of the base, as the version was scored."""
    tasks: Mapping[str, EvaluationSpec]
    """Each with one data set, without its path."""


def documents(tags: Mapping[str, str], tasks: Mapping[str, EvaluationSpec]) -> dict[str, str]:
    """Path in the version -> text; nothing for a version of no task."""
    if not tasks:
        return {}
    base = {"name": tags.get("base.name", ""), "digest": tags.get("base.digest", "")}
    answers = {
        "base": {**base, "dtype": tags.get(DTYPE_TAG, "float32")},
        "tasks": {name: _written(spec) for name, spec in sorted(tasks.items())},
    }
    # Only keys that stand in `config` may be given to `load_model`.
    flavor = {"loader_module": LOADER, "data": ".", "config": {"base": ""}}
    mlmodel = {"flavors": {"python_function": flavor}}
    # JSON is YAML.
    return {
        name: json.dumps(what, indent=2) + "\n" for name, what in ((MLMODEL, mlmodel), (ANSWERS, answers))
    }


def _written(spec: EvaluationSpec) -> dict[str, Any]:
    rows = spec.datasets[0]
    return {
        "type": rows.type,
        "labels": list(rows.labels),
        "instruction": rows.instruction,
        "sequence_len": spec.sequence_len,
        "max_new_tokens": spec.max_new_tokens,
    }


def read_answers(folder: Path) -> Answers:
    """Raises BadInput if the version was registered for no task."""
    if not (folder / ANSWERS).is_file():
        raise BadInput(f"{folder} holds no {ANSWERS}: it was registered without a task and answers none")
    found = json.loads((folder / ANSWERS).read_text())
    base = found["base"]
    tasks = {name: _read(written) for name, written in found["tasks"].items()}
    return Answers(base["name"], base["digest"], cast(Dtype, base["dtype"]), tasks)


def _read(written: Mapping[str, Any]) -> EvaluationSpec:
    rows = DatasetSpec("", written["type"], "", tuple(written["labels"]), written["instruction"])
    return EvaluationSpec((rows,), written["sequence_len"], written["max_new_tokens"])
