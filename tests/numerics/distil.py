"""Distillation on the test base: two parents, their student, and the plain PEFT loop it is held to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.optimization import get_scheduler

from tests.models import write_rows
from tests.numerics.jobs import attach, headline_rows, run
from tests.numerics.reference import DTYPES, Trained, _get_factors
from workers.adapter import Adapter, read_adapter
from workers.compose import padded_length
from workers.data import encode_all
from workers.factor_file import PREFIX
from workers.order import batch_samples, num_steps
from workers.rows import Row
from workers.types import (
    AdapterSpec,
    BaseSpec,
    DatasetSpec,
    DistillSpec,
    JobSpec,
    Teacher,
    TrainingFinished,
    TrainingSpec,
)

STEPS = 20


def parents(folder: Path, base: BaseSpec) -> tuple[Teacher, Teacher]:
    """Two adapters of other ranks, alphas and rows, far enough from the base to have something to teach."""
    specs = [
        _parent(folder, "left", AdapterSpec(4, 8), (3, 9), seed=11),
        _parent(folder, "right", AdapterSpec(6, 6, target_modules=("q_proj", "down_proj")), (1, 5), seed=12),
    ]
    events = run(replace(base, zero="none"), {0: attach(*specs)})
    made = {event.job: event.adapter_dir for event in events if isinstance(event, TrainingFinished)}
    left, right = specs
    return (
        Teacher(made["left"], left.train, (), batch_size=3, weight=1.0),
        Teacher(made["right"], right.train, (), batch_size=5, weight=2.0),
    )


def _parent(folder: Path, name: str, adapter: AdapterSpec, words: tuple[int, int], seed: int) -> JobSpec:
    path = write_rows(folder / f"{name}.jsonl", headline_rows(seed, 40, words))
    data = DatasetSpec(str(path), "classification", labels=("negative", "neutral", "positive"))
    training = TrainingSpec(2e-2, 8, 256, max_steps=12, seed=seed)
    return JobSpec(name, 1, adapter, training, (data,), (), str(folder / "parents" / name))


def student(folder: Path, teachers: Sequence[Teacher], name: str = "student", **changes: Any) -> JobSpec:
    """A student of `teachers`; `changes` are fields of its `DistillSpec`."""
    training = TrainingSpec(
        1e-2, sum(teacher.batch_size for teacher in teachers), 256, max_steps=STEPS, warmup_ratio=0.1, seed=5
    )
    distill = replace(DistillSpec(tuple(teachers), temperature=2.0, labels=0.25), **changes)
    return JobSpec(
        name, 1, AdapterSpec(8, 16), training, (), (), str(folder / "students" / name), distill=distill
    )


def distil_alone(base: BaseSpec, job: JobSpec, first: Adapter) -> Trained:
    """Plain PEFT: the student and its teachers are adapters of one model, switched by name."""
    assert job.distill is not None
    model = AutoModelForCausalLM.from_pretrained(base.path, dtype=DTYPES[base.dtype])
    tokenizer = AutoTokenizer.from_pretrained(base.path)
    model = get_peft_model(model, _config(first), autocast_adapter_dtype=base.dtype != "float64")
    _fill(model, "default", first)
    for number, teacher in enumerate(job.distill.teachers):
        adapter = read_adapter(Path(teacher.adapter_dir))
        model.add_adapter(f"teacher{number}", _config(adapter))
        _fill(model, f"teacher{number}", adapter)
    model.set_adapter("default")
    trainable = [p for name, p in model.named_parameters() if ".default." in name]
    training = job.training
    rows = [encode_all(tokenizer, teacher.train, training.sequence_len) for teacher in job.distill.teachers]
    total = num_steps(training, sum(map(len, rows)))
    adamw = torch.optim.AdamW(trainable, lr=training.learning_rate, weight_decay=training.weight_decay)
    schedule = get_scheduler("cosine", adamw, round(training.warmup_ratio * total), total)
    losses = []
    for step in range(total):
        losses.append(sum(_teach(model, job, number, rows[number], step) for number in range(len(rows))))
        torch.nn.utils.clip_grad_norm_(trainable, training.max_grad_norm)
        adamw.step()
        adamw.zero_grad()
        schedule.step()
    return Trained(losses, _get_factors(model))


def _teach(model: Any, job: JobSpec, number: int, rows: list[Row], step: int) -> float:
    """One teacher's part of a step, backward included, written out over full logits."""
    distill, seed = job.distill, job.training.seed
    assert distill is not None
    teacher = distill.teachers[number]
    batch = [rows[i] for i in batch_samples(seed, step, len(rows), teacher.batch_size)]
    length = padded_length(max(len(row.input_ids) for row in batch))
    input_ids = torch.tensor([[*row.input_ids, *[0] * (length - len(row.input_ids))] for row in batch])
    labels = torch.tensor([[*row.labels, *[-100] * (length - len(row.labels))] for row in batch])[:, 1:]
    wanted = labels != -100
    model.set_adapter(f"teacher{number}")
    with torch.no_grad():
        theirs = model(input_ids=input_ids).logits[:, :-1][wanted]
    model.set_adapter("default")
    own = model(input_ids=input_ids).logits[:, :-1][wanted]
    soft = F.softmax(theirs / distill.temperature, 1)
    apart = (soft * (soft.log() - F.log_softmax(own / distill.temperature, 1))).sum(1).mean()
    hard = F.cross_entropy(own, labels[wanted])
    share = teacher.weight / sum(other.weight for other in distill.teachers)
    loss = share * (distill.labels * hard + (1 - distill.labels) * distill.temperature**2 * apart)
    loss.backward()
    return float(loss.detach())


def _config(adapter: Adapter) -> LoraConfig:
    targets = list(adapter.target_modules) or list(adapter.factors)
    return LoraConfig(
        r=adapter.r, lora_alpha=adapter.lora_alpha, target_modules=targets, task_type="CAUSAL_LM"
    )


def _fill(model: Any, name: str, adapter: Adapter) -> None:
    state = dict(model.named_parameters())
    with torch.no_grad():
        for module, (a, b) in adapter.factors.items():
            state[f"{PREFIX}{module}.lora_A.{name}.weight"].copy_(a)
            state[f"{PREFIX}{module}.lora_B.{name}.weight"].copy_(b)
