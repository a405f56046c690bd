"""What the orchestrator relies on, asked of both clusters: two ZeRO-3 ranks on Ray, one in process."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from orchestrator.cluster.local import LocalCluster
from tests.adapters import SHAPES, random_adapter
from tests.integration.conftest import poll_until, task_end
from workers.adapter import read_adapter, write_adapter
from workers.manifest import verify_folder
from workers.types import (
    Attach,
    Attached,
    CheckpointSaved,
    Detach,
    Detached,
    Evaluate,
    EvaluationDone,
    EvaluationFailed,
    EvaluationSpec,
    FuseTask,
    HostReady,
    JobStopped,
    Progress,
    StepDone,
    TrainingFinished,
    Validated,
)

WORLD_SIZES = {"ray": 2, "local": 1}


@pytest.fixture(scope="module", params=WORLD_SIZES)
def kind(request):
    return request.param


@pytest.fixture(scope="module")
def cluster(kind, request):
    if kind == "ray":
        yield request.getfixturevalue("ray_cluster")
    else:
        local = LocalCluster()
        yield local
        local.close()


@pytest.fixture(scope="module")
def host(kind, cluster, base):
    """A host that has reported itself ready, with this one event."""
    cluster.start_host("contract", base, WORLD_SIZES[kind])
    events = poll_until(cluster, "contract", lambda event: isinstance(event, HostReady))
    assert [(event.world_size, event.zero) for event in events] == [
        (WORLD_SIZES[kind], "3" if kind == "ray" else "none")
    ]
    yield "contract"
    cluster.stop_host("contract")


def of(events, kind):
    return [event for event in events if isinstance(event, kind)]


def trained(cluster, host, *specs):
    """Attach `specs` and collect events until all have finished."""
    for spec in specs:
        cluster.send(host, Attach(spec))
    events, names = [], {spec.job for spec in specs}
    while names:
        events += poll_until(cluster, host, lambda event: isinstance(event, TrainingFinished))
        names -= {event.job for event in of(events, TrainingFinished)}
    return events


def test_cluster_capacity_while_a_host_runs_leaves_its_ranks_out(cluster, host):
    assert cluster.capacity().cpus == 0.0


def test_cluster_jobs_attached_together_report_every_step_once_and_in_order(cluster, host, jobs):
    events = trained(cluster, host, *jobs)
    for spec in jobs:
        own = [event for event in events if event.job == spec.job]
        assert isinstance(own[0], Attached)
        assert isinstance(own[-1], TrainingFinished)
        assert [event.step for event in of(own, StepDone)] == [1, 2, 3, 4]
        assert of(own, Validated)
        assert of(own, CheckpointSaved)
        assert read_adapter(Path(own[-1].adapter_dir)).r == spec.adapter.r


def test_cluster_detached_job_goes_on_from_its_checkpoint_in_the_next_attempt(cluster, host, jobs):
    spec = replace(jobs[0], training=replace(jobs[0].training, max_steps=100_000))
    cluster.send(host, Attach(spec))
    poll_until(cluster, host, lambda event: isinstance(event, StepDone) and event.step >= 2)
    cluster.send(host, Detach(spec.job, spec.attempt))
    (left,) = of(poll_until(cluster, host, lambda event: isinstance(event, Detached)), Detached)
    cluster.send(host, Attach(replace(spec, attempt=2)))
    (back,) = of(poll_until(cluster, host, lambda event: isinstance(event, Attached)), Attached)
    assert (back.attempt, back.step) == (2, left.step)
    cluster.send(host, Detach(spec.job, 2))
    poll_until(cluster, host, lambda event: isinstance(event, Detached))


def test_cluster_evaluate_scores_base_and_adapter_and_refuses_a_missing_folder(cluster, host, jobs):
    (finished,) = of(trained(cluster, host, jobs[0]), TrainingFinished)
    evaluation = EvaluationSpec((replace(jobs[0].train[0], max_samples=6),), 256)
    for request, folder in (("base", None), ("adapter", finished.adapter_dir), ("lost", "nowhere")):
        cluster.send(host, Evaluate(request, folder, evaluation))
    events = poll_until(cluster, host, lambda event: isinstance(event, EvaluationFailed))
    reports = {event.request: event.report for event in of(events, EvaluationDone)}
    assert {request: report.rows for request, report in reports.items()} == {"base": 6, "adapter": 6}
    assert reports["base"].metrics != reports["adapter"].metrics
    assert [event.request for event in of(events, EvaluationFailed)] == ["lost"]


def test_cluster_job_with_bad_data_is_stopped_and_the_host_goes_on(cluster, host, jobs):
    lost = replace(jobs[0], train=(replace(jobs[0].train[0], path="nowhere.jsonl"),))
    cluster.send(host, Attach(lost))
    (stopped,) = of(poll_until(cluster, host, lambda event: isinstance(event, JobStopped)), JobStopped)
    assert stopped.code == "bad_data"
    assert "nowhere.jsonl" in stopped.message
    trained(cluster, host, jobs[1])


def test_cluster_task_runs_beside_a_host_that_holds_every_cpu(cluster, host, jobs, tmp_path):
    (finished,) = of(trained(cluster, host, jobs[0]), TrainingFinished)
    out = tmp_path / "fused"
    cluster.submit_task("fuse", FuseTask((finished.adapter_dir,), (1.0,), "cat", None, str(out)))
    result = task_end(cluster, "fuse")
    assert (result.error, result.refused) == (None, False)
    assert result.value
    verify_folder(out)


def test_cluster_task_tells_how_far_it_is(cluster, tmp_path):
    (tmp_path / "adapter").mkdir()
    write_adapter(random_adapter(1), tmp_path / "adapter")
    assert cluster.task_progress("counted") is None
    for out in ("once", "twice"):
        task = FuseTask((str(tmp_path / "adapter"),), (1.0,), "cat", None, str(tmp_path / out))
        cluster.submit_task("counted", task)
        assert task_end(cluster, "counted").error is None
        assert cluster.task_progress("counted") == Progress(len(SHAPES), len(SHAPES))
        cluster.forget_task("counted")
        assert cluster.task_progress("counted") is None


def test_cluster_task_that_is_wrong_is_refused_in_one_sentence(cluster, tmp_path):
    cluster.submit_task("wrong", FuseTask((str(tmp_path),), (1.0,), "cat", None, str(tmp_path / "fused")))
    wrong = task_end(cluster, "wrong")
    assert wrong.refused
    assert wrong.error == f"{tmp_path} is not an adapter: it has no adapter_config.json"


def test_cluster_task_that_fails_is_not_called_the_users_fault(cluster, host, jobs, tmp_path):
    (finished,) = of(trained(cluster, host, jobs[0]), TrainingFinished)
    (tmp_path / "taken").write_text("")
    taken = str(tmp_path / "taken" / "fused")
    cluster.submit_task("taken", FuseTask((finished.adapter_dir,), (1.0,), "cat", None, taken))
    failed = task_end(cluster, "taken")
    assert not failed.refused
    assert failed.error.startswith(("NotADirectoryError", "FileExistsError"))


def test_cluster_host_that_is_gone_takes_commands_and_stops_in_silence(cluster):
    cluster.send("never", Detach("a", 1))
    assert cluster.poll("never") == ()
    cluster.stop_host("never")
