"""The break-even gate and the outcome ledger."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from symphony_sglang.core.gate import (
    OPEN_GATE,
    EstimatorLimits,
    Gate,
    GateCounts,
    GateReason,
    GateSnapshot,
    Rate,
    RateEstimator,
    fit_rate,
)
from symphony_sglang.core.ledger import Histogram, OutcomeLedger
from symphony_sglang.core.levels import Hop, Level
from symphony_sglang.core.lifecycle import Ended, Kind, State, Status

SNAPSHOT = GateSnapshot(
    nvme_to_host=Rate(20_000, 0.010), host_to_device=Rate(200_000, 0.001), prefill=Rate(10_000)
)


def test_the_gate_compares_the_sum_of_hops_with_recompute():
    decision = SNAPSHOT.worth_loading(Level.NVME, 2000)
    assert decision.use
    assert decision.load_seconds == pytest.approx(0.010 + 0.1 + 0.001 + 0.01)
    assert decision.recompute_seconds == pytest.approx(0.2)
    short = SNAPSHOT.worth_loading(Level.NVME, 100)
    assert (short.use, short.reason) == (False, GateReason.SLOWER), "latency eats a short one"
    assert SNAPSHOT.worth_loading(Level.HOST, 100).use


def test_what_was_never_measured_is_used():
    for level in (Level.NVME, Level.HOST, Level.PEER):
        decision = OPEN_GATE.worth_loading(level, 1000)
        assert (decision.use, decision.reason) == (True, GateReason.UNMEASURED)
    assert SNAPSHOT.worth_loading(Level.DEVICE, 1000).reason is GateReason.RESIDENT


def test_the_margin_tolerates_a_slower_load():
    gate = Gate({Hop.HOST_TO_DEVICE: Rate(90)}, Rate(100))
    assert not gate.snapshot().worth_loading(Level.HOST, 1000).use
    lenient = Gate({Hop.HOST_TO_DEVICE: Rate(90)}, Rate(100), margin=1.2)
    assert lenient.snapshot().worth_loading(Level.HOST, 1000).use


def test_a_disk_that_gets_slow_is_found_out_and_forgiven():
    gate = Gate({Hop.NVME_TO_HOST: Rate(20_000), Hop.HOST_TO_DEVICE: Rate(1e6)}, Rate(10_000))
    assert gate.snapshot().worth_loading(Level.NVME, 5000).use
    for _ in range(20):
        gate.transferred(Hop.NVME_TO_HOST, 1000, 0.5)
    assert not gate.snapshot().worth_loading(Level.NVME, 5000).use
    for _ in range(40):
        gate.transferred(Hop.NVME_TO_HOST, 1000, 0.05)
    assert gate.snapshot().worth_loading(Level.NVME, 5000).use
    for _ in range(40):
        gate.prefilled(1000, 0.01)
    assert not gate.snapshot().worth_loading(Level.NVME, 5000).use
    gate.check()


def test_one_outlier_moves_the_estimate_by_a_bounded_step():
    limits = EstimatorLimits(weight=0.2, step_max=4.0)
    estimator = RateEstimator(Rate(1000), limits)
    estimator.add(1000, 1e6)
    assert 1000 / estimator.rate().tokens_per_second == pytest.approx(1 + 0.2 * 3)


def test_a_second_outlier_to_the_same_side_is_believed():
    """A copy of microseconds a token that becomes one of seconds is found out after two."""
    estimator = RateEstimator(Rate(1e6))
    estimator.add(1000, 3.0)
    assert 1e6 / estimator.rate().tokens_per_second < 10, "one outlier is a bounded step"
    estimator.add(1000, 2.0)
    assert estimator.rate().tokens_per_second == pytest.approx(500), "the nearer of the two"
    for _ in range(2):
        estimator.add(1000, 1e-3)
    assert estimator.rate().tokens_per_second == pytest.approx(1e6), "and back as fast"
    estimator.check()


def test_outliers_to_different_sides_or_with_a_sample_between_stay_outliers():
    for between in (0.0001, 1.0):  # as far off to the other side; as expected
        estimator = RateEstimator(Rate(1000))
        for seconds in (1000.0, between, 1000.0):
            estimator.add(1000, seconds)
        assert estimator.rate().tokens_per_second > 100, between


def test_a_calibration_that_was_too_slow_is_left_behind_and_tokens_still_cost():
    """Calibrated beside other work: 0.11 s and 80 us a token; really 0.01 s and 40 us."""
    estimator = RateEstimator(Rate(12_500, 0.11))
    for number in range(400):
        tokens = (300, 1200, 600)[number % 3]
        estimator.add(tokens, 0.01 + tokens * 40e-6)
    rate = estimator.rate()
    assert rate.seconds(600) == pytest.approx(0.034, rel=0.5)
    assert rate.seconds(3000) - rate.seconds(500) > 0.03
    estimator.check()


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.lists(st.tuples(st.integers(-5, 10**9), st.floats(allow_nan=True, allow_infinity=True))))
def test_no_sequence_of_samples_breaks_an_estimate(samples):
    estimator, twin = RateEstimator(Rate(1000, 0.01)), RateEstimator(Rate(1000, 0.01))
    for tokens, seconds in samples:
        assert estimator.add(tokens, seconds) == twin.add(tokens, seconds)
        assert estimator.rate() == twin.rate()
        estimator.check()
    assert estimator.samples + estimator.ignored == len(samples)


def end(advisory_id: str, state: State, moved: int = 0, ready: float | None = None) -> Ended:
    return Ended(advisory_id, state, Kind.PREFETCH, "c", 100, moved, 2.0, ready)


def test_outcomes_are_counted_with_their_lead_times():
    ledger = OutcomeLedger()
    ledger.received(Status.ACCEPTED)
    ledger.ended(end("a", State.USED, 50, 0.3))
    ledger.ended(end("b", State.WASTED, 70))
    ledger.moved(Hop.NVME_TO_HOST, 5, 500)
    body = ledger.as_json(0.0)
    assert (body["outcomes"]["used"], body["outcomes"]["wasted"]) == (1, 1)
    assert body["wasted_tokens"] == 70
    assert body["moved_bytes"] == {"nvme_to_host": 500, "host_to_device": 0}
    assert (ledger.lead_seconds.total, ledger.ready_seconds.sum) == (1, 0.3)
    ledger.check()


def test_a_page_asked_for_before_the_advisory_was_used_is_harm():
    ledger = OutcomeLedger()
    ledger.evicted("a", ["p1", "p2"])
    ledger.evicted("b", ["p3"])
    assert ledger.asked(["p1", "x"]) == 1
    assert ledger.asked(["p1"]) == 0, "it is back now"
    assert ledger.asked(["p2"]) == 1
    assert (ledger.harmful, ledger.harmful_pages) == (1, 2), "one advisory, two pages"
    ledger.ended(end("b", State.USED))
    assert ledger.asked(["p3"]) == 0, "its own use came first"
    ledger.check()


def test_ghosts_are_bounded_and_die_with_the_cache():
    ledger = OutcomeLedger(ghosts_max=10)
    for number in range(100):
        ledger.evicted(f"a{number % 3}", [f"p{number}"])
        ledger.check()
    assert ledger.asked(["p0", "p89"]) == 0
    assert ledger.asked(["p90"]) == 1
    ledger.flushed()
    assert ledger.asked(["p99"]) == 0
    ledger.check()


def test_held_memory_is_integrated_over_time():
    ledger = OutcomeLedger()
    ledger.held(Level.DEVICE, 100, 10.0)
    ledger.held(Level.DEVICE, 50, 12.0)
    assert ledger.held_token_seconds(Level.DEVICE, 14.0) == 100 * 2 + 50 * 2
    assert ledger.held_token_seconds(Level.HOST, 14.0) == 0


def test_histogram_puts_a_value_below_its_bound():
    histogram = Histogram((1.0, 2.0))
    for value in (0.5, 1.0, 1.5, 9.0):
        histogram.add(value)
    assert histogram.counts == [2, 1, 1]
    assert (histogram.total, histogram.sum) == (4, 12.0)


def test_a_speed_without_calibration_starts_with_its_first_long_sample():
    gate = Gate()
    gate.transferred(Hop.NVME_TO_HOST, 10, 1.0)
    assert gate.snapshot().nvme_to_host is None, "too short to say anything"
    gate.transferred(Hop.NVME_TO_HOST, 1000, 0.1)
    gate.prefilled(2000, 1.0)
    snapshot = gate.snapshot()
    assert snapshot.nvme_to_host.tokens_per_second == pytest.approx(10_000)
    assert snapshot.prefill.tokens_per_second == pytest.approx(2000)
    assert snapshot.host_to_device is None
    gate.check()


def test_a_level_that_was_found_slow_is_tried_again_some_time_later():
    """A closed gate gives no samples; only time can open it."""
    gate = Gate({Hop.NVME_TO_HOST: Rate(100_000), Hop.HOST_TO_DEVICE: Rate(1e6)}, Rate(10_000))
    for _ in range(10):
        gate.transferred(Hop.NVME_TO_HOST, 1000, 10.0, now_seconds=0.0)
    assert not gate.snapshot(1.0).worth_loading(Level.NVME, 1000).use
    opened = next(s for s in range(1, 600) if gate.snapshot(s).worth_loading(Level.NVME, 1000).use)
    assert opened >= EstimatorLimits().stale_seconds
    gate.transferred(Hop.NVME_TO_HOST, 1000, 10.0, now_seconds=opened)
    gate.transferred(Hop.NVME_TO_HOST, 1000, 10.0, now_seconds=opened)
    assert not gate.snapshot(opened).worth_loading(Level.NVME, 1000).use, "and closes at once"
    gate.check()


def test_first_samples_that_were_slow_do_not_shut_a_level_for_good():
    gate = Gate(prefill=Rate(10_000))
    gate.transferred(Hop.HOST_TO_DEVICE, 1000, 1e-4)
    gate.transferred(Hop.NVME_TO_HOST, 1000, 1.0, now_seconds=0.0)
    assert not gate.snapshot(0.0).worth_loading(Level.NVME, 1000).use
    assert any(gate.snapshot(s).worth_loading(Level.NVME, 1000).use for s in range(0, 600, 10))


def test_calibration_replaces_what_it_measured_and_nothing_else():
    gate = Gate({Hop.HOST_TO_DEVICE: Rate(5.0)}, Rate(7.0), margin=2.0)
    gate.calibrate(GateSnapshot(nvme_to_host=Rate(9.0)))
    assert gate.snapshot() == GateSnapshot(Rate(9.0), Rate(5.0), Rate(7.0), 2.0)


@given(
    speed=st.floats(10, 1e6),
    latency=st.floats(0, 1),
    sizes=st.lists(st.integers(16, 10_000), min_size=2, max_size=6, unique=True),
)
def test_a_line_is_found_again_from_its_points(speed, latency, sizes):
    line = Rate(speed, latency)
    fitted = fit_rate([(tokens, line.seconds(tokens)) for tokens in sizes])
    for tokens in sizes:
        assert fitted.seconds(tokens) == pytest.approx(line.seconds(tokens), rel=0.05, abs=1e-6)


def test_no_line_without_points_and_a_plain_speed_from_one_length():
    assert fit_rate([]) is None
    assert fit_rate([(0, 1.0), (5, 0.0)]) is None
    assert fit_rate([(100, 0.1), (100, 0.3)]).seconds(100) == pytest.approx(0.2)
    assert fit_rate([(100, 0.3), (1000, 0.1)]).latency_seconds == 0.0, "noise is no latency"


def test_decisions_are_counted_by_level():
    first, second = GateCounts(), GateCounts()
    first.count(Level.NVME, True)
    second.count(Level.NVME, False)
    second.count(Level.HOST, False)
    assert GateCounts.merge(first, second).as_json() == {
        "host": {"use": 0, "recompute": 1},
        "nvme": {"use": 1, "recompute": 1},
    }
