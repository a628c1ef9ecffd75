"""What all policies have in common, and what each of the others does."""

from __future__ import annotations

import random
from dataclasses import replace

import numpy as np
import pytest

from routing_world import World, chain, request, worker
from symphony_sglang.core.levels import Level
from symphony_sglang.core.prefix_tree import PrefixTree
from symphony_sglang.core.routing_policies import POLICIES, make_policy
from symphony_sglang.core.routing_types import (
    LoadView,
    Reason,
    RouteRequest,
    WorkerState,
)
from symphony_sglang.core.worker_load import LoadLedger
from symphony_sglang.errors import ConfigError, NoWorkerError


@pytest.mark.parametrize("name", POLICIES)
def test_every_policy_leaves_out_who_may_not_serve(name: str) -> None:
    world = World(name, workers=4)
    states = [WorkerState.UNHEALTHY, WorkerState.DRAINING, WorkerState.READY, WorkerState.READY]
    world.workers = [
        replace(view, state=state) for view, state in zip(world.workers, states, strict=True)
    ]
    hashes = chain(10)
    world.index.stored("w0", Level.DEVICE, hashes.tolist())
    world.index.session_turn("w1", "s", 160, None, 1, 0)
    for _ in range(20):
        assert world.send(request(hashes, session="s")).worker_id in ("w2", "w3")
    asked = request(hashes, session="s", excluded=frozenset({"w2"}))
    assert world.send(asked).worker_id == "w3"
    for broken, reason in (
        (request(hashes, excluded=frozenset({"w2", "w3"})), "tried"),
        (request(hashes, target_worker="nobody"), "target"),
        (request(hashes, target_worker="w0"), "unhealthy"),
    ):
        with pytest.raises(NoWorkerError) as caught:
            world.choose(broken)
        assert caught.value.reason == reason
    world.workers = [replace(view, model_id="other") for view in world.workers]
    with pytest.raises(NoWorkerError, match="serves model 'mine'"):
        world.choose(request(hashes, model_id="mine"))
    world.workers = []
    with pytest.raises(NoWorkerError, match="no workers"):
        world.choose(request(hashes))
    with pytest.raises(NoWorkerError, match="no workers"):
        world.advise(request(hashes))


@pytest.mark.parametrize("name", POLICIES)
def test_a_named_worker_is_taken(name: str) -> None:
    world = World(name)
    decision = world.choose(request(chain(10), target_worker="w1"))
    assert (decision.worker_id, decision.reason) == ("w1", Reason.TARGETED)


@pytest.mark.parametrize("name", POLICIES)
def test_ranks_of_one_server_are_workers_of_their_own(name: str) -> None:
    world = World(name)
    world.workers = [
        replace(worker(f"http://a@{rank}"), server_id="http://a", dp_rank=rank) for rank in (0, 1)
    ]
    hashes = chain(30)
    world.index.stored("http://a@1", Level.DEVICE, hashes.tolist())
    decision = world.choose(request(hashes, target_worker="http://a"))
    assert decision.worker_id.startswith("http://a@")
    if name == "symphony":
        assert decision.worker_id == "http://a@1"


def test_unknown_policy_is_named() -> None:
    with pytest.raises(ConfigError, match="'bucket'; expected one of symphony"):
        make_policy("bucket")


def test_advisory_says_where_the_kv_is_and_a_request_decides_again() -> None:
    world, hashes = World(), chain(100)
    world.index.stored("w1", Level.HOST, hashes.tolist())
    world.index.session_turn("w1", "s", 1600, None, 1, 0)
    stay = world.advise(request(hashes, session="s"))
    assert (stay.worker_id, stay.source_worker_id, stay.best_level) == ("w1", None, Level.HOST)
    world.workers[1] = worker("w1", tokens_waiting_uncached=50_000)
    move = world.advise(request(hashes, session="s"))
    assert move.worker_id != "w1"
    assert (move.source_worker_id, move.tokens, move.best_level) == ("w1", 1600, Level.HOST)
    # The queue is gone when the request comes: late binding takes the KV that is there.
    world.workers[1] = worker("w1")
    assert world.choose(request(hashes, session="s")).worker_id == "w1"


def test_paper_policy_spreads_advisories_and_binds_early() -> None:
    world = World("symphony-paper", workers=4)
    targets = {}
    for number in range(16):
        targets[number] = world.advise(request(chain(5, number), session=f"s{number}")).worker_id
    assert sorted(targets.values()) == sorted(["w0", "w1", "w2", "w3"] * 4)
    again = world.advise(request(chain(5, 0), session="s0"))
    assert again.worker_id == targets[0]
    for number in range(16):
        world.workers[0] = worker("w0", tokens_waiting_uncached=10**6)
        decision = world.send(request(chain(5, number), session=f"s{number}"))
        assert (decision.worker_id, decision.reason) == (targets[number], Reason.ADVISED)
    # Without an advisory the session stays, as with a stateful server.
    stayed = world.send(request(chain(5, 0), session="s0"))
    assert (stayed.worker_id, stayed.reason) == (targets[0], Reason.SESSION)


def test_sticky_sessions_stick_and_new_ones_spread() -> None:
    world = World("session_sticky", workers=3)
    homes = {}
    for number in range(9):
        world.workers = [
            worker(v.worker_id, requests_in_flight=list(homes.values()).count(v.worker_id))
            for v in world.workers
        ]
        homes[number] = world.send(request(chain(4, number), session=f"s{number}")).worker_id
    assert sorted(homes.values()) == sorted(["w0", "w1", "w2"] * 3)
    world.workers[0] = worker("w0", requests_in_flight=500)
    for number, home in homes.items():
        assert world.send(request(chain(4, number), session=f"s{number}")).worker_id == home
    world.policy.forget_worker("w0")
    stray = next(number for number, home in homes.items() if home == "w0")
    assert world.choose(request(chain(4), session=f"s{stray}")).worker_id != "w0"


def test_round_robin_takes_turns_by_what_was_sent() -> None:
    world = World("round_robin")
    asked = request(chain(3))
    assert world.choose(asked).worker_id == world.choose(asked).worker_id == "w0"
    assert [world.send(asked).worker_id for _ in range(4)] == ["w0", "w1", "w2", "w0"]


def test_power_of_two_never_takes_the_busiest() -> None:
    world = World("power_of_two")
    world.workers[1] = worker("w1", requests_running=9)
    assert {world.choose(request(chain(3))).worker_id for _ in range(50)} == {"w0", "w2"}


@pytest.mark.parametrize("by_text", [True, False])
def test_cache_aware_follows_its_tree_until_load_is_uneven(by_text: bool) -> None:
    world = World("cache_aware", workers=2)

    def asked(seed: int, tail: int = 0) -> RouteRequest:
        hashes = np.concatenate([chain(40, seed), chain(3, 900 + tail)])
        text = "".join(map(str, hashes.tolist())) if by_text else ""
        return replace(request(hashes), text=text)

    homes = [world.send(asked(seed)).worker_id for seed in range(6)]
    assert set(homes) == {"w0", "w1"}  # misses go to the smaller tree
    for seed, home in enumerate(homes):
        decision = world.choose(asked(seed, tail=seed + 1))
        assert (decision.worker_id, decision.reason) == (home, Reason.CACHE)
    for busy, uneven in ((64, False), (65, True)):
        world.workers = [
            worker(v.worker_id, requests_in_flight=busy if v.worker_id == homes[0] else 0)
            for v in world.workers
        ]
        decision = world.choose(asked(0, tail=77))
        assert (decision.reason is Reason.BALANCE) is uneven
        assert (decision.worker_id == homes[0]) is not uneven


def test_prefix_tree_is_bounded_and_forgets_the_oldest_first() -> None:
    source = random.Random(4)
    tree = PrefixTree(characters_max=2000, bytes_max=60_000)
    heads = ["".join(source.choices("abc", k=50)) for _ in range(5)]
    for number in range(600):
        text = source.choice(heads)[: source.randint(0, 50)] + str(number) * source.randint(1, 9)
        tree.insert(text, f"w{source.randrange(3)}")
        assert tree.match(text)[0] == len(text)
        if number % 20 == 0:
            tree.check()
        assert tree.bytes <= 60_000
        assert max(tree.characters.values()) <= 2000
    assert tree.evicted > 0
    tree.forget_worker("w1")
    tree.check()
    assert "w1" not in tree.characters
    for worker_id in ("w0", "w2"):
        tree.forget_worker(worker_id)
    tree.check()
    assert tree.bytes == 0


def test_load_is_the_report_plus_what_was_sent_since() -> None:
    ledger = LoadLedger()
    ledger.sent("w", "old", 500, 800, 0.0)
    report = LoadView(requests_running=3, tokens_waiting_uncached=100, decode_step_seconds=0.02)
    ledger.reported("w", report, 1.0)
    ledger.sent("w", "new", 700, 800, 1.1)
    view = ledger.view("w", 1.2)
    assert view is ledger.view("w", 1.2)
    assert (view.tokens_waiting_uncached, view.requests_waiting) == (800, 1)
    assert (view.requests_in_flight, view.requests) == (2, 4)
    ledger.first_token("new")
    assert ledger.view("w", 1.3).tokens_waiting_uncached == 100
    ledger.ended("old")
    ledger.ended("old")
    assert ledger.view("w", 1.3).requests_in_flight == 1
    # A worker that has gone silent: only what is known here counts.
    silent = ledger.view("w", 20.0)
    assert (silent.requests_running, silent.tokens_waiting_uncached) == (1, 0)
    assert silent.decode_step_seconds == 0.02
    ledger.sent("other", "new", 10, 20, 20.0)
    ledger.check()
    assert ledger.view("w", 20.0).requests_in_flight == 0
    ledger.forget_worker("other")
    ledger.check()
    ledger.first_token("new")
    ledger.ended("new")
