"""Equal meaning gives an equal hash; another meaning gives another."""

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.recipe.load import load_recipe
from tests.orchestrator.recipe_files import LABELS, finance, write_world, write_yaml

FULL: dict[str, Any] = finance(
    lora_r=8,
    lora_alpha=16.0,
    lora_target_modules=["q_proj", "v_proj"],
    learning_rate=0.002,
    lr_scheduler="cosine",
    evaluation={"gates": {"macro_f1": ">= 0.8", "loss": "<= 2"}, "champion_margin": {"macro_f1": 0.01}},
    schedule={"priority": "high", "max_duration": "2h"},
)
SPELLINGS: dict[str, list[tuple[str, Any]]] = {
    "lora_r": [("lora_rank", 8), ("lora_r", "8"), ("lora_r", 8.0)],
    "lora_alpha": [("lora_alpha", 16)],
    "lora_target_modules": [
        ("target_modules", ["v_proj", "q_proj"]),
        ("lora_target", ["q_proj", "v_proj", "q_proj"]),
    ],
    "learning_rate": [("learning_rate", "2e-3")],
    "lr_scheduler": [("lr_scheduler_type", "cosine")],
    "sequence_len": [("cutoff_len", 64), ("max_seq_length", 64)],
    "base_model": [("model", "bases/tiny.yaml"), ("base_model", "./data/../bases/tiny.yaml")],
    "schedule": [("schedule", {"priority": 75, "max_duration": "120m"})],
    "evaluation": [
        (
            "evaluation",
            {"champion_margin": {"macro_f1": 1e-2}, "gates": {"loss": "<=2.0", "macro_f1": " >=.80"}},
        )
    ],
    "datasets": [
        ("datasets", [{"labels": LABELS, "split": None, "type": "classification", "path": "./data/finance/"}])
    ],
}
"""Other ways to write a key of FULL that mean the same."""


@pytest.fixture(scope="module")
def world() -> Iterator[Path]:
    folder = Path(tempfile.mkdtemp())
    yield write_world(folder)
    shutil.rmtree(folder)


def content_hash(world: Path, recipe: dict[str, Any], comment: str = "") -> str:
    file = world / "recipe.yaml"
    file.write_text(comment + yaml.safe_dump(recipe, sort_keys=False))
    return load_recipe(file).recipe.content_hash()


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_recipe_hash_ignores_order_spelling_defaults_and_comments(world: Path, data: st.DataObject) -> None:
    written: dict[str, Any] = {}
    for key in data.draw(st.permutations(list(FULL))):
        spelling, value = data.draw(st.sampled_from([(key, FULL[key]), *SPELLINGS.get(key, [])]))
        written[spelling] = value
    defaults = data.draw(st.sets(st.sampled_from(["seed", "weight_decay", "use_rslora", "registry"])))
    written |= {
        key: {"seed": 0, "weight_decay": 0, "use_rslora": False, "registry": {}}[key] for key in defaults
    }
    comment = data.draw(st.sampled_from(["", "# a comment\n", "---\n"]))
    assert content_hash(world, written, comment) == content_hash(world, FULL)


CHANGES: dict[str, Any] = {
    "name": "other",
    "task": "other",
    "base_model": "bases/tiny",
    "sequence_len": 63,
    "lora_r": 9,
    "lora_alpha": 16.5,
    "lora_dropout": 0.1,
    "lora_target_modules": ["q_proj"],
    "use_rslora": True,
    "global_batch_size": 31,
    "max_steps": 6,
    "learning_rate": 0.0021,
    "lr_scheduler": "linear",
    "warmup_ratio": 0.1,
    "weight_decay": 0.1,
    "max_grad_norm": None,
    "evals_per_epoch": 2,
    "saves_per_epoch": 2,
    "gram_rows": 8,
    "seed": 1,
    "max_bad_steps": 4,
    "evaluation": {"gates": {"macro_f1": ">= 0.8000001"}},
    "registry": {"promote": False},
    "resources": {"world_size": 1},
    "schedule": {"priority": 76},
    "datasets": [{**finance()["datasets"][0], "instruction": "Say it."}],
}


@pytest.mark.parametrize("key", list(CHANGES))
def test_recipe_hash_changes_with_every_key(world: Path, key: str) -> None:
    changed = {**FULL, key: CHANGES[key]}
    assert content_hash(world, changed) != content_hash(world, FULL)


def test_recipe_hash_is_the_same_wherever_recipe_and_files_lie_together(tmp_path: Path) -> None:
    hashes = set()
    for name in ("here", "there"):
        (tmp_path / name).mkdir()
        hashes.add(content_hash(write_world(tmp_path / name), FULL))
    assert len(hashes) == 1


def test_recipe_canonical_form_written_as_yaml_is_the_same_recipe(world: Path) -> None:
    recipe = load_recipe(write_yaml(world / "recipe.yaml", FULL)).recipe
    (world / "again.yaml").write_text(recipe.to_yaml())
    again = load_recipe(world / "again.yaml")
    assert again.recipe == recipe
    assert again.notices == ()
