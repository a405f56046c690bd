"""Gram matrices that a training job leaves: plain PEFT's, whoever trains beside it; what regmean reads."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.adapters import relative_error
from tests.numerics.jobs import adapters, attach, run, test_base, three_jobs
from workers.data import encode_all
from workers.fuse import fuse_folders
from workers.fuse.grams import GRAMS
from workers.manifest import CorruptFolder, verify_folder
from workers.order import batch_samples
from workers.types import BaseSpec, FuseTask, JobSpec, TrainingFinished

STEPS, ROWS = 4, 20


def asking(folder: Path, rows: int = ROWS) -> list[JobSpec]:
    return [replace(spec, gram_rows=rows) for spec in three_jobs(folder, steps=STEPS)]


def trained(base: BaseSpec, jobs: list[JobSpec], world_size: int = 1) -> dict[str, Path]:
    events = run(base, {0: attach(*jobs)}, world_size)
    assert adapters(events).keys() == {spec.job for spec in jobs}
    return {e.job: Path(e.adapter_dir) for e in events if isinstance(e, TrainingFinished)}


def by_peft(base: BaseSpec, job: JobSpec, folder: Path) -> dict[str, torch.Tensor]:
    """X^T X of what PEFT's layers read, row by row and without padding."""
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base.path), folder).eval()
    rows = encode_all(AutoTokenizer.from_pretrained(base.path), job.train, job.training.sequence_len)
    found: dict[str, torch.Tensor] = {}

    def hear(name: str, x_1TD: torch.Tensor) -> None:
        x_TD = x_1TD[0].double()
        found[name] = found.get(name, 0) + x_TD.T @ x_TD

    for name, module in model.base_model.model.named_modules():
        if hasattr(module, "lora_A"):
            module.register_forward_pre_hook(lambda _, inputs, name=name: hear(name, inputs[0]))
    for sample in batch_samples(job.training.seed, 0, len(rows), job.gram_rows):
        with torch.no_grad():
            model(input_ids=torch.tensor([rows[sample].input_ids]))
    return found


@pytest.mark.parametrize("world_size", [1, 2])
def test_gram_matrices_are_those_of_plain_peft(tmp_path: Path, world_size: int) -> None:
    base, jobs = test_base(tmp_path), asking(tmp_path)
    folders = trained(base, jobs, world_size)
    for spec in jobs:
        found, expected = load_file(folders[spec.job] / GRAMS), by_peft(base, spec, folders[spec.job])
        assert found.keys() == expected.keys()
        for name, gram in found.items():
            assert gram.dtype == torch.float32
            assert torch.equal(gram, gram.T)
            assert relative_error(gram.double(), expected[name]) < 1e-5, name


def test_gram_matrices_do_not_depend_on_neighbours_and_change_no_adapter(tmp_path: Path) -> None:
    base, jobs = test_base(tmp_path), asking(tmp_path)
    together = trained(base, jobs)
    for spec in jobs:
        alone = trained(base, [replace(spec, checkpoint_dir=f"{spec.checkpoint_dir}-alone")])[spec.job]
        assert (alone / GRAMS).read_bytes() == (together[spec.job] / GRAMS).read_bytes()
    (plain,) = trained(base, [replace(jobs[0], gram_rows=0, checkpoint_dir=str(tmp_path / "plain"))]).values()
    weights = "adapter_model.safetensors"
    assert (plain / weights).read_bytes() == (together[jobs[0].job] / weights).read_bytes()
    assert not (plain / GRAMS).exists()


def test_gram_matrices_of_more_rows_than_there_are_are_of_all(tmp_path: Path) -> None:
    base, job = test_base(tmp_path), asking(tmp_path, 48)[2]
    (every,) = trained(base, [job]).values()
    more = replace(job, gram_rows=1000, checkpoint_dir=str(tmp_path / "more"))
    assert (trained(base, [more])[job.job] / GRAMS).read_bytes() == (every / GRAMS).read_bytes()


def test_regmean_fuses_adapters_by_what_their_training_left_and_verifies_it(tmp_path: Path) -> None:
    base, spec = test_base(tmp_path), asking(tmp_path)[0]
    twin = replace(
        spec, job="twin", training=replace(spec.training, seed=9), checkpoint_dir=str(tmp_path / "twin")
    )
    folders = list(trained(base, [spec, twin]).values())
    assert GRAMS in verify_folder(folders[0])["files"]
    task = FuseTask(tuple(map(str, folders)), (1.0, 1.0), "regmean", 8, str(tmp_path / "fused"))
    report = fuse_folders(task)
    assert all(GRAMS in source for source in report["sources"])
    assert not (tmp_path / "fused" / GRAMS).exists()
    grams = [load_file(folder / GRAMS) for folder in folders]
    assert any(not torch.equal(grams[0][name], grams[1][name]) for name in grams[0])
    raw = bytearray((folders[1] / GRAMS).read_bytes())
    raw[-1] ^= 1
    (folders[1] / GRAMS).write_bytes(raw)
    with pytest.raises(CorruptFolder, match=r"gram\.safetensors does not match"):
        fuse_folders(replace(task, out_dir=str(tmp_path / "again")))
