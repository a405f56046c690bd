"""The `fuse` block of a pipeline: which adapters become one, by which rule, and what must hold of it."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from orchestrator.gate import parse_bound, retention_problem
from orchestrator.recipe.parts import (
    BoundText,
    Count,
    Gates,
    Model,
    Name,
    Number,
    Registry,
    Slug,
    Word,
)


class Parent(Model):
    """One adapter to fuse: what a job of this pipeline trains, or a registered version."""

    job: Name | None = None
    adapter: Annotated[str, Field(pattern=r"^[A-Za-z0-9._-]+@[A-Za-z0-9_-]+$")] | None = None
    """NAME@ALIAS or NAME@VERSION."""
    recipe: Word | None = None
    """With `adapter`: the recipe that says by which rows and metrics its task is judged."""
    weight: Number = 1.0

    @model_validator(mode="after")
    def _one_source(self) -> Parent:
        if (self.job is None) == (self.adapter is None):
            raise ValueError("name exactly one of job and adapter")
        if (self.adapter is None) != (self.recipe is None):
            raise ValueError("a registered adapter needs the recipe it is judged by, and only that does")
        return self

    @property
    def label(self) -> str:
        return self.job or self.adapter or ""


class FusedEvaluation(Gates):
    """What must hold of the fused adapter; keys are `<task>.<metric>`."""

    retention: dict[str, BoundText] = Field(default_factory=dict)
    """Share of the parent's score that is kept; parent/fused for a metric where lower is better."""
    worst_task: BoundText | None = None
    """Bound on the least retention over all tasks, each by perplexity, macro_f1 or hit_at_1."""

    def problem(self, allowed: set[str]) -> tuple[tuple[str, str], str] | None:
        """As `Gates.problem`, with the retention."""
        for key, text in self.retention.items():
            if why := retention_problem(key, text, allowed):
                return ("retention", key), why
        if self.worst_task is not None and not parse_bound(self.worst_task).is_floor:
            return ("worst_task", self.worst_task), f"more is better, so {self.worst_task!r} guards nothing"
        return super().problem(allowed)


class Release(Model):
    """Where the champion is written when every gate has passed."""

    out: Word
    """A folder that does not exist yet, relative to the pipeline file."""
    merged: bool = False
    """Write a full model instead of the adapter alone."""


class Fuse(Model):
    """Several adapters made into one."""

    name: Name
    task: Slug = "multitask"
    rule: Literal["cat", "svd"]
    """cat: the exact sum. svd: the nearest adapter of a given rank."""
    rank: Count | None = None
    """Of the result; rule svd only."""
    adapters: Annotated[tuple[Parent, ...], Field(min_length=1)]
    evaluation: FusedEvaluation = FusedEvaluation()
    registry: Registry = Registry()
    release: Release | None = None

    @model_validator(mode="after")
    def _rank_belongs_to_svd(self) -> Fuse:
        if (self.rule == "svd") != (self.rank is not None):
            raise ValueError("rank is needed for rule svd, and only there")
        return self

    @model_validator(mode="after")
    def _release_is_of_a_champion(self) -> Fuse:
        if self.release is not None and not self.registry.promote:
            raise ValueError("release writes the champion, so registry.promote must be true")
        return self
