"""A host's mailbox: no event lost or doubled over a change of controllers, and the earlier one is refused."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from workers import mail as mailbox
from workers.mail import Mail
from workers.types import (
    AdapterSpec,
    Attach,
    Detach,
    Detached,
    Evaluate,
    EvaluationFailed,
    EvaluationSpec,
    HostReady,
    JobSpec,
    Roll,
    SearchDone,
    Superseded,
    TrainingFinished,
    TrainingSpec,
    Validated,
)

READY = HostReady(world_size=2, zero="3", slots=8, base_parameters=1, load_seconds=0.0)


def evaluate(request):
    return Evaluate(request, None, EvaluationSpec((), 64))


def spec(job, attempt=1):
    adapter, training = AdapterSpec(r=2, lora_alpha=4), TrainingSpec(1e-3, 2, 64, max_steps=4)
    return JobSpec(job, attempt, adapter, training, (), (), "checkpoints")


def events(count, first=1):
    return [Validated("a", 1, number, 0.0) for number in range(first, first + count)]


def test_mail_poll_gives_each_event_once_and_again_when_the_answer_was_lost():
    mail = Mail()
    mail.put(events(2))
    first = mail.poll(0)
    assert mail.poll(0) == first
    mail.put(events(1, first=3))
    assert mail.poll(first.last).events == tuple(events(1, first=3))


def test_mail_poll_gives_so_many_events_at_a_time_that_one_answer_stays_small(monkeypatch):
    monkeypatch.setattr(mailbox, "MOST_EVENTS", 3)
    mail, heard, after = Mail(), [], 0
    mail.put(events(8))
    for _ in range(4):
        polled = mail.poll(after)
        assert len(polled.events) <= 3
        heard, after = [*heard, *polled.events], polled.last
    assert heard == events(8)


FATES = st.sampled_from(["taken in", "answer lost", "crash before it is written", "crash after"])


@given(st.lists(st.tuples(st.integers(0, 4), FATES), max_size=30))
def test_mail_controllers_that_come_and_go_write_down_every_event_and_none_as_two(story):
    """Each event is written under its number, which a database may be asked for twice."""
    mail, epoch, after, put, written = Mail(), 0, 0, 0, {}
    for count, fate in [*story, (0, "taken in")]:
        mail.put(events(count, first=put + 1))
        put += count
        polled = mail.poll(after, epoch)
        if fate in ("taken in", "crash after"):
            for number, event in enumerate(polled.events, start=polled.last - len(polled.events) + 1):
                assert written.setdefault(number, event) == event
        if fate == "taken in":
            after = polled.last
        if fate.startswith("crash"):
            epoch += 1
            after = mail.take_over(epoch).after
    assert [written[number] for number in sorted(written)] == events(put)


def test_mail_of_an_earlier_controller_is_refused_and_has_no_effect():
    mail = Mail(epoch=1)
    mail.put(events(1))
    mail.take_over(2)
    for speak in (
        lambda: mail.submit(Detach("a", 1), 1),
        lambda: mail.poll(1, 1),
        lambda: mail.take_over(1),
    ):
        with pytest.raises(Superseded, match="controller 2 has taken over from controller 1"):
            speak()
    assert mail.commands(0.0) == []
    assert mail.poll(0, 2).events == tuple(events(1))
    assert mail.take_over(2).after == 0


def test_mail_roll_holds_what_was_asked_and_not_yet_known_to_be_answered():
    mail = Mail(epoch=1)
    first, second = spec("a"), spec("b")
    mail.put([READY])
    mail.poll(mail.poll(0, 1).last, 1)
    for command in (Attach(first), Attach(second), evaluate("scored"), evaluate("waits")):
        mail.submit(command, 1)
    mail.put([TrainingFinished("a", 1, 4, "adapter"), EvaluationFailed("scored", "no rows")])
    heard = mail.poll(1, 1)
    assert mail.take_over(2) == Roll(
        1, READY, None, (first, second), (evaluate("scored"), evaluate("waits"))
    ), "nobody has said that the answers were taken in"
    mail.poll(heard.last, 2)
    assert mail.take_over(3) == Roll(3, READY, None, (second,), (evaluate("waits"),))
    mail.put([SearchDone("waits", {}), Detached("b", 1, 2)])
    mail.poll(mail.poll(3, 3).last, 3)
    assert mail.take_over(4) == Roll(5, READY)


def test_mail_roll_keeps_a_job_of_which_only_an_earlier_attempt_has_left():
    mail = Mail()
    mail.submit(Attach(spec("a", attempt=2)))
    mail.put([Detached("a", 1, 5)])
    mail.poll(1)
    assert [spec.attempt for spec in mail.take_over(1).attached] == [2]


def test_mail_is_abandoned_once_nobody_has_spoken_for_so_long_and_no_more_when_someone_does():
    now = [0.0]
    mail = Mail(epoch=1, orphan_seconds=60.0, clock=lambda: now[0])
    now[0] = 61.0
    assert mail.abandoned
    mail.take_over(2)
    assert not mail.abandoned
    now[0] = 122.0
    with pytest.raises(Superseded):
        mail.poll(0, 1)
    assert mail.abandoned, "one who was refused has not spoken"
