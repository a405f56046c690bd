"""The `fuse` block of a pipeline: which adapters become one, by which rule, and what must hold of it."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from orchestrator.gate import parse_bound, retention_problem
from orchestrator.recipe.parts import (
    BoundText,
    Count,
    Gates,
    Model,
    Name,
    NoBool,
    Number,
    Positive,
    Registry,
    Share,
    Slug,
    Whole,
    Word,
)
from workers.rules import MERGES, check_name, check_plan, check_weights
from workers.types import RuleOptions

RULES = (*MERGES, "distill")


class Parent(Model):
    """One adapter to fuse: what a job of this pipeline trains, or a registered version."""

    job: Name | None = None
    adapter: Annotated[str, Field(pattern=r"^[A-Za-z0-9._-]+@[A-Za-z0-9_-]+$")] | None = None
    """NAME@ALIAS or NAME@VERSION."""
    recipe: Word | None = None
    """With `adapter`: the recipe that says by which rows and metrics its task is judged."""
    weight: Number = 1.0
    """In the weighted sum; with rule distill, in the sum the student starts from."""
    share: Positive = 1.0
    """Rule distill only: of the loss on its rows, relative to the other adapters' shares."""
    rows: Count | None = None
    """Rule distill only: its rows in every step; left out, the `global_batch_size` of its recipe."""

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


class Distill(Model):
    """Rule distill: how one adapter is trained against the others, on their rows, on the same host."""

    max_steps: Count
    learning_rate: Annotated[float, Field(gt=0, le=1), NoBool] = 2e-3
    lr_scheduler: Literal["constant", "linear", "cosine"] = "cosine"
    warmup_ratio: Share = 0.05
    temperature: Positive = 1.0
    """Softens teacher and student alike before they are compared."""
    labels: Share = 0.5
    """How much the rows' own labels count beside the teacher's word, from 0 to below 1."""
    start: Literal["svd", "fresh"] = "svd"
    """svd: from the nearest adapter to the weighted sum. fresh: as any new adapter."""
    evals_per_epoch: Whole = 1
    saves_per_epoch: Count = 1
    seed: Annotated[int, Field(ge=0, lt=2**63), NoBool] = 0


class Search(Model):
    """Find the weights by trials: each is fused, and scored on validation rows on the resident base."""

    trials: Annotated[int, Field(ge=2, le=1000), NoBool]
    floors: dict[str, Annotated[float, Field(ge=0), NoBool]]
    """`<task>.<metric>` -> share of the parent's score that must be kept: one for every adapter's task."""
    groups: tuple[Word, ...] = ()
    """Parts of module names with weights of their own, like self_attn and mlp; none for one an adapter."""
    max_samples: Count | None = 100
    """Of each task's validation rows."""
    seed: Annotated[int, Field(ge=0, lt=2**32), NoBool] = 0


class Controls(Model):
    """What the fused adapter is measured beside, on the same rows: base, parents, a random adapter."""

    random: bool = True
    """An adapter of the fused one's norms and ranks, drawn at random."""
    joint: bool = False
    """Rule distill only: the same training from the labels alone, without teachers, from a fresh adapter."""
    max_samples: Count | None = 200
    """The first so many test rows of each task; null for all of them, and for generated replies."""


class Settings(Model):
    """What a rule takes beside rank and weights; left out, its default. `workers/README.md` has the table."""

    energy: float | None = None
    """In place of rank: the lowest rank that keeps this share of the squared singular values."""
    bucket: int | None = None
    """In place of rank: one that vLLM sets memory aside for (1, 8, 16, 32, 64, 128, 256, 320 or 512)."""
    density: float | None = None
    """Share of entries that are kept; 0.5."""
    seed: int | None = None
    """Of the entries dropped at random; 0."""
    epsilon: float | None = None
    """della: how far the chance to be kept rises from the smallest entry to the largest; 0.1."""
    gamma: float | None = None
    """breadcrumbs: share of entries dropped as too large; 0.01."""
    common: float | None = None
    """iso_cts: share of the directions taken from the sum; 0.8."""
    alpha: float | None = None
    """regmean: what the off-diagonal of a Gram matrix is multiplied by; 0.9."""
    scale: float | None = None
    """What the result is multiplied by; 1."""

    def options(self) -> RuleOptions:
        return RuleOptions(**self.model_dump())


class Fuse(Model):
    """Several adapters made into one."""

    name: Name
    task: Slug = "multitask"
    rule: Annotated[str, Field(json_schema_extra={"enum": list(RULES)})]
    """cat: the exact sum. svd: the nearest of a given rank. distill: one trained against them; and others."""
    rank: Count | None = None
    """Of the result: needed for svd and distill, refused for cat, may cut the others."""
    options: Settings = Settings()
    """Of the rule."""
    distill: Distill | None = None
    """Rule distill only: how to train."""
    search: Search | None = None
    """Search the weights instead of taking them as they stand; not with rule distill."""
    controls: Controls | None = Controls()
    """What the fused adapter is measured beside; null for nothing."""
    adapters: Annotated[tuple[Parent, ...], Field(min_length=1)]
    evaluation: FusedEvaluation = FusedEvaluation()
    registry: Registry = Registry()
    release: Release | None = None

    @field_validator("rule")
    @classmethod
    def _rule_is_known(cls, rule: str) -> str:
        check_name(rule, RULES)
        return rule

    @model_validator(mode="after")
    def _options_belong_to_the_rule(self) -> Fuse:
        if self.rule != "distill":
            check_plan(self.rule, self.rank, self.options.options())
            check_weights(self.rule, [parent.weight for parent in self.adapters], len(self.adapters))
        elif self.rank is None or self.options != Settings():
            raise ValueError("rule distill needs a rank and takes no options")
        return self

    @model_validator(mode="after")
    def _training_belongs_to_distill(self) -> Fuse:
        distilled = self.rule == "distill"
        if distilled != (self.distill is not None):
            raise ValueError("a distill block is needed for rule distill, and only there")
        if not distilled and any(p.share != 1.0 or p.rows is not None for p in self.adapters):
            raise ValueError("share and rows of an adapter are for rule distill only")
        if not distilled and self.controls is not None and self.controls.joint:
            raise ValueError("controls.joint needs rule distill, which says how to train")
        if distilled and self.search is not None:
            raise ValueError("search is for rules that weigh adapters, not for rule distill")
        return self

    @model_validator(mode="after")
    def _release_is_of_a_champion(self) -> Fuse:
        if self.release is not None and not self.registry.promote:
            raise ValueError("release writes the champion, so registry.promote must be true")
        return self
