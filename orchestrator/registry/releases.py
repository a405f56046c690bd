"""The release record: each move of a champion as a run in the experiment `releases`, and who makes the next.

MLflow has no compare-and-swap and no history of aliases. Its one atomic "first writer wins" is a run's
parameter, which never changes its value. So a move is numbered, written down as an unfinished run, and then
claims its number as a parameter of one run that all writers agree on; whoever comes second is told. It holds
between any number of machines on one server.

MLflow's client repeats a request that is not answered, so a move may be written down twice. Both records
carry the move's token, and one of them wins.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from mlflow.entities import Run
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient

from orchestrator.contracts import AdapterVersion, RegistryConflict, ReleaseRecord
from orchestrator.registry.client import PAGE, experiment_id, pages, quoted
from orchestrator.registry.versions import runs_of
from orchestrator.who import user_at_machine

RELEASES = "releases"
Kind = Literal["promote", "rollback"]
RECORDED_TAGS = (
    *("adapter.digest", "manifest.digest", "base.digest", "recipe.digest", "data.digest"),
    "fusion.parents",
)
"""Tags of the version that its release record repeats."""
MAX_TAG = 8000
OVERTAKEN = "another move took its number"


@dataclass(frozen=True)
class Move:
    """One change of champion and the run that records it."""

    run_id: str
    record: ReleaseRecord
    token: str
    """The same in all records of one move; empty in those from before moves had tokens."""

    @property
    def claim(self) -> str:
        """The parameter by which it takes its number."""
        return f"release.{self.record.number}"


def history(client: MlflowClient, name: str) -> list[ReleaseRecord]:
    """Moves that were made or are under way, oldest first."""
    return [move.record for move in moves(client, name)]


def moves(client: MlflowClient, name: str) -> list[Move]:
    """Those of `history`. A record from before moves had numbers is counted in the order of its start."""
    runs = pages(
        client.search_runs,
        experiment_ids=[experiment_id(client, RELEASES)],
        filter_string=f"tags.`release.name` = {quoted(name)}",
        order_by=["attributes.start_time ASC"],
        max_results=PAGE,
    )
    won = [run for run in runs if run.info.status != "FAILED"]
    found = [_read(run, place) for place, run in enumerate(won, 1)]
    return sorted(found, key=lambda move: move.record.number)


def write(
    client: MlflowClient,
    kind: Kind,
    number: int,
    champion: int | None,
    target: AdapterVersion,
    reason: str,
    figures: Mapping[str, float],
) -> Move:
    """Write a move down, in one request, before it is made."""
    tags = {
        "release.name": target.name,
        "release.number": str(number),
        "release.kind": kind,
        "release.from": str(champion or 0),
        "release.to": str(target.version),
        "release.who": user_at_machine(),
        "release.reason": reason[:MAX_TAG],
        "release.figures": json.dumps(dict(figures)),
        "release.token": uuid.uuid4().hex,
        **{key: target.tags[key] for key in RECORDED_TAGS if key in target.tags},
    }
    title = f"{kind} {target.name} {champion or 0} to {target.version}"
    return _read(client.create_run(experiment_id(client, RELEASES), run_name=title, tags=tags), number)


def winner(client: MlflowClient, name: str, move: Move) -> Move | None:
    """Take the move's number: the record that holds it, if that is of this move; None if another has it.

    Asked again it answers the same.
    """
    anchor = _anchor(client, name)
    try:
        client.log_param(anchor, move.claim, move.run_id)
    except MlflowException as error:
        if error.error_code != "INVALID_PARAMETER_VALUE":
            raise
    holder = client.get_run(anchor).data.params.get(move.claim)
    if holder == move.run_id:
        return move
    return next((m for m in moves(client, name) if m.run_id == holder and m.token == move.token != ""), None)


def newest(client: MlflowClient, name: str) -> Move | None:
    """The move with the highest number that was won, be it carried out or not."""
    claims = client.get_run(_anchor(client, name)).data.params
    found = [m for m in moves(client, name) if m.record.done or claims.get(m.claim) == m.run_id]
    return found[-1] if found else None


def withdraw_losers(client: MlflowClient, name: str, number: int) -> None:
    """End the records up to that number that another move, or the same one written twice, has overtaken."""
    claims = client.get_run(_anchor(client, name)).data.params
    for move in moves(client, name):
        lost = not move.record.done and claims.get(move.claim) not in (None, move.run_id)
        if lost and move.record.number <= number:
            withdraw(client, move, OVERTAKEN)


def withdraw(client: MlflowClient, move: Move, why: str) -> None:
    """Leave a move that was not made in the record as one that failed."""
    client.set_tag(move.run_id, "release.lost", why)
    client.set_terminated(move.run_id, "FAILED")


def _anchor(client: MlflowClient, name: str) -> str:
    """The oldest run of the name's versions that was not deleted: all writers find the same."""
    for run_id in runs_of(client, name):
        if client.get_run(run_id).info.lifecycle_stage == "active":
            return run_id
    raise RegistryConflict(
        f"the runs of all versions of {name} were deleted; restore one to move its champion"
    )


def _read(run: Run, place: int) -> Move:
    tags = run.data.tags
    record = ReleaseRecord(
        number=int(tags.get("release.number", place)),
        name=tags["release.name"],
        kind="promote" if tags["release.kind"] == "promote" else "rollback",
        source=int(tags["release.from"]),
        target=int(tags["release.to"]),
        who=tags.get("release.who", ""),
        when_ms=int(run.info.start_time or 0),
        reason=tags.get("release.reason", ""),
        figures=json.loads(tags["release.figures"]),
        digests={key: tags[key] for key in RECORDED_TAGS if key in tags},
        done=run.info.status == "FINISHED",
    )
    return Move(str(run.info.run_id), record, tags.get("release.token", ""))
