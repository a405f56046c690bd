"""Fusion by training: the steps of rule distill, and of its control trained on the labels alone. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from orchestrator.plan.pieces import PACE, Source, fuse_step, make_step, rows_of
from orchestrator.plan.steps import Estimate, Step, TrainWhat
from orchestrator.recipe.fuse_block import Distill, Fuse
from workers.manifest import json_digest
from workers.types import AdapterSpec, DistillSpec, JobSpec, Teacher, TrainingSpec


def steps(fuse: Fuse, sources: Sequence[Source]) -> tuple[Step, ...]:
    """The adapter the student starts from, if it has one, and its training."""
    assert fuse.distill is not None
    if fuse.distill.start == "fresh":
        return (_train(fuse, sources, fuse.distill.labels, None),)
    start = fuse_step(fuse.distill.start, fuse.rank, sources)
    return start, _train(fuse, sources, fuse.distill.labels, start)


def joint(fuse: Fuse, sources: Sequence[Source]) -> Step:
    """The same training from the labels alone and from a fresh adapter: no parent has a part in it."""
    return _train(fuse, sources, 1.0, None)


def estimate(fuse: Fuse, sources: Sequence[Source]) -> Estimate:
    """The student's parameters beside those of its teachers, which are resident with it."""
    assert fuse.distill is not None
    own = _student_parameters(fuse, sources)
    taught = [source.recipe.base.targets(source.recipe.recipe.lora_target_modules) for source in sources]
    theirs = sum(
        source.recipe.recipe.lora_r * (rows + columns)
        for source, targets in zip(sources, taught, strict=True)
        for rows, columns in targets.values()
    )
    train_rows = sum(source.recipe.train.rows for source in sources)
    return Estimate(own + theirs, 4 * own, fuse.distill.max_steps, train_rows)


def _student_parameters(fuse: Fuse, sources: Sequence[Source]) -> int:
    shapes: dict[str, tuple[int, int]] = {}
    for source in sources:
        shapes |= source.recipe.base.targets(source.recipe.recipe.lora_target_modules)
    return sum((fuse.rank or 0) * (rows + columns) for rows, columns in shapes.values())


def _train(fuse: Fuse, sources: Sequence[Source], labels: float, start: Step | None) -> Step:
    spec, read = _spec(fuse, sources, labels), labels < 1
    assert spec.distill is not None
    lessons = [
        {
            "teacher": source.bytes_id if read else "",
            "train": [rows_of(dataset) for dataset in teacher.train],
            "digest": source.recipe.train.digest,
            "rows": teacher.batch_size,
            "share": teacher.weight,
        }
        for source, teacher in zip(sources, spec.distill.teachers, strict=True)
    ]
    matters: dict[str, Any] = {
        "base": sources[0].recipe.base.fingerprint,
        "adapter": asdict(spec.adapter),
        "training": {key: value for key, value in asdict(spec.training).items() if key not in PACE},
        "lessons": lessons,
        "temperature": spec.distill.temperature if read else None,
        "labels": labels,
        "start": start.id if start else None,
    }
    what = TrainWhat(
        spec,
        json_digest([source.recipe.train.digest for source in sources]),
        json_digest([source.recipe.validation.digest for source in sources]),
        tuple(source.adapter for source in sources) if read else (),
        start.id if start else None,
    )
    parents = tuple(source.adapter for source in sources if source.parent.job and read)
    return make_step("train", matters, (*((start.id,) if start else ()), *parents), what)


def _spec(fuse: Fuse, sources: Sequence[Source], labels: float) -> JobSpec:
    """A student whose scaling is 1, as every fused adapter's is."""
    distill = fuse.distill
    assert distill is not None
    assert fuse.rank is not None, "the fuse block sees to it"
    teachers = tuple(_teacher(source, distill) for source in sources)
    targets = {source.recipe.recipe.lora_target_modules for source in sources}
    names = sorted({name for target in targets if target != "all-linear" for name in target})
    return JobSpec(
        job="",
        attempt=0,
        adapter=AdapterSpec(
            fuse.rank, fuse.rank, 0.0, "all-linear" if "all-linear" in targets else tuple(names)
        ),
        training=TrainingSpec(
            learning_rate=distill.learning_rate,
            global_batch_size=sum(teacher.batch_size for teacher in teachers),
            sequence_len=max(source.recipe.recipe.sequence_len for source in sources),
            max_steps=distill.max_steps,
            lr_scheduler=distill.lr_scheduler,
            warmup_ratio=distill.warmup_ratio,
            evals_per_epoch=distill.evals_per_epoch,
            saves_per_epoch=distill.saves_per_epoch,
            seed=distill.seed,
        ),
        train=(),
        validation=(),
        checkpoint_dir="",
        weight=max(1, *(source.recipe.recipe.schedule.priority for source in sources)),
        distill=DistillSpec(teachers, distill.temperature, labels),
    )


def _teacher(source: Source, distill: Distill) -> Teacher:
    recipe, parent = source.recipe.recipe, source.parent
    validation = recipe.datasets_of("validation") if distill.evals_per_epoch else ()
    rows = parent.rows or recipe.global_batch_size
    return Teacher("", recipe.datasets_of("train"), validation, rows, parent.share)
