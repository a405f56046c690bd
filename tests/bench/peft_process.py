"""One job as people run it today: a process that loads the base, trains one adapter, saves and registers it.

    python -m tests.bench.peft_process order.json

Imports what such a script needs, and of ours only the reader of rows. Prints one line of JSON: the seconds
each part took.
"""

from __future__ import annotations

import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

STARTED = time.perf_counter()


@dataclass(frozen=True)
class Order:
    name: str
    base: str
    data: str
    out: str
    tracking_uri: str
    steps: int
    batch: int
    sequence_len: int
    r: int
    learning_rate: float
    seed: int


def main(order: Order) -> dict[str, float]:
    seconds: dict[str, float] = {}
    import mlflow  # noqa: F401
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    _lap(seconds, "import")
    torch.set_num_threads(1)
    torch.manual_seed(order.seed)
    tokenizer = AutoTokenizer.from_pretrained(order.base)
    model = AutoModelForCausalLM.from_pretrained(order.base, dtype=torch.float32)
    config = LoraConfig(r=order.r, lora_alpha=2 * order.r, target_modules="all-linear", task_type="CAUSAL_LM")
    peft: Any = get_peft_model(model, config)
    peft.train()
    _lap(seconds, "load")
    losses = train(peft, tokenizer, order)
    _lap(seconds, "train")
    peft.save_pretrained(order.out)
    register(order, losses)
    _lap(seconds, "save and register")
    return seconds


def train(model: Any, tokenizer: Any, order: Order) -> list[float]:
    """The loss of every step. Raises ValueError if one is not finite."""
    import torch

    from workers.data import encode_all
    from workers.types import DatasetSpec

    rows = encode_all(tokenizer, [DatasetSpec(order.data, "chat")], order.sequence_len)
    trainable = [p for p in model.parameters() if p.requires_grad]
    adamw = torch.optim.AdamW(trainable, lr=order.learning_rate, weight_decay=0.0)
    losses = []
    for step in range(order.steps):
        batch = [rows[(step * order.batch + i) % len(rows)] for i in range(order.batch)]
        input_ids = torch.tensor([row.input_ids for row in batch])
        loss = model(input_ids=input_ids, labels=torch.tensor([row.labels for row in batch])).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trainable, 1.0)
        adamw.step()
        adamw.zero_grad()
        losses.append(loss.item())
    if not torch.tensor(losses).isfinite().all():
        raise ValueError(f"{order.name}: a loss is not finite")
    return losses


def register(order: Order, losses: list[float]) -> None:
    """A run with its curve and its files, and a version of a registered model."""
    import mlflow
    from mlflow.entities import Metric

    mlflow.set_tracking_uri(order.tracking_uri)
    mlflow.set_experiment("peft")
    client = mlflow.MlflowClient()
    now = int(time.time() * 1000)
    with mlflow.start_run(run_name=order.name) as run:
        client.log_batch(run.info.run_id, [Metric("loss", v, now, i) for i, v in enumerate(losses, 1)])
        mlflow.log_artifacts(order.out, "adapter")
        client.create_registered_model(order.name)
        client.create_model_version(order.name, f"{run.info.artifact_uri}/adapter", run.info.run_id)


def _lap(seconds: dict[str, float], part: str) -> None:
    """What has passed since the last part, or since the process began to read this file."""
    seconds[part] = time.perf_counter() - STARTED - sum(seconds.values())


if __name__ == "__main__":
    print(json.dumps(main(Order(**json.loads(Path(sys.argv[1]).read_text())))))
