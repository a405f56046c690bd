"""`hosts`, `teams`, `events`: what the controller shows, and what happened to a job. They change nothing."""

from __future__ import annotations

import time
from contextlib import ExitStack
from typing import Any

from rich.console import Console

from orchestrator.commands.home import Home
from orchestrator.commands.jobs import find_job, open_store
from orchestrator.commands.output import Format, duration, emit, grid, moment
from orchestrator.commands.parts import Parts
from orchestrator.commands.queue_view import Queue, claim_view, teams
from orchestrator.commands.views import event_view
from orchestrator.control.show import read_snapshot
from orchestrator.recipe.teams import load_policy

HOST_COLUMNS = ("host", "base", "ranks", "zero", "state", "slots", "adapter room", "tokens/tick", "residents")
TEAM_COLUMNS = ("team", "running", "waiting", "ranks", "share", "weight", "quota", "used lately")
EVENT_COLUMNS = ("when", "who", "attempt", "from", "to", "reason", "message")


def hosts(parts: Parts, home: Home, format: Format) -> None:
    """The hosts of the controller at work, as it last showed them."""
    with ExitStack() as stack:
        queue = Queue.read(open_store(parts, home, stack))
        at_work = home.claimed()
        value = {"at_work": at_work, "at": queue.at, "hosts": [dict(host) for host in queue.hosts]}

        def table(out: Console) -> None:
            if not at_work:
                out.print(f"nobody works in {home.folder} on this machine", soft_wrap=True)
            if queue.hosts:
                right = ("ranks", "slots", "adapter room", "tokens/tick")
                out.print(grid(HOST_COLUMNS, [_host_cells(host) for host in queue.hosts], right=right))
            if queue.at is not None:
                out.print(f"as shown {duration(time.time() - queue.at)} ago")

        emit(value, format, table)


def _host_cells(host: Any) -> tuple[str, ...]:
    room = f"{host['adapter_parameters']:,}"
    if host["adapter_room"] is not None:
        room += f" of {host['adapter_room']:,}"
    aboard = [*host["residents"], *(f"{job} (scored)" for job in host["visitors"])]
    return (
        *(host["name"], host["base"], str(host["world_size"]), host["zero"] or "", _state(host)),
        f"{len(host['residents'])} of {host['slots']}",
        room,
        str(host["tokens_per_tick"] or ""),
        ", ".join(aboard),
    )


def _state(host: Any) -> str:
    """`saturated`: one more resident would only make the others slower."""
    return "saturated" if host.get("saturated") else host["state"]


def team_table(parts: Parts, home: Home, format: Format) -> None:
    """Teams with unfinished jobs: the share of the ranks in use that each has, and what its turn goes by."""
    policy = load_policy(home.folder / "teams.yaml")
    with ExitStack() as stack:
        store = open_store(parts, home, stack)
        shown = read_snapshot(store)
        usage = shown[0].usage if shown else dict[str, float]()
        rows = [
            {**row, **claim_view(policy, usage, row["team"])}
            for row in teams(store.unfinished_jobs(), Queue.read(store).hosts)
        ]

        def table(out: Console) -> None:
            cells = [
                (
                    row["team"],
                    str(row["running"]),
                    str(row["waiting"]),
                    f"{row['ranks']:g}",
                    f"{row['share']:.0%}",
                    *(f"{row[key]:g}" for key in ("weight", "quota")),
                    f"{row['used_lately']:.1f}",
                )
                for row in rows
            ]
            out.print(grid(TEAM_COLUMNS, cells, right=TEAM_COLUMNS[1:]))

        emit(rows, format, table)


def events(parts: Parts, home: Home, reference: str, format: Format) -> None:
    """All that happened to a job, the oldest first: who, when, from which status to which, and why."""
    with ExitStack() as stack:
        store = open_store(parts, home, stack)
        rows = [event_view(event) for event in store.events(find_job(store, reference).id)]

        def table(out: Console) -> None:
            cells = [
                (
                    *(moment(row["at"]), row["who"], str(row["attempt"]), row["from"] or "", row["status"]),
                    *(row["reason_words"], row["message"]),
                )
                for row in rows
            ]
            out.print(grid(EVENT_COLUMNS, cells, right=("attempt",)))

        emit(rows, format, table)
