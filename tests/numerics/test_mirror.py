"""Checkpoints in an object store: told once there, gone on from elsewhere, waited for while it is away."""

from __future__ import annotations

import shutil
import threading
from dataclasses import replace
from pathlib import Path

import pytest

from tests.numerics.jobs import adapters, attach, run, test_base, three_jobs
from tests.numerics.test_resume import assert_same
from tests.numerics.test_saves import killed_while_it_saves
from workers import checkpoint, joins
from workers.host import Host
from workers.manifest import folder_digest, verify_folder
from workers.object_store import ObjectStore
from workers.ranks import Ranks
from workers.types import Attached, CheckpointSaved, Detach, Detached, JobStopped, StepDone, TrainingFinished


@pytest.fixture
def url(s3):
    return f"s3://{s3.bucket()}/home/step"


def mirrored(tmp_path, url, steps=14, saves=100):
    job = three_jobs(tmp_path, steps=steps)[0]
    return replace(job, checkpoint_url=url, training=replace(job.training, saves_per_epoch=saves))


def elsewhere(job, name, attempt=2):
    return replace(job, checkpoint_dir=f"{job.checkpoint_dir}-{name}", attempt=attempt)


def alone(base, job):
    """The adapter of an undisturbed run, without a store."""
    return adapters(run(base, {0: attach(replace(elsewhere(job, "alone", 1), checkpoint_url=""))}))


def held_there(url, prefix="step-"):
    return [stored.name for stored in ObjectStore(url).whole(prefix)]


def to_the_end(host):
    events = []
    while host.busy:
        events += host.tick()
    return events


KILLED = """
import sys
from pathlib import Path
from tests.numerics.jobs import attach, test_base
from tests.numerics.test_mirror import mirrored
from workers.host import Host
from workers.ranks import Ranks
host = Host.load(test_base(Path(sys.argv[1])), Ranks())
for command in attach(mirrored(Path(sys.argv[1]), sys.argv[2], 24)):
    host.apply(command)
while True:
    for event in host.tick():
        print(type(event).__name__, event.step, flush=True)
"""


def test_job_killed_with_its_folder_lost_goes_on_elsewhere_from_the_store_bit_for_bit(tmp_path, url):
    base, job = test_base(tmp_path), mirrored(tmp_path, url, 24)
    undisturbed = alone(base, job)
    saved = killed_while_it_saves(KILLED, tmp_path, url)
    shutil.rmtree(job.checkpoint_dir)
    events = run(base, {0: attach(elsewhere(job, "found"))})
    begun = next(event.step for event in events if isinstance(event, Attached))
    assert saved <= begun <= saved + 2
    told = [event.step for event in events if isinstance(event, StepDone) and event.step > begun]
    assert told == list(range(begun + 1, 25))
    assert_same(adapters(events), undisturbed)
    finished = Path(job.checkpoint_dir + "-found") / "adapter"
    (stored,) = ObjectStore(url).whole("adapter")
    assert stored.digest == folder_digest(finished)
    assert held_there(url) == ["step-000024", "step-000023"]


def test_store_that_goes_away_in_training_stops_its_job_alone_and_nothing_is_lost(tmp_path, url, s3):
    base, job = test_base(tmp_path), mirrored(tmp_path, url)
    other = three_jobs(tmp_path, steps=40)[1]
    undisturbed = {**alone(base, job), **alone(base, other)}
    host, events = Host.load(base, Ranks()), []
    for command in attach(job, other):
        host.apply(command)
    while not any(isinstance(event, CheckpointSaved) and event.job == job.job for event in events):
        events += host.tick()
    with s3.away():
        before = len(events)
        while not any(isinstance(event, JobStopped) for event in events):
            events += host.tick()
        (stopped,) = (event for event in events if isinstance(event, JobStopped))
        assert (stopped.job, stopped.code) == (job.job, "checkpoints_away")
        assert stopped.message.startswith(f"cannot save: {url}: ")
        kept = checkpoint.newest(Path(job.checkpoint_dir))
        events += host.apply(attach(replace(job, attempt=2))[0])
        while len([event for event in events if isinstance(event, JobStopped)]) < 2:
            events += host.tick()
        assert events[-1].message.startswith(f"cannot look for its newest checkpoint: {url}: ")
        during = events[before:]
        assert any(isinstance(event, StepDone) and event.job == other.job for event in during)
    events += host.apply(attach(replace(job, attempt=3))[0])
    events += to_the_end(host)
    (begun,) = (event.step for event in events if isinstance(event, Attached) and event.attempt == 3)
    assert kept == checkpoint.path_of(Path(job.checkpoint_dir), begun), "it goes on from what is on the disk"
    assert_same(adapters(events), undisturbed)
    assert held_there(url) == ["step-000014", "step-000013"]


def test_checkpoint_is_told_once_the_store_has_it_and_meanwhile_a_neighbour_trains(
    tmp_path, url, monkeypatch
):
    job, other = mirrored(tmp_path, url), three_jobs(tmp_path, steps=40)[1]
    go, put = threading.Event(), ObjectStore.put

    def held(self, folder):
        assert go.wait(60)
        put(self, folder)

    monkeypatch.setattr(ObjectStore, "put", held)
    host = Host.load(test_base(tmp_path), Ranks())
    events = []
    for command in attach(job, other):
        events += host.apply(command)
    while not checkpoint.newest(Path(job.checkpoint_dir)):
        events += host.tick()
    events += [event for _ in range(3) for event in host.tick()]
    assert [event.step for event in events if isinstance(event, StepDone) and event.job == job.job] == [1]
    assert max(event.step for event in events if isinstance(event, StepDone)) >= 3
    assert not any(isinstance(event, CheckpointSaved) and event.job == job.job for event in events)
    assert held_there(url) == []
    go.set()
    while not any(isinstance(event, CheckpointSaved) and event.job == job.job for event in events):
        events += host.tick()
    assert held_there(url)
    go.clear()
    threading.Timer(0.2, go.set).start()
    events = host.apply(Detach(job.job, 1))
    assert [type(event) for event in events][-2:] == [CheckpointSaved, Detached]
    assert held_there(url)[0] == f"step-{events[-1].step:06d}"


def test_older_checkpoint_on_the_disk_gives_way_to_a_newer_one_in_the_store(tmp_path, url):
    base, job = test_base(tmp_path), mirrored(tmp_path, url)
    undisturbed = alone(base, job)
    host = Host.load(base, Ranks())
    host.apply(attach(job)[0])
    events = until_saved(host, 3)
    old = elsewhere(job, "old")
    shutil.copytree(job.checkpoint_dir, old.checkpoint_dir)
    events += until_saved(host, 8)
    host.apply(Detach(job.job, 1))
    events = run(base, {0: attach(old)})
    assert next(event.step for event in events if isinstance(event, Attached)) >= 8
    assert_same(adapters(events), undisturbed)


def test_newer_checkpoint_on_the_disk_is_put_into_the_store_before_it_is_gone_on_from(tmp_path, url):
    """Its writer could not: it was killed before, or the store was away."""
    base, job = test_base(tmp_path), mirrored(tmp_path, url)
    host = Host.load(base, Ranks())
    host.apply(attach(replace(job, checkpoint_url=""))[0])
    until_saved(host, 4)
    told = host.apply(Detach(job.job, 1))
    host.apply(attach(replace(job, attempt=2))[0])
    while not any(isinstance(event, Attached) for event in told):
        told += host.tick()
    begun = next(event.step for event in told if isinstance(event, Attached))
    assert held_there(url)[-1] == f"step-{begun:06d}"
    host.close()


def test_torn_checkpoint_in_the_store_is_passed_over(tmp_path, url):
    base, job = test_base(tmp_path), mirrored(tmp_path, url)
    undisturbed = alone(base, job)
    run(base, {0: attach(job)})
    store = ObjectStore(url)
    newest = next(store.whole("step-"))
    weights = f"{newest.place}/optimizer.safetensors"
    content = store._fs.cat_file(weights)
    store._fs.pipe_file(weights, content[:-1] + bytes([content[-1] ^ 1]))
    events = run(base, {0: attach(elsewhere(job, "again"))})
    assert next(event.step for event in events if isinstance(event, Attached)) == 13
    assert_same(adapters(events), undisturbed)


def test_job_whose_rows_are_encoded_beside_the_tick_goes_on_from_the_store(tmp_path, url, monkeypatch):
    base, job = test_base(tmp_path), mirrored(tmp_path, url, 6)
    undisturbed = alone(base, job)
    host = Host.load(base, Ranks())
    host.apply(attach(job)[0])
    until_saved(host, 2)
    host.apply(Detach(job.job, 1))
    monkeypatch.setattr(joins, "AT_ONCE", -1)
    again = elsewhere(job, "again")
    host.apply(attach(again)[0])
    events = to_the_end(host)
    host.close()
    assert next(event.step for event in events if isinstance(event, Attached)) >= 2
    assert_same(adapters(events), undisturbed)
    assert not list(Path(again.checkpoint_dir).glob(".*"))


def until_saved(host, step):
    events = []
    while not any(isinstance(event, CheckpointSaved) and event.step >= step for event in events):
        events += host.tick()
    return events


def test_job_on_two_ranks_is_kept_in_a_store_and_resumed_from_it(tmp_path):
    """Rank 0 alone speaks to the store."""
    base, url = test_base(tmp_path, zero="3"), f"file://{tmp_path}/store/step"
    job = mirrored(tmp_path, url, steps=6)
    undisturbed = adapters(run(base, {0: attach(replace(job, checkpoint_url=""))}, 2))
    begun = elsewhere(job, "begun", 1)
    run(base, {0: attach(begun), 4: [Detach(job.job, 1)]}, 2)
    assert held_there(url)
    events = run(base, {0: attach(elsewhere(job, "resumed"))}, 2)
    assert next(event.step for event in events if isinstance(event, Attached)) > 0
    assert_same(adapters(events), undisturbed)
    (finished,) = (Path(event.adapter_dir) for event in events if isinstance(event, TrainingFinished))
    verify_folder(finished)
