"""A pipeline as a frozen graph of steps with content ids. Pure.

A step's id is a hash of its kind, the parameters that bear on its outcome, the digests of its inputs and the
ids of the steps it needs. Equal work has an equal id: a rerun is a no-op, a change redoes what depends on it.
Ids hold no path but a release's, no name of a job, and neither the number of ranks nor how a base is spread.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from orchestrator.plan import controls, distillation
from orchestrator.plan.pieces import PACE, Source, evaluate, fuse_step, make_step, rows_of, search_step
from orchestrator.plan.steps import (
    Estimate,
    Plan,
    PlannedJob,
    PromoteWhat,
    RegisterWhat,
    ReleaseWhat,
    Step,
    TrainWhat,
)
from orchestrator.recipe.base_file import Base
from orchestrator.recipe.fuse_block import Fuse, Parent
from orchestrator.recipe.load import LoadedRecipe
from orchestrator.recipe.pipeline import LoadedPipeline
from workers.manifest import json_digest
from workers.types import BadInput, TrainingSpec


def make_plan(pipeline: LoadedPipeline, adapter_digests: Mapping[str, str] | None = None) -> Plan:
    """The plan of a pipeline. `adapter_digests` gives the digest of each of its `external_adapters`.

    Raises BadInput when two jobs would train the same adapter, or a registered adapter has no digest.
    """
    jobs = [_train_job(job) for job in pipeline.jobs]
    _refuse_twins(jobs, pipeline)
    if pipeline.fuse is not None:
        trained = {job.name: job for job in jobs}
        jobs.append(_fuse_job(pipeline, pipeline.fuse, trained, adapter_digests or {}))
    return Plan(pipeline.name, pipeline.content_hash(), tuple(jobs), pipeline.canonical())


def _refuse_twins(jobs: list[PlannedJob], pipeline: LoadedPipeline) -> None:
    seen: dict[str, str] = {}
    for job in jobs:
        other = seen.setdefault(job.step("train").id, job.name)
        if other != job.name:
            raise BadInput(
                f"{pipeline.path}: jobs {other!r} and {job.name!r} train exactly the same adapter; "
                "drop one, or give it another seed"
            )


# ---- a training job ---------------------------------------------------------------------------------------


def _train_job(loaded: LoadedRecipe) -> PlannedJob:
    recipe = loaded.recipe
    before = evaluate(loaded, None, loaded.base.fingerprint)
    train = _train(loaded)
    after = evaluate(loaded, train.id, train.id, (train.id,))
    register = _register_trained(loaded, before, train, after)
    promote = _promote_trained(loaded, register, after)
    return PlannedJob(
        name=recipe.name,
        kind="train",
        depends_on=(),
        steps=(before, train, after, register, promote),
        base=loaded.base.spec,
        world_size=loaded.world_size,
        host_key=host_key(loaded.base, loaded.world_size),
        task=recipe.task,
        recipe=recipe.canonical(),
        recipe_digest=recipe.content_hash(),
        priority=recipe.schedule.priority,
        team=recipe.schedule.team,
        max_duration=recipe.schedule.max_duration,
        estimate=estimate(loaded),
    )


def host_key(base: Base, world_size: int) -> str:
    """Equal for jobs that one host can hold: same bytes, same settings, same number of ranks."""
    return json_digest([base.digests.all, asdict(base.spec), world_size])


def estimate(loaded: LoadedRecipe) -> Estimate:
    """Exact figures: r * (in + out) parameters for each target (arXiv 2106.09685 section 4.1), and steps."""
    recipe = loaded.recipe
    shapes = loaded.base.targets(recipe.lora_target_modules).values()
    parameters = sum(recipe.lora_r * (rows + columns) for rows, columns in shapes)
    steps = num_steps(recipe.training_spec(), loaded.train.rows)
    return Estimate(parameters, 4 * parameters, steps, loaded.train.rows)


def num_steps(training: TrainingSpec, rows: int) -> int:
    """Steps of a job on `rows` training rows; a part of an epoch is rounded up to a step."""
    if training.max_steps is not None:
        return training.max_steps
    assert training.num_epochs is not None, "a recipe sets num_epochs or max_steps"
    per_epoch = math.ceil(rows / training.global_batch_size)
    return max(1, math.ceil(round(training.num_epochs * per_epoch, 6)))


def _train(loaded: LoadedRecipe) -> Step:
    """Validation rows and the pace of saving change curves and files on the way, never the adapter."""
    spec = loaded.recipe.job_spec(job="", attempt=0, checkpoint_dir="")
    what = TrainWhat(spec, loaded.train.digest, loaded.validation.digest)
    matters = {
        "base": loaded.base.fingerprint,
        "adapter": asdict(spec.adapter),
        "training": {k: v for k, v in asdict(spec.training).items() if k not in PACE},
        "train": [rows_of(dataset) for dataset in spec.train],
        "digest": loaded.train.digest,
        # Left out where none are asked for: what was trained before they existed stays trained.
        **({"gram_rows": spec.gram_rows} if spec.gram_rows else {}),
    }
    return make_step("train", matters, (), what)


def _register_trained(loaded: LoadedRecipe, before: Step, train: Step, after: Step) -> Step:
    recipe = loaded.recipe
    what = RegisterWhat(
        name=loaded.registered_name,
        task=recipe.task,
        adapter=train.id,
        scores={recipe.task: after.id},
        base_scores={recipe.task: before.id},
        parents=(),
        recipe_yaml=recipe.to_yaml(),
        recipe_digest=recipe.content_hash(),
        data_digest=loaded.train.digest,
        base=loaded.base.digests,
    )
    return _register(what, (before.id, train.id, after.id))


def _promote_trained(loaded: LoadedRecipe, register: Step, after: Step) -> Step:
    recipe = loaded.recipe
    what = PromoteWhat(
        name=loaded.registered_name,
        promote=recipe.registry.promote,
        gates={f"{recipe.task}.{key}": bound for key, bound in recipe.evaluation.gates.items()},
        champion_margin={f"{recipe.task}.{key}": by for key, by in recipe.evaluation.champion_margin.items()},
        retention={},
        scores={recipe.task: after.id},
        parent_scores={},
        non_inferiority={f"{recipe.task}.{key}": by for key, by in recipe.evaluation.non_inferiority.items()},
        structure=recipe.evaluation.structure,
    )
    return _promote(what, register)


# ---- a fusion ---------------------------------------------------------------------------------------------


def _fuse_job(
    pipeline: LoadedPipeline, fuse: Fuse, trained: Mapping[str, PlannedJob], digests: Mapping[str, str]
) -> PlannedJob:
    sources = [_source(parent, recipe, trained, digests) for parent, recipe in pipeline.parents()]
    made = _made(fuse, sources)
    fused = made[-1]
    scores = [evaluate(source.recipe, fused.id, fused.id, (fused.id,)) for source in sources]
    compared = controls.plan(fuse, sources, fused)
    register = _register_fused(pipeline, fuse, sources, fused, scores, compared)
    promote = _promote_fused(fuse, register, sources, scores)
    release = (_release(fuse, promote),) if fuse.release else ()
    own = [step for source in sources for step in source.own_steps]
    first = sources[0].recipe
    # Scores come last and in a row: a host reads for all of them in the same passes.
    steps = (*own, *made, *compared.made, *scores, *compared.steps, register, promote, *release)
    return PlannedJob(
        name=fuse.name,
        kind="fuse",
        depends_on=tuple(parent.job for parent in fuse.adapters if parent.job),
        steps=tuple({step.id: step for step in steps}.values()),
        base=first.base.spec,
        world_size=first.world_size,
        host_key=host_key(first.base, first.world_size),
        task=fuse.task,
        recipe=pipeline.canonical(),
        recipe_digest=pipeline.content_hash(),
        priority=max(source.recipe.recipe.schedule.priority for source in sources),
        estimate=distillation.estimate(fuse, sources) if fuse.distill else None,
        team=_team(sources),
    )


def _team(sources: Sequence[Source]) -> str | None:
    """Whose share a fusion takes: its sources' team, if they have one and the same."""
    teams = {source.recipe.recipe.schedule.team for source in sources}
    return teams.pop() if len(teams) == 1 else None


def _made(fuse: Fuse, sources: list[Source]) -> tuple[Step, ...]:
    """The steps that make the fused adapter; the last one has it."""
    if fuse.distill is not None:
        return distillation.steps(fuse, sources)
    plain = fuse_step(fuse.rule, fuse.rank, sources, fuse.options.options())
    return (search_step(fuse.search, plain, sources) if fuse.search else plain,)


def _source(
    parent: Parent, recipe: LoadedRecipe, trained: Mapping[str, PlannedJob], digests: Mapping[str, str]
) -> Source:
    if parent.job is not None:
        before, train, after, register, _ = trained[parent.job].steps
        return Source(parent, recipe, train.id, train.id, register.id, before, after, ())
    ref = parent.label
    if ref not in digests:
        raise BadInput(f"fuse.adapters: {ref!r} is not in the registry; `chorus adapters list` shows what is")
    before = evaluate(recipe, None, recipe.base.fingerprint)
    after = evaluate(recipe, ref, digests[ref])
    return Source(parent, recipe, ref, digests[ref], ref, before, after, (before, after))


def _register_fused(
    pipeline: LoadedPipeline,
    fuse: Fuse,
    sources: list[Source],
    fused: Step,
    scores: list[Step],
    compared: controls.Compared,
) -> Step:
    tasks = [source.recipe.recipe.task for source in sources]
    base = sources[0].recipe.base
    what = RegisterWhat(
        name=fuse.registry.name or f"{base.slug}.{fuse.task}",
        task=fuse.task,
        adapter=fused.id,
        scores={task: step.id for task, step in zip(tasks, scores, strict=True)},
        base_scores={task: source.evaluate_base.id for task, source in zip(tasks, sources, strict=True)},
        parents=tuple(source.version for source in sources),
        recipe_yaml=pipeline.to_yaml(),
        recipe_digest=pipeline.content_hash(),
        data_digest=json_digest([source.recipe.train.digest for source in sources]),
        base=base.digests,
        controls=compared.scores,
    )
    versions = [source.version for source in sources if source.parent.job]
    beside = {step for of in compared.scores.values() for step in of.values()}
    scored = tuple(step.id for step in scores)
    return _register(what, tuple(dict.fromkeys((fused.id, *scored, *versions, *sorted(beside)))))


def _promote_fused(fuse: Fuse, register: Step, sources: list[Source], scores: list[Step]) -> Step:
    tasks = [source.recipe.recipe.task for source in sources]
    assert isinstance(register.what, RegisterWhat)
    what = PromoteWhat(
        name=register.what.name,
        promote=fuse.registry.promote,
        gates=fuse.evaluation.gates,
        champion_margin=fuse.evaluation.champion_margin,
        retention=fuse.evaluation.retention,
        scores={task: step.id for task, step in zip(tasks, scores, strict=True)},
        parent_scores={task: source.evaluate.id for task, source in zip(tasks, sources, strict=True)},
        non_inferiority=fuse.evaluation.non_inferiority,
        worst_task=fuse.evaluation.worst_task,
        structure=fuse.evaluation.structure,
    )
    return _promote(what, register)


# ---- ids --------------------------------------------------------------------------------------------------


def _register(what: RegisterWhat, needs: tuple[str, ...]) -> Step:
    """The recipe's text is left out: a gate that is changed later makes no new version of the same bytes."""
    return make_step("register", {"name": what.name, "task": what.task}, needs, what)


def _promote(what: PromoteWhat, register: Step) -> Step:
    needs = (register.id, *what.scores.values(), *what.parent_scores.values())
    matters: dict[str, Any] = {
        "gates": dict(what.gates),
        "champion_margin": dict(what.champion_margin),
        "retention": dict(what.retention),
        "promote": what.promote,
    }
    # Left out where they are not asked for: what was promoted before they existed stays promoted.
    later = {
        "non_inferiority": dict(what.non_inferiority),
        "worst_task": what.worst_task,
        "structure": sorted(what.structure),
    }
    matters |= {key: value for key, value in later.items() if value}
    return make_step("promote", matters, needs, what)


def _release(fuse: Fuse, promote: Step) -> Step:
    """The one id with a path in it: where a release lies is its outcome."""
    assert fuse.release is not None
    assert isinstance(promote.what, PromoteWhat)
    what = ReleaseWhat(promote.what.name, fuse.release.out, fuse.release.merged)
    return make_step("release", asdict(what), (promote.id,), what)
