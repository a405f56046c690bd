"""The blocks of a recipe: data sets, evaluation, registry, resources, schedule. Opens no file."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from orchestrator.gate import OF_THE_CORPUS, gate_problem, metric_name, parse_bound, unknown_metric
from orchestrator.structure import Check
from workers.types import TaskType

PRIORITIES = {"low": 25, "normal": 50, "high": 75}
_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400}


def not_bool(value: object) -> object:
    if isinstance(value, bool):
        raise ValueError(f"should be a number, found {value}")
    return value


def _priority(value: object) -> object:
    not_bool(value)
    if isinstance(value, str) and not value.isdigit():
        if value not in PRIORITIES:
            raise ValueError(f"should be one of {', '.join(PRIORITIES)} or a number, found {value!r}")
        return PRIORITIES[value]
    return value


def _duration(value: object) -> object:
    not_bool(value)
    match = re.fullmatch(r"(\d+)([smhd])", value.strip()) if isinstance(value, str) else None
    if match is not None:
        return int(match[1]) * _SECONDS[match[2]]
    if isinstance(value, str):
        raise ValueError(f"should be a time like 90s, 30m, 6h or 2d, found {value!r}")
    return value


def _targets(value: object) -> object:
    if value == "all-linear":
        return value
    if isinstance(value, (list, tuple)) and value and all(isinstance(name, str) for name in value):  # pyright: ignore[reportUnknownVariableType]
        return tuple(sorted(set(value)))  # pyright: ignore[reportUnknownArgumentType, reportUnknownVariableType]
    raise ValueError(f"should be all-linear or a list of module names, found {value!r}")


def _bound(value: object) -> str:
    """`>=.80` and `>= 0.8` are one bound."""
    return str(parse_bound(str(value)))


# Bounds stand before the validator: pydantic then checks them on the number, and writes them into the schema.
NoBool = BeforeValidator(not_bool)
Count = Annotated[int, Field(ge=1), NoBool]
Whole = Annotated[int, Field(ge=0), NoBool]
Number = Annotated[float, NoBool]
Positive = Annotated[float, Field(gt=0), NoBool]
NotNegative = Annotated[float, Field(ge=0), NoBool]
Share = Annotated[float, Field(ge=0, lt=1), NoBool]
Slug = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_-]{0,63}$")]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]
RegisteredName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$")]
Word = Annotated[str, Field(min_length=1)]
Priority = Annotated[
    int,
    Field(ge=0, le=100),
    BeforeValidator(_priority, json_schema_input_type=int | Literal["low", "normal", "high"]),
]
Duration = Annotated[int, Field(gt=0), BeforeValidator(_duration, json_schema_input_type=int | str)]
BoundText = Annotated[str, BeforeValidator(_bound)]
Targets = Annotated[Literal["all-linear"] | tuple[Word, ...], BeforeValidator(_targets)]


class Model(BaseModel):
    """Every part of a recipe: refuses what it does not know, and never changes."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, allow_inf_nan=False, use_attribute_docstrings=True, validate_default=True
    )


class Dataset(Model):
    """Rows to train on or to be judged by."""

    path: Word
    """A .jsonl file, or a folder of train.jsonl, validation.jsonl and test.jsonl; relative to the recipe."""
    type: TaskType
    """chat: messages. classification: text, label. recommendation: history, candidates, target."""
    split: Literal["train", "validation", "test"] | None = None
    """The one role these rows have; left out, a folder gives each of its files the role of its name."""
    labels: tuple[Word, ...] = ()
    """Classification only: the label words."""
    instruction: str = ""
    """System message put before every row."""
    max_samples: Count | None = None
    """Use the first so many rows of each split."""

    @model_validator(mode="after")
    def _labels_belong_to_classification(self) -> Dataset:
        if (self.type == "classification") != bool(self.labels):
            raise ValueError("labels are needed for type classification, and only there")
        if len(set(self.labels)) != len(self.labels):
            raise ValueError(f"a label is listed twice in {', '.join(self.labels)}")
        return self

    @model_validator(mode="after")
    def _file_has_one_role(self) -> Dataset:
        if self.split is None and self.path.endswith(".jsonl"):
            raise ValueError("a single file needs its split: train, validation or test")
        return self


class Gates(Model):
    """Conditions shared by a job's evaluation and a fusion's."""

    gates: dict[str, BoundText] = Field(default_factory=dict)
    """Metric -> bound, like `macro_f1: ">= 0.8"`."""
    champion_margin: dict[str, NotNegative] = Field(default_factory=dict)
    """Metric -> how much worse than the champion it may be."""
    non_inferiority: dict[str, NotNegative] = Field(default_factory=dict)
    """Metric -> how much worse than the champion it may be at the bad end of a 95% interval over rows."""

    structure: tuple[Check, ...] = ()
    """What its files must be, beside whole, finite and unaltered: shapes, bucket, vllm, sglang, ..."""

    def problem(self, allowed: set[str]) -> tuple[tuple[str, str], str] | None:
        """The first gate or margin on something not in `allowed`: its block and key, and why."""
        for key, text in self.gates.items():
            if why := gate_problem(key, text, allowed):
                return ("gates", key), why
        for block, margins in (
            ("champion_margin", self.champion_margin),
            ("non_inferiority", self.non_inferiority),
        ):
            for key in margins:
                if why := unknown_metric(key, allowed):
                    return (block, key), why
        for key in self.non_inferiority:
            if metric_name(key) in OF_THE_CORPUS:
                return ("non_inferiority", key), f"{key} is one figure of all rows, so no interval is known"
        return None


class Evaluation(Gates):
    """How the adapter is scored, and what must hold before it is promoted."""

    max_new_tokens: Count = 48
    """Chat only: longest generated reply."""
    generate_samples: Whole = 32
    """Chat only: how many replies are generated for ROUGE-L and chrF."""


class Registry(Model):
    """Where the adapter is registered."""

    name: RegisteredName | None = None
    """Registered name; left out, `<base>.<task>`."""
    promote: bool = True
    """Make it champion when its gates pass."""


class Resources(Model):
    """What the job asks of the cluster."""

    world_size: Count | None = None
    """Ranks of its host; left out, what the base file says."""


class Schedule(Model):
    """When the job runs."""

    priority: Priority = 50
    """low (25), normal (50), high (75), or a number from 0 to 100; higher goes first, with more of a tick."""
    team: str | None = None
    """Whom the job is for: whose share it takes. A fusion takes its jobs' team, if they have the same."""
    max_duration: Duration | None = None
    """Longest running time, like 90s, 30m or 6h; waits and pauses are not counted."""
