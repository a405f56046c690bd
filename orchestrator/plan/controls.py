"""What a fused adapter is measured beside: base, each parent on each task, a random adapter, joint training.

Pure. Scored on the same rows as the fused one, which for that is scored on them once more if they are fewer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from orchestrator.plan import distillation
from orchestrator.plan.pieces import Source, evaluate, make_step
from orchestrator.plan.steps import FuseWhat, Step
from orchestrator.recipe.fuse_block import Fuse


@dataclass(frozen=True)
class Compared:
    """`scores[what][task]` is an evaluate step; `made` and then `steps` are all that this takes, in order."""

    scores: Mapping[str, Mapping[str, str]]
    made: tuple[Step, ...]
    """The adapters that are for comparison alone."""
    steps: tuple[Step, ...]


@dataclass(frozen=True)
class _Scored:
    adapter: str | None
    bytes_id: str
    needs: tuple[str, ...] = ()


def plan(fuse: Fuse, sources: Sequence[Source], fused: Step) -> Compared:
    """Nothing where the recipe wants none."""
    if fuse.controls is None:
        return Compared({}, (), ())
    extra = {"random": _random(fused)} if fuse.controls.random else {}
    if fuse.controls.joint:
        extra["joint"] = distillation.joint(fuse, sources)
    scored = {"base": _Scored(None, sources[0].recipe.base.fingerprint)}
    for source in sources:
        needs = (source.adapter,) if source.parent.job else ()
        scored[f"parent {source.parent.label}"] = _Scored(source.adapter, source.bytes_id, needs)
    for name, step in {"fused": fused, **extra}.items():
        scored[name] = _Scored(step.id, step.id, (step.id,))
    steps = {
        (name, source.recipe.recipe.task): evaluate(
            source.recipe, one.adapter, one.bytes_id, one.needs, fuse.controls.max_samples
        )
        for name, one in scored.items()
        for source in sources
    }
    scores = {name: {task: step.id for (of, task), step in steps.items() if of == name} for name in scored}
    return Compared(scores, tuple(extra.values()), tuple(steps.values()))


def _random(fused: Step) -> Step:
    matters = {"rule": "random", "rank": None, "adapters": [[fused.id, 1.0]]}
    return make_step("fuse", matters, (fused.id,), FuseWhat("random", None, ((fused.id, 1.0),)))
