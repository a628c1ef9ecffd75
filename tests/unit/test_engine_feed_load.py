"""When the load is told, and what of SGLang's sums it is made."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from symphony_sglang.core.gate import Rate

feed_load = pytest.importorskip("symphony_sglang.engine.feed_load")


def request(tokens: int, *, ended: bool = False) -> Any:
    return SimpleNamespace(seqlen=tokens, finished=lambda: ended)


def world() -> tuple[Any, Any]:
    """A scheduler's state, as far as the gauge reads it, and its cache."""
    scheduler = SimpleNamespace(
        running_batch=SimpleNamespace(reqs=[]),
        waiting_queue=[],
        load_inquirer=SimpleNamespace(get_num_waiting_uncached_tokens=lambda: 70),
        max_running_requests=9,
        decode_moment_totals=[0.0] * 6,
    )
    rates = SimpleNamespace(
        agreed=SimpleNamespace(prefill=Rate(3000.0, 0.5), host_to_device=None, nvme_to_host=None)
    )
    cache = SimpleNamespace(
        token_to_kv_pool_allocator=SimpleNamespace(size=1000, available_size=lambda: 300),
        full_evictable_size=lambda: 200,
        advisories=SimpleNamespace(
            rates=rates,
            promoter=SimpleNamespace(device=SimpleNamespace(resident_tokens=0)),
        ),
        peer=None,
    )
    return scheduler, cache


def test_a_load_says_what_runs_what_waits_and_how_fast_it_is() -> None:
    scheduler, cache = world()
    scheduler.running_batch.reqs = [request(100), request(50)]
    scheduler.waiting_queue = [request(70)]
    load = feed_load.LoadGauge(scheduler, cache).read(0.0)
    assert (load.requests_running, load.requests_waiting) == (2, 1)
    assert (load.tokens_running, load.tokens_waiting_uncached) == (150, 70)
    assert (load.device_used_tokens, load.device_total_tokens) == (500, 1000)
    assert load.requests_max == 9
    assert load.speeds.prefill.tokens_per_second == 3000.0
    assert load.speeds.host_to_device is None


def test_what_hints_protect_is_room_for_running_work() -> None:
    scheduler, cache = world()
    cache.advisories.promoter.device.resident_tokens = 400
    load = feed_load.LoadGauge(scheduler, cache).read(0.0)
    assert (load.device_used_tokens, load.device_total_tokens) == (100, 1000)
    # A request that runs on what is still protected is counted on both sides.
    cache.advisories.promoter.device.resident_tokens = 600
    assert feed_load.LoadGauge(scheduler, cache).read(0.0).device_used_tokens == 0


def test_changes_of_requests_are_told_at_once_and_all_else_at_a_pace() -> None:
    scheduler, cache = world()
    gauge = feed_load.LoadGauge(scheduler, cache)
    assert gauge.read(0.0) is not None
    scheduler.max_running_requests = 10
    assert gauge.read(0.05) is None, "too early for a slow change"
    scheduler.waiting_queue = [request(1)]
    assert gauge.read(0.06).requests_waiting == 1
    scheduler.waiting_queue = [request(1)] * 2
    assert gauge.read(0.061) is None, "a burst of changes is told as one"
    assert gauge.read(0.07).requests_waiting == 2
    assert gauge.read(0.5) is None, "nothing changed"


def test_the_end_of_the_last_request_is_told_before_the_scheduler_sleeps() -> None:
    scheduler, cache = world()
    gauge = feed_load.LoadGauge(scheduler, cache)
    scheduler.running_batch.reqs = [request(10)]
    assert gauge.read(0.0).requests_running == 1
    # It stays in the batch until the next one is made, which may be a sleep later.
    scheduler.running_batch.reqs = [request(10, ended=True)]
    assert gauge.read(0.0001).requests_running == 0


def test_decode_steps_are_averaged_over_the_latest() -> None:
    scheduler, cache = world()
    gauge = feed_load.LoadGauge(scheduler, cache)
    assert gauge.read(0.0).decode_step_seconds == 0.0
    scheduler.decode_moment_totals = [10.0, 10.0, 200_000.0, 0.0, 0.0, 10.0]
    assert gauge.read(1.0).decode_step_seconds == pytest.approx(0.02)
    scheduler.decode_moment_totals = [12.0, 12.0, 900_000.0, 0.0, 0.0, 12.0]
    assert gauge.read(2.0) is None, "two steps are too few to say anything"
    scheduler.decode_moment_totals = [20.0, 20.0, 600_000.0, 0.0, 0.0, 20.0]
    assert gauge.read(3.0).decode_step_seconds == pytest.approx(0.02 + 0.3 * 0.02)
