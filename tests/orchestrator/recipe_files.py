"""Small recipes, bases and data for tests: real files in the layouts that recipes name."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from safetensors.numpy import save_file

LABELS = ["negative", "neutral", "positive"]


def write_base(folder: Path, layers: int = 2, hidden: int = 8, inner: int = 12, seed: int = 0) -> Path:
    """A folder in Hugging Face layout, with the tensors of a very small Llama."""
    folder.mkdir(parents=True)
    shapes = {"model.embed_tokens.weight": (32, hidden), "model.norm.weight": (hidden,)}
    for layer in range(layers):
        prefix = f"model.layers.{layer}"
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            shapes[f"{prefix}.self_attn.{name}.weight"] = (hidden, hidden)
        shapes[f"{prefix}.mlp.gate_proj.weight"] = (inner, hidden)
        shapes[f"{prefix}.mlp.down_proj.weight"] = (hidden, inner)
        shapes[f"{prefix}.input_layernorm.weight"] = (hidden,)
    random = np.random.default_rng(seed)
    tensors = {name: random.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    save_file(tensors, folder / "model.safetensors")
    write_json(folder / "config.json", {"model_type": "llama", "max_position_embeddings": 128})
    write_json(folder / "tokenizer.json", {"version": "1.0"})
    write_json(folder / "tokenizer_config.json", {"eos_token": "<|im_end|>"})
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    return folder


def write_json(file: Path, value: Any) -> None:
    file.write_text(json.dumps(value))


def write_rows(file: Path, rows: list[Any]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def finance_rows(count: int, start: int = 0) -> list[dict[str, str]]:
    return [{"text": f"headline {n}", "label": LABELS[n % 3]} for n in range(start, start + count)]


def support_rows(count: int, start: int = 0) -> list[dict[str, Any]]:
    turns = [("user", "where is order {n}?"), ("assistant", "order {n} is on its way")]
    return [
        {"messages": [{"role": role, "content": text.format(n=n)} for role, text in turns]}
        for n in range(start, start + count)
    ]


def write_splits(folder: Path, rows: Any) -> Path:
    for index, split in enumerate(("train", "validation", "test")):
        write_rows(folder / f"{split}.jsonl", rows(10 if split == "train" else 4, start=100 * index))
    return folder


def write_world(folder: Path) -> Path:
    """`folder` with a base file, its model, and data for two tasks."""
    write_base(folder / "bases" / "tiny")
    write_yaml(folder / "bases" / "tiny.yaml", {"model": "tiny", "world_size": 2})
    write_splits(folder / "data" / "finance", finance_rows)
    write_splits(folder / "data" / "support", support_rows)
    return folder


def finance(**changes: Any) -> dict[str, Any]:
    """A recipe as its YAML reads; a change to None takes the key out."""
    recipe: dict[str, Any] = {
        "version": 1,
        "name": "finance",
        "task": "finance-sentiment",
        "base_model": "bases/tiny.yaml",
        "datasets": [{"path": "data/finance", "type": "classification", "labels": LABELS}],
        "sequence_len": 64,
        "max_steps": 5,
        **changes,
    }
    return {key: value for key, value in recipe.items() if value is not None}


def support(**changes: Any) -> dict[str, Any]:
    datasets = [{"path": "data/support", "type": "chat"}]
    return finance(**{"name": "support", "task": "support", "datasets": datasets, **changes})


def pipeline(*jobs: Any, fuse: dict[str, Any] | None = None, **changes: Any) -> dict[str, Any]:
    whole = {"version": 1, "name": "demo", "jobs": list(jobs), **changes}
    return whole if fuse is None else {**whole, "fuse": fuse}


def fuse(*adapters: dict[str, Any], **changes: Any) -> dict[str, Any]:
    chosen = list(adapters) or [{"job": "finance"}, {"job": "support"}]
    return {"name": "fused", "rule": "cat", "adapters": chosen, "controls": None, **changes}


def write_yaml(file: Path, value: Any) -> Path:
    file.write_text(yaml.safe_dump(value, sort_keys=False))
    return file


def line_of(file: Path, text: str) -> int:
    """The 1-based line of the first line that holds `text`."""
    lines = file.read_text().splitlines()
    return next(number for number, line in enumerate(lines, start=1) if text in line)
