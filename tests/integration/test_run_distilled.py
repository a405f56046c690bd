"""Rule distill by the command that a user gives: killed while the student trains, it ends as undisturbed.

The parents are short, the student longer, so that the kill lands in its training.
"""

from __future__ import annotations

import json
import random

import pytest
from peft import PeftModel
from transformers import AutoModelForCausalLM

from orchestrator.registry import server as tracking_server
from orchestrator.registry.registry import MlflowRegistry
from tests.integration.test_run_killed import (
    After,
    World,
    assert_whole,
    finance,
    left_behind,
    make_world,
    support,
)
from tests.orchestrator.recipe_files import fuse, pipeline, write_yaml

STUDENT_STEPS = 90
STUDENT_TRAINING = After("checkpoints/*/step-*7?", jitter=0.1)
"""Its parents have 60 steps."""
DISTILL = {"max_steps": STUDENT_STEPS, "learning_rate": 5e-3, "saves_per_epoch": 8, "evals_per_epoch": 1}


def make_distilled(folder) -> World:
    world = make_world(folder, 1, "--local")
    block = fuse(
        rule="distill",
        rank=6,
        distill=DISTILL,
        controls={"max_samples": 2},
        release={"out": "release/fused"},
    )
    write_yaml(world.folder / "demo.yaml", pipeline(finance(), support(), fuse=block))
    return world


@pytest.fixture(scope="module")
def worlds(tmp_path_factory):
    """One that was killed and begun again, one that was not, side by side."""
    folder = tmp_path_factory.mktemp("distilled")
    killed, undisturbed = make_distilled(folder / "killed"), make_distilled(folder / "undisturbed")
    beside = undisturbed.start()
    try:
        killed.killed(STUDENT_TRAINING, random.Random(20261126))
        finished = list(killed.home.glob("checkpoints/*/adapter"))
        assert len(finished) == 2, f"the student was not in its training: {finished}"
        killed.finish()
        undisturbed.finish(beside)
    finally:
        beside.kill()
    return killed, undisturbed


@pytest.mark.timeout(1200)
def test_run_distilled_and_killed_ends_like_an_undisturbed_one(worlds):
    killed, undisturbed = worlds
    expected = left_behind(undisturbed)
    assert_whole(expected)
    student = expected["curves"][1]
    assert [step for step, _ in student["loss"]] == list(range(1, STUDENT_STEPS + 1))
    assert student["eval_loss"][-1][0] == STUDENT_STEPS
    assert left_behind(killed) == expected


def test_run_distilled_keeps_its_parents_its_start_and_its_controls_in_the_registry(worlds):
    world, _ = worlds
    with tracking_server.start(world.home) as server:
        registry = MlflowRegistry(server.url)
        version = registry.version("tiny.multitask", "champion")
        report = json.loads(registry.read_text(version, "fusion/report.json"))
    assert version.tags["fusion.parents"] == "tiny.finance-sentiment/1,tiny.support/1"
    assert (report["rule"], report["start"]["rule"], report["start"]["rank"]) == ("distill", "svd", 6)
    names = {"base", "parent finance", "parent support", "fused", "random"}
    assert set(report["controls"]["scores"]) == names
    assert report["controls"]["rows"] == {"finance-sentiment": 2, "support": 2}


def test_run_distilled_releases_an_adapter_of_its_rank_that_peft_loads(worlds):
    world, _ = worlds
    base = AutoModelForCausalLM.from_pretrained(world.folder / "bases/tiny")
    config = PeftModel.from_pretrained(base, world.folder / "release/fused").peft_config["default"]
    assert (config.r, config.lora_alpha) == (6, 6)
