"""What `chorus submit` says of each job that trains: its size, what it will take, and where it would go."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from orchestrator.api.queue_view import Queue
from orchestrator.api.token_count import tokens_to_train
from orchestrator.control.show import read_snapshot
from orchestrator.fit import Ask, fit
from orchestrator.plan.steps import Plan
from orchestrator.recipe.pipeline import LoadedPipeline
from orchestrator.store.store import Store

FitView = dict[str, Any]
LATEST = 50
"""Jobs by whose pace a new one is judged."""


def fit_views(store: Store, plan: Plan, pipeline: LoadedPipeline) -> dict[str, FitView]:
    """Job -> its fit as `-o json` shows it, for the jobs that train."""
    shown, known = read_snapshot(store), paces(store)
    up = {host["name"] for host in Queue.read(store).hosts}
    found: dict[str, FitView] = {}
    for job in plan.jobs:
        if job.estimate is not None:
            size, tokens = job.estimate.adapter_parameters, tokens_to_train(pipeline, job)
            ask = Ask(job.host_key, job.world_size, size, tokens)
            its = fit(ask, shown[0] if shown else None, up, known)
            sizes = {"adapter_parameters": size, "adapter_bytes": job.estimate.adapter_bytes}
            found[job.name] = {**sizes, **asdict(its)}
    return found


def paces(store: Store) -> dict[str, float]:
    """Base -> tokens a second of a host of it: of all that train there now, else of the latest that did."""
    together: dict[tuple[str, str], float] = {}
    alone: dict[str, float] = {}
    for base, host, pace in store.latest_paces(LATEST):
        alone.setdefault(base, pace)
        if host is not None:
            together[base, host] = together.get((base, host), 0.0) + pace
    return alone | {base: pace for (base, _), pace in together.items()}
