"""`schedule`: the policy case by case, then its invariants over any snapshot."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from orchestrator.contracts import Capacity
from orchestrator.host_view import HostView, Resident
from orchestrator.job import Reason, Status
from orchestrator.placement import NewHost
from orchestrator.policy import Policy, Team
from orchestrator.queue import Need, Waiting, in_order
from orchestrator.scheduler import Snapshot, schedule

NO_ROOM = Capacity(cpus=0, gpus=0)


def waiting(job: str, need: Need = Need.SLOT, base: str = "b1", **changes) -> Waiting:
    return replace(Waiting(job, need, base, 2, 4, priority=0, submitted_at=0.0), **changes)


def residents(*names: str, **changes) -> tuple[Resident, ...]:
    return tuple(replace(Resident(name), **changes) for name in names)


def host(name: str = "h1", base: str = "b1", **changes) -> HostView:
    return replace(HostView(name, base, world_size=2, slots=4), **changes)


def decide(*jobs: Waiting, hosts=(), capacity=NO_ROOM, **rest):
    return schedule(Snapshot(capacity, tuple(hosts), tuple(jobs), **rest))


def test_schedule_jobs_of_one_base_share_one_new_host():
    decision = decide(waiting("a"), waiting("b"), waiting("c"), capacity=Capacity(4, 0))
    assert decision.start_hosts == (NewHost("host-1", "b1", 2, 4),)
    assert decision.placements == {"a": "host-1", "b": "host-1", "c": "host-1"}


def test_schedule_warm_host_with_a_free_slot_is_used_before_a_new_one():
    decision = decide(waiting("a"), hosts=[host()], capacity=Capacity(8, 0))
    assert (decision.start_hosts, decision.placements) == ((), {"a": "h1"})


def test_schedule_crowded_host_is_joined_only_if_no_second_one_can_be_opened():
    full = host(residents=residents("x"), crowded=True)
    decision = decide(waiting("a"), hosts=[full], capacity=Capacity(2, 0))
    assert decision.placements == {"a": "host-1"}
    assert decide(waiting("a"), hosts=[full], capacity=Capacity(1, 0)).placements == {"a": "h1"}
    short = decide(waiting("a", remaining=10.0), hosts=[full], capacity=Capacity(2, 0))
    assert short.placements == {"a": "h1"}


def test_schedule_crowded_hosts_are_passed_for_one_that_is_not_and_else_the_emptiest_is_joined():
    fuller = host("h1", residents=residents("x", "y"), crowded=True)
    emptier = host("h2", residents=residents("z"), crowded=True)
    light = host("h3")
    assert decide(waiting("a"), hosts=[fuller, emptier, light]).placements == {"a": "h3"}
    assert decide(waiting("a"), hosts=[fuller, emptier]).placements == {"a": "h2"}


def test_schedule_job_placed_in_this_decision_is_not_preempted_by_it():
    wide, narrow = waiting("wide", base="b1", world_size=8), waiting("narrow", base="b2", world_size=1)
    decision = decide(replace(wide, team="a"), replace(narrow, team="b"), capacity=Capacity(8, 0))
    assert (decision.placements, decision.preempt) == ({"wide": "host-1"}, {})
    assert decision.refusals == {"narrow": Reason.WAITS_FOR_HOST}


def test_schedule_full_host_makes_the_youngest_wait_for_a_slot():
    full = host(slots=2, residents=residents("x"))
    decision = decide(waiting("old"), waiting("young", submitted_at=9.0), hosts=[full])
    assert decision.placements == {"old": "h1"}
    assert decision.refusals == {"young": Reason.WAITS_FOR_SLOT}


def test_schedule_job_that_does_not_fit_beside_the_residents_waits_for_memory():
    warm = host(residents=residents("x"), adapter_parameters=600, adapter_room=1000)
    decision = decide(waiting("fits", adapter_parameters=400), hosts=[warm])
    assert decision.placements == {"fits": "h1"}
    decision = decide(waiting("big", adapter_parameters=401), hosts=[warm])
    assert decision.refusals == {"big": Reason.WAITS_FOR_MEMORY}


def test_schedule_memory_is_deducted_as_places_are_given():
    jobs = [waiting(name, adapter_parameters=400) for name in "abc"]
    decision = decide(*jobs, hosts=[host(adapter_room=1000)])
    assert decision.placements == {"a": "h1", "b": "h1"}
    assert decision.refusals == {"c": Reason.WAITS_FOR_MEMORY}


def test_schedule_small_job_does_not_take_the_memory_a_large_one_waits_for():
    warm = host(residents=residents("x"), adapter_parameters=600, adapter_room=1000)
    big = waiting("big", adapter_parameters=900)
    small = waiting("small", adapter_parameters=1, submitted_at=9.0)
    decision = decide(big, small, hosts=[warm])
    assert decision.refusals == {"big": Reason.WAITS_FOR_MEMORY, "small": Reason.WAITS_FOR_MEMORY}


def test_schedule_job_larger_than_all_the_memory_for_adapters_is_refused():
    decision = decide(waiting("huge", adapter_parameters=1001), hosts=[host(adapter_room=1000)])
    assert decision.refusals == {"huge": Reason.OUT_OF_MEMORY}


def test_schedule_host_that_has_not_measured_takes_what_has_a_slot():
    decision = decide(waiting("huge", adapter_parameters=10**12), hosts=[host()])
    assert decision.placements == {"huge": "h1"}


def test_schedule_scoring_needs_no_memory_for_an_adapter():
    full = host(residents=residents("x"), adapter_parameters=999, adapter_room=1000)
    assert decide(waiting("a", Need.HOST), hosts=[full]).placements == {"a": "h1"}


def test_schedule_scoring_needs_no_slot():
    full = host(slots=1, residents=residents("x"))
    assert decide(waiting("a", Need.HOST), hosts=[full]).placements == {"a": "h1"}


def test_schedule_priority_goes_before_age():
    full = host(slots=1)
    decision = decide(waiting("old"), waiting("urgent", priority=5, submitted_at=9.0), hosts=[full])
    assert decision.placements == {"urgent": "h1"}


def test_schedule_host_opens_with_all_its_ranks_or_not_at_all():
    busy = host(base="b2", world_size=1, residents=residents("x"))
    decision = decide(waiting("a"), hosts=[busy], capacity=Capacity(1, 0))
    assert (decision.start_hosts, decision.refusals) == ((), {"a": Reason.WAITS_FOR_HOST})


def test_schedule_more_ranks_than_the_cluster_has_is_too_large():
    assert decide(waiting("a"), capacity=Capacity(1, 0)).refusals == {"a": Reason.TOO_LARGE}


def test_schedule_ranks_are_counted_in_gpus_where_there_are_any():
    first = decide(waiting("a"), capacity=Capacity(cpus=1, gpus=2))
    assert first.placements == {"a": "host-1"}
    held = host(base="b2", on_gpus=True, residents=residents("x"))
    second = decide(waiting("a"), hosts=[held], capacity=Capacity(cpus=64, gpus=0))
    assert second.refusals == {"a": Reason.WAITS_FOR_HOST}


def test_schedule_idle_host_of_another_base_gives_way():
    decision = decide(waiting("a"), hosts=[host(base="b2")], bases_to_come=frozenset({"b1", "b2"}))
    assert decision.close_hosts == ("h1",)
    assert decision.placements == {"a": "host-1"}


def test_schedule_no_more_idle_hosts_close_than_have_to():
    idle = [host("h1", "b2"), host("h2", "b3", world_size=1), host("h3", "b4", world_size=1)]
    decision = decide(waiting("a"), hosts=idle, bases_to_come=frozenset({"b2", "b3", "b4"}))
    assert decision.close_hosts == ("h1",)


def test_schedule_busy_host_of_another_base_stays():
    busy = host(base="b2", residents=residents("x"))
    assert decide(waiting("a"), hosts=[busy]).close_hosts == ()


def test_schedule_job_that_fits_passes_one_that_does_not_until_that_has_waited_to_the_bound():
    bound = Policy().most_waiting
    busy = host(base="b3", residents=residents("x", preempted_at=bound - 1))
    small = waiting("small", base="b2", world_size=1, submitted_at=9.0)
    jobs, rest = (waiting("first"), small), {"hosts": [busy], "capacity": Capacity(1, 0)}
    assert decide(*jobs, **rest, now=10.0).placements == {"small": "host-1"}
    decision = decide(*jobs, **rest, now=bound)
    assert decision.start_hosts == ()
    assert decision.refusals == {"first": Reason.WAITS_FOR_HOST, "small": Reason.WAITS_FOR_HOST}


def test_schedule_job_that_gets_no_second_host_keeps_none_behind_it_from_preempting_for_a_first():
    full = host(slots=1, residents=residents("own", team="below"))
    borrowers = [host(f"o{n}", "b3", slots=1, residents=residents(f"x{n}", team="above")) for n in (1, 2, 3)]
    first = waiting("first", base="b1", team="below")
    second = waiting("second", base="b2", team="below", submitted_at=1.0)
    decision = decide(first, second, hosts=[full, *borrowers])
    assert decision.refusals == {"first": Reason.WAITS_FOR_SLOT, "second": Reason.WAITS_FOR_HOST}
    assert decision.preempt == {"x3": "second"}


def test_schedule_crowd_is_preempted_a_part_in_each_decision_and_a_host_whole():
    hosts = [host(f"h{n}", f"b{n}", residents=residents(f"x{n}", f"y{n}", team="above")) for n in range(4)]
    jobs = [waiting(f"j{n}", base=f"new{n}", team="below", submitted_at=float(n)) for n in range(2)]
    policy = Policy(most_preempted=1)
    decision = decide(*jobs, hosts=hosts, policy=policy)
    assert decision.preempt == {"x3": "j0", "y3": "j0"}
    assert decision.refusals["j1"] is Reason.WAITS_FOR_HOST
    left = [replace(h, residents=()) if h.name == "h3" else h for h in hosts]
    decision = decide(*jobs, hosts=left, policy=policy)
    assert (decision.placements, decision.preempt) == ({"j0": "host-1"}, {"x2": "j1", "y2": "j1"})


def test_schedule_idle_host_stays_warm_for_a_while_or_while_its_base_is_to_come():
    long, idle = Policy().idle, [host(idle_since=0.0)]
    assert decide(hosts=idle, bases_to_come=frozenset({"b1"}), now=10 * long).close_hosts == ()
    assert decide(hosts=idle, now=long - 1).close_hosts == ()
    assert decide(hosts=idle, now=long).close_hosts == ("h1",)


def test_schedule_task_runs_though_ranks_hold_every_cpu():
    decision = decide(waiting("f", Need.CPU), waiting("g", Need.CPU, submitted_at=1.0))
    assert (decision.start_tasks, decision.refusals) == (("f",), {"g": Reason.WAITS_FOR_CPU})
    assert decide(waiting("f", Need.CPU), running_tasks=1).refusals == {"f": Reason.WAITS_FOR_CPU}


def test_schedule_job_whose_parent_did_not_succeed_is_refused_for_good():
    failed = waiting("a", parents=(Status.SUCCEEDED, Status.CANCELLED, Status.RUNNING))
    pending = waiting("b", parents=(Status.SUCCEEDED, Status.RUNNING))
    decision = decide(failed, pending, hosts=[host()])
    assert decision.refusals == {"a": Reason.PARENT_FAILED, "b": Reason.WAITS_FOR_PARENTS}


BASES = ("b1", "b2", "b3")
TEAMS = ("blue", "red")
SERVICE = (0.0, 20_000.0, 200_000.0)
WORLD = {"b1": 1, "b2": 2, "b3": 3}
jobs = st.builds(
    Waiting,
    job=st.uuids().map(str),
    need=st.sampled_from(Need),
    base=st.sampled_from(BASES),
    world_size=st.just(1),
    slots=st.integers(1, 3),
    priority=st.integers(-2, 2),
    submitted_at=st.floats(0, 10),
    parents=st.lists(st.sampled_from(Status), max_size=2).map(tuple),
    adapter_parameters=st.integers(1, 5),
    team=st.sampled_from(TEAMS),
    attained=st.sampled_from(SERVICE),
    remaining=st.none() | st.sampled_from(SERVICE),
    waiting_since=st.none() | st.floats(-90_000, 4000),
).map(lambda job: replace(job, world_size=WORLD[job.base]))
hosts = st.builds(
    HostView,
    name=st.uuids().map(lambda name: f"warm-{name}"),
    base=st.sampled_from(BASES),
    world_size=st.just(1),
    slots=st.integers(1, 3),
    residents=st.lists(
        st.builds(
            Resident,
            job=st.uuids().map(str),
            team=st.sampled_from(TEAMS),
            priority=st.integers(-2, 2),
            attained=st.sampled_from(SERVICE),
            remaining=st.none() | st.sampled_from(SERVICE),
            submitted_at=st.floats(0, 10),
            preempted_at=st.none() | st.floats(0, 4000),
            leaving=st.booleans(),
        ),
        max_size=3,
    ).map(tuple),
    visitors=st.integers(0, 1).map(lambda n: frozenset(f"v{i}" for i in range(n))),
    adapter_parameters=st.integers(0, 6),
    adapter_room=st.none() | st.integers(0, 12),
).map(lambda h: replace(h, world_size=WORLD[h.base], slots=max(h.slots, len(h.residents))))
snapshots = st.builds(
    Snapshot,
    capacity=st.builds(Capacity, cpus=st.integers(0, 6), gpus=st.integers(0, 6)),
    hosts=st.lists(hosts, max_size=4).map(tuple),
    waiting=st.lists(jobs, max_size=10).map(tuple),
    running_tasks=st.integers(0, 2),
    bases_to_come=st.frozensets(st.sampled_from(BASES)),
    now=st.floats(4000, 5000),
    policy=st.builds(
        Policy,
        most_preempted=st.integers(1, 3) | st.just(128),
        teams=st.dictionaries(
            st.sampled_from(TEAMS),
            st.builds(Team, weight=st.floats(0.5, 4.0), quota=st.integers(0, 4)),
        ),
    ),
    usage=st.dictionaries(st.sampled_from(TEAMS), st.floats(0, 1e6)),
)


@given(snapshots)
def test_schedule_any_snapshot_answers_every_job_exactly_once(snapshot):
    decision = schedule(snapshot)
    answered = [*decision.placements, *decision.start_tasks, *decision.free, *decision.refusals]
    assert sorted(answered) == sorted(job.job for job in snapshot.waiting)


@given(snapshots)
def test_schedule_any_snapshot_gives_no_slot_rank_or_task_twice(snapshot):
    decision = schedule(snapshot)
    by_job = {job.job: job for job in snapshot.waiting}
    seats = {h.name: (h.base, h.slots - len(h.residents)) for h in snapshot.hosts}
    seats |= {h.name: (h.base, h.slots) for h in decision.start_hosts}
    memory = {h.name: (h.adapter_parameters, h.adapter_room) for h in snapshot.hosts}
    for name, (base, free) in seats.items():
        placed = [by_job[job] for job, where in decision.placements.items() if where == name]
        assert all(job.base == base for job in placed)
        seated = [job for job in placed if job.need is Need.SLOT]
        assert len(seated) <= free
        taken, room = memory.get(name, (0, None))
        assert not seated or room is None or taken + sum(j.adapter_parameters for j in seated) <= room
    ranks = snapshot.capacity.gpus if snapshot.capacity.gpus else snapshot.capacity.cpus
    ranks += sum(h.world_size for h in snapshot.hosts if h.name in decision.close_hosts)
    assert sum(h.world_size for h in decision.start_hosts) <= ranks
    started = len(decision.start_tasks)
    assert not started or started + snapshot.running_tasks <= max(1, snapshot.capacity.cpus)


@given(snapshots)
def test_schedule_any_snapshot_closes_only_idle_hosts_that_nobody_was_placed_on(snapshot):
    decision = schedule(snapshot)
    idle = {host.name for host in snapshot.hosts if host.idle}
    assert set(decision.close_hosts) <= idle - set(decision.placements.values())
    assert len(set(decision.close_hosts)) == len(decision.close_hosts)


@given(snapshots, st.randoms(use_true_random=False))
def test_schedule_does_not_depend_on_the_order_of_its_input(snapshot, random):
    shuffled_hosts, shuffled_jobs = list(snapshot.hosts), list(snapshot.waiting)
    random.shuffle(shuffled_hosts)
    random.shuffle(shuffled_jobs)
    shuffled = replace(snapshot, hosts=tuple(shuffled_hosts), waiting=tuple(shuffled_jobs))
    assert schedule(shuffled) == schedule(snapshot)


@given(snapshots)
def test_schedule_preempts_nobody_who_is_leaving_or_was_preempted_lately(snapshot):
    decision = schedule(snapshot)
    everyone = {resident.job: resident for host in snapshot.hosts for resident in host.residents}
    for job, taker in decision.preempt.items():
        assert not everyone[job].leaving
        before = everyone[job].preempted_at
        assert before is None or snapshot.now - before >= snapshot.policy.protection
        assert decision.refusals[taker] in (Reason.WAITS_FOR_HOST, Reason.WAITS_FOR_SLOT)


@given(snapshots)
def test_schedule_never_passes_over_an_older_job_of_the_same_team_base_and_need(snapshot):
    decision = schedule(snapshot)
    refused: set[tuple[str, str, Need]] = set()
    for job in in_order(snapshot.waiting, snapshot.policy, snapshot.now):
        kind = (job.team, job.base, job.need)
        if decision.refusals.get(job.job) in (
            Reason.WAITS_FOR_SLOT,
            Reason.WAITS_FOR_MEMORY,
            Reason.WAITS_FOR_HOST,
        ):
            refused.add(kind)
        assert job.job not in decision.placements or kind not in refused
