"""Saving off the tick's path: training goes on meanwhile, and nothing is told before it is durable."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import pytest

from tests.numerics.jobs import adapters, attach, job, run, test_base, three_jobs
from tests.numerics.test_resume import assert_same
from workers import checkpoint
from workers.host import Host
from workers.order import steps_per_epoch
from workers.ranks import Ranks
from workers.types import (
    AdapterSpec,
    Attached,
    CheckpointSaved,
    Detach,
    Detached,
    JobStopped,
    StepDone,
    TrainingFinished,
    TrainingSpec,
)


def saving_often(tmp_path, steps=14):
    job = three_jobs(tmp_path, steps=steps)[0]
    return replace(job, training=replace(job.training, saves_per_epoch=100))


@pytest.fixture
def held(monkeypatch):
    """Writes of checkpoints wait until this is set."""
    go, write = threading.Event(), checkpoint.save

    def save(*arguments):
        assert go.wait(60)
        return write(*arguments)

    monkeypatch.setattr(checkpoint, "save", save)
    yield go
    go.set()


def test_a_slow_disk_holds_up_no_neighbour_and_a_checkpoint_is_told_when_durable(tmp_path, held):
    slow, other, _ = three_jobs(tmp_path, steps=14)
    slow = replace(slow, training=replace(slow.training, saves_per_epoch=1, max_steps=1))
    host = Host.load(test_base(tmp_path), Ranks())
    for command in attach(slow, other):
        host.apply(command)
    events = [event for _ in range(4) for event in host.tick()]
    assert {event.step for event in events if isinstance(event, StepDone) and event.job == other.job} >= {
        1,
        2,
    }
    assert not any(isinstance(event, CheckpointSaved | TrainingFinished) for event in events)
    assert slow.job not in host.residents
    held.set()
    while host.busy:
        events += host.tick()
    told = [type(event) for event in events if event.job == slow.job]
    assert told[-2:] == [CheckpointSaved, TrainingFinished]


def test_a_job_gets_one_step_ahead_of_a_slow_disk_and_its_neighbour_goes_on(tmp_path, held):
    """Else a kill would undo more than what lies between two checkpoints, and one step."""
    slow, other, _ = three_jobs(tmp_path, steps=40)
    other = replace(other, training=replace(other.training, saves_per_epoch=0))
    host = Host.load(test_base(tmp_path), Ranks())
    for command in attach(slow, other):
        host.apply(command)
    begun = steps_per_epoch(host.residents[slow.job].train_rows, slow.training.global_batch_size)
    events = [event for _ in range(16) for event in host.tick()]
    assert host.residents[slow.job].step == begun + 1
    assert host.residents[other.job].step > begun + 1
    held.set()
    while host.residents[slow.job].step < begun + 2:
        events += host.tick()
    assert next(event.step for event in events if isinstance(event, CheckpointSaved)) == begun


def test_a_detach_waits_for_what_is_under_way(tmp_path, held):
    job = saving_often(tmp_path)
    host = Host.load(test_base(tmp_path), Ranks())
    for command in attach(job):
        host.apply(command)
    host.tick()
    threading.Timer(0.2, held.set).start()
    events = host.apply(Detach(job.job, 1))
    assert [type(event) for event in events][-2:] == [CheckpointSaved, Detached]
    step = events[-1].step
    assert checkpoint.newest(Path(job.checkpoint_dir)) == checkpoint.path_of(Path(job.checkpoint_dir), step)
    assert not host.busy


def test_a_close_waits_for_what_is_under_way_and_tells_of_it(tmp_path, held):
    job = saving_often(tmp_path)
    host = Host.load(test_base(tmp_path), Ranks())
    for command in attach(job):
        host.apply(command)
    host.tick()
    threading.Timer(0.2, held.set).start()
    assert any(isinstance(event, CheckpointSaved) for event in host.close())


def test_a_write_that_fails_stops_its_job_alone_and_keeps_its_last_checkpoint(tmp_path, monkeypatch):
    job, other, _ = three_jobs(tmp_path, steps=14)
    job = replace(job, training=replace(job.training, saves_per_epoch=100))
    write = checkpoint.save

    def save(folder, state, digest):
        if state.progress.step >= 3 and str(folder) == job.checkpoint_dir:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(folder, state, digest)

    monkeypatch.setattr(checkpoint, "save", save)
    events = run(test_base(tmp_path), {0: attach(job, other)})
    (stopped,) = [event for event in events if isinstance(event, JobStopped)]
    assert (stopped.job, stopped.code) == (job.job, "disk_full")
    assert "No space left" in stopped.message
    assert not any(isinstance(event, TrainingFinished) and event.job == job.job for event in events)
    newest = checkpoint.newest(Path(job.checkpoint_dir))
    assert newest is not None
    assert newest.name == "step-000002"
    assert adapters(events).keys() == {other.job}


def test_a_job_whose_failed_write_is_heard_of_while_a_neighbour_ends_its_step_ends_none_itself(
    tmp_path, monkeypatch
):
    """One diverges and waits for its own save; with that comes the failure of another's."""
    go, written, write = threading.Event(), threading.Event(), checkpoint.save

    def save(folder, state, digest):
        assert go.wait(60)
        if Path(folder).name == "full":
            raise OSError(errno.ENOSPC, "No space left on device")
        if Path(folder).name == "last":
            written.set()  # one thread writes, in the order of asking
        return write(folder, state, digest)

    monkeypatch.setattr(checkpoint, "save", save)
    training = TrainingSpec(1e-3, 24, 256, num_epochs=2, saves_per_epoch=1, max_bad_steps=1)
    diverges, full, last = (
        job(tmp_path, name, AdapterSpec(2, 4), training, (3, 4)) for name in ("diverges", "full", "last")
    )
    host = Host.load(test_base(tmp_path, tokens_per_tick=4096), Ranks())
    for command in attach(diverges, full, last):
        host.apply(command)
    for _ in range(2):  # all three begin to save
        host.tick()
    bad = host.residents["diverges"].optimizer
    step = bad.step

    def step_once_all_is_written():
        bad.slot.weights.grad.fill_(float("nan"))
        go.set()
        assert written.wait(60)
        return step()

    monkeypatch.setattr(bad, "step", step_once_all_is_written)
    events = host.tick()
    assert [type(event) for event in events if event.job == "full"] == [JobStopped]
    (stopped,) = [event for event in events if isinstance(event, JobStopped) and event.job == "diverges"]
    assert stopped.code == "diverged"
    while host.busy:
        events += host.tick()
    assert adapters(events).keys() == {"last"}


KILLED = """
import sys
from pathlib import Path
from tests.numerics.jobs import attach, test_base
from tests.numerics.test_saves import saving_often
from workers.host import Host
from workers.ranks import Ranks
host = Host.load(test_base(Path(sys.argv[1])), Ranks())
for command in attach(saving_often(Path(sys.argv[1]), 24)):
    host.apply(command)
while True:
    for event in host.tick():
        print(type(event).__name__, event.step, flush=True)
"""


def killed_while_it_saves(code: str, *arguments: object) -> int:
    """The last step of which a process, killed once it has told of five saves, said that it is saved."""
    command = [sys.executable, "-c", code, *map(str, arguments)]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=os.environ.copy())
    assert child.stdout is not None
    saved: list[int] = []
    for line in child.stdout:
        if line.startswith("CheckpointSaved"):
            saved.append(int(line.split()[1]))
        if len(saved) == 5:
            break
    os.kill(child.pid, signal.SIGKILL)  # saving never stops here: it dies in the middle of one
    child.wait()
    return saved[-1]


def test_a_process_killed_while_it_saves_leaves_no_torn_checkpoint_and_resumes_bit_for_bit(tmp_path):
    job = saving_often(tmp_path, 24)
    base = test_base(tmp_path)
    undisturbed = adapters(run(base, {0: attach(replace(job, checkpoint_dir=job.checkpoint_dir + "-alone"))}))

    told = killed_while_it_saves(KILLED, tmp_path)
    newest = checkpoint.newest(Path(job.checkpoint_dir))
    assert newest is not None
    assert int(newest.name.removeprefix("step-")) >= told
    events = run(base, {0: attach(replace(job, attempt=2))})
    assert next(event.step for event in events if isinstance(event, Attached)) >= told
    assert_same(adapters(events), undisturbed)
