"""What `chorus submit` says of each job that trains: its size, what it will take, and where it would go."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from orchestrator.commands.output import duration, megabytes
from orchestrator.commands.queue_view import Queue
from orchestrator.commands.token_count import tokens_to_train
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


def fit_words(view: FitView) -> str:
    """One line for a person."""
    words = f"adapter of {view['adapter_parameters']:,} parameters, {megabytes(view['adapter_bytes'])}"
    words += f", {megabytes(view['memory_bytes'])} on each rank while it trains"
    if view["tokens"] is not None:
        words += f"; about {view['tokens']:,} tokens"
    if view["seconds"] is not None:
        words += (
            f", {duration(view['seconds'])} of training, {view['rank_seconds']:,.0f} rank-seconds of its own"
        )
    if view["never"] is not None:
        return f"{words}. It cannot run as the cluster is: {view['never']}"
    if view["host"] is not None:
        return f"{words}. It would join {view['host']}, where {view['beside']} train"
    return words
