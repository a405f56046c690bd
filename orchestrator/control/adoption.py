"""What a controller that begins takes over from the one before: hosts that live on, with the jobs aboard.

A host's rank 0 tells what it was asked and had not answered (`Roll`); the store tells which attempt of a job
is under way. Where the two agree the job goes on as if nothing had been: the same attempt, in its slot, and
what it was asked for is awaited again. A job aboard that the store does not want there is told to leave. A
host that no unfinished job needs is closed, and so is one with an attempt of a job whose next has begun.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

from orchestrator.contracts import LivingHost
from orchestrator.control.fleet import Host
from orchestrator.control.work import Work
from orchestrator.job import Status
from orchestrator.plan.steps import Step
from orchestrator.queue import Need
from orchestrator.store.rows import JobRow
from workers.types import JobSpec

log = logging.getLogger(__name__)


def adopt(work: Work, run: str | None, who: str) -> frozenset[str]:
    """Begin to be the controller, `who`; the jobs that go on where they are.

    Of one run only, if `run` is given. Raises Superseded if another one has begun since.
    """
    work.epoch = work.store.epochs.begin(who)
    living = work.cluster.adopt(work.epoch)
    if not living:
        return frozenset()
    work.refresh(run)
    held = [(host, found) for found in living if (host := _hold(work, found)) is not None]
    going = [job for host, found in held for job in _training(work, host, found)]
    going += [job for host, _ in held for job in _placed(work, host)]
    going += [job for host, found in held for job in _scoring(work, host, found)]
    log.info("took over %s with %s", [host.name for host, _ in held], sorted(set(going)))
    return frozenset(going)


def _hold(work: Work, living: LivingHost) -> Host | None:
    orders = (work.order(job).job for job in work.jobs)
    shape = living.base, living.world_size
    base = next((order.host_key for order in orders if (order.base, order.world_size) == shape), None)
    if base is None or any(_outrun(work, spec) for spec in living.roll.attached):
        log.warning("%s lives on, and nobody needs it: it is closed", living.name)
        work.cluster.stop_host(living.name)
        return None
    return work.fleet.adopt(living, base)


def _outrun(work: Work, spec: JobSpec) -> bool:
    """Whether a later attempt of the job has begun."""
    row = work.jobs.get(spec.job)
    return row is not None and row.attempt != spec.attempt and row.status is not Status.WAITING


def _training(work: Work, host: Host, living: LivingHost) -> Iterator[str]:
    """Jobs that were sent to train there, and have not come back as far as anybody knows."""
    for spec in living.roll.attached:
        row = work.present(spec.job, spec.attempt)
        parameters = _adapter_parameters(work, row) if row is not None else 0
        work.fleet.seat(spec.job, spec.attempt, host.name, Need.SLOT, parameters)
        if row is None or row.status is Status.WAITING:
            work.detach(host, spec.job, spec.attempt)
            continue
        trained = Path(spec.checkpoint_dir).name
        step = next(step for step in work.order(row.id).job.steps if step.id == trained)
        work.depart(step, row, "host", host.name)
        yield row.id


def _placed(work: Work, host: Host) -> Iterator[str]:
    """Jobs of which the store says that they are there."""
    for row in list(work.jobs.values()):
        if row.host == host.name and row.status is not Status.WAITING:
            _seat(work, host, row)
            yield row.id


def _scoring(work: Work, host: Host, living: LivingHost) -> Iterator[str]:
    """Jobs that still want what the host was asked for; it does not matter which of them asked."""
    for request in living.roll.requests:
        found = next(_who_wants(work, host, request.request), None)
        if found is not None:
            row, step = found
            work.depart(step, row, "host", host.name)
            _seat(work, host, row)
            yield row.id


def _who_wants(work: Work, host: Host, step: str) -> Iterator[tuple[JobRow, Step]]:
    """Jobs under way that have the step still to do: those that sit there, then those that sit nowhere."""
    under_way = [row for row in work.jobs.values() if row.status is not Status.WAITING]
    for seat in (host, None):
        for row in under_way:
            if work.fleet.host_of(row.id) is seat:
                remaining = work.ledger.remaining(work.order(row.id))
                yield from ((row, found) for found in remaining if found.id == step)


def _seat(work: Work, host: Host, row: JobRow) -> None:
    """Where it sat, by what it needs next; a job that waits for a CPU or the registry sits nowhere."""
    order = work.order(row.id)
    need = order.seat_need(work.ledger.remaining(order))
    if work.fleet.host_of(row.id) is None and need in (Need.SLOT, Need.HOST):
        work.fleet.seat(row.id, row.attempt, host.name, need, _adapter_parameters(work, row))


def _adapter_parameters(work: Work, row: JobRow) -> int:
    estimate = work.order(row.id).job.estimate
    return estimate.adapter_parameters if estimate else 0
