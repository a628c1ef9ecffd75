"""Placement: what each policy does in cases that can be worked out by hand."""

from __future__ import annotations

import random
from dataclasses import replace

import numpy as np
import pytest

from routing_world import RATES, World, chain, request, worker
from symphony_sglang.core.gate import Rate
from symphony_sglang.core.levels import Level
from symphony_sglang.core.location import LocationIndex
from symphony_sglang.core.routing import SymphonyPolicy
from symphony_sglang.core.routing_types import (
    AdvisedPlace,
    LoadView,
    PolicySettings,
    Reason,
    RouteRequest,
    WorkerRates,
    WorkerView,
    measured_rate,
)
from symphony_sglang.core.worker_load import LoadLedger


def test_the_worker_that_has_it_on_device_is_cheapest_and_the_parts_add_up() -> None:
    world, hashes = World(), chain(100)
    world.index.stored("w1", Level.DEVICE, hashes[:50].tolist())
    decision = world.choose(request(hashes))
    assert (decision.worker_id, decision.reason) == ("w1", Reason.LEAST_COST)
    assert decision.tokens.device == 800
    assert decision.uncached_tokens == decision.tokens.recompute == 804
    assert sum(decision.tokens) == 1604
    assert decision.cost.recompute == pytest.approx(0.804)
    assert decision.cost.total == pytest.approx(0.804)
    assert {other.worker_id for other in decision.alternatives} <= {"w0", "w2"}


@pytest.mark.parametrize(
    ("levels", "winner"),
    [
        # 1600 tokens: device 0, host 0.032 s, NVMe 0.192 s, recompute 1.6 s.
        ({"w0": Level.NVME, "w1": Level.HOST, "w2": Level.DEVICE}, "w2"),
        ({"w0": Level.NVME, "w1": Level.HOST}, "w1"),
        ({"w0": Level.NVME}, "w0"),
    ],
)
def test_faster_levels_win(levels: dict[str, Level], winner: str) -> None:
    world, hashes = World(), chain(100)
    for name, level in levels.items():
        world.index.stored(name, level, hashes.tolist())
    assert world.choose(request(hashes)).worker_id == winner


def test_each_level_costs_its_hops() -> None:
    world, hashes = World(workers=1), chain(100)
    world.index.stored("w0", Level.NVME, hashes.tolist())
    world.index.stored("w0", Level.HOST, hashes[:60].tolist())
    world.index.stored("w0", Level.DEVICE, hashes[:10].tolist())
    decision = world.choose(request(hashes))
    assert decision.reason is Reason.ONLY_WORKER
    assert decision.tokens == (160, 800, 640, 0, 4)
    # A second of loading counts half: it leaves the device to others.
    assert decision.cost.bring == pytest.approx((1440 / 50_000 + 640 / 10_000) / 2)


def test_a_level_slower_than_recomputing_is_not_used() -> None:
    world, hashes = World(workers=1), chain(100)
    world.index.stored("w0", Level.NVME, hashes.tolist())
    slow = replace(RATES, nvme_to_host=Rate(500.0))
    world.workers = [replace(world.workers[0], rates=slow)]
    decision = world.choose(request(hashes))
    assert decision.tokens == (0, 0, 0, 0, 1604)
    assert decision.cost.bring == 0


def test_load_is_shed_only_when_waiting_costs_more_than_recomputing() -> None:
    world, hashes = World(stay_seconds=0.0, stay_share=0.0), chain(100)
    world.index.stored("w1", Level.DEVICE, hashes.tolist())
    for queued, winner in ((1000, True), (3000, False)):
        world.workers[1] = worker("w1", tokens_waiting_uncached=queued)
        assert (world.choose(request(hashes)).worker_id == "w1") is winner


def test_only_what_does_not_pay_leaves_an_overloaded_worker() -> None:
    """Bounded load: long matches stay where short ones leave."""
    world = World()
    long, short = chain(400, 1), chain(20, 2)
    for hashes in (long, short):
        world.index.stored("w1", Level.DEVICE, hashes.tolist())
    world.workers[1] = worker("w1", tokens_waiting_uncached=2000)
    assert world.choose(request(long)).worker_id == "w1"
    assert world.choose(request(short)).worker_id != "w1"


def test_equal_workers_share_new_prompts() -> None:
    world = World(workers=8)
    counts = dict.fromkeys((view.worker_id for view in world.workers), 0)
    for seed in range(400):
        decision = world.choose(request(chain(10, seed)))
        counts[decision.worker_id] += 1
        assert decision.reason is Reason.TIE_SPREAD
    assert min(counts.values()) > 20


def test_the_fewest_requests_break_a_tie() -> None:
    world = World(workers=4, tie_seconds=1.0)
    for number in range(3):
        world.workers[number] = worker(f"w{number}", requests_in_flight=number + 1)
    for seed in range(20):
        assert world.choose(request(chain(10, seed))).worker_id == "w3"


def test_the_first_concurrent_requests_of_a_session_stay_together() -> None:
    """No page is reported yet: the first request's own prompt is waited for, not computed twice."""
    world, ledger = World(workers=4), LoadLedger()
    hashes = chain(200)
    first = None
    for number in range(6):
        asked = request(hashes, session="s")
        decision = world.send(asked)
        ledger.sent(decision.worker_id, f"r{number}", decision.uncached_tokens, 3204, world.now)
        world.workers = [
            replace(view, load=ledger.view(view.worker_id, world.now)) for view in world.workers
        ]
        first = first or decision.worker_id
        assert decision.worker_id == first
    assert decision.uncached_tokens < 400


def test_a_shared_head_on_its_way_is_waited_for_without_a_session_too() -> None:
    world, hashes = World(workers=4), chain(300)
    first = world.send(request(hashes))
    second = world.choose(request(np.concatenate([hashes[:250], chain(10, 9)])))
    assert second.worker_id == first.worker_id
    assert second.match.expected_pages == 250


def test_expectation_ends_with_time_and_with_truth() -> None:
    world, hashes = World(workers=2), chain(100)
    sent = world.send(request(hashes)).worker_id
    assert world.index.match(hashes, world.now)[sent].expected_pages == 100
    later = world.now + PolicySettings().speculative_seconds
    assert world.index.match(hashes, later) == {}
    world.index.stored(sent, Level.DEVICE, hashes.tolist())
    assert world.index.match(hashes, world.now)[sent] == (100, 0, 0, 0)
    assert world.index.stats().expected == 0
    world.index.check()


def test_a_session_stays_for_a_small_difference_and_leaves_for_a_large_one() -> None:
    world, hashes = World(), chain(100)
    for name in ("w0", "w1"):
        world.index.stored(name, Level.DEVICE, hashes.tolist())
    world.index.session_turn("w1", "s", 1600, None, 1, 0)
    for queued, reason in ((0, Reason.LEAST_COST), (30, Reason.SESSION), (5000, None)):
        world.workers[1] = worker("w1", tokens_waiting_uncached=queued)
        decision = world.choose(request(hashes, session="s"))
        if reason is None:
            assert decision.worker_id == "w0"
        else:
            assert decision.worker_id == "w1"
            assert decision.reason in (reason, Reason.TIE_SESSION)


def test_a_moved_session_stays_though_the_worker_it_left_has_a_page_more() -> None:
    for more, expected in ((2, "w1"), (20, "w0")):
        world, hashes = World(), chain(100)
        world.index.stored("w0", Level.DEVICE, hashes.tolist())
        world.index.stored("w1", Level.DEVICE, hashes[: 100 - more].tolist())
        world.index.session_turn("w1", "s", 1600, None, 1, 1 << 16)
        assert world.choose(request(hashes, session="s")).worker_id == expected


def test_without_page_hashes_the_session_is_what_counts() -> None:
    world = World()
    asked = RouteRequest("r", 1000, session_id="s")
    home = world.send(asked).worker_id
    world.now += 3000
    for number, view in enumerate(world.workers):
        if view.worker_id == home:
            world.workers[number] = worker(home, tokens_waiting_uncached=300)
    assert world.choose(asked).worker_id == home


def test_a_promotion_under_way_counts_by_when_it_is_ready() -> None:
    world, hashes = World(stay_share=0.0, stay_seconds=0.0), chain(100)
    for name in ("w0", "w1"):
        world.index.stored(name, Level.NVME, hashes.tolist())
    for ready, winner in ((99.0, "w1"), (100.05, "w1")):
        places = (AdvisedPlace("w1", 1600, ready),)
        decision = world.choose(request(hashes, advised=places))
        assert decision.worker_id == winner
        assert decision.cost.bring == pytest.approx(max(0.0, ready - world.now) / 2)
    # One that takes longer than starting afresh is not waited for.
    decision = world.choose(request(hashes, advised=(AdvisedPlace("w1", 1600, 110.0),)))
    assert decision.cost.bring == pytest.approx((1600 / 10_000 + 1600 / 50_000) / 2)


def test_a_pull_is_offered_where_copying_beats_computing() -> None:
    world, hashes = World(), chain(200)
    world.index.stored("w1", Level.HOST, hashes.tolist())
    rates = replace(RATES, peer_to_host=Rate(20_000.0))
    busy = LoadView(tokens_waiting_uncached=20_000)
    world.workers = [
        replace(view, rates=rates, serves_pages=True, pulls_pages=True) for view in world.workers
    ]
    world.workers[1] = replace(world.workers[1], load=busy)
    decision = world.choose(request(hashes))
    assert decision.worker_id in ("w0", "w2")
    assert decision.pull is not None
    assert decision.pull[:3] == ("w1", 3200, 0)
    assert decision.pull.saved_seconds == pytest.approx(3.2 - 3200 / 20_000 - 3200 / 50_000 / 2)
    assert decision.tokens == (0, 0, 0, 3200, 4)
    slow = replace(rates, peer_to_host=Rate(900.0))
    world.workers = [replace(view, rates=slow) for view in world.workers]
    assert world.choose(request(hashes)).pull is None


def test_unmeasured_workers_are_taken_for_the_typical_one() -> None:
    world, hashes = World(), chain(50)
    world.workers[0] = replace(world.workers[0], rates=WorkerRates())
    assert measured_rate(0.0, 1.0) is None
    assert measured_rate(None, None) is None
    assert measured_rate(float("nan"), 0.0) is None
    assert measured_rate(5.0, None) == Rate(5.0)
    seen = {world.choose(request(hashes)).worker_id for _ in range(60)}
    assert seen == {"w0", "w1", "w2"}
    bare = World()
    bare.workers = [replace(view, rates=WorkerRates()) for view in bare.workers]
    assert bare.choose(request(hashes)).cost.recompute > 0


def test_a_faster_worker_gets_the_long_prompt() -> None:
    world = World()
    fast = replace(RATES, prefill=Rate(4000.0))
    world.workers[2] = replace(worker("w2", tokens_waiting_uncached=2000), rates=fast)
    assert world.choose(request(chain(100))).worker_id == "w2"


def test_page_sizes_may_differ() -> None:
    world = World()
    wide = chain(25, 7)
    world.workers[2] = replace(world.workers[2], page_size=64)
    asked = RouteRequest("r", 1604, {16: chain(100), 64: wide})
    world.index.stored("w2", Level.DEVICE, wide.tolist())
    decision = world.choose(asked)
    assert (decision.worker_id, decision.tokens.device) == ("w2", 1600)
    blind = replace(world.workers[2], page_size=0)
    world.workers[2] = blind
    assert world.choose(asked).tokens.device == 0


def test_a_full_worker_is_waited_for_or_avoided() -> None:
    world, hashes = World(), chain(100)
    world.index.stored("w0", Level.DEVICE, hashes.tolist())
    full = {"device_used_tokens": 10_000, "device_total_tokens": 10_000, "tokens_running": 10_000,
            "decode_step_seconds": 0.02, "requests_running": 8}  # fmt: skip
    world.workers = [worker(f"w{n}", decode_step_seconds=0.02) for n in range(3)]
    assert world.choose(request(hashes)).worker_id == "w0"
    # 1604 tokens short at 256 x 0.02 s for 10,000 tokens: 0.82 s of waiting against 1.6 s.
    world.workers[0] = worker("w0", **full)
    assert world.choose(request(hashes)).cost.queue == pytest.approx(0.82, rel=0.01)
    crowded = LoadView(**{**full, "requests_max": 8})  # type: ignore[arg-type]
    world.workers[0] = replace(world.workers[0], load=crowded)
    decision = world.choose(request(hashes))
    assert decision.worker_id == "w0" or decision.cost.queue == 0


def test_where_nothing_runs_there_is_nothing_to_wait_for() -> None:
    """Memory that is in use without running work gives way when a request comes."""
    world, hashes = World(workers=2), chain(100)
    world.index.stored("w0", Level.DEVICE, hashes.tolist())
    world.workers[0] = worker("w0", device_used_tokens=10_000, device_total_tokens=10_000)
    decision = world.choose(request(hashes))
    assert (decision.worker_id, decision.cost.queue) == ("w0", 0.0)


def test_a_session_stays_though_its_worker_measured_a_slower_prefill() -> None:
    """Two workers alike but for noise in what they measured of the same prefill."""
    index = LocationIndex()
    hashes = np.arange(1, 129, dtype=np.int64)
    for name in ("w0", "w1"):
        index.stored(name, Level.DEVICE, hashes.tolist())
    index.session_turn("w0", "s", 2048, None, 1, 1)
    rates = {"w0": Rate(100.0), "w1": Rate(300.0)}
    views = [
        WorkerView(name, page_size=16, rates=WorkerRates(prefill=rate))
        for name, rate in rates.items()
    ]
    asked = RouteRequest("r", 2100, {16: hashes}, "s")
    decision = SymphonyPolicy().choose(asked, views, index, 0.0, random.Random(0))
    assert (decision.worker_id, decision.reason) == ("w0", Reason.SESSION)
    # Without the session there is nothing to stay for.
    fresh = RouteRequest("r", 2100, {16: hashes})
    assert SymphonyPolicy().choose(fresh, views, index, 0.0, random.Random(0)).worker_id == "w1"


def test_a_noisy_fixed_part_does_not_make_a_hit_dearer_than_a_whole_prompt() -> None:
    index = LocationIndex()
    hashes = np.arange(1, 76, dtype=np.int64)
    index.stored("w0", Level.DEVICE, hashes.tolist())
    views = [
        WorkerView(name, page_size=16, rates=WorkerRates(prefill=rate))
        for name, rate in (("w0", Rate(9000.0, 0.5)), ("w1", Rate(9000.0, 0.01)))
    ]
    asked = RouteRequest("r", 1203, {16: hashes})
    decision = SymphonyPolicy().choose(asked, views, index, 0.0, random.Random(0))
    assert (decision.worker_id, decision.tokens.device) == ("w0", 1200)
    assert decision.cost.recompute < 0.02
