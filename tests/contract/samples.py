"""Small adapter versions and evaluations for the registry's tests, and one MLflow server for all of them."""

import atexit
import json
import tempfile
from collections.abc import Generator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np
import pytest
from safetensors.numpy import save_file

from orchestrator.contracts import NewVersion, Registry, Scores
from orchestrator.registry import server as tracking_server
from orchestrator.registry.server import TrackingServer
from tests.contract.memory_registry import MemoryRegistry
from workers.manifest import publish_folder
from workers.types import EvaluationReport

HOMES: dict[str, Path] = {}
"""Of each server that tests started, by its address."""
LABELS = ("negative", "neutral", "positive")


@cache
def shared_server() -> TrackingServer:
    """One server for the whole test process: starting it takes seconds. Tests use names of their own."""
    home = tempfile.TemporaryDirectory()
    server = tracking_server.start(Path(home.name))
    HOMES[server.url] = server.home
    atexit.register(lambda: (server.stop(), home.cleanup()))
    return server


def home_of(registry) -> Path:
    """Where the files of an MLflow registry lie that a test uses."""
    return next(home for url, home in HOMES.items() if url == registry.url)


def fresh_name(task: str = "sentiment") -> str:
    return f"tiny-{uuid4().hex[:8]}.{task}"


def adapter_folder(parent: Path, seed: int = 0) -> Path:
    """A PEFT folder with its manifest."""
    random = np.random.default_rng(seed)
    folder = parent / f"adapter-{seed}"
    with publish_folder(folder) as scratch:
        tensors = {
            f"base_model.model.q_proj.lora_{side}.weight": random.normal(size=(4, 8)).astype("float32")
            for side in "AB"
        }
        save_file(tensors, scratch / "adapter_model.safetensors")
        (scratch / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 4}))
    return folder


def classification(task: str = "sentiment", macro_f1: float = 0.9) -> Scores:
    predictions = tuple({"row": i, "label": LABELS[i % 3], "predicted": LABELS[i % 3]} for i in range(6))
    report = EvaluationReport(
        task_type="classification",
        metrics={"macro_f1": macro_f1, "accuracy": 0.92, "loss": 0.31},
        rows=60,
        predictions=predictions,
        labels=LABELS,
        confusion=((18, 1, 1), (2, 17, 1), (0, 1, 19)),
    )
    return Scores(task, "finance/test.jsonl", "d" * 64, report)


def recommendation(task: str = "recommendation", hit: float = 0.5) -> Scores:
    report = EvaluationReport("recommendation", {"hit@1": hit, "ndcg@5": 0.6}, 40, ({"row": 0, "rank": 1},))
    return Scores(task, "histories/test.jsonl", "e" * 64, report)


def perplexity(task: str = "support") -> Scores:
    """The smallest evaluation: one metric, no predictions."""
    return Scores(task, "support/test.jsonl", "c" * 64, EvaluationReport("chat", {"perplexity": 9.5}, 20, ()))


def new_version(
    registry: Registry, folder: Path, name: str, step_id: str = "step-1", seed: int = 0, **changes
):
    """All of a version, with a run of its own."""
    run_id = registry.start_run(f"{name}/{step_id}", "contract", name, {"r": "4"}, {"task": "sentiment"})
    arguments = {
        "step_id": step_id,
        "name": name,
        "run_id": run_id,
        "adapter_dir": adapter_folder(folder, seed),
        "model_type": "lora-adapter",
        "tags": {"base.digest": "b" * 64, "recipe.hash": "a" * 64, "task": "sentiment"},
        "params": {"r": "4", "lora_alpha": "8"},
        "scores": [perplexity()],
        "base_scores": [],
        "recipe_yaml": "task: sentiment\n",
        "card": "# card\n",
    }
    return NewVersion(**{**arguments, **changes})


class Killed(BaseException):
    """Who moves a champion ends here."""


@contextmanager
def killed_in_its_move(registry: Any) -> Generator[None]:
    """Within, a move is written down and its aliases are set; its record is not ended."""

    def die(*_: object) -> None:
        raise Killed

    of_memory = isinstance(registry, MemoryRegistry)
    last = (registry, "_end") if of_memory else ("orchestrator.registry.promotion._settle",)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(*last, die)
        with pytest.raises(Killed):
            yield
