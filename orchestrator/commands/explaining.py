"""`explain JOB`: why it waits, who goes first, what would have to be freed, when it may start and end."""

from __future__ import annotations

import time

from rich.console import Console

from orchestrator.api.service import Service, Value
from orchestrator.commands.output import Format, duration, emit, moment
from orchestrator.job import FINISHED


def explain(service: Service, reference: str, format: Format) -> None:
    value = service.explain(reference)
    emit(value, format, lambda out: _print(out, value))


def _print(out: Console, value: Value) -> None:
    finished = value["status"] in FINISHED
    out.print(f"{value['job']}: {value['sentence']}", soft_wrap=True)
    if value["ahead"]:
        out.print(f"ahead of it: {', '.join(value['ahead'])}", soft_wrap=True)
    for words in value["to_free"]:
        out.print(f"to be freed: {words}", soft_wrap=True)
    if value["expected_start"] is not None and value["status"] == "WAITING":
        out.print(f"may start {moment(value['expected_start'])}")
    if value["expected_end"] is not None and not finished:
        left = duration(max(0.0, value["expected_end"] - time.time()))
        out.print(f"its training may end {moment(value['expected_end'])}, in {left}", soft_wrap=True)
    if not value["at_work"] and not finished:
        out.print("nobody works here now; `chorus serve` does", soft_wrap=True)
