"""Times between two fences, how many of them are taken, and their spread."""

from __future__ import annotations

import pytest
from clocked import Calls, Clock

from rpac.bench.time import FENCED_S, LEAST_TIMES, MOST_TIMES, Plan, Spread, between_fences, estimate, plan


def test_a_spread_is_the_median_and_the_tenths_between_neighbors() -> None:
    assert Spread.of([0.5, 0.1, 0.3, 0.2, 0.4, 0.0]) == pytest.approx(Spread(0.25, 0.05, 0.45, 6))
    assert Spread.of([0.7]) == Spread(0.7, 0.7, 0.7, 1)


def test_a_time_is_that_of_the_calls_between_two_fences_over_their_number() -> None:
    clock = Clock()
    calls = Calls(clock, [1.0, 2.0, 3.0, 6.0])
    assert between_fences(calls, Plan(3, 2), clock) == (1.5, 4.5, 1.5)
    assert calls.started == 6


def test_calls_that_were_started_before_are_no_part_of_a_time() -> None:
    clock = Clock()
    calls = Calls(clock, [100.0, 1.0, 1.0])
    calls()
    assert between_fences(calls, Plan(2, 1), clock) == (1.0, 1.0)


def test_the_first_call_is_no_part_of_an_estimate() -> None:
    clock = Clock()
    assert estimate(Calls(clock, [50.0, 3.0, 2.0, 4.0]), clock) == 2.0


@pytest.mark.parametrize(
    ("seconds_of_a_call", "seconds", "calls", "wanted"),
    [
        (0.03, 3.0, None, Plan(100, 1)),  # long enough for a fence each
        (0.001, 2.0, None, Plan(200, 10)),
        (10.0, 2.0, None, Plan(LEAST_TIMES, 1)),  # a few, however long they take
        (0.1, 1e6, None, Plan(MOST_TIMES, 1)),
        (0.001, 2.0, 100, Plan(10, 10)),
        (0.001, 2.0, 20, Plan(5, 4)),  # fewer between two fences than would be best, so that there is a spread
        (0.001, 2.0, 1, Plan(1, 1)),
    ],
)
def test_as_many_times_are_taken_as_there_is_room_for(
    seconds_of_a_call: float, seconds: float, calls: int | None, wanted: Plan
) -> None:
    assert plan(seconds_of_a_call, seconds, calls) == wanted
    assert calls is None or wanted.times * wanted.calls_each <= calls


def test_a_call_that_seems_to_take_no_time_is_timed_all_the_same() -> None:
    found = plan(0.0, 2.0, None)
    assert found.times >= 1
    assert found.calls_each * 1e-9 >= FENCED_S
