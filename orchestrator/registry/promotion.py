"""Moving `champion` and `previous`, with an append-only record of every move in the experiment `releases`.

MLflow moves aliases one by one, without compare-and-swap and without history. So a move is first written down
as an unfinished run, then carried out, then the run is ended: after a crash the next command carries out what
was written down.
"""

from __future__ import annotations

import fcntl
import json
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from mlflow.entities import Metric, Run
from mlflow.tracking import MlflowClient

from orchestrator.contracts import AdapterVersion, NoSuchVersion, RegistryConflict
from orchestrator.registry.artifacts import check_bytes
from orchestrator.registry.client import experiment_id, metric_key, quoted
from orchestrator.registry.versions import GATE_TAG, aliases_of, one_version, set_tags
from workers.types import BadInput

RELEASES = "releases"
CHAMPION, PREVIOUS = "champion", "previous"
Kind = Literal["promote", "rollback"]
RECORDED_TAGS = ("adapter.digest", "manifest.digest", "base.digest", "recipe.digest", "fusion.parents")
"""Tags of the version that its release record repeats."""
MAX_TAG = 8000


@dataclass(frozen=True)
class Move:
    """One change of champion, as its release record tells it. `source` 0: there was no champion."""

    run_id: str
    kind: Kind
    source: int
    target: int
    figures: Mapping[str, float]
    started_ms: int


@contextmanager
def one_writer(lock: Path | None) -> Generator[None]:
    """Keep other commands of the same home out until the move is done."""
    if lock is None:
        yield
        return
    with lock.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def set_alias(client: MlflowClient, name: str, alias: str, version: int) -> None:
    """Point any other alias at a version. Raises BadInput for the two that only a recorded move changes."""
    if alias in (CHAMPION, PREVIOUS):
        raise BadInput(f"the alias {alias} of {name} moves by `chorus promote` and `chorus rollback` only")
    one_version(client, name, str(version))
    client.set_registered_model_alias(name, alias, str(version))


def promote(
    client: MlflowClient,
    name: str,
    version: int,
    expected_champion: int | None,
    reason: str,
    figures: Mapping[str, float],
) -> AdapterVersion:
    """Make `version` champion if the champion is the expected one; the same move asked again does nothing.

    Raises RegistryConflict if it is not or if the version's bytes were altered, NoSuchVersion.
    """
    wanted = one_version(client, name, str(version))
    finish_pending(client, name)
    champion = _champion(client, name)
    if champion == version and _last_move(client, name) == (expected_champion or 0, version):
        return one_version(client, name, CHAMPION)
    if champion != expected_champion:
        raise RegistryConflict(
            f"the champion of {name} is {_say(champion)}, not {_say(expected_champion)} as expected"
        )
    check_bytes(client, wanted)
    move = _record(client, "promote", champion, wanted, reason, figures)
    return _carry_out(client, name, move)


def rollback(client: MlflowClient, name: str, reason: str) -> AdapterVersion:
    """Swap champion and previous. Finishes an interrupted rollback rather than swapping twice."""
    pending = finish_pending(client, name)
    if pending is not None and pending.kind == "rollback":
        return one_version(client, name, CHAMPION)
    aliases = aliases_of(client, name)
    if PREVIOUS not in aliases or CHAMPION not in aliases:
        raise NoSuchVersion(f"{name} has no previous champion to roll back to")
    target = one_version(client, name, PREVIOUS)
    check_bytes(client, target)
    move = _record(client, "rollback", int(aliases[CHAMPION]), target, reason, {})
    return _carry_out(client, name, move)


def finish_pending(client: MlflowClient, name: str) -> Move | None:
    """Carry out a move that was written down and then interrupted; None if there was none."""
    wanted = f"tags.`release.name` = {quoted(name)} AND attributes.status = 'RUNNING'"
    runs = client.search_runs(
        [experiment_id(client, RELEASES)], wanted, order_by=["attributes.start_time ASC"]
    )
    moves = [_read_move(run) for run in runs]
    for move in moves:
        _carry_out(client, name, move)
    return moves[-1] if moves else None


def _record(
    client: MlflowClient,
    kind: Kind,
    champion: int | None,
    target: AdapterVersion,
    reason: str,
    figures: Mapping[str, float],
) -> Move:
    """Write a move down, in one request, before it is made."""
    tags = {
        "release.name": target.name,
        "release.kind": kind,
        "release.from": str(champion or 0),
        "release.to": str(target.version),
        "release.reason": reason[:MAX_TAG],
        "release.figures": json.dumps(dict(figures)),
        **{key: target.tags[key] for key in RECORDED_TAGS if key in target.tags},
    }
    title = f"{kind} {target.name} {champion or 0} to {target.version}"
    return _read_move(client.create_run(experiment_id(client, RELEASES), run_name=title, tags=tags))


def _carry_out(client: MlflowClient, name: str, move: Move) -> AdapterVersion:
    """Set both aliases from the record, so that doing it again is harmless; read back; end the record."""
    if move.source:
        client.set_registered_model_alias(name, PREVIOUS, str(move.source))
    client.set_registered_model_alias(name, CHAMPION, str(move.target))
    if move.kind == "promote":
        set_tags(client, name, move.target, {GATE_TAG: "passed"})
    if move.figures:
        metrics = [Metric(metric_key(k), v, move.started_ms, 0) for k, v in move.figures.items()]
        client.log_batch(move.run_id, metrics)
    champion = one_version(client, name, CHAMPION)
    if champion.version != move.target:
        raise RegistryConflict(
            f"the champion of {name} was moved to {champion.version} by someone else meanwhile"
        )
    client.set_terminated(move.run_id, "FINISHED")
    return champion


def _read_move(run: Run) -> Move:
    tags = run.data.tags
    kind: Kind = "promote" if tags["release.kind"] == "promote" else "rollback"
    figures = json.loads(tags["release.figures"])
    when = int(run.info.start_time or 0)
    return Move(str(run.info.run_id), kind, int(tags["release.from"]), int(tags["release.to"]), figures, when)


def _last_move(client: MlflowClient, name: str) -> tuple[int, int] | None:
    wanted = f"tags.`release.name` = {quoted(name)}"
    runs = client.search_runs(
        [experiment_id(client, RELEASES)], wanted, order_by=["attributes.start_time DESC"], max_results=1
    )
    moves = [_read_move(run) for run in runs]
    return (moves[0].source, moves[0].target) if moves else None


def _champion(client: MlflowClient, name: str) -> int | None:
    number = aliases_of(client, name).get(CHAMPION)
    return None if number is None else int(number)


def _say(version: int | None) -> str:
    return "none" if version is None else f"version {version}"
