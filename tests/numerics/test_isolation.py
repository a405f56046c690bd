"""Isolation: what one resident yields changes no bit of another."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import LlamaForCausalLM

from tests.models import make_base, write_rows
from tests.numerics.jobs import adapters, attach, headline_rows, run, three_jobs
from workers.types import BaseSpec, JobSpec, JobStopped, StepDone

POISON = "~"


def base_with_a_poisonous_byte(folder: Path) -> BaseSpec:
    """A base whose embedding of one byte is NaN; the head is untied, so only rows with that byte see it."""
    path = make_base(folder / "base", tie_word_embeddings=False)
    model = LlamaForCausalLM.from_pretrained(path)
    vocabulary = (path / "tokenizer.json").read_text()
    assert f'"{POISON}"' in vocabulary
    from transformers import AutoTokenizer

    token = AutoTokenizer.from_pretrained(path).convert_tokens_to_ids(POISON)
    with torch.no_grad():
        model.get_input_embeddings().weight[token] = float("nan")
    model.save_pretrained(path)
    return BaseSpec(str(path), tokens_per_tick=1024)


def poisoned(job: JobSpec) -> JobSpec:
    """The same job with one byte of some rows replaced by the poisonous one: equal lengths, equal ticks."""
    data = job.train[0]
    rows = headline_rows(job.training.seed, 48, (3, 12))
    for row in rows[::2]:
        row["text"] = POISON + row["text"][1:]
    path = write_rows(Path(data.path).with_name("poisoned.jsonl"), rows)
    checkpoints = job.checkpoint_dir + "-poisoned"
    return replace(job, train=(replace(data, path=str(path)),), checkpoint_dir=checkpoints)


def elsewhere(jobs: list[JobSpec], name: str) -> list[JobSpec]:
    return [replace(job, checkpoint_dir=f"{job.checkpoint_dir}-{name}") for job in jobs]


@pytest.mark.parametrize("world_size", [1, 2])
def test_isolation_nan_data_leaves_the_neighbours_bit_identical(tmp_path, world_size):
    base = base_with_a_poisonous_byte(tmp_path)
    bad, *healthy = three_jobs(tmp_path, steps=12)
    clean = run(base, {0: attach(bad, *healthy)}, world_size)
    dirty = run(base, {0: attach(poisoned(bad), *elsewhere(healthy, "dirty"))}, world_size)

    stopped = [event for event in dirty if isinstance(event, JobStopped)]
    assert [(event.job, event.code) for event in stopped] == [("wide", "diverged")]
    assert "not finite in 3 steps in a row" in stopped[0].message
    skipped = [e.step for e in dirty if isinstance(e, StepDone) and e.job == "wide" and e.skipped]
    assert skipped[-3:] == list(range(stopped[0].step - 2, stopped[0].step + 1))
    assert_bit_identical(adapters(clean), adapters(dirty), ["rslora", "small"])


def assert_bit_identical(expected, found, jobs):
    assert set(jobs) <= found.keys()
    for job in jobs:
        for name, pair in expected[job].factors.items():
            assert torch.equal(found[job].factors[name][0], pair[0]), (job, name)
            assert torch.equal(found[job].factors[name][1], pair[1]), (job, name)
