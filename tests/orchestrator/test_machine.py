"""A short run of the state machine; the long one is a command."""

from tests.orchestrator.machine import check


def test_machine_any_sequence_of_events_breaks_no_invariant():
    check(sequences=60)
