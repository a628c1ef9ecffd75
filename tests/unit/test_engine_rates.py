"""Speeds as this rank measures them, keeps them on disk, and agrees on them."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from symphony_sglang.core.gate import GateSnapshot, Rate
from symphony_sglang.engine.calibration import ENTRIES_MAX, KEEP_SECONDS, RateFile
from symphony_sglang.engine.cost import CostMeter, TimeBuckets, Work
from symphony_sglang.engine.rates import SEND_SECONDS, RateBook, rates_from_json, rates_json


class FakeClock:
    def __init__(self) -> None:
        self.now = 100.0

    def monotonic(self) -> float:
        return self.now

    def unix(self) -> float:
        return self.now


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


def book(clock: FakeClock, margin: float = 1.0) -> RateBook:
    cache: Any = SimpleNamespace(page_size=16, device="cpu", cache_controller=SimpleNamespace())
    return RateBook(cache, margin, clock)


def batch(tokens: int, launch: float, *, extend: bool = True, mixed: bool = False) -> Any:
    mode = SimpleNamespace(is_extend=lambda: extend, is_mixed=lambda: mixed)
    return SimpleNamespace(forward_mode=mode, extend_num_tokens=tokens, launch_ts=launch)


def test_prefill_is_timed_from_launch_or_from_the_end_of_the_batch_before(
    clock: FakeClock,
) -> None:
    rates = book(clock)
    clock.now = 101.0
    rates.batch_ended(batch(1000, 100.0), SimpleNamespace())
    # Launched ahead, while the first still ran.
    clock.now = 103.0
    rates.batch_ended(batch(1000, 100.5), SimpleNamespace())
    assert [*rates.batches] == [(1000, 1.0), (1000, 2.0)]
    rates.batch_ended(batch(1, 102.0, extend=False), SimpleNamespace())
    rates.batch_ended(batch(900, 102.0, mixed=True), SimpleNamespace())
    assert len(rates.batches) == 2, "batches with decoding in them say nothing"


def test_speeds_are_sent_when_they_changed_and_not_too_often(clock: FakeClock) -> None:
    rates = book(clock)
    rates.loaded(1000, 0.01)
    rates.read_from_storage(100, 0.5)
    sent = rates.to_send()
    assert sent is not None
    assert sent.nvme_to_host is not None
    assert rates.to_send() is None
    clock.now += SEND_SECONDS
    rates.agree(sent)
    assert rates.to_send() is None, "nothing changed"
    rates.loaded(1000, 0.02)
    clock.now += SEND_SECONDS
    assert rates.to_send() is not None


def test_a_storage_thread_that_nobody_listens_to_fills_no_memory(clock: FakeClock) -> None:
    rates = book(clock)
    for _ in range(10_000):
        rates.read_from_storage(100, 0.5)
    assert len(rates._reads) < 1000


def test_the_gate_that_is_off_measures_and_decides_nothing(clock: FakeClock) -> None:
    rates = book(clock, margin=0.0)
    rates.calibrate(GateSnapshot(Rate(1.0), Rate(1.0), Rate(1e6)))
    assert rates.agreed == GateSnapshot()
    assert rates.as_json()["prefill_tokens_per_second"] == 1e6, "shown all the same"
    assert rates.to_send() is None


def test_speeds_survive_json_and_nonsense_is_not_measured() -> None:
    speeds = GateSnapshot(Rate(1e5, 0.001), None, Rate(3e3, 0.02))
    assert rates_from_json(json.loads(json.dumps(rates_json(speeds)))) == speeds
    bad = {"prefill_tokens_per_second": -1, "prefill_latency_seconds": 0}
    assert rates_from_json({**bad, "nvme_to_host_tokens_per_second": "fast"}) == GateSnapshot()
    infinite = {"prefill_tokens_per_second": float("inf"), "prefill_latency_seconds": 0}
    assert rates_from_json(infinite) == GateSnapshot()


def test_rate_file_keeps_machines_apart_and_forgets_old_figures(
    tmp_path: Path, clock: FakeClock
) -> None:
    file = RateFile(tmp_path / "deep" / "rates.json", clock)
    assert file.load("a") is None
    file.save("a", {"prefill_tokens_per_second": 1.0})
    file.save("b", {"prefill_tokens_per_second": 2.0})
    assert file.load("a") == {"prefill_tokens_per_second": 1.0}
    clock.now += KEEP_SECONDS
    assert file.load("a") is None
    for number in range(2 * ENTRIES_MAX):
        clock.now += 1
        file.save(f"m{number}", {})
    assert len(json.loads((tmp_path / "deep" / "rates.json").read_text())) == ENTRIES_MAX
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["rates.json"]


@pytest.mark.parametrize("text", ["", "{", "[]", '{"a": 1}', '{"a": {"speeds": 3}}'])
def test_a_damaged_rate_file_is_no_file(tmp_path: Path, clock: FakeClock, text: str) -> None:
    path = tmp_path / "rates.json"
    path.write_text(text)
    file = RateFile(path, clock)
    assert file.load("a") is None
    file.save("a", {})
    assert file.load("a") == {}


def test_percentiles_are_right_to_a_bucket() -> None:
    times = TimeBuckets()
    for microseconds in range(1, 1001):
        times.add(microseconds * 1e-6)
    assert times.percentile(0.5) == pytest.approx(500e-6, rel=0.2)
    assert times.percentile(0.99) == pytest.approx(990e-6, rel=0.2)
    assert times.as_json()["count"] == 1000
    assert times.as_json()["max_seconds"] == pytest.approx(1e-3)
    assert TimeBuckets().percentile(0.99) == 0.0
    times.add(0.0)
    times.add(1e9)
    assert times.samples == 1002


def test_the_share_of_the_loop_counts_only_loops_with_advisories(clock: FakeClock) -> None:
    meter = CostMeter(clock)
    for active in (False, True, True, False, True):
        meter.looped(active)
        if active:
            with meter.measure(Work.STEP):
                clock.now += 0.001
        clock.now += 0.099
    assert meter.loop_seconds == pytest.approx(0.1)
    assert meter.as_json()["step"]["count"] == 3
    with meter.measure(Work.MESSAGE, count=4):
        clock.now += 0.004
    assert meter.as_json()["message"]["p99_seconds"] == pytest.approx(0.001, rel=0.2)


def test_copies_inside_a_step_are_counted_apart(clock: FakeClock) -> None:
    """On a processor a copy to the device takes its time in the step that starts it."""
    meter = CostMeter(clock)
    meter.looped(True)
    with meter.measure(Work.STEP):
        clock.now += 0.001
        with meter.measure(Work.COPY):
            clock.now += 0.050
        clock.now += 0.001
    with meter.measure(Work.STEP):
        clock.now += 0.002
    meter.looped(True)
    told = meter.as_json()
    assert told["step"]["total_seconds"] == pytest.approx(0.004)
    assert told["copy"]["total_seconds"] == pytest.approx(0.050)
    assert told["step_share"] == pytest.approx(0.004 / 0.054)
