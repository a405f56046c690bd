"""What the policy remembers from tick to tick: who used how much, who waits since when, who is suspected.

Kept in the store as one value, written from time to time: a controller that is killed loses some seconds of
accounting, never a job.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from orchestrator.control.fleet import Host
from orchestrator.fairness import decayed, grown
from orchestrator.poison import Poison, acquitted, after_death
from orchestrator.store.rows import JobRow
from orchestrator.store.scheduling import SchedulingStore

WRITE_SECONDS = 10.0
MOST_SECONDS = 60.0
"""A longer stretch between two ticks is a clock that jumped or a machine that slept: nobody pays for it."""
STEPS_TO_TELL = 3
"""Steps after which a job's pace is taken for known."""


@dataclass
class Books:
    """Times in seconds since the epoch, service in rank-seconds."""

    store: SchedulingStore
    usage: dict[str, float] = field(default_factory=dict[str, float])
    """Team -> decayed, as of `at`."""
    attained: dict[str, float] = field(default_factory=dict[str, float])
    held: dict[str, float] = field(default_factory=dict[str, float])
    """Job -> seconds for which it was under way while a controller was at work."""
    waiting_since: dict[str, float] = field(default_factory=dict[str, float])
    preempted_at: dict[str, float] = field(default_factory=dict[str, float])
    poison: Poison = field(default_factory=Poison)
    at: float | None = None
    _holding: frozenset[str] = frozenset()
    _held_at: float = 0.0
    _tokens: dict[str, int] = field(default_factory=dict[str, int])
    _written: float | None = None

    @classmethod
    def open(cls, store: SchedulingStore) -> Books:
        """The books as they were last written; empty ones for a new store."""
        books, value = cls(store), store.read()
        if value:
            poison = value["poison"]
            groups = tuple(frozenset(group) for group in poison["groups"])
            books.poison = Poison(poison["died_at"], poison["alone"], groups)
            books.usage, books.attained = dict(value["usage"]), dict(value["attained"])
            books.waiting_since, books.preempted_at = (
                dict(value["waiting_since"]),
                dict(value["preempted_at"]),
            )
            books.held = dict(value.get("held", {}))  # younger than some stores
            books.at = value["at"]
        return books

    def value(self) -> dict[str, Any]:
        """All of it, as JSON."""
        poison = {
            "died_at": dict(self.poison.died_at),
            "alone": dict(self.poison.alone),
            "groups": [sorted(group) for group in self.poison.groups],
        }
        return {
            "at": self.at,
            "usage": self.usage,
            "attained": self.attained,
            "held": self.held,
            "waiting_since": self.waiting_since,
            "preempted_at": self.preempted_at,
            "poison": poison,
        }

    def write(self, now: float, *, at_once: bool = False) -> None:
        """Keep the books in the store if that is due."""
        if at_once or self._written is None or abs(now - self._written) >= WRITE_SECONDS:
            self.store.write(self.value())
            self._written = now

    # ---- service ---------------------------------------------------------------------------------------

    def trained(self, job: str, tokens: int) -> None:
        self._tokens[job] = self._tokens.get(job, 0) + tokens

    def holds(self, jobs: Iterable[str], now: float) -> None:
        """These are under way now. What was so the last time has been until now; a clock set back counts 0.

        Their events would not do: they do not tell when a controller was killed, with all that it had.
        """
        for job in self._holding:
            self.held[job] = self.held.get(job, 0.0) + max(now - self._held_at, 0.0)
        self._holding, self._held_at = frozenset(jobs), now

    def charge(self, hosts: tuple[Host, ...], teams: Mapping[str, str], now: float, half_life: float) -> None:
        """Charge residents for the time since the last charge: each for its share of its host's ticks.

        The share is that of the tokens trained since then; an equal part on a host that has trained none.
        `teams` names the team of every resident that is to be charged.
        """
        seconds = 0.0 if self.at is None else now - self.at
        self.at = now
        if not 0 < seconds <= MOST_SECONDS:
            if seconds > MOST_SECONDS:
                self.usage = decayed(self.usage, seconds, half_life)
            return
        held: dict[str, float] = {}
        for host in hosts:
            aboard = [job for job in host.residents if job in teams]
            for job, part in self._parts(aboard).items():
                ranks = host.world_size * part
                self.attained[job] = self.attained.get(job, 0.0) + ranks * seconds
                held[teams[job]] = held.get(teams[job], 0.0) + ranks
        self._tokens.clear()
        self.usage = grown(self.usage, held, seconds, half_life)

    def _parts(self, jobs: list[str]) -> dict[str, float]:
        total = sum(self._tokens.get(job, 0) for job in jobs)
        return {job: self._tokens.get(job, 0) / total if total else 1 / len(jobs) for job in jobs}

    def remaining(self, job: JobRow) -> float | None:
        """Rank-seconds that a job's steps to come will take at its pace so far; None before that is known."""
        had = self.attained.get(job.id, 0.0)
        if job.num_steps is None or job.step < STEPS_TO_TELL or had == 0.0:
            return None
        return had / job.step * max(job.num_steps - job.step, 0)

    # ---- waits, preemptions, deaths ----------------------------------------------------------------------

    def waits(self, jobs: set[str], now: float) -> None:
        """These wait for a place now, and no others."""
        self.waiting_since = {job: self.waiting_since.get(job, now) for job in jobs}

    def died(self, reached: Mapping[str, int]) -> str | None:
        """A host has died under these jobs; the culprit, if that shows who it is."""
        self.poison, culprit = after_death(self.poison, reached)
        return culprit

    def keep_only(self, jobs: Mapping[str, JobRow]) -> None:
        """Forget jobs that have finished, and acquit suspects that got further."""
        self.poison = acquitted(self.poison, {job: row.step for job, row in jobs.items()})
        for kept in (self.attained, self.held, self.preempted_at):
            for job in kept.keys() - jobs.keys():
                del kept[job]
