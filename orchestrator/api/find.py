"""The job or run that a person means by a word."""

from __future__ import annotations

from contextlib import suppress

from orchestrator.store.rows import JobRow
from orchestrator.store.store import NoSuchJob, Store


def find_jobs(store: Store, reference: str) -> tuple[JobRow, ...]:
    """The one job, or all jobs of the run, that a user means: an id, or a name in the newest run that has it.

    Raises NoSuchJob.
    """
    with suppress(NoSuchJob):
        return (store.job(reference),)
    if of_run := store.jobs(reference):
        return of_run
    if (run := store.newest_run_with(reference)) is not None:
        of_run = store.jobs(run)
        return tuple(job for job in of_run if job.name == reference) or of_run
    raise NoSuchJob(f"there is no job or run {reference!r}; `chorus ps --all` shows them")


def find_job(store: Store, reference: str) -> JobRow:
    """One job. Raises NoSuchJob, also for a run of several."""
    job, *others = find_jobs(store, reference)
    if others:
        names = ", ".join(each.name for each in (job, *others))
        raise NoSuchJob(f"{reference} is a run of several jobs; name one of {names}")
    return job
