"""A model that is down is left alone, and found out about by one call at a time."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from gateway.breaker import FAILURES, LONGEST_PAUSE_S, PAUSE_S, Breaker
from tests.fakes import FakeClock


def broken(clock: FakeClock) -> Breaker:
    """A breaker that has just opened."""
    breaker = Breaker(clock.monotonic_s)
    for _ in range(FAILURES):
        assert breaker.admits()
        breaker.failed()
    return breaker


def test_failures_in_a_row_open_it_and_a_success_between_them_does_not() -> None:
    breaker = Breaker(FakeClock().monotonic_s)
    for number in range(3 * FAILURES):
        breaker.failed()
        if number % (FAILURES - 1) == FAILURES - 2:
            breaker.succeeded()
    assert not breaker.is_open
    for _ in range(FAILURES):
        breaker.failed()
    assert breaker.is_open
    assert not breaker.admits()


def test_after_the_pause_one_call_finds_out_and_its_success_closes_it() -> None:
    clock = FakeClock()
    breaker = broken(clock)
    clock.advance(PAUSE_S)
    assert [breaker.admits() for _ in range(3)] == [True, False, False]
    breaker.succeeded()
    assert not breaker.is_open
    assert [breaker.admits() for _ in range(3)] == [True, True, True]


def test_a_failed_probe_doubles_the_pause_up_to_the_longest() -> None:
    clock = FakeClock()
    breaker = broken(clock)
    pause_s = PAUSE_S
    for _ in range(8):
        clock.advance(pause_s - 0.5)
        assert not breaker.admits()
        clock.advance(0.5)
        assert breaker.admits()
        breaker.failed()
        pause_s = min(2 * pause_s, LONGEST_PAUSE_S)
    assert pause_s == LONGEST_PAUSE_S


def test_a_probe_that_is_withdrawn_says_nothing_and_another_may_try() -> None:
    clock = FakeClock()
    breaker = broken(clock)
    clock.advance(PAUSE_S)
    assert breaker.admits()
    breaker.withdrawn()
    assert breaker.is_open
    assert breaker.admits()


def test_calls_that_were_under_way_do_not_prolong_the_pause() -> None:
    clock = FakeClock()
    breaker = broken(clock)
    clock.advance(PAUSE_S / 2)
    breaker.failed()
    clock.advance(PAUSE_S / 2)
    assert breaker.admits()


@given(st.lists(st.sampled_from(["call", "succeeded", "failed", "withdrawn", "later"])))
def test_it_never_stays_open_for_good(events: list[str]) -> None:
    clock = FakeClock()
    breaker = Breaker(clock.monotonic_s)
    for event in events:
        if event == "later":
            clock.advance(PAUSE_S)
        elif breaker.admits() and event != "call":
            getattr(breaker, event)()
    breaker.withdrawn()
    clock.advance(LONGEST_PAUSE_S)
    assert breaker.admits()
    breaker.succeeded()
    assert not breaker.is_open
