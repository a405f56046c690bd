"""A host of two ranks killed, and what it had on its disk lost: the next one goes on from S3, bit for bit."""

from __future__ import annotations

import shutil
import signal
from dataclasses import replace

from tests.integration.conftest import poll_until
from tests.integration.test_cluster_faults import SECONDS, ranks
from tests.numerics.jobs import adapters
from tests.numerics.test_resume import assert_same
from workers.object_store import ObjectStore
from workers.types import Attach, Attached, CheckpointSaved, HostFailed, HostReady, TrainingFinished


def finish(cluster, host, job):
    cluster.send(host, Attach(job))
    return poll_until(cluster, host, lambda event: isinstance(event, TrainingFinished))


def start(cluster, host, base):
    cluster.start_host(host, base, 2)
    poll_until(cluster, host, lambda event: isinstance(event, HostReady))


def test_cluster_host_killed_with_its_folder_lost_is_gone_on_from_s3(ray_cluster, base, jobs, s3):
    plain = replace(jobs[0], training=replace(jobs[0].training, max_steps=14, saves_per_epoch=3))
    lost, found = (f"{plain.checkpoint_dir}-{name}" for name in ("lost", "found"))
    job = replace(plain, checkpoint_url=f"s3://{s3.bucket()}/step", checkpoint_dir=lost)
    start(ray_cluster, "first", base)
    undisturbed = adapters(finish(ray_cluster, "first", plain))
    ray_cluster.send("first", Attach(job))
    poll_until(ray_cluster, "first", lambda event: isinstance(event, CheckpointSaved))
    for process in ranks():
        process.send_signal(signal.SIGKILL)
    poll_until(ray_cluster, "first", lambda event: isinstance(event, HostFailed), SECONDS)
    shutil.rmtree(job.checkpoint_dir)

    start(ray_cluster, "second", base)
    again = replace(job, attempt=2, checkpoint_dir=found)
    events = finish(ray_cluster, "second", again)
    assert next(event.step for event in events if isinstance(event, Attached)) >= 2
    assert_same(adapters(events), undisturbed)
    assert [stored.name for stored in ObjectStore(job.checkpoint_url).whole("")] == [
        "step-000014",
        "step-000012",
        "adapter",
    ]
    ray_cluster.stop_host("second")
