"""A recipe: what to train, on what, how it is judged, where it is registered.

Owns the keys of a recipe, its canonical form and content hash, and what it asks of a host. Opens no file.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import Field, PrivateAttr, model_validator

from orchestrator.gate import OF_REPLIES, metrics_of
from orchestrator.recipe.parts import (
    Count,
    Dataset,
    Evaluation,
    Model,
    Name,
    NoBool,
    NotNegative,
    Positive,
    Registry,
    Resources,
    Schedule,
    Share,
    Slug,
    Targets,
    Whole,
    Word,
)
from workers.manifest import json_digest
from workers.types import AdapterSpec, DatasetSpec, EvaluationSpec, JobSpec, TaskType, TrainingSpec

SplitName = Literal["train", "validation", "test"]


class Recipe(Model):
    """One job. Its paths are absolute once loaded; the canonical form has them relative to its folder."""

    version: Literal[1]
    """Of this format."""
    name: Name
    """What the job is called."""
    task: Slug
    """What the adapter is for, like finance-sentiment; part of its registered name."""
    base_model: Word
    """A base file, a model folder, or a hub id that is on this machine."""
    datasets: Annotated[tuple[Dataset, ...], Field(min_length=1)]
    sequence_len: Count
    """Longest row in tokens."""
    lora_r: Annotated[int, Field(ge=1, le=1024), NoBool] = 16
    lora_alpha: Positive = 32.0
    lora_dropout: Share = 0.0
    lora_target_modules: Targets = "all-linear"
    """all-linear, or a list of module names like q_proj."""
    use_rslora: bool = False
    """Scale by lora_alpha / sqrt(lora_r) instead of lora_alpha / lora_r."""
    global_batch_size: Count = 32
    """Rows of one step, whatever the number of ranks."""
    num_epochs: Positive | None = None
    max_steps: Count | None = None
    learning_rate: Annotated[float, Field(gt=0, le=1), NoBool] = 2e-4
    lr_scheduler: Literal["constant", "linear", "cosine"] = "cosine"
    warmup_ratio: Share = 0.0
    """Share of the steps in which the learning rate rises from 0."""
    weight_decay: NotNegative = 0.0
    max_grad_norm: Positive | None = 1.0
    """Null for no clipping."""
    evals_per_epoch: Whole = 1
    """How often an epoch the validation loss is taken; 0 for never."""
    saves_per_epoch: Count = 1
    gram_rows: Whole = 0
    """Training rows whose inputs to each adapted layer are left as X^T X beside the adapter, for regmean."""
    seed: Annotated[int, Field(ge=0, lt=2**63), NoBool] = 0
    max_bad_steps: Count = 3
    """Steps in a row with a gradient that is not finite after which the job is stopped."""
    evaluation: Evaluation = Evaluation()
    registry: Registry = Registry()
    resources: Resources = Resources()
    schedule: Schedule = Schedule()
    _folder: Path = PrivateAttr(default=Path())

    @model_validator(mode="after")
    def _one_length(self) -> Recipe:
        if (self.num_epochs is None) == (self.max_steps is None):
            raise ValueError("say how long to train with exactly one of num_epochs and max_steps")
        return self

    @model_validator(mode="after")
    def _one_kind_of_rows(self) -> Recipe:
        kinds = {(dataset.type, dataset.labels) for dataset in self.datasets}
        if len(kinds) > 1:
            raise ValueError("the data sets of one recipe must have one type and the same labels")
        return self

    def model_post_init(self, context: Any) -> None:
        """The validation context is the folder of the recipe file."""
        self._folder = context if isinstance(context, Path) else Path()

    # ---- meaning -----------------------------------------------------------------------------------

    @property
    def task_type(self) -> TaskType:
        return self.datasets[0].type

    @property
    def metrics(self) -> set[str]:
        """Names this recipe's gates may use: what its evaluation will measure."""
        measured = set(metrics_of(self.task_type))
        return measured if self.evaluation.generate_samples else measured - OF_REPLIES

    def canonical(self) -> dict[str, Any]:
        """Every key with its value, JSON only, in a fixed form: equal meaning gives equal values."""
        canonical = self.model_dump(mode="json")
        for dataset in canonical["datasets"]:
            dataset["path"] = self._relative(dataset["path"])
        canonical["base_model"] = self._relative(canonical["base_model"])
        return canonical

    def content_hash(self) -> str:
        """SHA-256 of the canonical form; the same wherever the recipe and its files are put together."""
        return json_digest(self.canonical())

    def to_yaml(self) -> str:
        """The canonical form as a recipe file, defaults and all."""
        return yaml.safe_dump(self.canonical(), sort_keys=False, allow_unicode=True)

    def _relative(self, path: str) -> str:
        """A hub id stays as it is: only paths are absolute after loading."""
        return Path(os.path.relpath(path, self._folder)).as_posix() if Path(path).is_absolute() else path

    # ---- what it asks of a host --------------------------------------------------------------------

    def datasets_of(self, split: SplitName) -> tuple[DatasetSpec, ...]:
        """The data sets that have a role; one that names no split has all three."""
        if split == "validation" and self.evals_per_epoch == 0:
            return ()
        return tuple(
            DatasetSpec(item.path, item.type, split, item.labels, item.instruction, item.max_samples)
            for item in self.datasets
            if item.split in (None, split)
        )

    def adapter_spec(self) -> AdapterSpec:
        return AdapterSpec(
            r=self.lora_r,
            lora_alpha=self.lora_alpha,
            lora_dropout=self.lora_dropout,
            target_modules=self.lora_target_modules,
            use_rslora=self.use_rslora,
        )

    def training_spec(self) -> TrainingSpec:
        return TrainingSpec(
            learning_rate=self.learning_rate,
            global_batch_size=self.global_batch_size,
            sequence_len=self.sequence_len,
            num_epochs=self.num_epochs,
            max_steps=self.max_steps,
            lr_scheduler=self.lr_scheduler,
            warmup_ratio=self.warmup_ratio,
            weight_decay=self.weight_decay,
            max_grad_norm=self.max_grad_norm,
            evals_per_epoch=self.evals_per_epoch,
            saves_per_epoch=self.saves_per_epoch,
            max_bad_steps=self.max_bad_steps,
            seed=self.seed,
        )

    def job_spec(self, job: str, attempt: int, checkpoint_dir: str) -> JobSpec:
        return JobSpec(
            job=job,
            attempt=attempt,
            adapter=self.adapter_spec(),
            training=self.training_spec(),
            train=self.datasets_of("train"),
            validation=self.datasets_of("validation"),
            checkpoint_dir=checkpoint_dir,
            # The least priority is not none: such a job would hold a slot and never train.
            weight=max(1, self.schedule.priority),
            gram_rows=self.gram_rows,
        )

    def evaluation_spec(self) -> EvaluationSpec:
        return EvaluationSpec(
            datasets=self.datasets_of("test"),
            sequence_len=self.sequence_len,
            max_new_tokens=self.evaluation.max_new_tokens,
            generate_samples=self.evaluation.generate_samples,
        )
