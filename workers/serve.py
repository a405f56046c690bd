"""The loop of a host: commands in, ticks, events out, the same on every rank. No Ray here.

The Ray actor, the orchestrator's local cluster and torchrun drive this one loop. It owns the order of a round
and nothing that happens inside it. Under torchrun, or in one process alone, it trains the jobs named on the
command line:

    torchrun --nproc-per-node 2 -m workers.serve base.json job.json [job.json ...]
    python -m workers.serve base.json job.json [job.json ...]

`base.json` holds a `BaseSpec`, each `job.json` a `JobSpec` (see workers/types.py). Rank 0 prints one line per
step and per event; the exit code is 0 when every job finished, 1 when the host stopped one, 2 on bad input.
"""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from workers.mail import Mail
from workers.types import (
    Attach,
    BadInput,
    BaseSpec,
    Close,
    Command,
    Event,
    HostFailed,
    JobSpec,
    JobStopped,
    StepDone,
    TrainingFinished,
)

if TYPE_CHECKING:
    from workers.host import Host
    from workers.ranks import Ranks

IDLE_SECONDS = 0.5
"""Longest wait of an idle rank 0 for a command: its peers wait in a collective meanwhile."""

log = logging.getLogger(__name__)
Spec = TypeVar("Spec", BaseSpec, JobSpec)


def serve(
    load: Callable[[], Host], ranks: Ranks, mail: Mail, idle_seconds: float = IDLE_SECONDS
) -> Generator[bool]:
    """Load a host and serve it until Close; yields after every round whether the host is busy.

    Collective. Whatever fails here is not a job's own fault (the host reports those as JobStopped), so it
    ends the host: HostFailed goes out and the error is raised.
    """
    try:
        host = load()
        _put(ranks, mail, [host.ready])
        while _round(host, ranks, mail, idle_seconds):
            yield host.busy
        _put(ranks, mail, host.close())
        ranks.close()
    except Exception as error:
        log.exception("rank %d: the host failed", ranks.rank)
        mail.put([HostFailed(failure_words(ranks.rank, error))])
        raise


def _round(host: Host, ranks: Ranks, mail: Mail, idle_seconds: float) -> bool:
    """Apply the commands that came and do one tick; False after Close.

    A host to which no controller has spoken for long closes itself, once it has nothing left to do.
    """
    wait = 0.0 if host.busy else idle_seconds
    taken = mail.commands(wait) if ranks.rank == 0 else []
    if ranks.rank == 0 and not host.busy and mail.abandoned:
        taken.append(Close())
    # One broadcast a round, empty or not: all ranks apply the same commands between the same two ticks.
    commands: list[Command] = ranks.broadcast(taken)
    for command in commands:
        if isinstance(command, Close):
            return False
        _put(ranks, mail, host.apply(command))
    if host.busy:
        _put(ranks, mail, host.tick())
    mail.rounds += 1
    return True


def _put(ranks: Ranks, mail: Mail, events: Sequence[Event]) -> None:
    if ranks.rank == 0:
        mail.put(events)


def failure_words(rank: int, error: BaseException) -> str:
    """One line for HostFailed. What a user did wrong is said as it stands, without a rank."""
    if isinstance(error, BadInput):
        return str(error)
    lines = str(error).strip().splitlines()
    return f"rank {rank}: {type(error).__name__}: {lines[0] if lines else 'no message'}"


# ---- torchrun ---------------------------------------------------------------------------------------------


def train(base: BaseSpec, jobs: Sequence[JobSpec]) -> int:
    """Train `jobs` together on the ranks torchrun started (or alone), printing events. The exit code."""
    # Heavy, and DeepSpeed chooses its accelerator when it is imported: the actor and the tests of the loop
    # import this module without it.
    from workers.host import Host
    from workers.ranks import from_environment

    ranks, mail = from_environment(), Mail()
    for job in jobs:
        mail.submit(Attach(job))
    ended: list[Event] = []
    after = 0
    for _ in serve(lambda: Host.load(base, ranks), ranks, mail):
        polled = mail.poll(after)
        after = polled.last
        for event in polled.events:
            print(event_line(event), flush=True)
        ended += [event for event in polled.events if isinstance(event, TrainingFinished | JobStopped)]
        if ranks.rank == 0 and len(ended) == len(jobs):
            mail.submit(Close())
    return int(any(isinstance(event, JobStopped) for event in ended))


def event_line(event: Event) -> str:
    """One plain line: the event's name and its fields."""
    if isinstance(event, StepDone):
        return (
            f"{event.job} step {event.step} loss {event.loss:.6f} grad_norm {event.grad_norm:.4f} "
            f"lr {event.learning_rate:.3e} tokens {event.tokens} {event.seconds:.3f} s"
            + (" skipped" if event.skipped else "")
        )
    return type(event).__name__ + "".join(f" {key}={value}" for key, value in asdict(event).items())


def read_spec(kind: type[Spec], path: Path) -> Spec:
    """A spec from its JSON file. Raises BadInput naming the file and the key."""
    # Here, so that a rank of a Ray host does not pay for it.
    from pydantic import TypeAdapter, ValidationError

    try:
        given = json.loads(path.read_text())
        spec = TypeAdapter(kind).validate_python(given)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        raise BadInput(f"{path}: {key or 'the file'}: {first['msg']}") from error
    except (OSError, ValueError) as error:
        raise BadInput(f"{path} cannot be read as JSON: {error}") from error
    unknown = _unknown_key(given, asdict(spec))
    if unknown:
        raise BadInput(f"{path}: {kind.__name__} has no key {unknown}; remove it or see workers/types.py")
    return spec


def _unknown_key(given: Any, known: Any) -> str | None:
    """The first key of `given` that is not in `known`, with its path; lists are compared item by item."""
    if isinstance(given, list) and isinstance(known, tuple):
        found = (_unknown_key(item, other) for item, other in zip(given, known, strict=False))
        return next(filter(None, found), None)
    if not isinstance(given, Mapping) or not isinstance(known, Mapping):
        return None
    for key, value in given.items():
        if key not in known:
            return repr(key)
        below = _unknown_key(value, known[key])
        if below:
            return f"{key}.{below}"
    return None


def main(arguments: Sequence[str]) -> int:
    if len(arguments) < 2:
        print("usage: python -m workers.serve base.json job.json [job.json ...]", file=sys.stderr)
        return 2
    try:
        base = read_spec(BaseSpec, Path(arguments[0]))
        jobs = [read_spec(JobSpec, Path(path)) for path in arguments[1:]]
        return train(base, jobs)
    except BadInput as error:
        print(error, file=sys.stderr)
        return 2


if __name__ == "__main__":
    logging.basicConfig(level=logging.WARNING)
    status = main(sys.argv[1:])
    sys.stdout.flush()
    sys.stderr.flush()
    # DeepSpeed holds on to gloo's group, whose threads can abort an interpreter that winds down.
    os._exit(status)
