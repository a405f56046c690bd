"""Joining beside the tick: the same bits, and no neighbour waits for another job's rows to be encoded."""

from __future__ import annotations

import os
import signal
import threading
from dataclasses import replace
from pathlib import Path

import pytest

from tests.models import write_rows
from tests.numerics.distil import parents, student
from tests.numerics.jobs import (
    adapters,
    assert_same_bits,
    attach,
    drive,
    headline_rows,
    run,
    test_base,
    three_jobs,
)
from tests.numerics.pair import two_ranks
from workers import encoder, joins
from workers.encoded import encode, read, sources
from workers.encoder import Encoder
from workers.host import Host
from workers.joins import Joins
from workers.ranks import Ranks
from workers.types import Attached, Detach, Detached, JobStopped, StepDone, Validated


@pytest.fixture
def beside(monkeypatch):
    """All data is encoded beside the tick."""
    monkeypatch.setattr(joins, "AT_ONCE", -1)


@pytest.fixture
def held(monkeypatch, beside):
    """As `beside`, and no job's rows are encoded before this is set."""
    go, encode = threading.Event(), Encoder.encode

    def waiting(self, spec, out):
        assert go.wait(60)
        return encode(self, spec, out)

    monkeypatch.setattr(Encoder, "encode", waiting)
    yield go
    go.set()


def validated(job):
    return replace(job, validation=job.train, training=replace(job.training, evals_per_epoch=1))


def scratch(*jobs):
    return [path for job in jobs for path in Path(job.checkpoint_dir).glob(".*")]


def closing(base, script, ranks=Ranks()):  # noqa: B008
    """The script through a host that is closed, and its encoder ended."""
    host = Host.load(base, ranks)
    events = drive(host, script)
    host._joins.close()
    return events


def host_of(tmp_path, **overrides):
    return Host.load(test_base(tmp_path, **overrides), Ranks())


def test_jobs_encoded_beside_the_tick_get_the_bits_of_jobs_encoded_at_once(tmp_path, beside):
    base, jobs = test_base(tmp_path), [validated(job) for job in three_jobs(tmp_path, steps=8)]
    script = {0: attach(*jobs[:2]), 3: attach(jobs[2])}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(joins, "AT_ONCE", 1 << 30)
        at_once = closing(base, script)
    jobs = [replace(job, checkpoint_dir=job.checkpoint_dir + "-beside") for job in jobs]
    found = closing(base, {0: attach(*jobs[:2]), 3: attach(jobs[2])})
    for name, adapter in adapters(at_once).items():
        assert_same_bits(adapters(found)[name].factors, adapter.factors, name)
    for kind in (StepDone, Validated):
        told = [
            {(e.job, e.step): e.loss for e in events if isinstance(e, kind)} for events in (at_once, found)
        ]
        assert told[0] == told[1]
    assert not scratch(*jobs)


def joins_on(ranks, base, script):
    joins.AT_ONCE = -1
    try:
        return closing(base, script, ranks)
    finally:
        joins.AT_ONCE = 32 * 1024


def test_a_job_becomes_resident_on_two_ranks_at_the_same_tick(tmp_path):
    """Else the ranks would train different passes, and hang in a gather."""
    base, jobs = test_base(tmp_path, zero="3"), three_jobs(tmp_path, steps=6)
    alone = adapters(run(base, {0: attach(*jobs)}, 2))
    jobs = [replace(job, checkpoint_dir=job.checkpoint_dir + "-beside") for job in jobs]
    found = adapters(two_ranks(joins_on, base, {0: attach(jobs[0]), 2: attach(*jobs[1:])}))
    for name, adapter in alone.items():
        assert_same_bits(found[name].factors, adapter.factors, name)


def test_a_neighbour_trains_on_while_a_job_is_encoded_and_the_job_joins_once_it_is(
    tmp_path, held, monkeypatch
):
    first, late, _ = three_jobs(tmp_path, steps=40)
    host = host_of(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(joins, "AT_ONCE", 1 << 30)
        host.apply(attach(first)[0])
    assert host.apply(attach(late)[0]) == []
    events = [event for _ in range(4) for event in host.tick()]
    assert max(event.step for event in events if isinstance(event, StepDone)) == 4
    assert list(host.residents) == [first.job]
    held.set()
    while late.job not in host.residents:
        events += host.tick()
    assert any(isinstance(event, Attached) and event.job == late.job for event in events)
    host.close()


def test_a_job_that_resumes_goes_on_from_its_checkpoint(tmp_path, beside):
    job = three_jobs(tmp_path, steps=10)[0]
    base, alone = test_base(tmp_path), replace(job, checkpoint_dir=job.checkpoint_dir + "-alone")
    undisturbed = adapters(closing(base, {0: attach(alone)}))[job.job]
    host = Host.load(base, Ranks())
    events = host.apply(attach(job)[0])
    while not any(isinstance(event, StepDone) and event.step == 4 for event in events):
        events += host.tick()
    host.apply(Detach(job.job, 1))
    events = host.apply(attach(replace(job, attempt=2))[0])
    while host.busy:
        events += host.tick()
    assert next(event.step for event in events if isinstance(event, Attached)) == 4
    assert_same_bits(adapters(events)[job.job].factors, undisturbed.factors)
    host.close()


def test_rows_that_cannot_be_used_stop_their_job_alone_in_the_words_they_always_have(tmp_path, beside):
    good, bad, missing = three_jobs(tmp_path, steps=4)
    Path(bad.train[0].path).write_text('{"text": "gold", "label": "sideways"}\n')
    missing = replace(missing, train=(replace(missing.train[0], path=str(tmp_path / "nowhere.jsonl")),))
    events = closing(test_base(tmp_path), {0: attach(good, bad, missing)})
    stopped = {event.job: event for event in events if isinstance(event, JobStopped)}
    assert {job: event.code for job, event in stopped.items()} == {
        bad.job: "bad_data",
        missing.job: "bad_data",
    }
    assert stopped[bad.job].message.startswith(f"{bad.train[0].path}:1: unknown label 'sideways'")
    assert "no such data file" in stopped[missing.job].message
    assert adapters(events).keys() == {good.job}
    assert not scratch(good, bad, missing)


def test_a_job_that_is_detached_while_it_is_encoded_never_joins_and_its_next_attempt_does(tmp_path, held):
    job = three_jobs(tmp_path, steps=3)[0]
    host = host_of(tmp_path)
    host.apply(attach(job)[0])
    assert host.apply(attach(job)[0]) == []
    assert host.apply(Detach(job.job, 7)) == []
    assert host.apply(Detach(job.job, 1)) == [Detached(job.job, 1, 0)]
    assert not host.busy
    host.apply(attach(replace(job, attempt=2))[0])
    host.apply(attach(replace(job, attempt=3))[0])
    held.set()
    events = [event for _ in iter(lambda: host.busy, False) for event in host.tick()]
    assert [event.attempt for event in events if isinstance(event, Attached)] == [3]
    assert adapters(events).keys() == {job.job}
    host.close()
    assert not scratch(job)


def test_a_job_being_encoded_holds_its_slot(tmp_path, held):
    first, second, _ = three_jobs(tmp_path, steps=3)
    host = host_of(tmp_path, slots=1)
    host.apply(attach(first)[0])
    (stopped,) = host.apply(attach(second)[0])
    assert (stopped.job, stopped.message) == (second.job, "the host has no free slot")
    held.set()
    host.close()


def test_a_close_gives_up_what_is_being_encoded(tmp_path, held):
    job = three_jobs(tmp_path, steps=3)[0]
    host = host_of(tmp_path)
    host.apply(attach(job)[0])
    threading.Timer(0.2, held.set).start()
    assert host.close() == []
    assert not host.busy
    assert not scratch(job)


def test_an_encoder_that_dies_stops_the_job_it_was_at_and_the_next_one_joins(tmp_path, beside, monkeypatch):
    fatal, other, _ = three_jobs(tmp_path, steps=3)
    begin = Encoder.encode

    def killed(self, spec, out):
        if spec.job == fatal.job:
            threading.Timer(0.1, lambda: os.kill(self._process.pid, signal.SIGKILL)).start()
        return begin(self, spec, out)

    monkeypatch.setattr(Encoder, "encode", killed)
    host = host_of(tmp_path)
    events = [event for command in attach(fatal, other) for event in host.apply(command)]
    while host.busy:
        events += host.tick()
    (stopped,) = [event for event in events if isinstance(event, JobStopped)]
    assert (stopped.job, stopped.code) == (fatal.job, "internal_error")
    assert "-9" in stopped.message
    assert adapters(events).keys() == {other.job}
    host.close()


def large(tmp_path, rows=200_000):
    job = three_jobs(tmp_path, steps=3)[0]
    write_rows(Path(job.train[0].path), headline_rows(1, 500, (3, 12)) * (rows // 500))
    return job


def test_cancelling_ends_the_encoding_at_once_and_the_process_starts_anew(tmp_path, beside):
    base, long, short = test_base(tmp_path), large(tmp_path), three_jobs(tmp_path / "short", steps=3)[0]
    under_way = Joins(Ranks(), base.path)
    under_way.begin(long)
    assert under_way.ended(1.0) == []
    under_way.drop(long.job)
    under_way.begin(short)
    ((spec, (prepared, problem)),) = under_way.ended(60)
    assert (spec, problem) == (short, None)
    assert prepared.rows.is_file()
    assert not scratch(long)
    under_way.close()


def test_an_encoder_that_died_while_idle_costs_the_next_job_nothing(tmp_path):
    base, job = test_base(tmp_path), three_jobs(tmp_path, steps=3)[0]
    beside = Encoder(base.path)
    assert beside.encode(job, tmp_path / "1" / "rows.safetensors") is None
    beside._process.kill()
    beside._process.wait()
    assert beside.encode(job, tmp_path / "2" / "rows.safetensors") is None
    beside.close()


def test_cancelling_a_job_whose_answer_has_just_come_costs_the_next_job_nothing(tmp_path, monkeypatch):
    base, job = test_base(tmp_path), three_jobs(tmp_path, steps=3)[0]
    beside, ask, cancelled = Encoder(base.path), encoder._ask, tmp_path / "1" / "rows.safetensors"

    def cancelled_then(process, request):
        line = ask(process, request)
        beside.cancel(cancelled)
        return line

    monkeypatch.setattr(encoder, "_ask", cancelled_then)
    beside.encode(job, cancelled)
    assert beside.encode(job, tmp_path / "2" / "rows.safetensors") is None
    beside.close()


def test_an_encoder_that_dies_with_a_request_unread_is_an_answer_and_no_error(tmp_path, monkeypatch):
    base, job = test_base(tmp_path), three_jobs(tmp_path, steps=3)[0]
    beside, ask = Encoder(base.path), encoder._ask

    def dies_first(process, request):
        process.kill()
        process.wait()
        return ask(process, request)

    monkeypatch.setattr(encoder, "_ask", dies_first)
    code, words = beside.encode(job, tmp_path / "1" / "rows.safetensors")
    assert (code, "ended (-9) at this job's" in words) == ("internal_error", True)
    beside.close()


def test_rows_from_a_file_are_the_rows_encoded_in_place(tmp_path):
    base = test_base(tmp_path)
    first, second = parents(tmp_path, base)
    job = student(tmp_path, [first, replace(second, validation=second.train)])
    host = Host.load(base, Ranks())
    expected = encode(host.base.tokenizer, sources(job), job.training.sequence_len)
    encoder = Encoder(base.path)
    assert encoder.encode(job, tmp_path / "rows/rows.safetensors") is None
    encoder.close()
    found = read(tmp_path / "rows/rows.safetensors", len(expected))
    for course, other in zip(found, expected, strict=True):
        assert list(course.train) == list(other.train)
        assert list(course.validation) == list(other.validation)
        assert course.train[-1] == other.train[-1]
        assert course.train[1:3] == other.train[1:3]
    with pytest.raises(IndexError):
        found[0].train[len(found[0].train)]
