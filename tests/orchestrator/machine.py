"""A state machine over the real controller, scheduler and store: no order of events breaks them.

The cluster is in memory, and its wire is not to be trusted: reports come late, twice, in another order, of
attempts long over, or not at all. What a host that lives reports of a job's end does arrive some time, as
`Cluster` promises; else nobody could know that a slot is free. `python -m tests.orchestrator.machine 10000`
runs so many sequences.
"""

from __future__ import annotations

import random
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any
from unittest.mock import patch

import yaml
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from orchestrator.contracts import Capacity
from orchestrator.control.books import Books
from orchestrator.control.controller import Controller
from orchestrator.control.submission import new_run
from orchestrator.job import Reason, Status
from orchestrator.plan.plan import make_plan
from orchestrator.recipe.pipeline import load_pipeline
from orchestrator.store import engine as store_engine
from orchestrator.store.rows import NewRun
from orchestrator.store.store import Store
from tests.contract.memory_registry import MemoryRegistry
from tests.orchestrator.fakes import FakeCluster
from tests.orchestrator.recipe_files import finance, write_world, write_yaml
from workers import manifest
from workers.types import Attached, CheckpointSaved, HostFailed, StepDone

MOST_RANKS = 6
MAY_FAIL = {Reason.QUARANTINED, Reason.INTERNAL_ERROR, Reason.TOO_LARGE}
"""What a job may end with that hosts kept dying under, or for which nodes stayed away; nothing else fails."""
TICKS_TO_END = 600
MAY_BE_LOST = (Attached, StepDone, CheckpointSaved)


class Wire(FakeCluster):
    """Reports pass through a queue for each host, on which faults act."""

    def __init__(self, ranks: int, old: Sequence[Any] = ()) -> None:
        super().__init__(cpus=float(ranks))
        self.queues: dict[str, list[Any]] = {}
        self.faults_of_wire: list[Callable[[list[Any]], list[Any]]] = []
        self.told: list[Any] = list(old)
        """Everything ever reported: some of it comes again."""
        self.held_back: set[str] = set()

    def poll(self, host: str) -> list[Any]:
        queue = self.queues.setdefault(host, [])
        fresh = list(super().poll(host))
        self.told += [event for event in fresh if hasattr(event, "attempt")]
        while fresh and self.faults_of_wire:
            fresh = self.faults_of_wire.pop()(fresh)
        queue += fresh
        if host in self.held_back:
            return []
        self.queues[host] = []
        return queue

    def lose(self, host: str) -> None:
        """A rank dies: all of the host goes, and what was not delivered with it."""
        self.stop_host(host)
        self.held_back.discard(host)
        self.queues[host] = [HostFailed("rank 1 died")]


class Machine(RuleBasedStateMachine):
    """Many users, one cluster, one home."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp(prefix="machine-", dir=_scratch()))
        shutil.copytree(_template(), self.folder, dirs_exist_ok=True)
        self.now = 1e6
        self.random = random.Random(0)
        self.store = Store(f"sqlite:///{self.folder}/home/chorus.db", clock=lambda: self.now)
        self.registry: Any = MemoryRegistry(self.folder / "registry")
        self.wire = Wire(4)
        self.controller = self._start()
        self.seen: dict[str, tuple[Status, int]] = {}
        self.submitted = 0

    def _start(self) -> Controller:
        home = self.folder / "home"
        controller = Controller(self.store, self.wire, self.registry, home, clock=lambda: self.now)
        controller.recover()
        return controller

    # ---- what users do ---------------------------------------------------------------------------------

    @rule(which=st.integers(0, 5), twice=st.booleans())
    def submit(self, which: int, twice: bool) -> None:
        new = _plans()[which]
        run = self.store.submit(new)
        if twice:
            assert self.store.submit(new) == run
        self.submitted += 1

    @precondition(lambda self: self.submitted)
    @rule(data=st.data(), kind=st.sampled_from(["cancel", "pause", "resume", "priority"]))
    def request(self, data: st.DataObject, kind: Any) -> None:
        job = data.draw(st.sampled_from([job.id for job in self.store.jobs()]))
        self.store.request(job, kind, value=data.draw(st.integers(0, 100)) if kind == "priority" else None)

    @rule(quota=st.integers(0, 4), weight=st.sampled_from([0.5, 1.0, 3.0]))
    def change_quotas(self, quota: int, weight: float) -> None:
        teams = {"a": {"quota": quota}, "b": {"weight": weight}}
        (self.folder / "home" / "teams.yaml").write_text(yaml.safe_dump({"version": 1, "teams": teams}))

    # ---- time ------------------------------------------------------------------------------------------

    @rule(count=st.integers(1, 6))
    def tick(self, count: int) -> None:
        for _ in range(count):
            self.now += 1.0
            self.controller.tick()

    @rule(seconds=st.sampled_from([-7200.0, -1.0, 50.0, 1900.0, 90000.0]))
    def jump_clock(self, seconds: float) -> None:
        self.now += seconds

    # ---- the wire --------------------------------------------------------------------------------------

    @precondition(lambda self: self.wire.hosts)
    @rule(data=st.data())
    def hold_back(self, data: st.DataObject) -> None:
        self.wire.held_back ^= {data.draw(st.sampled_from(sorted(self.wire.hosts)))}

    @rule()
    def double(self) -> None:
        self.wire.faults_of_wire.append(
            lambda events: [again for event in events for again in (event, event)]
        )

    @rule(seed=st.integers(0, 99))
    def reorder(self, seed: int) -> None:
        self.wire.faults_of_wire.append(lambda events: random.Random(seed).sample(events, len(events)))

    @rule()
    def drop(self) -> None:
        self.wire.faults_of_wire.append(lambda events: [e for e in events if not isinstance(e, MAY_BE_LOST)])

    @precondition(lambda self: self.wire.told and self.wire.hosts)
    @rule(data=st.data())
    def repeat_old(self, data: st.DataObject) -> None:
        """A report of long ago arrives again, from whichever host."""
        host = data.draw(st.sampled_from(sorted(self.wire.hosts)))
        event = self.wire.told[data.draw(st.integers(0, len(self.wire.told) - 1))]
        self.wire.queues.setdefault(host, []).append(event)

    # ---- the machines ----------------------------------------------------------------------------------

    @precondition(lambda self: self.wire.hosts)
    @rule(data=st.data())
    def lose_rank(self, data: st.DataObject) -> None:
        self.wire.lose(data.draw(st.sampled_from(sorted(self.wire.hosts))))

    @rule()
    def node_up(self) -> None:
        self.wire.cpus = min(self.wire.cpus + 2, MOST_RANKS)

    @rule()
    def node_down(self) -> None:
        self.wire.cpus = max(self.wire.cpus - 2, 0.0)
        for host in sorted(self.wire.hosts):
            if self.wire.capacity().cpus < 0:
                self.wire.lose(host)

    @rule()
    def crash_controller(self) -> None:
        """SIGKILL: its hosts go with it; what they told may come again to the next one."""
        written = self.store.scheduling.read()
        self.wire = Wire(int(self.wire.cpus), self.wire.told)
        self.controller = self._start()
        assert written is None or Books.open(self.store.scheduling).value() == written
        work = self.controller._work
        work.refresh(None)
        unfinished = {job.id: job for job in self.store.unfinished_jobs()}
        assert work.jobs == unfinished
        assert all(job.status is Status.WAITING for job in unfinished.values())

    # ---- what always holds -----------------------------------------------------------------------------

    @invariant()
    def resources_are_conserved(self) -> None:
        assert sum(self.wire.sizes.values()) <= self.wire.cpus
        assert self.wire.capacity() == Capacity(self.wire.cpus - sum(self.wire.sizes.values()), 0)

    @invariant()
    def a_gang_is_whole_or_absent(self) -> None:
        known = {host.name: host.world_size for host in self.controller._work.fleet.hosts}
        assert self.wire.sizes.items() <= known.items()
        lost = known.keys() - self.wire.sizes.keys()
        assert all(any(isinstance(e, HostFailed) for e in self.wire.queues[host]) for host in lost)

    @invariant()
    def a_job_has_one_state_and_one_seat(self) -> None:
        work = self.controller._work
        seats = [job for host in work.fleet.hosts for job in host.seated]
        assert len(seats) == len(set(seats))
        for host in work.fleet.hosts:
            assert len(host.residents) <= host.slots
        for job in work.jobs.values():
            if job.status in (Status.STARTING, Status.RUNNING) and job.host is not None:
                assert job.id in seats, (job.id, job.status, job.reason)

    @invariant()
    def attempts_go_up_and_ends_stay(self) -> None:
        for job in self.store.jobs():
            status, attempt = self.seen.get(job.id, (Status.WAITING, 0))
            assert job.attempt >= attempt
            assert not status.finished or (job.status, job.attempt) == (status, attempt)
            assert job.status is not Status.FAILED or job.reason in MAY_FAIL, (job.reason, job.message)
            if job.reason is Reason.INTERNAL_ERROR:
                assert "hosts of its base were lost" in job.message
            self.seen[job.id] = job.status, job.attempt

    @invariant()
    def memory_is_as_the_store(self) -> None:
        stored = {job.id: job for job in self.store.unfinished_jobs()}
        for job in self.controller._work.jobs.values():
            same = stored[job.id]
            assert (job.status, job.reason, job.attempt, job.priority, job.step) == (
                same.status,
                same.reason,
                same.attempt,
                same.priority,
                same.step,
            )

    # ---- the end ---------------------------------------------------------------------------------------

    def teardown(self) -> None:
        """Faults end: everyone who is not cancelled gets to the end, in so many ticks."""
        try:
            self.wire.faults_of_wire.clear()
            self.wire.held_back.clear()
            self.wire.cpus = float(MOST_RANKS)
            self.now = max(self.now, max((job.submitted_at for job in self.store.jobs()), default=0.0))
            for job in self.store.unfinished_jobs():
                self.store.request(job.id, "resume")
            for _ in range(TICKS_TO_END):
                self.now += 1.0
                if not self.controller.tick() and not self.store.unfinished_jobs():
                    break
            left = [(job.id, job.status, job.reason, job.message) for job in self.store.unfinished_jobs()]
            assert not left, left
            self.attempts_go_up_and_ends_stay()
            self.resources_are_conserved()
        finally:
            self.store.close()
            shutil.rmtree(self.folder)


# ---- made once ------------------------------------------------------------------------------------------


@cache
def _scratch() -> Path:
    """In memory where there is such a place."""
    shared = Path("/dev/shm")
    return Path(tempfile.mkdtemp(prefix="chorus-machine-", dir=shared if shared.is_dir() else None))


@cache
def _template() -> Path:
    """A world with an empty store."""
    folder = write_world(_scratch() / "template")
    (folder / "home").mkdir()
    Store(f"sqlite:///{folder}/home/chorus.db").close()
    return folder


@cache
def _plans() -> tuple[NewRun, ...]:
    folder = _template()
    bases = {"narrow": 1, "wide": 2, "widest": 4}
    for name, size in bases.items():
        write_yaml(folder / "bases" / f"{name}.yaml", {"model": "tiny", "world_size": size, "slots": 2})
    made: list[NewRun] = []
    for number in range(6):
        base = list(bases)[number % 3]
        schedule = {"team": "ab"[number % 2], "priority": 50 + 10 * (number == 5)}
        recipe = finance(
            name=f"job-{number}",
            base_model=f"bases/{base}.yaml",
            max_steps=3 + number,
            seed=number,
            schedule=schedule,
        )
        path = write_yaml(folder / f"job-{number}.yaml", recipe)
        made.append(new_run(make_plan(load_pipeline(path))))
    return tuple(made)


def check(sequences: int, steps: int = 30) -> None:
    """Run so many sequences of rules. Raises AssertionError with the shortest one that breaks something."""
    pragmas = ("synchronous = OFF", "journal_mode = MEMORY", "foreign_keys = ON")
    with (
        patch.object(store_engine, "SQLITE_PRAGMAS", pragmas),
        patch.object(manifest.os, "fsync", lambda descriptor: None),
    ):
        run_state_machine_as_test(
            Machine,
            settings=settings(
                max_examples=sequences,
                stateful_step_count=steps,
                deadline=None,
                suppress_health_check=list(HealthCheck),
                print_blob=True,
            ),
        )


def main() -> None:
    sequences = int(sys.argv[1])
    start = time.monotonic()
    check(sequences)
    print(f"{sequences} sequences, no invariant broken, {time.monotonic() - start:.0f} s")


if __name__ == "__main__":
    main()
