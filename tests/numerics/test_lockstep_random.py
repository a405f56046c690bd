"""Lock-step at random on two ZeRO-3 ranks: a thousand compositions, a hundred joins and leaves."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

from tests.models import make_base
from tests.numerics.jobs import drive, job
from tests.numerics.pair import two_ranks
from tests.numerics.slots import clear_gradients, gradients, put
from workers.compose import Chunk, MicroBatch
from workers.host import Host
from workers.rows import Row
from workers.step import Share, forward_backward, forward_only
from workers.types import AdapterSpec, Attach, Attached, BaseSpec, Command, Detach, Detached, TrainingSpec

COMPOSITIONS = 1000
SLOTS = {"all": "all-linear", "v": ("v_proj",), "down": ("down_proj", "o_proj"), "k": ("k_proj",)}


def narrow_base(folder: Path) -> BaseSpec:
    """One layer of width 16, every matrix partitioned."""
    shape = {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "max_position_embeddings": 128,
    }
    path = make_base(folder / "base", **shape)
    return BaseSpec(str(path), deepspeed={"stage3_param_persistence_threshold": 16}, tokens_per_tick=400)


def random_composition(draw: random.Random) -> MicroBatch:
    """Some jobs in any order; each has up to three rows a rank, on every rank, one rank, or none at all."""
    length = draw.choice([16, 32])
    present = draw.sample(list(SLOTS), draw.randint(1, len(SLOTS)))
    return MicroBatch(length, tuple((name, random_chunk(draw, length)) for name in present))


def random_chunk(draw: random.Random, length: int) -> Chunk:
    counts = draw.choice([(0, 0), (1, 0), (0, 1), (draw.randint(1, 3), draw.randint(0, 3))])
    return Chunk(length, tuple(tuple(random_row(draw, length) for _ in range(count)) for count in counts))


def random_row(draw: random.Random, length: int) -> Row:
    tokens = tuple(draw.randrange(3, 200) for _ in range(draw.randint(4, length)))
    return Row(draw.randrange(99), tokens, (-100, *tokens[1:]))


def thousand_compositions(ranks, base: BaseSpec, seed: int) -> tuple[set[str], int, bool]:
    """DeepSpeed's traces from the third pass on, passes done, and whether just the jobs with rows on this
    rank had a gradient."""
    host, draw = Host.load(base, ranks), random.Random(seed)
    for slot, targets in enumerate(SLOTS.values()):
        put(host.base.slots, slot, AdapterSpec(4, 8, 0.1, targets), seed=slot)
    shares = {name: Share(slot, slot, 0, 0.1, target_tokens=50) for slot, name in enumerate(SLOTS)}
    traces, exact = [], True
    for number in range(COMPOSITIONS):
        micro_batch = random_composition(draw)
        passing = forward_only if draw.random() < 0.1 else forward_backward
        losses = passing(host.base, ranks, micro_batch, shares)
        present = {name for name, chunk in micro_batch.chunks if chunk.rows[ranks.rank]}
        assert losses.keys() == present, number
        for name, share in shares.items():
            touched = any(bool(gradient.any()) for gradient in gradients(host.base.slots, share.slot))
            exact &= touched == (name in present and passing is forward_backward)
            clear_gradients(host.base.slots, share.slot)
        traces.append(host.base.trace)
    return set(traces[2:]), len(traces), exact


def test_lockstep_a_thousand_random_compositions_never_hang(tmp_path):
    base = narrow_base(tmp_path)
    traces, passes, exact = two_ranks(thousand_compositions, base, 5)
    assert passes == COMPOSITIONS
    assert traces == {"COMPLETE"}
    assert exact


def joins_and_leaves(ranks, base: BaseSpec, script) -> tuple[list, set[str], set[int]]:
    host, traces, residents = Host.load(base, ranks), [], []
    tick = host.tick

    def watched():
        events = tick()
        traces.append(host.base.trace)
        residents.append(len(host.residents))
        return events

    host.tick = watched
    return drive(host, script), set(traces[2:]), set(residents)


def test_lockstep_a_hundred_joins_and_leaves_keep_the_trace_complete(tmp_path):
    base = narrow_base(tmp_path)
    draw = random.Random(3)
    kinds = [
        job(
            tmp_path,
            f"kind{index}",
            AdapterSpec(r, 4, 0.0, targets),
            TrainingSpec(1e-3, batch, 128, max_steps=40),
            words,
        )
        for index, (r, targets, batch, words) in enumerate(
            [
                (1, "all-linear", 1, (1, 2)),
                (8, ("v_proj",), 3, (1, 5)),
                (3, ("down_proj", "o_proj"), 2, (3, 5)),
            ]
        )
    ]
    script: dict[int, list[Command]] = {}
    for index in range(100):
        spec = draw.choice(kinds)
        spec = replace(spec, job=f"job{index}", checkpoint_dir=str(tmp_path / "checkpoints" / str(index)))
        came = index + draw.randrange(3)
        script.setdefault(came, []).append(Attach(spec))
        script.setdefault(came + draw.randint(1, 5), []).append(Detach(spec.job, 1))
    events, traces, residents = two_ranks(joins_and_leaves, replace(base, slots=32), script)
    assert sum(isinstance(event, Attached) for event in events) == 100
    assert sum(isinstance(event, Detached) for event in events) == 100
    assert traces == {"COMPLETE"}
    assert max(residents) > 3
