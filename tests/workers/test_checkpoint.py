"""Which checkpoints a save drops: none before the two that stay have verified, and each is hashed once."""

from __future__ import annotations

import os
import time

import pytest
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
    save(tmp_path, 4)  # the torn one is older than two that verify
    assert kept(tmp_path) == ["step-000003", "step-000004"]


def test_prune_removes_what_a_kill_during_a_former_one_left(tmp_path):
    save(tmp_path, 1, 2, 3)
    (tmp_path / "step-000001").mkdir()
    (tmp_path / "step-000001" / "progress.json").write_text("{}")
    save(tmp_path, 4)
    assert kept(tmp_path) == ["step-000003", "step-000004"]


@pytest.mark.parametrize("name", [f".step-000009.{'a' * 32}", f".rows.{'b' * 32}"])
def test_prune_leaves_what_another_writer_is_at_until_it_is_long_abandoned(tmp_path, name):
    """A host that was given up may still write beside the one that the job went to."""
    scratch = tmp_path / name
    scratch.mkdir()
    (scratch / "rows").write_text("1")
    old = time.time() - 2 * checkpoint.ABANDONED_SECONDS
    os.utime(scratch, (old, old))  # the folder is old, but its file grows
    save(tmp_path, 1)
    assert kept(tmp_path) == [name, "step-000001"]
    os.utime(scratch / "rows", (old, old))
    save(tmp_path, 2)
    assert kept(tmp_path) == ["step-000001", "step-000002"]


def test_save_of_a_step_that_another_writer_publishes_meanwhile_is_theirs(tmp_path, monkeypatch):
    write = checkpoint.save_tensors

    def after_the_other(tensors, path):
        monkeypatch.setattr(checkpoint, "save_tensors", write)
        save(tmp_path, 1)
        write(tensors, path)

    monkeypatch.setattr(checkpoint, "save_tensors", after_the_other)
    save(tmp_path, 1)
    assert kept(tmp_path) == ["step-000001"]
    assert checkpoint.newest(tmp_path) == tmp_path / "step-000001"


def test_save_of_an_adapter_that_another_writer_publishes_meanwhile_is_theirs(tmp_path, monkeypatch):
    write, final = checkpoint.write_adapter, tmp_path / "adapter"

    def after_the_other(adapter, folder):
        monkeypatch.setattr(checkpoint, "write_adapter", write)
        checkpoint.save_adapter(final, adapter, "digest")
        write(adapter, folder)

    monkeypatch.setattr(checkpoint, "write_adapter", after_the_other)
    checkpoint.save_adapter(final, at(1).adapter, "digest")
    assert kept(tmp_path) == ["adapter"]


def test_save_that_the_disk_refuses_raises_though_nothing_is_torn(tmp_path, monkeypatch):
    def refuses(tensors, path):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_tensors", refuses)
    with pytest.raises(OSError, match="No space left"):
        save(tmp_path, 1)
    assert kept(tmp_path) == []
