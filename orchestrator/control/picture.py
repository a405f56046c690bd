"""What the scheduler is shown: the `Snapshot` of this moment, from work, fleet and books."""

from __future__ import annotations

from dataclasses import replace

from orchestrator.control.books import Books
from orchestrator.control.fleet import Host
from orchestrator.control.submission import NEEDS
from orchestrator.control.work import Work
from orchestrator.host_view import HostView, Resident
from orchestrator.policy import DEFAULT_TEAM, Policy
from orchestrator.queue import Need, Waiting
from orchestrator.scheduler import Snapshot


def snapshot(work: Work, policy: Policy, waiting: list[Waiting]) -> Snapshot:
    books, now = work.books, work.clock()
    return Snapshot(
        capacity=work.cluster.capacity(),
        hosts=tuple(_view(work, books, host, now) for host in work.fleet.hosts),
        waiting=tuple(replace(job, waiting_since=books.waiting_since.get(job.job, now)) for job in waiting),
        running_tasks=sum(flight.of == "task" for flight in work.flights.values()),
        bases_to_come=_bases_to_come(work),
        next_host=work.fleet.next_number,
        now=now,
        policy=policy,
        usage=books.usage,
        poison=books.poison,
    )


def team_of(work: Work, job: str) -> str:
    return work.order(job).job.team or DEFAULT_TEAM


def teams_aboard(work: Work) -> dict[str, str]:
    """The team of every job that holds a slot and was not told to leave it."""
    return {
        job: team_of(work, job)
        for host in work.fleet.hosts
        for job, attempt in host.residents.items()
        if not work.over(job, attempt)
    }


def _view(work: Work, books: Books, host: Host, now: float) -> HostView:
    if host.seated:
        host.idle_since = None
    elif host.idle_since is None:
        host.idle_since = now
    return HostView(
        host.name,
        host.base,
        host.world_size,
        host.slots,
        host.on_gpus,
        tuple(_resident(work, books, job, attempt) for job, attempt in sorted(host.residents.items())),
        frozenset(host.visitors),
        sum(host.adapter_parameters.values()),
        host.measured.adapter_parameters if host.measured else None,
        host.idle_since or now,
        host.crowded,
    )


def _resident(work: Work, books: Books, job: str, attempt: int) -> Resident:
    row = work.jobs.get(job)
    if row is None:
        return Resident(job, leaving=True)
    return Resident(
        job,
        team_of(work, job),
        row.priority,
        books.attained.get(job, 0.0),
        books.remaining(row),
        row.submitted_at,
        books.preempted_at.get(job),
        work.over(job, attempt),
    )


def _bases_to_come(work: Work) -> frozenset[str]:
    orders = [work.order(job) for job in work.jobs]
    return frozenset(
        order.job.host_key
        for order in orders
        if any(NEEDS[step.kind] in (Need.SLOT, Need.HOST) for step in work.ledger.remaining(order))
    )
