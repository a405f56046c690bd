"""The whole way through with real parts but Ray: train, score, register, fuse, release, and nothing twice."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from orchestrator.commands.cli import app
from orchestrator.main import real_parts
from orchestrator.registry import server as tracking_server
from tests.models import make_base, write_rows
from tests.orchestrator.recipe_files import LABELS, fuse, pipeline, write_yaml
from workers.adapter import read_adapter
from workers.fuse import fuse as fused_by_hand
from workers.manifest import verify_folder
from workers.types import RuleOptions

SHORT = {"version": 1, "base_model": "bases/tiny.yaml", "sequence_len": 96, "global_batch_size": 4}
SHORT |= {"max_steps": 4, "learning_rate": 1e-2, "lora_r": 4, "gram_rows": 6}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Two tiny jobs, their fusion and its release, run once by the command that a user gives."""
    folder = tmp_path_factory.mktemp("world")
    make_base(folder / "bases" / "tiny")
    write_yaml(folder / "bases" / "tiny.yaml", {"model": "tiny", "world_size": 2, "tokens_per_tick": 512})
    for split in ("train", "validation", "test"):
        write_rows(folder / f"data/finance/{split}.jsonl", [headline(split, n) for n in range(8)])
        write_rows(folder / f"data/support/{split}.jsonl", [dialogue(split, n) for n in range(8)])
    block = fuse(rule="svd", rank=6, release={"out": "release/fused"})
    write_yaml(folder / "demo.yaml", pipeline(finance(), support(), fuse=block))
    done = subprocess.run(
        [sys.executable, "-m", "orchestrator.main", "run", "demo.yaml", "--local"],
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, (done.stdout, done.stderr)
    # Held for the commands that follow: starting it takes longer than all of them.
    with tracking_server.start(folder / ".chorus"):
        yield folder, done.stdout


def finance():
    datasets = [{"path": "data/finance", "type": "classification", "labels": LABELS}]
    return {**SHORT, "name": "finance", "task": "finance-sentiment", "datasets": datasets}


def support():
    datasets = [{"path": "data/support", "type": "chat"}]
    replies = {"generate_samples": 2, "max_new_tokens": 4}
    job = {**SHORT, "name": "support", "task": "support", "datasets": datasets, "evaluation": replies}
    return {**job, "lora_r": 8, "use_rslora": True}


def headline(split, n):
    return {"text": f"{split} headline {n}", "label": LABELS[n % 3]}


def dialogue(split, n):
    turns = (("user", f"{split}: where is {n}?"), ("assistant", f"{n} is on its way"))
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


def chorus(folder, *arguments):
    """A command with the real parts, in this process: mlflow and torch are imported once."""
    home = str(folder / ".chorus")
    result = CliRunner().invoke(app, [*map(str, arguments), "--home", home], obj=real_parts())
    assert result.exit_code == 0, (result.stdout, result.stderr, result.exception)
    return result.stdout


def read(folder, *arguments):
    return json.loads(chorus(folder, *arguments, "-o", "json"))


def _scores(said):
    """The rows of the score table."""
    return [line.split() for line in said.splitlines() if len(line.split()) == 6 and "%" in line]


def test_run_local_prints_scores_of_base_adapter_and_fused(world):
    _, said = world
    rows = {tuple(row[:2]): row[2:] for row in _scores(said)}
    for task, metric in (("finance-sentiment", "macro_f1"), ("support", "perplexity")):
        assert all(float(figure) >= 0 for figure in rows[task, metric][:3])
    assert "release: adapter tiny.multitask in release/fused" in said


def test_run_local_succeeds_in_every_job(world):
    jobs = read(world[0], "ps")
    assert [(job["name"], job["status"]) for job in jobs] == [
        ("finance", "SUCCEEDED"),
        ("support", "SUCCEEDED"),
        ("fused", "SUCCEEDED"),
    ]
    assert [job["step"] for job in jobs] == [4, 4, 0]


def test_run_local_releases_an_adapter_that_peft_loads(world):
    folder, _ = world
    manifest = verify_folder(folder / "release/fused")
    assert {"adapter_config.json", "adapter_model.safetensors", "README.md"} <= set(manifest["files"])
    base = AutoModelForCausalLM.from_pretrained(folder / "bases/tiny")
    assert PeftModel.from_pretrained(base, folder / "release/fused").peft_config["default"].r == 6


def test_run_local_registers_three_champions_and_again_does_nothing(world):
    folder, said = world
    again = chorus(folder, "run", folder / "demo.yaml", "--local")
    assert "nothing to do" in again
    assert _scores(again) == _scores(said) != []
    versions = read(folder, "adapters", "list")
    assert [(version["name"], version["version"]) for version in versions] == [
        ("tiny.finance-sentiment", 1),
        ("tiny.multitask", 1),
        ("tiny.support", 1),
    ]
    assert all("champion" in version["aliases"] for version in versions)


def test_release_merged_and_fuse_by_hand_write_folders_that_load(world):
    folder, _ = world
    chorus(folder, "release", "tiny.multitask@champion", "--out", folder / "merged", "--merged")
    assert AutoModelForCausalLM.from_pretrained(folder / "merged").config.num_hidden_layers == 2
    parents = ("tiny.support@champion", folder / "release/fused")
    chorus(folder, "fuse", *parents, "--weights", "1,0.5", "--out", folder / "both")
    report = json.loads((folder / "both/fusion.json").read_text())
    assert (report["rule"], report["weights"]) == ("cat", [1.0, 0.5])
    verify_folder(folder / "both")


def test_fuse_by_hand_with_a_rules_settings_writes_what_the_rule_makes_of_them(world):
    folder, _ = world
    parents = [folder / "release/fused", "tiny.support@champion"]
    settings = ("--rule", "dare_ties", "--set", "density=0.4", "--set", "seed=7")
    chorus(folder, "fuse", *parents, *settings, "--weights", "1,0.5", "--out", folder / "drawn")
    chorus(folder, "fuse", *parents, *settings, "--weights", "1,0.5", "--out", folder / "again")
    report = json.loads((folder / "drawn/fusion.json").read_text())
    assert (report["rule"], report["options"]) == ("dare_ties", {"density": 0.4, "seed": 7})
    files = ("adapter_model.safetensors", "adapter_config.json", "fusion.json")
    assert all((folder / "drawn" / f).read_bytes() == (folder / "again" / f).read_bytes() for f in files)
    adapters = [read_adapter(folder / "release/fused"), read_adapter(_downloaded(folder))]
    expected, _ = fused_by_hand(adapters, [1.0, 0.5], "dare_ties", options=RuleOptions(density=0.4, seed=7))
    found = read_adapter(folder / "drawn")
    for name, (a, b) in expected.factors.items():
        assert torch.equal(found.factors[name][0], a), name
        assert torch.equal(found.factors[name][1], b), name
    base = AutoModelForCausalLM.from_pretrained(folder / "bases/tiny")
    assert PeftModel.from_pretrained(base, folder / "drawn").peft_config["default"].peft_type == "LORA"


def test_fuse_by_hand_with_regmean_reads_what_training_left_with_registered_adapters(world):
    folder, _ = world
    parents = ("tiny.finance-sentiment@champion", "tiny.support@champion")
    chorus(folder, "fuse", *parents, "--rule", "regmean", "--rank", 8, "--out", folder / "regmean")
    copies = [_downloaded(folder, parent) for parent in parents]
    assert all("gram.safetensors" in verify_folder(copy)["files"] for copy in copies)
    adapters = [read_adapter(copy) for copy in copies]
    expected, _ = fused_by_hand(adapters, [1.0, 1.0], "regmean", 8, folders=copies)
    found = read_adapter(folder / "regmean")
    for name, (a, b) in expected.factors.items():
        assert torch.equal(found.factors[name][0], a), name
        assert torch.equal(found.factors[name][1], b), name
    released = verify_folder(folder / "release/fused")["files"]
    assert "gram.safetensors" not in {*released, *verify_folder(folder / "regmean")["files"]}


def _downloaded(folder, version="tiny.support@champion"):
    """The verified copy that `fuse` keeps of a registered adapter."""
    digest = read(folder, "adapters", "show", version)["digest"]
    return folder / ".chorus/downloads" / digest


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("density=most", "density is 'most'; give it as density=FIGURE"),
        ("thickness=0.4", "'thickness' is no option of a rule"),
        ("density=1.4", "density is 1.4; it must be above 0 and at most 1"),
        ("gamma=0.1", "rule 'dare_ties' takes no gamma; leave it out"),
    ],
)
def test_fuse_by_hand_with_a_setting_the_rule_does_not_take_is_refused_and_leaves_nothing(
    world, setting, words
):
    folder, _ = world
    parents = ["tiny.support@champion", folder / "release/fused"]
    asked = ("fuse", *parents, "--rule", "dare_ties", "--set", setting, "--out", folder / "refused")
    result = CliRunner().invoke(app, [*map(str, asked), "--home", str(folder / ".chorus")], obj=real_parts())
    assert result.exit_code == 2
    assert words in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1
    assert not (folder / "refused").exists()
