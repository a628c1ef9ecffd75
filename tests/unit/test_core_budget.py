"""Caller budgets: a rate with a burst, tokens in flight, and bounds on what is remembered."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from symphony_sglang.core.budget import CallerBudget, CallerLimits, Refusal


def test_a_caller_may_burst_and_then_goes_at_its_rate():
    budget = CallerBudget(CallerLimits(rate_per_second=10, burst=5))
    assert all(budget.admit("c", 0.0).allowed for _ in range(5))
    refused = budget.admit("c", 0.0)
    assert (refused.allowed, refused.refusal) == (False, Refusal.RATE)
    assert refused.retry_after_seconds == pytest.approx(0.1)
    assert budget.admit("c", refused.retry_after_seconds).allowed
    assert not budget.admit("c", refused.retry_after_seconds).allowed
    assert budget.admit("other", 0.0).allowed, "callers do not share"
    assert math.isinf(budget.admit("c", 100.0, count=6).retry_after_seconds)
    assert not budget.admit("d", 0.0, count=6).allowed
    assert budget.admit("d", 0.0, count=5).allowed, "a refusal costs nothing"
    budget.check()


def test_a_clock_that_stands_still_or_goes_back_gives_no_credit():
    budget = CallerBudget(CallerLimits(rate_per_second=10, burst=1))
    assert budget.admit("c", 5.0).allowed
    assert not budget.admit("c", 1.0).allowed
    assert not budget.admit("c", 5.0).allowed
    budget.check()


def test_tokens_in_flight_hold_a_caller_back_until_they_end():
    budget = CallerBudget(CallerLimits(tokens_in_flight_max=100))
    budget.started("c", "a", 60, 60.0, 0.0)
    assert budget.admit("c", 0.0).allowed, "the one that crosses the limit is let in"
    budget.started("c", "b", 60, 60.0, 0.0)
    refused = budget.admit("c", 0.0)
    assert (refused.refusal, refused.retry_after_seconds) == (Refusal.TOKENS, 1.0)
    assert budget.admit("other", 0.0).allowed, "callers do not share"
    budget.ended("c", "a")
    assert budget.admit("c", 0.0).allowed
    budget.ended("c", "a")
    budget.ended("c", "unknown")
    assert budget.tokens_in_flight("c") == 60
    budget.check()


def test_an_advisory_past_its_expiry_counts_no_more():
    budget = CallerBudget(CallerLimits(tokens_in_flight_max=100))
    budget.started("c", "a", 100, 5.0, 0.0)
    assert not budget.admit("c", 4.9).allowed
    assert budget.admit("c", 5.0).allowed
    assert budget.tokens_in_flight("c") == 0


def test_a_renewed_advisory_counts_once():
    budget = CallerBudget()
    budget.started("c", "a", 100, 5.0, 0.0)
    budget.started("c", "a", 100, 50.0, 1.0)
    assert budget.tokens_in_flight("c") == 100
    assert budget.live("c", 8) == ["a"]


def test_beyond_the_bound_the_oldest_advisory_is_taken_for_ended():
    budget = CallerBudget(CallerLimits(advisories_max=2))
    for number in range(3):
        budget.started("c", f"a{number}", 10, 60.0, 0.0)
    assert budget.live("c", 8) == ["a1", "a2"]
    assert budget.tokens_in_flight("c") == 20
    budget.check()


def test_callers_are_bounded_and_the_idle_go_first():
    budget = CallerBudget(CallerLimits(callers_max=2))
    budget.started("busy", "a", 1, 60.0, 0.0)
    budget.admit("idle", 0.0)
    assert budget.admit("new", 0.0).allowed
    budget.started("new", "b", 1, 60.0, 0.0)
    assert budget.admit("third", 59.0).refusal is Refusal.CALLERS
    assert budget.admit("third", 60.0).allowed, "all that `busy` had is over by then"
    budget.check()


calls = st.tuples(
    st.sampled_from(["admit", "started", "ended"]),
    st.sampled_from("abc"),
    st.integers(0, 5),
    st.integers(0, 50),
    st.floats(0.0, 3.0),
)


@given(st.lists(calls, max_size=60))
@settings(max_examples=150, deadline=None)
def test_the_sum_of_tokens_is_kept_whatever_comes(events):
    limits = CallerLimits(
        rate_per_second=2, burst=4, tokens_in_flight_max=60, callers_max=2, advisories_max=3
    )
    budget = CallerBudget(limits)
    now_seconds = 0.0
    for verb, caller, number, tokens, pause in events:
        now_seconds += pause
        if verb == "admit":
            before = budget.tokens_in_flight(caller)
            admission = budget.admit(caller, now_seconds)
            assert admission.allowed or admission.refusal is not None
            assert not admission.allowed or budget.tokens_in_flight(caller) <= before
        elif verb == "started":
            budget.started(caller, f"{caller}{number}", tokens, now_seconds + 2, now_seconds)
        else:
            budget.ended(caller, f"{caller}{number}")
        budget.check()
