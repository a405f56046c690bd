"""Lock-step on two ZeRO-3 ranks: unequal rows, no rows, joins and leaves; no hang, and no trace lost."""

from __future__ import annotations

import random
from dataclasses import replace

from tests.numerics.jobs import attach, drive, job, test_base, three_jobs
from tests.numerics.pair import two_ranks
from workers.host import Host
from workers.types import AdapterSpec, Attach, Detach, TrainingFinished, TrainingSpec

THRESHOLD = {"stage3_param_persistence_threshold": 0}


def traces_of(ranks, base, script):
    """Run a script; the state of DeepSpeed's trace after every tick, from the third on."""
    host, traces = Host.load(base, ranks), []
    tick = host.tick

    def watched():
        events = tick()
        traces.append(host.base.trace)
        return events

    host.tick = watched
    events = drive(host, script)
    return events, traces[2:], host.base.partitioned


def test_lockstep_joins_and_leaves_keep_the_trace_complete(tmp_path):
    base = test_base(tmp_path, deepspeed=THRESHOLD, tokens_per_tick=600)
    jobs = three_jobs(tmp_path, steps=8)
    script = {0: attach(jobs[0]), 3: attach(jobs[1]), 6: [Detach("wide", 1)], 9: attach(jobs[2])}
    script[12] = [Attach(replace(jobs[0], attempt=2))]
    events, traces, partitioned = two_ranks(traces_of, base, script)
    assert partitioned
    assert {event.job for event in events if isinstance(event, TrainingFinished)} == {
        "wide",
        "rslora",
        "small",
    }
    assert traces
    assert set(traces) == {"COMPLETE"}


def test_lockstep_rank_without_rows_runs_along(tmp_path):
    base = test_base(tmp_path, deepspeed=THRESHOLD)
    one_row = job(tmp_path, "one", AdapterSpec(4, 8), TrainingSpec(1e-3, 1, 256, max_steps=5), (3, 12))
    events, traces, _ = two_ranks(traces_of, base, {0: attach(one_row)})
    assert [event.step for event in events if isinstance(event, TrainingFinished)] == [5]
    assert set(traces) == {"COMPLETE"}


def test_lockstep_random_compositions_never_hang(tmp_path):
    base = test_base(tmp_path, deepspeed=THRESHOLD, tokens_per_tick=400)
    draw = random.Random(11)
    script: dict[int, list] = {}
    for index in range(8):
        training = TrainingSpec(1e-3, draw.randint(1, 5), 256, max_steps=draw.randint(1, 6), seed=index)
        targets = draw.choice(["all-linear", ("v_proj",), ("down_proj", "o_proj")])
        spec = job(
            tmp_path, f"job{index}", AdapterSpec(draw.choice([1, 3, 8]), 8, 0.0, targets), training, (1, 12)
        )
        script.setdefault(draw.randrange(12), []).append(Attach(spec))
    script.setdefault(0, attach(three_jobs(tmp_path, steps=3)[0]))
    events, traces, _ = two_ranks(traces_of, base, script)
    finished = {event.job for event in events if isinstance(event, TrainingFinished)}
    assert {f"job{index}" for index in range(8)} <= finished
    assert set(traces) == {"COMPLETE"}
