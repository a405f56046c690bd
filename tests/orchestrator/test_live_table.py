"""What a person watching a run sees: pace, time left, and lines where there is no terminal."""

from __future__ import annotations

from dataclasses import replace

import pytest

from orchestrator.commands.live_table import Lines
from orchestrator.commands.progress import JobProgress, RunProgress
from orchestrator.control.submission import new_run
from orchestrator.job import Reason, Status
from orchestrator.plan.plan import make_plan
from orchestrator.recipe.pipeline import load_pipeline
from orchestrator.store.rows import Progress
from orchestrator.store.store import Store
from tests.orchestrator.recipe_files import finance, write_world, write_yaml

pytestmark = pytest.mark.usefixtures("unsynced")


@pytest.fixture
def submitted(tmp_path):
    """A store with one job that trains, its id, and a progress whose clock the test sets."""
    path = write_yaml(write_world(tmp_path / "world") / "finance.yaml", finance(max_steps=100))
    plan = make_plan(load_pipeline(path))
    store = Store.open(tmp_path / "chorus.db")
    job = store.jobs(store.submit(new_run(plan)))[0].id
    store.steps.finish(plan.jobs[0].step("evaluate_base").id, "evaluate_base", job, {})
    store.switch_status(job, Reason.PLACED, host="host-1")
    store.switch_status(job, Reason.ATTACHED)
    now = [0.0]
    yield store, job, RunProgress(store, store.job(job).run, clock=lambda: now[0]), now
    store.close()


def test_progress_tells_time_left_from_the_pace_of_this_attempt(submitted):
    store, job, progress, now = submitted
    store.write_progress(job, 1, Progress(20, 100))
    assert progress.look()[0].seconds_left is None
    now[0] = 10.0
    store.write_progress(job, 1, Progress(40, loss=0.5, tokens_per_second=100.0))
    (seen,) = progress.look()
    assert (seen.doing, seen.steps, seen.loss) == ("trains", "40/100", 0.5)
    assert seen.seconds_left == pytest.approx(30.0)


def test_progress_of_a_new_attempt_forgets_the_old_pace(submitted):
    store, job, progress, now = submitted
    store.write_progress(job, 1, Progress(20, 100))
    progress.look()
    store.switch_status(job, Reason.HOST_LOST, "rank 1 died")
    assert progress.look()[0].doing == "its host was lost; goes on from the last checkpoint: rank 1 died"
    store.switch_status(job, Reason.PLACED, host="host-2")
    store.switch_status(job, Reason.ATTACHED)
    now[0] = 50.0
    store.write_progress(job, 2, Progress(30, 100))
    assert progress.look()[0].seconds_left is None


class Script:
    """A progress that shows what a test has written down."""

    def __init__(self, *looks: JobProgress) -> None:
        self.looks = list(looks)

    def look(self) -> tuple[JobProgress, ...]:
        return (self.looks.pop(0),)


def at(step: int, status: Status = Status.RUNNING, doing: str = "trains") -> JobProgress:
    return JobProgress("finance", "sentiment", status, doing, step, 100, 0.25, 1500.0, 65.0)


def test_lines_are_one_a_change_and_one_every_ten_seconds_of_training():
    said, now = [], [0.0]
    looks = [
        at(1),
        at(2),
        at(60),
        at(61),
        at(100, doing="scores the adapter"),
        at(100, Status.SUCCEEDED, "done"),
    ]
    lines = Lines(Script(*looks), said.append, clock=lambda: now[0])
    for second in (0, 5, 11, 20, 40, 75):
        now[0] = float(second)
        lines.look()
    assert said == [
        "[0:00] finance RUNNING: trains",
        "[0:11] finance step 60/100, loss 0.25, 1,500 tokens/s, 1:05 left",
        "[0:40] finance RUNNING: scores the adapter",
        "[1:15] finance SUCCEEDED: done",
    ]


def test_lines_of_a_job_that_counts_are_one_every_ten_seconds():
    said, now = [], [0.0]
    looks = [replace(at(0, doing="fuses"), counted=f"fuse {done}/224") for done in (1, 40, 120)]
    lines = Lines(Script(*looks), said.append, clock=lambda: now[0])
    for second in (0, 5, 11):
        now[0] = float(second)
        lines.look()
    assert said == ["[0:00] finance RUNNING: fuses", "[0:11] finance fuse 120/224"]
