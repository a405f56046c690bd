"""Moving `champion` and `previous`.

MLflow moves aliases one by one. So a move is first written down (`releases`), then carried out, then its
record is ended: after a crash the next command carries out what was written down.
"""

from __future__ import annotations

import fcntl
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from mlflow.entities import Metric
from mlflow.tracking import MlflowClient

from orchestrator.contracts import AdapterVersion, NoSuchVersion, RegistryConflict, ReleaseRecord
from orchestrator.judgement import GATE_TAG
from orchestrator.registry import releases
from orchestrator.registry.artifacts import check_bytes
from orchestrator.registry.client import metric_key
from orchestrator.registry.releases import Kind, Move
from orchestrator.registry.versions import aliases_of, one_version, set_tags
from workers.types import BadInput

CHAMPION, PREVIOUS = "champion", "previous"
ROUNDS = 5
"""Times that aliases are set again which another machine set meanwhile."""


@contextmanager
def one_writer(lock: Path | None) -> Generator[None]:
    """Keep other commands of the same home out until the move is done: they wait instead of losing a race."""
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
    """Make `version` champion if the champion is the expected one.

    The same move asked again does nothing, nor does one of the champion itself: `previous` stays. Raises
    RegistryConflict if it is not or if the version's bytes were altered, NoSuchVersion.
    """
    wanted = one_version(client, name, str(version))
    done = finish_pending(client, name)
    champion = _champion(client, name)
    asked_again = done and _ends(done[-1]) == ("promote", expected_champion or 0, version)
    if champion == version and (asked_again or expected_champion == version):
        return one_version(client, name, str(version))
    if champion != expected_champion:
        raise RegistryConflict(
            f"the champion of {name} is {_say(champion)}, not {_say(expected_champion)} as expected"
        )
    check_bytes(client, wanted)
    return _move(client, "promote", len(done), champion, wanted, reason, figures)


def rollback(client: MlflowClient, name: str, expected_champion: int | None, reason: str) -> AdapterVersion:
    """Make the previous champion champion if the champion is the expected one.

    A rollback from that champion that is done already, by whomever, is not done twice. Raises
    RegistryConflict, NoSuchVersion without a previous champion.
    """
    done = finish_pending(client, name)
    champion = _champion(client, name)
    if champion and done and _ends(done[-1]) == ("rollback", expected_champion, champion):
        return one_version(client, name, str(champion))
    if champion != expected_champion:
        raise RegistryConflict(
            f"the champion of {name} is {_say(champion)}, not {_say(expected_champion)} as expected"
        )
    if champion is None or PREVIOUS not in aliases_of(client, name):
        raise NoSuchVersion(f"{name} has no previous champion to roll back to")
    target = one_version(client, name, PREVIOUS)
    check_bytes(client, target)
    return _move(client, "rollback", len(done), champion, target, reason, {})


def finish_move(client: MlflowClient, name: str) -> list[ReleaseRecord]:
    """Carry out a move that was interrupted; the record of every move that was made, oldest first."""
    return [replace(move.record, done=True) for move in finish_pending(client, name)]


def finish_pending(client: MlflowClient, name: str) -> list[Move]:
    """Every move that was made, oldest first, after carrying out one that was written down and interrupted.

    One that came second for its number, or whose version has since been deleted, is withdrawn.
    """
    return [
        move for move in releases.moves(client, name) if move.record.done or _taken_up(client, name, move)
    ]


def _taken_up(client: MlflowClient, name: str, move: Move) -> bool:
    try:
        one_version(client, name, str(move.record.target))
        mine = releases.winner(client, name, move)
    except (NoSuchVersion, RegistryConflict) as error:
        releases.withdraw(client, move, str(error))
        return False
    if mine is None or mine.run_id != move.run_id:
        releases.withdraw(client, move, releases.OVERTAKEN)
        return False
    _carry_out(client, name, move)
    return True


def _move(
    client: MlflowClient,
    kind: Kind,
    moves_before: int,
    champion: int | None,
    target: AdapterVersion,
    reason: str,
    figures: Mapping[str, float],
) -> AdapterVersion:
    """Write the move down, win its number, carry it out. Raises RegistryConflict if another won."""
    written = releases.write(client, kind, moves_before + 1, champion, target, reason, figures)
    move = releases.winner(client, target.name, written)
    if move is None:
        releases.withdraw(client, written, releases.OVERTAKEN)
        raise RegistryConflict(
            f"another command moved the champion of {target.name} at the same time; look at "
            f"`chorus adapters history {target.name}`, then decide again"
        )
    return _carry_out(client, target.name, move)


def _carry_out(client: MlflowClient, name: str, move: Move) -> AdapterVersion:
    """Set both aliases from the record, so that doing it again is harmless; read back; end the record.

    Returns the version that was made champion, which a later move may have replaced meanwhile.
    """
    record = move.record
    _point(client, name, record)
    if record.kind == "promote":
        set_tags(client, name, record.target, {GATE_TAG: "passed"})
    if record.figures:
        metrics = [Metric(metric_key(k), v, record.when_ms, 0) for k, v in record.figures.items()]
        client.log_batch(move.run_id, metrics)
    _settle(client, name, record)
    client.set_terminated(move.run_id, "FINISHED")
    releases.withdraw_losers(client, name, record.number)
    return one_version(client, name, str(record.target))


def _point(client: MlflowClient, name: str, record: ReleaseRecord) -> None:
    for alias, version in _ends_of(client, name, record).items():
        client.set_registered_model_alias(name, alias, version)


def _ends_of(client: MlflowClient, name: str, record: ReleaseRecord) -> dict[str, str]:
    """Alias -> version after a move; `previous` stays where it is if what was champion has been deleted."""
    left = {PREVIOUS: str(record.source)} if record.source and _exists(client, name, record.source) else {}
    return {**left, CHAMPION: str(record.target)}


def _settle(client: MlflowClient, name: str, record: ReleaseRecord) -> None:
    """Leave the aliases as the newest move says, though a writer that was late undid it.

    Another machine may have finished this move and made the next before this one set its aliases. Raises
    RegistryConflict if they are still elsewhere: someone moves them past the record.
    """
    for _ in range(ROUNDS):
        newest = releases.newest(client, name)
        wanted = record if newest is None or newest.record.number < record.number else newest.record
        found = aliases_of(client, name)
        if _ends_of(client, name, wanted).items() <= found.items():
            return
        _point(client, name, wanted)
    raise RegistryConflict(
        f"the champion of {name} was moved to {_say(_champion(client, name))} by someone else"
    )


def _exists(client: MlflowClient, name: str, version: int) -> bool:
    try:
        one_version(client, name, str(version))
    except NoSuchVersion:
        return False
    return True


def _ends(move: Move) -> tuple[str, int, int]:
    return move.record.kind, move.record.source, move.record.target


def _champion(client: MlflowClient, name: str) -> int | None:
    number = aliases_of(client, name).get(CHAMPION)
    return None if number is None else int(number)


def _say(version: int | None) -> str:
    return "none" if version is None else f"version {version}"
