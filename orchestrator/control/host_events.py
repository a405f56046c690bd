"""What each report of a host does. Reports of an attempt that is over change no job.

Writes curves and progress first, so that a step is on record before what follows from it.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from orchestrator.control.fleet import Host
from orchestrator.control.ledger import evaluation_result
from orchestrator.control.work import Flight, Work
from orchestrator.job import Reason, Status
from orchestrator.plan.steps import EvaluateWhat
from orchestrator.poison import SOLO_DEATHS
from orchestrator.store.curves import finite
from orchestrator.store.rows import Progress, Report
from workers.manifest import CorruptFolder
from workers.types import (
    Attached,
    CheckpointSaved,
    Detached,
    EvaluationDone,
    EvaluationFailed,
    Event,
    HostFailed,
    HostMeasured,
    HostReady,
    JobStopped,
    OutOfMemory,
    SearchAdvanced,
    SearchDone,
    StepDone,
    TrainingFinished,
    Validated,
)

MOST_HOST_FAILURES = 3
"""Hosts of one base lost in a row, without a step or a score in between, after which its jobs fail."""

ON_THE_WAY = (StepDone, Validated, CheckpointSaved, OutOfMemory, SearchAdvanced)
"""Reports after which everything goes on as it was."""

log = logging.getLogger(__name__)


def hear(work: Work, host: Host) -> bool:
    """Take in all that a host has reported since the last time; whether it bears on what to do next."""
    events = work.cluster.poll(host.name)
    _write_curves(work, events)
    for event in events:
        _hear(work, host, event)
    return any(not isinstance(event, ON_THE_WAY) for event in events)


def _hear(work: Work, host: Host, event: Event) -> None:
    match event:
        case HostReady():
            host.ready = event
        case Attached():
            _attached(work, event)
        case StepDone():
            work.host_failures.pop(host.base, None)
            tokens = event.padded_tokens or event.tokens
            work.books.trained(event.job, tokens)
            if host.residents.get(event.job) == event.attempt:
                host.step_tokens[event.job] = tokens
        case TrainingFinished():
            _training_finished(work, host, event)
        case Detached():
            work.drop_training(event.job, event.attempt)
        case JobStopped():
            _job_stopped(work, event)
        case SearchAdvanced():
            work.progress[event.request] = event.trials
        case EvaluationDone() | SearchDone() | EvaluationFailed():
            _evaluation_ended(work, host, event)
        case HostFailed():
            lose(work, host, event.message)
        case OutOfMemory():
            _ran_out(event)
        case HostMeasured():
            host.measured = event
        case CheckpointSaved():
            work.found_room(event.job)
        case Validated():
            pass


def _write_curves(work: Work, events: Sequence[Event]) -> None:
    """One transaction for all that one poll has brought; a job may attach and step in one poll."""
    told: dict[tuple[str, int], list[Attached | StepDone | Validated]] = {}
    for event in events:
        if isinstance(event, Attached | StepDone | Validated) and work.present(event.job, event.attempt):
            told.setdefault((event.job, event.attempt), []).append(event)
    trainings = work.trainings() if told else {}
    reports = [
        _report(job, attempt, _series(work, job, trainings.get((job, attempt))), found)
        for (job, attempt), found in told.items()
    ]
    if reports:
        work.store.write_reports(reports)
        work.note_progress(reports)


def _report(job: str, attempt: int, series: str, found: Sequence[Attached | StepDone | Validated]) -> Report:
    points = tuple(event for event in found if not isinstance(event, Attached))
    return Report(job, attempt, series, points, _progress(found))


def _series(work: Work, job: str, flight: Flight | None) -> str:
    """The training at hand: a fusion may have one for its adapter and one for a control."""
    return flight.step.id if flight else work.order(job).series


def _progress(found: Sequence[Attached | StepDone | Validated]) -> Progress | None:
    """The newest of what a job has told in one poll."""
    attached = next((event for event in reversed(found) if isinstance(event, Attached)), None)
    last = next((event for event in reversed(found) if isinstance(event, StepDone)), None)
    num_steps = attached.num_steps if attached else None
    if last is None:
        return Progress(attached.step, num_steps) if attached else None
    speed = last.tokens / last.seconds if last.seconds > 0 else None
    return Progress(last.step, num_steps, finite(last.loss), speed)


def _attached(work: Work, event: Attached) -> None:
    job = work.present(event.job, event.attempt)
    if job is not None and job.status is Status.STARTING:
        work.switch(event.job, Reason.ATTACHED, attempt=event.attempt)


def _ran_out(event: OutOfMemory) -> None:
    log.warning(
        "%s: a pass of %d tokens did not fit in memory after step %d; the step is done again, %d at most",
        event.job,
        event.tokens,
        event.step,
        event.most_tokens,
    )


def _training_finished(work: Work, host: Host, event: TrainingFinished) -> None:
    """The adapter is there, even if its job was cancelled meanwhile; the job stays to be scored."""
    flight = work.drop_training(event.job, event.attempt)
    job = work.present(event.job, event.attempt)
    if job is not None and job.status is not Status.WAITING:
        host.visitors.add(event.job)
    if flight is not None:
        _adapter_made(work, flight, Path(event.adapter_dir), step=event.step)


def _adapter_made(work: Work, flight: Flight, folder: Path, **more: Any) -> None:
    """Record a step that made an adapter; its job fails if that does not verify or cannot be read."""
    try:
        result = work.ledger.adapter_result(folder, **more)
    except (CorruptFolder, OSError) as error:
        if work.present(flight.job, flight.attempt):
            work.switch(flight.job, Reason.INTERNAL_ERROR, str(error), attempt=flight.attempt)
    else:
        work.ledger.finish(flight.step.id, flight.step.kind, flight.job, result)


def _job_stopped(work: Work, event: JobStopped) -> None:
    work.drop_training(event.job, event.attempt)
    if not work.present(event.job, event.attempt):
        return
    words = f"after step {event.step}: {event.message}"
    if event.code == "disk_full":
        folder = work.ledger.checkpoint_dir(work.order(event.job).series)
        work.disk_full(event.job, folder, words, event.attempt)
    elif event.code in ("checkpoints_away", "waits_for_memory"):
        # The host may have less memory than it makes out to the scheduler, which would place the job at once.
        work.pause(event.job, Reason(event.code), words, event.attempt)
    else:
        work.switch(event.job, Reason(event.code), words, attempt=event.attempt)


def _evaluation_ended(work: Work, host: Host, event: EvaluationDone | SearchDone | EvaluationFailed) -> None:
    flight = work.flights.pop(event.request, None)
    if flight is None:
        return
    step = flight.step
    if isinstance(event, EvaluationFailed):
        if work.present(flight.job, flight.attempt):
            doing = (
                f"scoring {step.what.task}" if isinstance(step.what, EvaluateWhat) else "searching weights"
            )
            work.switch(flight.job, Reason.BAD_DATA, f"{doing}: {event.message}", attempt=flight.attempt)
        return
    work.host_failures.pop(host.base, None)
    if isinstance(event, SearchDone):
        _adapter_made(work, flight, work.ledger.fusion_dir(step.id), report=dict(event.report))
    else:
        assert isinstance(step.what, EvaluateWhat), f"{event.request} is not an evaluation"
        work.ledger.finish(step.id, step.kind, flight.job, evaluation_result(step.what, event))


def lose(work: Work, host: Host, message: str) -> None:
    """A host is gone: its jobs are queued again, but one that is shown to have taken it down.

    Jobs fail if hosts of their base keep dying before anyone trains on them.
    """
    work.fleet.stop(host.name)
    work.drop_flights(host)
    seated = sorted(host.seated & work.jobs.keys())
    reached = {job: work.jobs[job].step for job in host.residents if job in seated}
    if host.ready is not None and reached:
        _inquire(work, reached, message)
    else:
        _count_failure(work, host, seated, message)
    for job in seated:
        if job in work.jobs:
            work.switch(job, Reason.HOST_LOST, message)


def _inquire(work: Work, reached: dict[str, int], message: str) -> None:
    """Ask whether one of those aboard is what its hosts die of."""
    culprit = work.books.died(reached)
    work.books.write(work.clock(), at_once=True)
    if culprit is not None:
        words = f"{SOLO_DEATHS} hosts died with it alone aboard, after step {reached[culprit]}: {message}"
        work.switch(culprit, Reason.QUARANTINED, words)


def _count_failure(work: Work, host: Host, seated: list[str], message: str) -> None:
    failures = work.host_failures.get(host.base, 0) + 1
    work.host_failures[host.base] = failures % MOST_HOST_FAILURES
    if failures == MOST_HOST_FAILURES:
        words = f"{failures} hosts of its base were lost without getting anywhere; the last: {message}"
        for job in seated:
            work.switch(job, Reason.INTERNAL_ERROR, words)
