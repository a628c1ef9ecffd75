"""The simulator's parts: time, channels, levels, users, and what a worker does with them."""

from __future__ import annotations

import random
from collections.abc import Callable
from itertools import pairwise

import pytest

from symphony_sglang.core.levels import Level
from symphony_sglang.errors import ConfigError
from symphony_sglang.sim.hardware import MACHINES, MODELS, Machine, Speeds, speeds_of
from symphony_sglang.sim.levels import LevelStore
from symphony_sglang.sim.loop import Channel, EventLoop
from symphony_sglang.sim.users import User, UserRules
from symphony_sglang.sim.worker import Features, SimRequest, SimWorker


def test_callbacks_come_in_order_of_time_and_then_of_making() -> None:
    loop, seen = EventLoop(), []
    for name, seconds in (("b", 2.0), ("a", 1.0), ("c", 2.0)):
        loop.at(seconds, seen.append, name)
    loop.at(1.5, seen.append, "never").cancel()
    loop.run()
    assert seen == ["a", "b", "c"]
    assert loop.now_seconds == 2.0


def test_a_channel_carries_one_transfer_after_the_other() -> None:
    loop = EventLoop()
    channel = Channel(loop, bytes_per_second=100.0, latency_seconds=0.5)
    assert channel.reserve(100) == pytest.approx(1.5)
    assert channel.reserve(50) == pytest.approx(2.5)
    assert channel.reserve(0, not_before_seconds=10.0) == pytest.approx(10.5)


def quiet(level: Level, session: int, before: int, after: int) -> None:
    """Nobody listens."""


def test_eviction_takes_the_least_recent_tail_and_spares_what_is_held() -> None:
    changes: list[tuple[int, int, int]] = []
    store = LevelStore(Level.DEVICE, 100, lambda _level, *change: changes.append(change))
    for session in (1, 2, 3):
        store.grow(session, 30)
    store.lock(1, 20)
    store.keep(2, 30)
    store.touch(2)
    assert store.evictable_tokens == 40
    assert store.grow(4, 45) == 45
    # 10 were free; 10 of session 1 above its lock, then 25 of session 3; session 2 is kept.
    assert [store.tokens(session) for session in (1, 2, 3, 4)] == [20, 30, 5, 45]
    assert changes[-3:] == [(1, 30, 20), (3, 30, 5), (4, 0, 45)]
    store.check()


def test_a_level_takes_no_more_than_fits() -> None:
    store = LevelStore(Level.HOST, 50, quiet)
    assert store.grow(1, 80) == 50
    store.lock(1, 50)
    assert store.grow(2, 10) == 0
    assert store.grow(3, 10, room=20) == 0
    store.check()


def test_random_levels_keep_their_books() -> None:
    draw, store = random.Random(3), LevelStore(Level.DEVICE, 1000, quiet)
    for _ in range(3000):
        session = draw.randrange(20)
        act: Callable[[], object] = draw.choice(
            [
                lambda s=session: store.grow(s, draw.randrange(300)),
                lambda s=session: store.lock(s, draw.randrange(200)),
                lambda s=session: store.keep(s, draw.randrange(200)),
                lambda s=session: store.lock(s, 0),
                lambda s=session: store.keep(s, 0),
                lambda: store.evict(draw.randrange(100)),
                lambda s=session: store.shrink(s, draw.randrange(200)),
            ]
        )
        act()
        store.check()


def test_published_hardware_gives_speeds_of_the_known_order() -> None:
    speeds = speeds_of(MACHINES["a100-80g"], MODELS["llama-3.1-8b"])
    # 128 KiB a token (32 layers x 8 heads x 128 x 2 x 2 bytes), so 8,192 tokens are 1 GiB.
    assert speeds.token_bytes == 131_072
    assert 8_000 < 1 / speeds.prefill_token_seconds < 14_000
    assert 0.010 < speeds.decode_seconds(1, 1000) < 0.020
    small = Machine("small", 1e12, 8e9, 1e11, 1e9, 1e9, 1e9, 1e9, 1e9, 1e9)
    with pytest.raises(ConfigError, match="llama-2-13b needs"):
        speeds_of(small, MODELS["llama-2-13b"])


SIMPLE = Speeds(
    layers=10,
    token_bytes=1,
    step_seconds=0.0,
    prefill_token_seconds=0.001,
    prefill_pair_seconds=0.0,
    decode_base_seconds=0.1,
    decode_request_seconds=0.0,
    decode_context_seconds=0.0,
    device_tokens=1000,
    host_tokens=4000,
    nvme_tokens=100_000,
    link_bytes_per_second=10_000.0,
    nvme_read_bytes_per_second=1_000.0,
    nvme_write_bytes_per_second=1e9,
    network_bytes_per_second=1e9,
    link_latency_seconds=0.0,
    disk_latency_seconds=0.0,
)


def make_worker(features: Features | None = None) -> tuple[EventLoop, SimWorker, list[SimRequest]]:
    loop, ended = EventLoop(), []
    worker = SimWorker("w", loop, SIMPLE, features or Features(), 10, quiet, ended.append)
    return loop, worker, ended


def ask(number: int, session: int, prompt: int, answer: int, due: float) -> SimRequest:
    return SimRequest(number, session, number, prompt, answer, due)


def test_a_turn_costs_what_the_rates_say_and_the_next_one_hits() -> None:
    loop, worker, ended = make_worker()
    loop.at(0.0, worker.submit, ask(1, 7, 200, 11, 0.0))
    loop.run()
    first = ended[0]
    # 200 tokens at a millisecond, then ten steps of a tenth.
    assert first.ttft_seconds == pytest.approx(0.2)
    assert first.ended_seconds == pytest.approx(1.2)
    loop.at(5.0, worker.submit, ask(2, 7, 300, 2, 5.0))
    loop.run()
    second = ended[1]
    # 211 tokens are cached, 210 of them in whole pages of ten.
    assert (second.device_tokens, second.computed_tokens) == (210, 90)
    assert second.ttft_seconds == pytest.approx(0.09)
    worker.check()


def test_a_host_hit_overlaps_layer_by_layer() -> None:
    for layer_wise, seconds in ((True, 0.09 + 0.021 / 10), (False, 0.09 + 0.021)):
        loop, worker, ended = make_worker(Features(layer_wise=layer_wise))
        loop.at(0.0, worker.submit, ask(1, 7, 200, 11, 0.0))
        loop.run()
        worker.device.evict(1000)
        loop.at(5.0, worker.submit, ask(2, 7, 300, 2, 5.0))
        loop.run()
        assert ended[1].host_tokens == 210
        assert ended[1].ttft_seconds == pytest.approx(seconds)


def test_a_disk_hit_waits_for_the_disk_and_the_gate_prefers_to_compute() -> None:
    for gate, found, seconds in ((False, 210, 0.21 + 0.09 + 0.0021), (True, 0, 0.3)):
        loop, worker, ended = make_worker(Features(gate=gate))
        loop.at(0.0, worker.submit, ask(1, 7, 200, 11, 0.0))
        loop.run()
        worker.device.evict(1000)
        worker.host.evict(4000)
        # Reading is as fast as computing here, and the link comes on top: the gate says compute.
        loop.at(5.0, worker.submit, ask(2, 7, 300, 2, 5.0))
        loop.run()
        assert ended[1].nvme_tokens == found
        assert ended[1].ttft_seconds == pytest.approx(seconds, rel=0.02)


def test_an_arrival_interrupts_decoding_at_the_end_of_a_step() -> None:
    loop, worker, ended = make_worker()
    loop.at(0.0, worker.submit, ask(1, 1, 100, 101, 0.0))
    loop.at(1.23, worker.submit, ask(2, 2, 100, 2, 1.23))
    loop.run()
    by_number = {request.number: request for request in ended}
    # Steps end at 0.1 + n * 0.1: the prefill starts at 1.3 and delays the first request by itself.
    assert by_number[2].first_token_seconds == pytest.approx(1.4)
    assert by_number[1].ended_seconds == pytest.approx(0.1 + 100 * 0.1 + 0.1)
    worker.check()


def test_memory_that_runs_out_while_decoding_retracts_the_newest() -> None:
    loop, worker, ended = make_worker()
    for number in (1, 2):
        loop.at(0.0, worker.submit, ask(number, number, 300, 400, 0.0))
    loop.run()
    assert {request.number for request in ended} == {1, 2}
    assert worker.stats.retractions == 1
    assert [request.retractions for request in ended] == [0, 1]
    worker.check()


def test_users_are_the_same_for_the_same_seed_and_their_contexts_grow() -> None:
    rules = UserRules(users=1, turns=5)
    first, second, other = User(0, rules, 1), User(0, rules, 1), User(0, rules, 2)
    turns = []
    for user in (first, second, other):
        mine = []
        for _ in range(12):
            turn, ended = user.next_turn()
            mine.append((turn, ended, user.context_tokens))
            user.answered(turn.answer_tokens)
        turns.append(mine)
    assert turns[0] == turns[1]
    assert turns[0] != turns[2]
    contexts = [(turn.session, context) for turn, _, context in turns[0]]
    assert all(b[1] > a[1] for a, b in pairwise(contexts) if a[0] == b[0])
    assert all(turn.lead_seconds <= turn.think_seconds for turn, _, _ in turns[0])
