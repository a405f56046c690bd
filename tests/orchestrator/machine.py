"""A state machine over the real controller, scheduler and store: no order of events breaks them.

The cluster is in memory, and its wire is not to be trusted: reports come late, twice, in another order, of
attempts long over, or not at all. What a host that lives reports of a job's end does arrive some time, as
`Cluster` promises; else nobody could know that a slot is free. `python -m tests.orchestrator.machine 10000`
runs so many sequences; `--parts` and `--seed` share them out between processes (`machine_run`).
"""

from __future__ import annotations

import random
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import hypothesis
import pytest
import yaml
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from orchestrator.api import changes
from orchestrator.contracts import Capacity
from orchestrator.control import controller as control
from orchestrator.control.books import Books
from orchestrator.control.controller import Controller
from orchestrator.job import Reason, Status
from orchestrator.queue import aged, order_key
from orchestrator.scheduler import Decision, Snapshot, schedule
from orchestrator.store import engine as store_engine
from orchestrator.store.store import Store
from tests.contract.memory_registry import MemoryRegistry
from tests.orchestrator.fakes import Later
from tests.orchestrator.lasting import Lasting
from tests.orchestrator.machine_world import plans, scratch, template
from tests.orchestrator.wire import Wire
from workers import manifest
from workers.types import HostFailed, Superseded

MOST_RANKS = 6
MAY_FAIL = {Reason.QUARANTINED, Reason.INTERNAL_ERROR, Reason.TOO_LARGE}
"""What a job may end with that hosts kept dying under, or for which nodes stayed away; nothing else fails."""
TICKS_TO_END = 600
CONTENTS: Counter[str] = Counter()
"""What the sequences of this process contained so far."""


class Machine(RuleBasedStateMachine):
    """Many users, one cluster, one home."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp(prefix="machine-", dir=scratch()))
        shutil.copytree(template(), self.folder, dirs_exist_ok=True)
        self.now = 1e6
        self.random = random.Random(0)
        self.store = Store(f"sqlite:///{self.folder}/home/chorus.db", clock=lambda: self.now)
        self.registry: Any = MemoryRegistry(self.folder / "registry")
        self.wire = Wire(4, CONTENTS)
        self.controller = self._start()
        self.seen: dict[str, tuple[Status, int]] = {}
        self.submitted = 0

    def _start(self) -> Controller:
        home = self.folder / "home"
        self.answers = Later()
        controller = Controller(
            self.store, self.wire, self.registry, home, clock=lambda: self.now, start=self.answers
        )
        controller.recover()
        return controller

    # ---- what users do ---------------------------------------------------------------------------------

    @initialize(which=st.lists(st.integers(0, 5), min_size=2, max_size=6, unique=True))
    def begin(self, which: list[int]) -> None:
        for each in which:
            self.submit(each, False)

    @rule(which=st.integers(0, 5), twice=st.booleans())
    def submit(self, which: int, twice: bool) -> None:
        new = plans()[which]
        run = self.store.submit(new)
        CONTENTS["submissions"] += 1
        if twice:
            CONTENTS["submissions made twice"] += 1
            assert self.store.submit(new) == run
        self.submitted += 1

    @precondition(lambda self: self.submitted)
    @rule(data=st.data(), kind=st.sampled_from(["cancel", "pause", "resume", "priority"]))
    def request(self, data: st.DataObject, kind: Any) -> None:
        CONTENTS[f"requests: {kind}"] += 1
        job = data.draw(st.sampled_from([job.id for job in self.store.jobs()]))
        self.store.request(job, kind, value=data.draw(st.integers(0, 100)) if kind == "priority" else None)

    @rule(data=st.data(), kind=st.sampled_from(["cancel", "pause", "resume"]))
    def change_from_another_home(self, data: st.DataObject, kind: Any) -> None:
        """Written into the store beside a controller that was taken for dead."""
        unfinished = self.store.unfinished_jobs()
        if unfinished:
            CONTENTS[f"changes past the controller: {kind}"] += 1
            changes._do(self.store, data.draw(st.sampled_from(unfinished)), kind, "another", None)
            self.tick(1)

    @rule(quota=st.integers(0, 4), weight=st.sampled_from([0.5, 1.0, 3.0]), most=st.sampled_from([1, 2, 128]))
    def change_quotas(self, quota: int, weight: float, most: int) -> None:
        CONTENTS["changes of quotas and weights"] += 1
        teams = {"a": {"quota": quota}, "b": {"weight": weight}}
        said = {"version": 1, "teams": teams, "most_preempted": most}
        (self.folder / "home" / "teams.yaml").write_text(yaml.safe_dump(said))

    # ---- time ------------------------------------------------------------------------------------------

    @rule(count=st.integers(1, 6))
    def tick(self, count: int) -> None:
        for _ in range(count):
            self.now += 1.0
            self.controller.tick()
        CONTENTS["ticks"] += count

    @rule(seconds=st.sampled_from([-7200.0, -1.0, 50.0, 1900.0, 90000.0]))
    def jump_clock(self, seconds: float) -> None:
        CONTENTS["clock jumps forward" if seconds > 0 else "clock jumps back"] += 1
        self.now += seconds

    # ---- the wire --------------------------------------------------------------------------------------

    @precondition(lambda self: self.wire.hosts)
    @rule(data=st.data())
    def hold_back(self, data: st.DataObject) -> None:
        self.wire.held_back ^= {data.draw(st.sampled_from(sorted(self.wire.hosts)))}

    def _strike(self, fault: Callable[[list[Any]], list[Any]]) -> None:
        """On the next reports, which come at once: else most sequences would end before."""
        self.wire.faults_of_wire.append(fault)
        self.tick(3)

    @rule()
    def double(self) -> None:
        self._strike(self.wire.doubled)

    @rule(seed=st.integers(0, 99))
    def reorder(self, seed: int) -> None:
        self._strike(lambda events: self.wire.reordered(events, seed))

    @rule()
    def drop(self) -> None:
        self._strike(self.wire.dropped)

    @precondition(lambda self: self.wire.told and self.wire.hosts)
    @rule(data=st.data())
    def repeat_old(self, data: st.DataObject) -> None:
        """A report of long ago arrives again, from whichever host."""
        host = data.draw(st.sampled_from(sorted(self.wire.hosts)))
        event = self.wire.told[data.draw(st.integers(0, len(self.wire.told) - 1))]
        self.wire.queues.setdefault(host, []).append(event)
        CONTENTS["reports of long ago that came again"] += 1

    # ---- the registry ----------------------------------------------------------------------------------

    @rule()
    def hold_back_the_registry(self) -> None:
        """It hangs, or it answers again."""
        CONTENTS["times the registry hung"] += not self.answers.held
        self.answers.held = not self.answers.held
        if not self.answers.held:
            self.answers.do()

    # ---- the machines ----------------------------------------------------------------------------------

    @precondition(lambda self: self.wire.hosts)
    @rule(data=st.data())
    def lose_rank(self, data: st.DataObject) -> None:
        self.wire.lose(data.draw(st.sampled_from(sorted(self.wire.hosts))))

    @rule()
    def node_up(self) -> None:
        CONTENTS["nodes up"] += 1
        self.wire.cpus = min(self.wire.cpus + 2, MOST_RANKS)

    @rule()
    def node_down(self) -> None:
        CONTENTS["nodes down"] += 1
        self.wire.cpus = max(self.wire.cpus - 2, 0.0)
        for host in sorted(self.wire.hosts):
            if self.wire.capacity().cpus < 0:
                self.wire.lose(host)

    @rule(hosts_too=st.booleans(), alone=st.integers(0, 4))
    def crash_controller(self, hosts_too: bool, alone: int) -> None:
        """SIGKILL: its hosts go with it, or work on `alone` for some rounds and are taken over.

        What they told the last one may come again to the next one. What it had asked of the registry is done
        half of the time, and heard by nobody.
        """
        if self.random.random() < 0.5:
            self.answers.do()
        written = self.store.scheduling.read()
        machines = None if hosts_too else self.wire.machines
        CONTENTS["controller crashes with all hosts" if hosts_too else "controller crashes"] += 1
        former, self.wire = self.wire, Wire(int(self.wire.cpus), CONTENTS, self.wire.told, machines)
        for host in sorted(self.wire.hosts):
            CONTENTS["hosts that outlived their controller"] += 1
            for _ in range(alone):
                self.wire.machines.work(host)
        attempts = {job.id: (job.status, job.attempt) for job in self.store.unfinished_jobs()}
        self.controller = self._start()
        assert written is None or Books.open(self.store.scheduling).value() == written
        for host in self.wire.hosts:
            with pytest.raises(Superseded):
                Lasting.poll(former, host)
        work = self.controller._work
        work.refresh(None)
        unfinished = {job.id: job for job in self.store.unfinished_jobs()}
        assert work.jobs == unfinished
        for job in unfinished.values():
            assert job.status is Status.WAITING or (job.status, job.attempt) == attempts[job.id]
        going = [job for job in unfinished.values() if job.status is not Status.WAITING]
        assert not (going and hosts_too)
        CONTENTS["jobs that went on over a crash"] += len(going)

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
            self.answers.held = False
            self.answers.do()
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
            self._count_ends()
        finally:
            self.store.close()
            shutil.rmtree(self.folder)

    def _count_ends(self) -> None:
        CONTENTS["sequences"] += 1
        for job in self.store.jobs():
            CONTENTS[f"jobs that ended {job.status.value.lower()}"] += 1


def watched(snapshot: Snapshot) -> Decision:
    """`schedule`, and that it starves nobody: what gets free goes to who waited to the bound.

    While a job of the bound waits for ranks and none are about to come, nobody behind it in its team has a
    host opened.
    """
    decision = schedule(snapshot)
    CONTENTS["decisions"] += 1
    CONTENTS["preemptions"] += len(decision.preempt)
    if decision.preempt or any(r.leaving for host in snapshot.hosts for r in host.residents):
        return decision
    opener = {host: job for job, host in reversed(decision.placements.items())}
    openers = {opener[host.name] for host in decision.start_hosts}
    for job in snapshot.waiting:
        if decision.refusals.get(job.job) is Reason.WAITS_FOR_HOST and aged(
            job, snapshot.policy, snapshot.now
        ):
            CONTENTS["decisions on a job that had waited to the bound"] += 1
            key = order_key(job, snapshot.policy, snapshot.now)
            passed = [
                other.job
                for other in snapshot.waiting
                if other.job in openers
                and other.team == job.team
                and order_key(other, snapshot.policy, snapshot.now) > key
            ]
            assert not passed, (job.job, passed)
    return decision


def check(sequences: int, steps: int = 30, seed: int | None = None) -> Counter[str]:
    """Run so many sequences of rules; what they contained.

    Raises AssertionError with the shortest one that breaks something.
    """
    CONTENTS.clear()
    pragmas = ("synchronous = OFF", "journal_mode = MEMORY", "foreign_keys = ON")
    with (
        patch.object(store_engine, "SQLITE_PRAGMAS", pragmas),
        patch.object(manifest.os, "fsync", lambda descriptor: None),
        patch.object(control, "schedule", watched),
    ):
        run_state_machine_as_test(
            Machine if seed is None else hypothesis.seed(seed)(type("Machine", (Machine,), {})),
            settings=settings(
                max_examples=sequences,
                stateful_step_count=steps,
                deadline=None,
                suppress_health_check=list(HealthCheck),
                print_blob=True,
            ),
        )
    return Counter(CONTENTS)


if __name__ == "__main__":
    from tests.orchestrator.machine_run import main

    main()
