"""The host's loop, with a host that only writes down what it was told and when."""

from __future__ import annotations

import json
import queue
import threading

import pytest

from workers import serve as loop
from workers.mail import Mail
from workers.serve import serve
from workers.types import (
    BadInput,
    BaseSpec,
    Close,
    Detach,
    Detached,
    HostFailed,
    HostReady,
    JobSpec,
    StepDone,
    Validated,
)

READY = HostReady(world_size=1, zero="none", slots=8, base_parameters=1, load_seconds=0.0)


class Alone:
    rank, world_size = 0, 1

    def broadcast(self, value):
        return value

    def close(self):
        pass


class Joined(Alone):
    """Ranks in threads: rank 0's value reaches every other rank through a queue."""

    world_size = 2

    def __init__(self, rank, pipe):
        self.rank, self.pipe = rank, pipe

    def broadcast(self, value):
        if self.rank == 0:
            self.pipe.put(value)
            return value
        return self.pipe.get(timeout=10)


class WrittenHost:
    """`story` holds every command and tick in order; busy until it was told to detach `stop`."""

    ready = READY

    def __init__(self, busy=True, fail_at=None):
        self.story, self.busy, self.fail_at = [], busy, fail_at

    def apply(self, command):
        self.story.append(command.job)
        self.busy = command.job != "stop"
        return [Detached(command.job, 1, 0)]

    def tick(self):
        ticks = self.story.count("tick") + 1
        if ticks == self.fail_at:
            raise RuntimeError("the disk fell out\nof the machine")
        self.story.append("tick")
        return [Validated("job", 1, ticks, 0.0)]

    def close(self):
        self.story.append("close")
        return [Detached("saved at last", 1, 0)]


def run(host, mail, ranks=None):
    for _ in serve(lambda: host, ranks or Alone(), mail, idle_seconds=0.0):
        pass


def test_serve_command_during_ticks_takes_effect_before_the_next_tick():
    host, mail = WrittenHost(), Mail()
    served = serve(lambda: host, Alone(), mail)
    next(served)
    mail.submit(Detach("a", 1))
    mail.submit(Detach("b", 1))
    next(served)
    assert host.story == ["tick", "a", "b", "tick"]


def test_serve_close_ends_loop_and_leaves_later_commands():
    host, mail = WrittenHost(), Mail()
    for command in (Detach("a", 1), Close(), Detach("late", 1)):
        mail.submit(command)
    run(host, mail)
    assert host.story == ["a", "close"]
    assert mail.poll(0).events[-1] == Detached("saved at last", 1, 0)


def test_serve_two_ranks_apply_the_same_commands_between_the_same_ticks():
    pipe, mails = queue.Queue(), [Mail(), Mail()]
    hosts = [WrittenHost(), WrittenHost()]
    follower = threading.Thread(target=run, args=(hosts[1], mails[1], Joined(1, pipe)))
    follower.start()
    served = serve(lambda: hosts[0], Joined(0, pipe), mails[0])
    for job in ("a", "b", "c"):
        mails[0].submit(Detach(job, 1))
        next(served)
    mails[0].submit(Close())
    assert list(served) == []
    follower.join(timeout=10)
    assert hosts[0].story == hosts[1].story == ["a", "tick", "b", "tick", "c", "tick", "close"]
    assert mails[1].poll(0).events == ()


def test_serve_idle_host_wakes_at_once_for_a_command():
    host, mail = WrittenHost(busy=False), Mail()
    served = serve(lambda: host, Alone(), mail, idle_seconds=30.0)
    threading.Timer(0.05, mail.submit, [Detach("stop", 1)]).start()
    next(served)
    assert host.story == ["stop"]


def test_serve_error_in_a_tick_puts_out_one_line_after_earlier_events():
    mail = Mail()
    with pytest.raises(RuntimeError):
        run(WrittenHost(fail_at=2), mail)
    assert mail.poll(0).events == (
        READY,
        Validated("job", 1, 1, 0.0),
        HostFailed("rank 0: RuntimeError: the disk fell out"),
    )


def test_serve_base_that_is_refused_says_the_users_sentence_alone():
    def load():
        raise BadInput("base_model: nowhere has no config.json")

    mail = Mail()
    with pytest.raises(BadInput):
        list(serve(load, Alone(), mail))
    assert mail.poll(0).events == (HostFailed("base_model: nowhere has no config.json"),)


def test_serve_rounds_grow_with_every_round():
    mail = Mail()
    served = serve(WrittenHost, Alone(), mail)
    assert [mail.poll(0).rounds for _ in zip(range(3), served, strict=False)] == [1, 2, 3]


def test_serve_host_that_no_controller_speaks_to_closes_once_it_has_nothing_left_to_do():
    now = [0.0]
    mail = Mail(orphan_seconds=60.0, clock=lambda: now[0])
    host = WrittenHost()
    served = serve(lambda: host, Alone(), mail, idle_seconds=0.0)
    now[0] = 61.0
    next(served)
    host.busy = False
    assert list(served) == []
    assert host.story == ["tick", "close"]


def test_serve_idle_host_that_is_spoken_to_stays():
    now = [0.0]
    mail = Mail(orphan_seconds=60.0, clock=lambda: now[0])
    served = serve(lambda: WrittenHost(busy=False), Alone(), mail, idle_seconds=0.0)
    for _ in range(5):
        now[0] += 59.0
        mail.poll(0)
        assert next(served) is False


JOB = {
    "job": "a",
    "attempt": 1,
    "adapter": {"r": 4, "lora_alpha": 8},
    "training": {"learning_rate": 1e-3, "global_batch_size": 2, "sequence_len": 64, "max_steps": 2},
    "train": [{"path": "rows.jsonl", "type": "classification", "labels": ["good", "bad"]}],
    "validation": [],
    "checkpoint_dir": "checkpoints",
}


def written(folder, value):
    path = folder / "spec.json"
    path.write_text(json.dumps(value))
    return path


def test_read_spec_job_file_becomes_frozen_spec(tmp_path):
    spec = loop.read_spec(JobSpec, written(tmp_path, JOB))
    assert spec.train[0].labels == ("good", "bad")
    assert spec.adapter.lora_alpha == 8.0


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"attempts": 2}, "JobSpec has no key 'attempts'"),
        ({"adapter": {"r": 4, "lora_alpha": 8, "rank": 4}}, "no key adapter.'rank'"),
        ({"attempt": "soon"}, "attempt: Input should be a valid integer"),
    ],
)
def test_read_spec_wrong_key_is_refused_by_name(tmp_path, change, words):
    with pytest.raises(BadInput, match=words):
        loop.read_spec(JobSpec, written(tmp_path, {**JOB, **change}))


def test_read_spec_missing_file_is_refused_by_name(tmp_path):
    with pytest.raises(BadInput, match=r"absent\.json cannot be read"):
        loop.read_spec(BaseSpec, tmp_path / "absent.json")


def test_event_line_step_says_job_step_and_loss():
    line = loop.event_line(StepDone("a", 1, 3, 1.25, 0.5, 1e-3, 128, 0.25))
    assert line == "a step 3 loss 1.250000 grad_norm 0.5000 lr 1.000e-03 tokens 128 0.250 s"
