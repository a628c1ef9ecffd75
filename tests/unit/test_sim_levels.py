"""The simulator's parts: time, channels, levels, users, and what a worker does with them."""

from __future__ import annotations

import random
from collections.abc import Callable
from itertools import pairwise

import pytest

from benchmark.reproduce_recorded import RecordedTurn, RecordedUser
from symphony_sglang.core.levels import Level
from symphony_sglang.errors import ConfigError
from symphony_sglang.sim.hardware import DISKS, MACHINES, MODELS, Machine, Speeds, speeds_of
from symphony_sglang.sim.levels import LevelStore
from symphony_sglang.sim.loop import Channel, EventLoop
from symphony_sglang.sim.promotion import Promotions
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
    # 10 were free; 10 of session 1 above its lock, then session 3's only node; session 2 is kept.
    assert [store.tokens(session) for session in (1, 2, 3, 4)] == [20, 30, 0, 45]
    assert changes[-3:] == [(1, 30, 20), (3, 30, 0), (4, 0, 45)]
    store.check()


def test_eviction_goes_node_by_node_from_the_end() -> None:
    store = LevelStore(Level.DEVICE, 100, quiet)
    for tokens in (30, 50, 80):
        store.grow(1, tokens)
    assert store.evict(10) == 30  # the last turn's 30, all of them
    assert store.evict(21) == 50  # 20 are not enough, and the next node has 30
    store.grow(1, 60)
    assert store.evict(1) == 10, "nodes end where they did"
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
    small = Machine("small", 1e12, 8e9, 1e11, 1e9, 1e9, DISKS["nvme"], 1e9)
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
    read = (210, 0.21 + 0.09 + 0.0021)
    for gate, factor, (found, seconds) in (
        (False, 1.0, read), (True, 1.0, (0, 0.3)), (True, 2.0, read),
    ):  # fmt: skip
        loop, worker, ended = make_worker(Features(gate=gate, break_even=factor))
        loop.at(0.0, worker.submit, ask(1, 7, 200, 11, 0.0))
        loop.run()
        worker.device.evict(1000)
        worker.host.evict(4000)
        # Reading is as fast as computing here, and the link comes on top: a strict gate computes.
        loop.at(5.0, worker.submit, ask(2, 7, 300, 2, 5.0))
        loop.run()
        assert ended[1].nvme_tokens == found
        assert ended[1].ttft_seconds == pytest.approx(seconds, rel=0.02)


def test_a_read_that_takes_too_long_is_cut_and_the_rest_computed() -> None:
    loop, worker, ended = make_worker()
    loop.at(0.0, worker.submit, ask(1, 7, 200, 11, 0.0))
    loop.run()
    worker.device.evict(1000)
    worker.host.evict(4000)
    wait = 1.0 + 210 * 0.25 / 1024
    loop.at(5.0, worker.disk.reserve, 1000)
    loop.at(5.0, worker.submit, ask(2, 7, 300, 2, 5.0))
    loop.run()
    # 51 ms are left for its own read: 51 tokens, 50 in whole pages.
    assert (ended[1].nvme_tokens, ended[1].computed_tokens) == (50, 250)
    assert ended[1].ttft_seconds == pytest.approx(wait + 0.25 + 0.0005)
    assert (worker.stats.nvme_fetches, worker.stats.fetches_cut) == (1, 1)


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


def test_what_a_prompt_does_not_share_with_the_one_before_is_computed() -> None:
    loop, worker, _ = make_worker()
    loop.at(0.0, worker.submit, ask(1, 7, 200, 11, 0.0))
    loop.run()
    request = ask(2, 7, 300, 2, 5.0)
    request.reusable_tokens = 125
    loop.at(5.0, worker.submit, request)
    loop.run()
    assert (request.device_tokens, request.computed_tokens) == (120, 180)


def ttft_during_load(features: Features) -> float:
    """Of a request whose session is the second of two in a load that is under way."""
    loop, worker, ended = make_worker(features)
    worker.promotions = Promotions(worker, loop, protect_device=0.9, protect_host=0.5)
    for session in (7, 8):
        loop.at(0.0, worker.submit, ask(session, session, 200, 11, 0.0))
    loop.run()
    worker.device.evict(1000)
    for session in (7, 8):
        loop.at(10.0, worker.promotions.advise, f"a{session}", session, 210, 60.0)
    loop.at(10.001, worker.submit, ask(18, 8, 250, 1, 10.001))
    loop.run(20.0)
    worker.promotions.check()
    assert ended[-1].device_tokens == 210
    return ended[-1].ttft_seconds


def test_lower_layers_first_lets_requests_compute_while_the_rest_arrives() -> None:
    # 420 tokens take 42 ms from 10.0 on, a tenth of that for each layer; 40 tokens are computed in
    # 40 ms. Layer-major, the last layer's 4 ms of compute follow the last layer's arrival.
    assert ttft_during_load(Features()) == pytest.approx(0.041 + 0.004)
    # Session-major, all of its compute follows the arrival of its part, which is the last.
    assert ttft_during_load(Features(layer_wise=False)) == pytest.approx(0.041 + 0.040)
    apart = ttft_during_load(Features(layer_order=False))
    assert 0.045 - 1e-9 < apart < 0.081 + 1e-9


def test_recorded_users_ask_what_was_recorded_and_then_go() -> None:
    turns = [RecordedTurn(100, 5, 1.5), RecordedTurn(150, 0, 2.0, 0.7), RecordedTurn(90, 3, 0.0)]
    user = RecordedUser(4, turns)
    made = []
    while (step := user.next_turn()) is not None:
        made.append((step[0], user.context_tokens))
        user.answered(1)
    assert user.start_seconds == 1.5
    assert [context for _, context in made] == [100, 150, 90]
    assert [turn.history_tokens for turn, _ in made] == [0, 100, 90]
    assert [turn.answer_tokens for turn, _ in made] == [5, 1, 3]
    assert [turn.lead_seconds for turn, _ in made] == [None, 0.7, None]


def test_an_open_loops_user_is_gone_after_one_conversation() -> None:
    user = User(0, UserRules(users=1, turns=3, session_rate=1.0), 1)
    count = 0
    while (step := user.next_turn()) is not None:
        assert step[0].session == 0
        user.answered(step[0].answer_tokens)
        count += 1
    assert 1 <= count < 20


def test_users_met_midway_have_said_something_before() -> None:
    turns = [User(number, UserRules(users=1, turns=20, midway=True), 1).next_turn()
             for number in range(50)]  # fmt: skip
    said = [step[0].history_tokens for step in turns if step is not None]
    assert sum(tokens > 0 for tokens in said) > 40
    assert max(said) > 3000


def test_memory_that_runs_out_while_decoding_retracts_the_newest() -> None:
    loop, worker, ended = make_worker()
    for number in (1, 2):
        loop.at(0.0, worker.submit, ask(number, number, 300, 400, 0.0))
    loop.run()
    assert {request.number for request in ended} == {1, 2}
    assert worker.stats.retractions == 1
    assert [request.retractions for request in ended] == [0, 1]
    worker.check()


def test_a_swapping_worker_brings_back_what_it_had_computed() -> None:
    loop, worker, ended = make_worker(Features(swap=True, host=False, nvme=False))
    for number in (1, 2):
        loop.at(0.0, worker.submit, ask(number, number, 300, 400, 0.0))
    loop.run()
    assert worker.stats.retractions == 1
    by_number = {request.number: request for request in ended}
    # 300 of the prompt and 200 answered, out and in again; nothing is computed twice.
    assert by_number[2].loaded_tokens == worker.stats.swapped_tokens == 2 * 500
    assert worker.link.bytes == 2 * 500
    assert by_number[1].loaded_tokens == 0
    worker.check()


def test_users_are_the_same_for_the_same_seed_and_their_contexts_grow() -> None:
    rules = UserRules(users=1, turns=5)
    first, second, other = User(0, rules, 1), User(0, rules, 1), User(0, rules, 2)
    turns = []
    for user in (first, second, other):
        mine = []
        for _ in range(12):
            step = user.next_turn()
            assert step is not None
            turn, ended = step
            mine.append((turn, ended, user.context_tokens))
            user.answered(turn.answer_tokens)
        turns.append(mine)
    assert turns[0] == turns[1]
    assert turns[0] != turns[2]
    contexts = [(turn.session, context) for turn, _, context in turns[0]]
    assert all(b[1] > a[1] for a, b in pairwise(contexts) if a[0] == b[0])
    assert all(0 < (turn.lead_seconds or 0) <= turn.think_seconds for turn, _, _ in turns[0])
