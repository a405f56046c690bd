"""The sample ledger: what a job that is killed again and again has trained on, draw by draw.

A real host trains a real job on a small random base. Each step that begins writes its rows into a ledger. A
step that was begun again after a crash stands in it more than once; the last time counts, as a crash undid
the others. In every epoch each row must occur once, every repetition must be the same, and the adapter must
be the undisturbed run's, byte for byte: nothing but (seed, epoch, step) says what is drawn.
"""

from __future__ import annotations

import json
import os
import random
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import torch

from tests.bench.record import Bars, Outcome, Table, Target
from tests.chaos.processes import forked, killed_when
from tests.models import write_rows
from tests.numerics.jobs import headline_rows
from tests.numerics.jobs import test_base as random_base
from workers import resident
from workers.host import Host
from workers.order import batch_samples, steps_per_epoch
from workers.ranks import Ranks
from workers.types import AdapterSpec, Attach, BaseSpec, DatasetSpec, JobSpec, TrainingSpec

BATCH = 64


def train(base: BaseSpec, job: JobSpec, ledger: Path) -> None:
    """Train the job from its newest checkpoint to its end; every step goes into the ledger."""
    told = os.open(ledger, os.O_WRONLY | os.O_APPEND | os.O_CREAT)

    def drawn(seed: int, step: int, rows: int, batch: int) -> list[int]:
        samples = batch_samples(seed, step, rows, batch)
        os.write(told, json.dumps([step, samples]).encode() + b"\n")
        return samples

    resident.batch_samples = drawn
    host = Host.load(base, Ranks())
    host.apply(Attach(job))
    while host.busy:
        host.tick()


def read(ledger: Path) -> tuple[dict[int, list[int]], int, int]:
    """Step -> the rows that count; how many steps were begun again; how many of those drew other rows."""
    drawn: dict[int, list[int]] = {}
    again = other = 0
    for line in ledger.read_text().splitlines():
        step, samples = json.loads(line)
        again += step in drawn
        other += drawn.get(step, samples) != samples
        drawn[step] = samples
    return drawn, again, other


def lines(ledger: Path) -> int:
    return ledger.read_bytes().count(b"\n")


def miscounted(drawn: dict[int, list[int]], rows: int, epochs: int) -> tuple[int, int]:
    """(missing, doubled) draws over all epochs."""
    missing = doubled = 0
    size = steps_per_epoch(rows, BATCH)
    for epoch in range(epochs):
        counted = Counter(
            row for step in range(epoch * size, (epoch + 1) * size) for row in drawn.get(step, [])
        )
        missing += sum(counted[row] == 0 for row in range(rows))
        doubled += sum(max(counted[row] - 1, 0) for row in range(rows)) + sum(row >= rows for row in counted)
    return missing, doubled


def make_job(folder: Path, rows: int, epochs: int) -> JobSpec:
    """An epoch is no whole number of batches, and a checkpoint no whole number of epochs."""
    data = DatasetSpec(
        str(write_rows(folder / "rows.jsonl", headline_rows(7, rows, (1, 2)))),
        "classification",
        labels=("negative", "neutral", "positive"),
    )
    training = TrainingSpec(1e-3, BATCH, 64, num_epochs=epochs, seed=11, saves_per_epoch=3)
    return JobSpec(
        "drawn", 1, AdapterSpec(r=2, lora_alpha=2), training, (data,), (), str(folder / "checkpoints")
    )


def case(folder: Path, small: bool, seed: int) -> Outcome:
    rows, epochs, crashes = (301, 6, 4) if small else (1003, 100, 50)
    torch.set_num_threads(1)
    chance, began = random.Random(seed), time.monotonic()
    base = random_base(folder)
    job = make_job(folder, rows, epochs)
    undisturbed = replace(job, checkpoint_dir=str(folder / "undisturbed"))
    calm = time.monotonic()
    assert os.waitpid(forked(lambda: train(base, undisturbed, folder / "calm")), 0)[1] == 0
    calm = time.monotonic() - calm
    ledger = folder / "ledger"
    ledger.touch()
    # So that the last crash still finds something to do.
    most = int(0.8 * epochs * steps_per_epoch(rows, BATCH) / crashes)
    for _ in range(crashes):
        due = lines(ledger) + chance.randint(1, most)
        child = forked(lambda: train(base, job, ledger), folder / "out")
        assert killed_when(child, lambda due=due: lines(ledger) >= due), "it had done all before the crash"
    assert os.waitpid(forked(lambda: train(base, job, ledger)), 0)[1] == 0
    drawn, again, other = read(ledger)
    missing, doubled = miscounted(drawn, rows, epochs)
    same = adapter(job) == adapter(undisturbed)
    draws = sum(map(len, drawn.values()))
    return Outcome(
        "chaos-draws",
        f"{draws:,} draws over {crashes} crashes",
        [
            Table(
                "The ledger",
                ("what", "how many"),
                [
                    ("rows", rows),
                    ("epochs", epochs),
                    ("steps", len(drawn)),
                    ("steps begun again after a crash", again),
                    ("seconds undisturbed", f"{calm:.0f}"),
                ],
            )
        ],
        [
            Target("draws", draws, 1 if small else 100_000),
            Target("crashes", crashes, 1 if small else 50),
            Target("rows missing from an epoch", missing, 0, at_least=False),
            Target("rows doubled in an epoch", doubled, 0, at_least=False),
            Target("steps that drew other rows when begun again", other, 0, at_least=False),
            Target("the adapter is the undisturbed run's, byte for byte (1: yes)", float(same), 1),
        ],
        Bars({"steps": float(len(drawn)), "steps begun again": float(again)}, "steps"),
        [f"It took {time.monotonic() - began:.0f} s; seed {seed}."],
    )


def adapter(job: JobSpec) -> bytes:
    return (Path(job.checkpoint_dir) / "adapter" / "adapter_model.safetensors").read_bytes()
