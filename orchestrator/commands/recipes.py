"""`recipe validate`, `recipe schema` and `plan`: what a file says and would do. They make nothing."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console

from orchestrator.api.planning import adapter_digests
from orchestrator.api.token_count import tokens_to_train
from orchestrator.api.views import STAGES
from orchestrator.commands.output import Format, emit, grid, megabytes
from orchestrator.commands.parts import Parts
from orchestrator.home import Home
from orchestrator.plan.plan import make_plan
from orchestrator.plan.steps import Plan, PlannedJob
from orchestrator.recipe.pipeline import LoadedPipeline, json_schema, load_pipeline

PLAN_COLUMNS = ("job", "kind", "rows", "steps", "tokens", "adapter", "size", "to do", "done already")


# ---- recipe ---------------------------------------------------------------------------------------------


def validate(file: Path, format: Format) -> None:
    """Every check a run would make before it starts. Raises BadInput."""
    pipeline = load_pipeline(file)
    if not pipeline.external_adapters:
        make_plan(pipeline)
    value: dict[str, Any] = {
        "file": str(file),
        "name": pipeline.name,
        "content_hash": pipeline.content_hash(),
        "jobs": [_job_summary(pipeline, job.recipe.name) for job in pipeline.jobs],
        "fuse": pipeline.fuse.name if pipeline.fuse else None,
        "notices": list(pipeline.notices),
    }

    def table(out: Console) -> None:
        for notice in pipeline.notices:
            out.print(f"note: {notice}", soft_wrap=True)
        for job in value["jobs"]:
            rows = ", ".join(f"{count:,} {split}" for split, count in job["rows"].items())
            out.print(
                f"{job['name']}: {job['task']} on {job['base']}, rows: {rows}; "
                f"registered as {job['registered_name']}",
                soft_wrap=True,
            )
        if pipeline.fuse:
            parents = ", ".join(parent.label for parent, _ in pipeline.parents())
            out.print(f"{pipeline.fuse.name}: fused by {pipeline.fuse.rule} from {parents}", soft_wrap=True)
        out.print(f"{file} is valid")

    emit(value, format, table)


def _job_summary(pipeline: LoadedPipeline, name: str) -> dict[str, Any]:
    job = pipeline.job(name)
    return {
        "name": name,
        "task": job.recipe.task,
        "base": job.base.slug,
        "rows": {"train": job.train.rows, "validation": job.validation.rows, "test": job.test.rows},
        "registered_name": job.registered_name,
    }


def schema() -> None:
    """The JSON schema of recipe and pipeline files, as editors read it."""
    print(json.dumps(json_schema(), indent=2, ensure_ascii=False))


# ---- plan -----------------------------------------------------------------------------------------------


def plan(parts: Parts, home: Home, file: Path, format: Format) -> None:
    """Steps, sizes and tokens of every job, and which steps this home has done already. Raises BadInput."""
    pipeline = load_pipeline(file)
    digests: dict[str, str] = {}
    if pipeline.external_adapters:
        with parts.registry(home) as registry:
            digests = adapter_digests(registry, pipeline)
    planned = make_plan(pipeline, digests)
    done = _done(parts, home, planned)
    value: dict[str, Any] = {
        "name": planned.name,
        "key": planned.key,
        "jobs": [_planned_view(job, pipeline, done) for job in planned.jobs],
        "notices": list(pipeline.notices),
    }

    def table(out: Console) -> None:
        for notice in pipeline.notices:
            out.print(f"note: {notice}", soft_wrap=True)
        right = ("rows", "steps", "tokens", "adapter", "size")
        out.print(grid(PLAN_COLUMNS, [_cells(job) for job in value["jobs"]], right=right))

    emit(value, format, table)


def _done(parts: Parts, home: Home, planned: Plan) -> set[str]:
    if not home.has_store:
        return set()
    with parts.store(home) as store:
        return store.steps.finished(set(planned.steps))


def _planned_view(job: PlannedJob, pipeline: LoadedPipeline, done: set[str]) -> dict[str, Any]:
    estimate = job.estimate
    return {
        "name": job.name,
        "kind": job.kind,
        "task": job.task,
        "base": job.base.name,
        "world_size": job.world_size,
        "depends_on": list(job.depends_on),
        "adapter_parameters": estimate.adapter_parameters if estimate else None,
        "adapter_bytes": estimate.adapter_bytes if estimate else None,
        "train_rows": estimate.train_rows if estimate else None,
        "num_steps": estimate.num_steps if estimate else None,
        "tokens": tokens_to_train(pipeline, job) if estimate else None,
        "steps": [
            {"id": step.id, "kind": step.kind, "words": STAGES[step.kind], "done": step.id in done}
            for step in job.steps
        ],
    }


def _cells(job: Mapping[str, Any]) -> tuple[str, ...]:
    todo = Counter(step["words"] for step in job["steps"] if not step["done"])
    done = Counter(step["words"] for step in job["steps"] if step["done"])
    size, tokens = job["adapter_bytes"], job["tokens"]
    return (
        job["name"],
        job["kind"],
        _count(job["train_rows"]),
        _count(job["num_steps"]),
        f"about {_count(tokens)}" if tokens else "",
        _count(job["adapter_parameters"]),
        megabytes(size) if size else "",
        _words(todo) or "nothing",
        _words(done),
    )


def _words(steps: Counter[str]) -> str:
    return ", ".join(f"{words} ({count})" if count > 1 else words for words, count in steps.items())


def _count(number: int | None) -> str:
    return "" if number is None else f"{number:,}"
