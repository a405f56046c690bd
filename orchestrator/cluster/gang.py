"""A gang: the ranks of one host on Ray, as actors that outlive the controller and are found again by name.

All of it lies in one namespace of Ray's, the home's: rank n of a host that controller e started is the actor
`<host>.<e>.<n>`, its placement group `<namespace>.<host>.<e>`. What a host is, its rank 0 tells (`Card`).
"""

# Ray's types are incomplete; strict mode would have us annotate its unknowns.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false

from __future__ import annotations

import hashlib
import logging
import time
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayActorError, RayError, RayTaskError
from ray.util import (
    get_placement_group,
    list_named_actors,
    placement_group,
    placement_group_table,
    remove_placement_group,
)
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

import workers
from workers.actor import Card, RankActor
from workers.hang import DEFAULT, ORPHAN_VARIABLE, VARIABLE, hang_seconds, orphan_seconds
from workers.mail import Polled
from workers.manifest import file_digest, json_digest
from workers.serve import failure_words
from workers.types import Command, Event, Roll, Superseded

ANSWER_SECONDS = 0.2
"""Longest wait for an actor's answer in one `poll`; a later poll picks up a late one. Usually 2 ms."""
LAST_WORDS_SECONDS = 1.0
"""Once a rank has ended: for the others to end, and for the events rank 0 still holds."""
ROOM_SECONDS = 60.0
"""A gang that got no room by then is given up, so that the queue decides again."""
TAKE_OVER_SECONDS = 20.0
"""For all hosts that live on to answer whoever takes them over; those that do not are taken away."""
DETACHED = "detached"

log = logging.getLogger(__name__)


def namespace_of(home: Path) -> str:
    """Where the actors of a home are found; a cluster may hold the hosts of several."""
    return f"chorus-{hashlib.sha256(bytes(home.resolve())).hexdigest()[:16]}"


@dataclass
class Gang:
    """The actors of one host, in rank order, in one placement group."""

    card: Card
    epoch: int
    """Of the controller that holds it now."""
    group: Any
    ranks: list[Any]
    runs: list[Any]
    """One reference a rank to its `ended`: it is done only when that rank has ended."""
    endpoints: list[Any] = field(default_factory=list[Any])
    started: float = field(default_factory=time.monotonic)
    after: int = 0
    rounds: int = 0
    answer: Any = None
    """The call to rank 0's `poll` that is under way."""
    heard: float | None = None
    """When rank 0 last answered; None before it was first asked."""
    hang_seconds: float = DEFAULT

    def send(self, command: Command) -> None:
        self.ranks[0].submit.remote(command, self.epoch)

    def collect(self, seconds: float) -> list[Event]:
        """Rank 0's next events. A lost answer is asked for again with the same number: none is doubled.

        Asking for the next ones says that those before were taken in. Raises Superseded.
        """
        if self.answer is None:
            self.answer = self.ranks[0].poll.remote(self.after, self.epoch)
            self.heard = time.monotonic() if self._placed() else None
        done, _ = ray.wait([self.answer], timeout=seconds if self._placed() else 0)
        if not done:
            return []
        # Now, however long ago it was asked: the controller may have been kept elsewhere.
        self.answer, self.heard = None, time.monotonic()
        try:
            polled: Polled = ray.get(done[0])
        except RayError as error:
            _raise_superseded(error)
            return []
        self.after, self.rounds = polled.last, polled.rounds
        return list(polled.events)

    def failure(self, wait: bool) -> str | None:
        """Why the gang is lost; None while all its ranks serve. `wait` a moment if one is about to end.

        Raises Superseded.
        """
        if ray.wait(self.runs, timeout=LAST_WORDS_SECONDS if wait else 0)[0]:
            # The first to end is often one that merely lost its connection to the one that died.
            ended, _ = ray.wait(self.runs, num_returns=len(self.runs), timeout=LAST_WORDS_SECONDS)
            words = [_ended_words(rank, run) for rank, run in enumerate(self.runs) if run in ended]
            return sorted(words, key=lambda text: "onnection" in text)[0]
        if self.heard is not None and time.monotonic() - self.heard > self.hang_seconds:
            return f"rank 0 has not answered for {self.hang_seconds:.0f} s"
        if self.reserved or time.monotonic() - self.started < ROOM_SECONDS:
            return None
        return f"no room for {len(self.ranks)} ranks in the cluster within {ROOM_SECONDS:.0f} s"

    @property
    def reserved(self) -> bool:
        """Whether all its bundles have their place."""
        return self._placed() or self.group.wait(0)

    def alive(self, rank: int) -> bool:
        """False once the rank's process is known to be dead; it may outlive its loop."""
        ended, _ = ray.wait([self.runs[rank]], timeout=0)
        try:
            ray.get(ended)
        except RayTaskError:
            return True
        except RayError:
            return False
        return True

    def take_away(self) -> None:
        """End the processes at once and give their room back.

        Not if a later controller has taken over: Ray would kill for anyone who holds a handle.
        """
        if self._placed() and not self._ours():
            return
        for rank in self.ranks:
            ray.kill(rank)
        remove_placement_group(self.group)

    def _ours(self) -> bool:
        """Whether rank 0 obeys us; one that does not answer obeys nobody."""
        asked = self.ranks[0].obeys.remote(self.epoch)
        done, _ = ray.wait([asked], timeout=ANSWER_SECONDS)
        try:
            return all(ray.get(done))
        except RayError:
            return True

    def _placed(self) -> bool:
        if not self.endpoints:
            return True  # it was taken over, so it answers
        done, _ = ray.wait(self.endpoints, num_returns=len(self.endpoints), timeout=0)
        return len(done) == len(self.endpoints)


def start_gang(card: Card, namespace: str, logs: Path) -> Gang:
    """Reserve a bundle for each rank and start it there. Returns at once: Ray places them when it can."""
    resources = {"CPU": 1.0, "GPU": 1.0} if card.on_gpus else {"CPU": 1.0}
    group = placement_group(
        [resources] * card.world_size,
        strategy="PACK",
        name=_group_name(namespace, card),
        lifetime=DETACHED,
    )
    ranks = [
        RankActor.options(
            name=name,
            namespace=namespace,
            lifetime=DETACHED,
            num_cpus=1,
            num_gpus=int(card.on_gpus),
            scheduling_strategy=PlacementGroupSchedulingStrategy(group, index),
        ).remote(card, index, _rank_environment(card), str(logs / f"rank{index}.log"))
        for index, name in enumerate(_names(card))
    ]
    endpoints = [rank.endpoint.remote() for rank in ranks]
    for rank in ranks:
        rank.begin.remote(*endpoints)
    runs = [rank.ended.remote(card.epoch) for rank in ranks]
    return Gang(card, card.epoch, group, ranks, runs, endpoints, hang_seconds=hang_seconds())


def take_over(namespace: str, epoch: int) -> list[tuple[Gang, Roll]]:
    """The gangs of a namespace that live on, held by controller `epoch` from now on.

    What is left of others is taken away (a rank is dead, rank 0 does not answer or was never told to begin),
    and so are ranks that run another version of `workers` than ours. Raises Superseded.
    """
    names = set[str](list_named_actors())
    told = _ask_to_obey(_first_ranks(names, namespace), epoch)
    whole = [(c, roll) for c, roll in told if names.issuperset(_names(c)) and c.code == code_digest()]
    for group in _groups(namespace).keys() - {_group_name(namespace, card) for card, _ in whole}:
        log.warning("what is left of %s is taken away", group)
        remove_placement_group(get_placement_group(group))
    return [(_held(namespace, card, roll, epoch), roll) for card, roll in whole]


def _ask_to_obey(ranks: list[str], epoch: int) -> list[tuple[Card, Roll]]:
    asked: list[Any] = [ray.get_actor(name).take_over.remote(epoch) for name in ranks]
    if not asked:
        return []
    answered, _ = ray.wait(asked, num_returns=len(asked), timeout=TAKE_OVER_SECONDS)
    return [told for answer in answered if (told := _told(answer)) is not None]


def _told(answer: Any) -> tuple[Card, Roll] | None:
    try:
        return ray.get(answer)
    except RayError as error:
        _raise_superseded(error)
        return None


def _held(namespace: str, card: Card, roll: Roll, epoch: int) -> Gang:
    ranks = [ray.get_actor(name) for name in _names(card)]
    for rank in ranks[1:]:
        rank.take_over.remote(epoch)
    runs = [rank.ended.remote(epoch) for rank in ranks]
    group = get_placement_group(_group_name(namespace, card))
    return Gang(card, epoch, group, ranks, runs, after=roll.after, hang_seconds=hang_seconds())


@cache
def code_digest() -> str:
    """Of all that a rank may import from us."""
    folder = Path(workers.__file__).parent
    files = {str(path.relative_to(folder)): file_digest(path) for path in folder.rglob("*.py")}
    return json_digest(files)


def _names(card: Card) -> list[str]:
    return [f"{card.host}.{card.epoch}.{rank}" for rank in range(card.world_size)]


def _group_name(namespace: str, card: Card) -> str:
    return f"{namespace}.{card.host}.{card.epoch}"


def _first_ranks(names: set[str], namespace: str) -> list[str]:
    """Those that have their place: others would be asked in vain."""
    states = _groups(namespace)
    firsts = (name for name in sorted(names) if name.endswith(".0"))
    unplaced = ("PENDING", "PREPARED", None)
    return [name for name in firsts if states.get(f"{namespace}.{name.removesuffix('.0')}") not in unplaced]


def _groups(namespace: str) -> dict[str, str]:
    """Name -> state of the placement groups of a namespace that were not removed."""
    rows = [row for row in placement_group_table().values() if row["name"].startswith(f"{namespace}.")]
    return {row["name"]: row["state"] for row in rows if row["state"] != "REMOVED"}


def _rank_environment(card: Card) -> dict[str, str]:
    """What a rank sets before it imports torch.

    Ray shows a rank its own GPU alone, so its index among the visible ones is always 0. A thread that waits
    must sleep: one that spins takes the core from the thread, or the process, that it waits for.
    """
    environment = {"OMP_NUM_THREADS": str(card.threads), "OMP_WAIT_POLICY": "PASSIVE"}
    environment |= {"TOKENIZERS_PARALLELISM": "false", "LOCAL_RANK": "0"}
    environment |= {VARIABLE: f"{hang_seconds():g}", ORPHAN_VARIABLE: f"{orphan_seconds():g}"}
    return environment if card.on_gpus else {**environment, "DS_ACCELERATOR": "cpu"}


def _raise_superseded(error: RayError) -> None:
    if isinstance(error, RayTaskError) and isinstance(error.cause, Superseded):
        raise Superseded(*error.cause.args) from error


def _ended_words(rank: int, run: Any) -> str:
    try:
        ray.get(run)
    except RayTaskError as error:
        _raise_superseded(error)
        return failure_words(rank, error.cause)
    except RayActorError as error:
        return f"rank {rank} died: {first_line(error)}"
    except RayError as error:
        return failure_words(rank, error)
    return f"rank {rank} left the host"


def first_line(error: BaseException) -> str:
    return next(iter(str(error).strip().splitlines()), "no message")
