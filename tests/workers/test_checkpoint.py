"""Which checkpoints a save drops: none before the two that stay have verified, and each is hashed once."""

from __future__ import annotations

import torch

from workers import checkpoint
from workers.adapter import Adapter
from workers.checkpoint import Checkpoint, Progress


def at(step):
    factors = {"layer": (torch.full((2, 4), float(step)), torch.zeros(4, 2))}
    adapter = Adapter(factors, 2, 4.0, base_model="base", target_modules=("layer",))
    return Checkpoint(adapter, {}, Progress(step, 0))


def save(folder, *steps):
    for step in steps:
        checkpoint.save(folder, at(step), "digest")


def kept(folder):
    return sorted(path.name for path in folder.iterdir())


def test_prune_after_each_save_keeps_the_newest_two(tmp_path):
    save(tmp_path, 1, 2, 3, 4)
    assert kept(tmp_path) == ["step-000003", "step-000004"]


def test_prune_hashes_a_checkpoint_once_however_many_saves_follow(tmp_path, monkeypatch):
    hashed, verify = [], checkpoint.verify_folder
    monkeypatch.setattr(checkpoint, "verify_folder", lambda path: hashed.append(path.name) or verify(path))
    save(tmp_path, 1, 2, 3, 4)
    assert hashed == [f"step-{step:06d}" for step in (1, 2, 3, 4)]


def test_prune_with_a_torn_checkpoint_keeps_an_older_one_that_verifies(tmp_path):
    save(tmp_path, 1, 2)
    checkpoint._verified_as_written.cache_clear()  # as in a new process
    with (tmp_path / "step-000002" / "adapter_model.safetensors").open("r+b") as file:
        file.write(b"torn")
    save(tmp_path, 3)
    assert kept(tmp_path) == ["step-000001", "step-000002", "step-000003"]
    save(tmp_path, 4)
    assert kept(tmp_path) == ["step-000002", "step-000003", "step-000004"]
