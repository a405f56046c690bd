"""`hosts`, `teams`, `events`: what the controller shows, and what happened to a job. They change nothing."""

from __future__ import annotations

import time
from typing import Any

from rich.console import Console

from orchestrator.api.service import Service
from orchestrator.commands.output import Format, duration, emit, grid, moment

HOST_COLUMNS = ("host", "base", "ranks", "zero", "state", "slots", "adapter room", "tokens/tick", "residents")
TEAM_COLUMNS = ("team", "running", "waiting", "ranks", "share", "weight", "quota", "used lately")
EVENT_COLUMNS = ("when", "who", "attempt", "from", "to", "reason", "message")


def hosts(service: Service, format: Format) -> None:
    """The hosts of the controller at work, as it last showed them."""
    value = service.hosts()

    def table(out: Console) -> None:
        if not value["at_work"]:
            out.print(f"nobody works in {service.place} now", soft_wrap=True)
        if value["hosts"]:
            right = ("ranks", "slots", "adapter room", "tokens/tick")
            out.print(grid(HOST_COLUMNS, [_host_cells(host) for host in value["hosts"]], right=right))
        if value["at"] is not None:
            out.print(f"as shown {duration(time.time() - value['at'])} ago")

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


def team_table(service: Service, format: Format) -> None:
    """Teams with unfinished jobs: the share of the ranks in use that each has, and what its turn goes by."""
    rows = service.teams()

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


def events(service: Service, reference: str, format: Format) -> None:
    """All that happened to a job, the oldest first: who, when, from which status to which, and why."""
    rows = service.events(reference)

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
