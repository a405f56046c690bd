"""Jobs, runs and versions as `-o json` shows them: the keys here are an interface, add but do not rename."""

from __future__ import annotations

import json
from collections.abc import Iterable, Set
from typing import Any

from orchestrator.contracts import AdapterVersion
from orchestrator.control.submission import read_order
from orchestrator.job import REASONS
from orchestrator.judgement import FINDINGS_TAG, GATE_TAG
from orchestrator.plan.steps import PlannedJob, Step
from orchestrator.store.rows import EventRow, JobRow, MetricRow, RunRow

DEFAULT_TEAM = "default"
"""Of jobs whose recipe names none."""
STAGES = {
    "evaluate_base": "scores the base",
    "train": "trains",
    "evaluate": "scores the adapter",
    "fuse": "fuses",
    "search": "searches weights",
    "register": "registers",
    "promote": "checks its gates",
    "release": "writes the release",
}
"""Kind of a step -> what a job in it does."""

JOB_KEYS = (
    *("id", "run", "name", "kind", "status", "reason", "message", "attempt", "host", "priority"),
    *("step", "num_steps", "loss", "tokens_per_second", "submitted_at", "started_at", "finished_at"),
)


def job_view(job: JobRow) -> dict[str, Any]:
    """One job; times are seconds since the epoch."""
    planned = read_order(job.plan).job
    values = {key: getattr(job, key) for key in JOB_KEYS}
    values["status"], values["reason"] = job.status.value, job.reason.value
    return {
        **values,
        "task": planned.task,
        "team": planned.team or DEFAULT_TEAM,
        "reason_words": REASONS[job.reason].words,
        "depends_on": list(job.depends_on),
        "about": about(planned),
    }


def why(job: JobRow) -> str:
    """Why a job is where it is, in words."""
    words = REASONS[job.reason].words
    return f"{words}: {job.message}" if job.message else words


def about(planned: PlannedJob) -> str:
    """How the job makes its adapter, in words."""
    if planned.kind == "fuse":
        return f"fused from {', '.join(planned.depends_on) or 'registered adapters'}"
    if planned.estimate is None:
        return "trained"
    return (
        f"trained {planned.estimate.num_steps} steps on {planned.estimate.train_rows:,} rows, "
        f"{planned.estimate.adapter_parameters:,} parameters"
    )


def run_view(run: RunRow) -> dict[str, Any]:
    return {"id": run.id, "name": run.name, "status": run.status.value, "submitted_at": run.submitted_at}


def steps_view(steps: Iterable[Step], finished: Set[str]) -> list[dict[str, Any]]:
    """A job's steps in order; `finished` holds the ids of those that are done."""
    return [
        {"id": step.id, "kind": step.kind, "words": STAGES[step.kind], "done": step.id in finished}
        for step in steps
    ]


def event_view(event: EventRow) -> dict[str, Any]:
    return {
        "at": event.at,
        "type": "status",
        "from": event.before.value if event.before else None,
        "status": event.after.value,
        "reason": event.reason.value,
        "reason_words": REASONS[event.reason].words,
        "message": event.message,
        "attempt": event.attempt,
        "who": event.who,
    }


def metric_view(row: MetricRow) -> dict[str, Any]:
    return {
        "at": row.at,
        "type": "step",
        "step": row.step,
        "loss": row.loss,
        "eval_loss": row.eval_loss,
        "grad_norm": row.grad_norm,
        "learning_rate": row.learning_rate,
        "tokens": row.tokens,
        "seconds": row.seconds,
        "tokens_per_second": row.tokens / row.seconds if row.seconds > 0 else None,
        "skipped": row.skipped,
        "attempt": row.attempt,
    }


def version_view(version: AdapterVersion) -> dict[str, Any]:
    """One adapter version; `metrics` has `<task>/<metric>`, and the base's own under `base/`."""
    return {
        "name": version.name,
        "version": version.version,
        "aliases": list(version.aliases),
        "task": version.tags.get("task", ""),
        "gate_status": version.tags.get(GATE_TAG, ""),
        "gates": json.loads(version.tags.get(FINDINGS_TAG, "[]")),
        "metrics": dict(sorted(version.metrics.items())),
        "tags": dict(sorted(version.tags.items())),
        "digest": version.digest,
        "run_id": version.run_id,
        "model_id": version.model_id,
        "created_at": version.created_ms / 1000,
    }
