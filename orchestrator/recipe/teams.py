"""`teams.yaml` of a home: the teams' weights and quotas, the policy's figures. Read again when it changes."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, ValidationError, field_validator

from orchestrator.policy import Policy, Team
from orchestrator.recipe.file import read_yaml
from orchestrator.recipe.keys import refusal
from orchestrator.recipe.parts import Duration, Model, NoBool, Number
from workers.types import BadInput

log = logging.getLogger(__name__)

NotNegative = Annotated[float, Field(ge=0), NoBool]


class TeamBlock(Model):
    """What a team may claim."""

    weight: Annotated[Number, Field(gt=0)] = 1.0
    """Share of what nobody has a quota for, relative to the other teams' weights."""
    quota: NotNegative = 0.0
    """Ranks (GPUs, or CPUs where there are none) that are its own whenever it wants them."""


class TeamsFile(Model):
    """The keys of a teams file; what is left out keeps its default."""

    version: Literal[1]
    """Format of the file."""
    teams: dict[str, TeamBlock] = Field(default_factory=dict)
    """By the name that recipes give as `schedule.team`; `default` is of recipes that give none."""
    half_life: Duration = int(Policy.half_life)
    """After so long past use counts half, like 4h."""
    most_waiting: Duration = int(Policy.most_waiting)
    """A job that waited so long goes first in its team."""
    protection: Duration = int(Policy.protection)
    """A job is preempted at most once in so long."""
    most_preempted: Annotated[int, Field(ge=1), NoBool] = Policy.most_preempted
    """No more jobs make way in one round than so many, a whole host's at once."""
    levels: tuple[Duration, ...] = tuple(int(bound) for bound in Policy.levels)
    """Rising: rank-hours (like 4h) of service at which a job falls into the next queue of its team."""
    idle: Duration = int(Policy.idle)
    """How long a host that nobody needs is kept warm."""

    @field_validator("levels")
    @classmethod
    def _rising(cls, levels: tuple[int, ...]) -> tuple[int, ...]:
        if list(levels) != sorted(set(levels)):
            raise ValueError("must rise, like [4h, 32h]")
        return levels


def load_policy(path: Path) -> Policy:
    """The policy of a teams file; the default one if there is none. Raises BadInput naming file and line."""
    if not path.exists():
        return Policy()
    node = read_yaml(path)
    try:
        file = TeamsFile.model_validate(node.plain())
    except ValidationError as error:
        raise refusal(error, node, TeamsFile) from None
    teams = {name: Team(block.weight, block.quota) for name, block in file.teams.items()}
    return Policy(
        half_life=file.half_life,
        most_waiting=file.most_waiting,
        protection=file.protection,
        most_preempted=file.most_preempted,
        levels=file.levels,
        idle=file.idle,
        teams=teams,
    )


class PolicyFile:
    """The policy of a home, read again when its file changes; one that is wrong then changes nothing."""

    def __init__(self, path: Path) -> None:
        """Raises BadInput."""
        self._path = path
        self._stamp = self._look()
        self._policy = load_policy(path)

    def read(self) -> Policy:
        stamp = self._look()
        if stamp != self._stamp:
            self._stamp = stamp
            try:
                self._policy = load_policy(self._path)
            except BadInput as error:
                log.error("%s; the teams stay as they were", error)
        return self._policy

    def _look(self) -> tuple[int, int] | None:
        try:
            status = self._path.stat()
        except FileNotFoundError:
            return None
        return status.st_mtime_ns, status.st_size
