"""`simulate`: small traces with known answers, the three formats and our own log, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from orchestrator.job import Reason, Status
from orchestrator.policy import Policy, Team
from orchestrator.simulate.event_log import held_seconds
from orchestrator.simulate.measures import fair_ranks, quantile
from orchestrator.simulate.policies import PolicyName
from orchestrator.simulate.simulation import Outcome, simulate
from orchestrator.simulate.traces import TraceJob, read_trace
from orchestrator.simulate.world import Setting
from orchestrator.store.rows import EventRow
from tests.orchestrator.cli_world import CliWorld, assert_one_sentence
from workers.types import BadInput

HOUR = 3600.0


def ran(*jobs: TraceJob, policy: PolicyName = PolicyName.chorus, ranks=1, **changes) -> Outcome:
    changes = {"every": 10.0, "load": 0.0} | changes
    ordered = sorted(jobs, key=lambda job: job.submitted_at)
    return simulate(ordered, Setting(ranks, **changes), policy, Policy())


def ends(outcome: Outcome) -> dict[str, float | None]:
    return {name: job.ended_at for name, job in outcome.jobs.items()}


# ---- known answers --------------------------------------------------------------------------------------


def test_simulate_fifo_one_gpu_runs_one_job_after_the_other():
    jobs = [TraceJob(name, at, 100, 1) for name, at in (("a", 0), ("b", 1), ("c", 2))]
    outcome = ran(*jobs, policy=PolicyName.fifo)
    assert ends(outcome) == {"a": 100, "b": 200, "c": 300}
    found = outcome.summary
    assert (found.mean_completion, found.makespan) == (pytest.approx((100 + 199 + 298) / 3), 300)
    assert found.mean_waiting == pytest.approx((0 + 99 + 198) / 3)


def test_simulate_fifo_wide_job_stops_all_behind_it_and_fifo_skip_lets_them_pass():
    jobs = [TraceJob("first", 0, 100, 1), TraceJob("wide", 1, 100, 2), TraceJob("small", 2, 50, 1)]
    assert ends(ran(*jobs, policy=PolicyName.fifo, ranks=2)) == {"first": 100, "wide": 200, "small": 250}
    assert ends(ran(*jobs, policy=PolicyName.fifo_skip, ranks=2)) == {"first": 100, "wide": 200, "small": 60}


def test_simulate_las_preempts_the_job_that_had_more_service():
    long, short = TraceJob("long", 0, 10 * HOUR, 1), TraceJob("short", 5 * HOUR, HOUR, 1)
    assert ends(ran(long, short, policy=PolicyName.fifo_skip)) == {"long": 10 * HOUR, "short": 11 * HOUR}
    outcome = ran(long, short, policy=PolicyName.las)
    assert ends(outcome) == {"long": 11 * HOUR, "short": 6 * HOUR}
    assert outcome.summary.preemptions == 1


def test_simulate_residents_of_unequal_ticks_share_the_pass_of_the_base():
    # Alone a tick takes 1.0 and 3.0, of which 0.5 are shared: together 0.5 + 0.5 + 2.5.
    small = TraceJob("small", 0, 100, 1, base="b", slots=2, tick=1.0)
    large = TraceJob("large", 0, 900, 1, base="b", slots=2, tick=3.0)
    found = ends(ran(small, large, shared=0.5))
    assert found["small"] == pytest.approx(100 * 3.5)
    assert found["large"] == pytest.approx(350 + (300 - 100) * 3.0)


def test_simulate_crowded_host_gets_a_second_one_where_ranks_are_free():
    jobs = [TraceJob(name, at, 1000, 1, base="b", slots=8) for name, at in (("a", 0), ("b", 10))]
    assert ends(ran(*jobs, ranks=2, shared=0.05)) == {"a": 1000, "b": 1010}
    # 10 s alone, 990 steps of 1.2 s for both, and b's last 10 alone.
    joined = ends(ran(*jobs, ranks=2, shared=0.8))
    assert joined == {"a": pytest.approx(1198), "b": pytest.approx(1208)}


def test_simulate_two_backlogged_teams_have_equal_shares():
    jobs = [TraceJob(f"{team}{i}", 0, HOUR, 1, team) for team in "ab" for i in range(20)]
    found = ran(*jobs, ranks=4).summary
    assert (found.share_error, found.jain) == (pytest.approx(0, abs=0.01), pytest.approx(1))


def test_simulate_one_team_with_all_the_cluster_is_off_by_its_whole_surplus():
    hog = [TraceJob(f"a{i}", 0, 4 * HOUR, 1, "a") for i in range(4)]
    late = [TraceJob(f"b{i}", 1, 4 * HOUR, 1, "b") for i in range(4)]
    found = ran(*hog, *late, ranks=4, policy=PolicyName.fifo_skip).summary
    # From second 10 to the end of `hog`, b has none of the 2 ranks due to it; a is due 2 and has 4.
    assert found.worst_share_error > 0.9
    assert found.jain < 0.7


def test_simulate_host_takes_its_load_time_and_a_warm_one_does_not():
    jobs = [TraceJob("a", 0, 100, 1, base="x", slots=1), TraceJob("b", 0, 100, 1, base="x", slots=1)]
    assert ends(ran(*jobs, load=60.0)) == {"a": 160, "b": 260}


def test_simulate_residents_of_one_base_share_their_ticks():
    jobs = [TraceJob(name, 0, 100, 1, base="x", slots=2) for name in "ab"]
    assert ends(ran(*jobs, shared=0.0)) == {"a": 200, "b": 200}
    assert ends(ran(*jobs, shared=1.0)) == {"a": 100, "b": 100}
    assert ends(ran(*jobs, shared=0.5)) == {"a": 150, "b": 150}


def test_simulate_resident_left_alone_is_faster_than_before():
    jobs = [TraceJob("a", 0, 50, 1, base="x", slots=2), TraceJob("b", 0, 100, 1, base="x", slots=2)]
    assert ends(ran(*jobs, shared=0.0)) == {"a": 100, "b": 150}


def test_simulate_job_larger_than_the_cluster_is_left_out_and_counted():
    outcome = ran(TraceJob("huge", 0, 1, 9), TraceJob("a", 0, 1, 1), ranks=8)
    assert (outcome.too_large, list(outcome.jobs)) == (1, ["a"])


def test_fair_ranks_quota_first_then_weight_never_more_than_wanted():
    policy = Policy(teams={"q": Team(quota=4), "heavy": Team(weight=3)})
    assert fair_ranks({"q": 8, "heavy": 100, "light": 100, "small": 1}, 16, policy) == pytest.approx(
        {"q": 6.2, "heavy": 6.6, "light": 2.2, "small": 1.0}
    )


def test_quantile_is_the_smallest_value_that_covers_the_part():
    assert [quantile([1, 2, 3, 4], part) for part in (0.25, 0.5, 0.51, 0.99)] == [1, 2, 3, 4]


# ---- formats --------------------------------------------------------------------------------------------

PHILLY = """timestamp,duration,num_gpus,gpu_time,cluster
2017-10-03 00:01:00,60.5,2,121,vc1
2017-10-03 00:00:00,5,1,5,vc2
"""
TIRESIAS = "job_id,num_gpu,submit_time,iterations,model_name,duration,interval\n7,4,30,100,vgg,164,3\n"
GAVEL = "LM\tpython3 main.py\t--steps\t1\t500\t10.0\t2\n"


def written(folder: Path, text: str) -> Path:
    (folder / "trace").write_text(text)
    return folder / "trace"


def test_read_trace_philly_rows_come_in_time_with_their_cluster_as_team(tmp_path):
    first, second = read_trace(written(tmp_path, PHILLY))
    assert (first.submitted_at, first.seconds, first.ranks, first.team) == (0, 5, 1, "vc2")
    assert (second.submitted_at, second.seconds, second.ranks, second.team) == (60, 60.5, 2, "vc1")


def test_read_trace_tiresias_row_is_read(tmp_path):
    (job,) = read_trace(written(tmp_path, TIRESIAS))
    assert (job.job, job.submitted_at, job.seconds, job.ranks) == ("job-000000", 0, 164, 4)


def test_read_trace_gavel_steps_become_seconds_at_the_speed_given(tmp_path):
    (job,) = read_trace(written(tmp_path, GAVEL), steps_per_second=10)
    assert (job.seconds, job.ranks) == (50, 2)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "is empty"),
        ("a,b\n1,2\n", "no trace that is known"),
        (PHILLY.splitlines()[0] + "\n", "has no job"),
        (PHILLY.replace("60.5,2", "-1,2"), "line 2: it runs -1.0 seconds"),
        (PHILLY.replace("60.5,2", "nan,2"), "line 2: it runs nan seconds"),
        (PHILLY.replace("5,1,5", "5,0,5"), "line 3: it needs 0 GPUs"),
        (PHILLY.replace("60.5", "long"), "line 2: could not convert"),
        (PHILLY.replace("2017-10-03 00:01:00", "yesterday"), "line 2: Invalid isoformat"),
        (GAVEL, "--steps-per-second"),
    ],
)
def test_read_trace_bad_file_is_refused_in_one_sentence_with_its_line(tmp_path, text, words):
    path = written(tmp_path, text)
    with pytest.raises(BadInput) as error:
        read_trace(path)
    assert str(path) in str(error.value)
    assert words in str(error.value)
    assert "\n" not in str(error.value)


def test_held_seconds_counts_every_attempt_and_no_wait():
    def event(at: float, after: Status) -> EventRow:
        return EventRow(0, "j", at, "c", 1, None, after, Reason.PLACED, "")

    told = [(0, Status.WAITING), (10, Status.STARTING), (15, Status.RUNNING), (40, Status.WAITING)]
    told += [(100, Status.STARTING), (110, Status.SUCCEEDED)]
    assert held_seconds([event(*each) for each in told]) == 40


# ---- the command ----------------------------------------------------------------------------------------


def test_simulate_command_compares_policies_and_draws(tmp_path):
    world = CliWorld(tmp_path)
    trace = written(tmp_path, PHILLY)
    picture = tmp_path / "p.png"
    arguments = ["simulate", str(trace), "--gpus", "2", "--policy", "chorus", "--policy", "fifo"]
    result = world.chorus(*arguments, "--picture", str(picture))
    assert result.exit_code == 0, result.stderr
    assert "2 jobs on 2 GPUs" in result.stdout
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert [each["policy"] for each in world.read(*arguments)] == ["chorus", "fifo"]


def test_simulate_command_takes_the_log_of_a_home(tmp_path):
    world = CliWorld(tmp_path)
    assert world.chorus("run", world.one_job(), "--local").exit_code == 0
    assert world.read("simulate", world.home.folder, "--gpus", "4")[0]["jobs"] == 1


@pytest.mark.parametrize("policy", ["sjf", ""])
def test_simulate_command_unknown_policy_is_refused_with_those_known(tmp_path, policy):
    trace = written(tmp_path, PHILLY)
    result = CliWorld(tmp_path).chorus("simulate", trace, "--gpus", "2", "--policy", policy)
    assert_one_sentence(result, 2, "chorus, las, fifo-skip, fifo")
