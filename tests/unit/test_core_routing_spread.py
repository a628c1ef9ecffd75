"""A skewed session workload in virtual time: even load, without giving the cache away.

A small model, not a benchmark: workers prefill in order of arrival at one speed and keep all they
have computed; a session's turns come one after the other, a few sessions much more often.
"""

from __future__ import annotations

import heapq
import random
import statistics
from typing import NamedTuple

import numpy as np

from symphony_sglang.core.gate import Rate
from symphony_sglang.core.levels import Level
from symphony_sglang.core.location import LocationIndex
from symphony_sglang.core.routing_policies import make_policy
from symphony_sglang.core.routing_types import RouteRequest, WorkerRates, WorkerView
from symphony_sglang.core.worker_load import LoadLedger

PAGE, WORKERS, SESSIONS, TURNS = 64, 8, 48, 1500
SPEED = 10_000.0
RATES = WorkerRates(prefill=Rate(SPEED))


class Outcome(NamedTuple):
    max_over_median: float  # of prefilled tokens by worker
    hit_share: float
    mean_wait_seconds: float


def simulate(policy_name: str, seed: int) -> Outcome:
    """Every number of this world comes from `seed`, so policies see the same arrivals."""
    source, chance = random.Random(seed), random.Random(seed + 1)
    generator = np.random.default_rng(seed)
    index, ledger, policy = LocationIndex(), LoadLedger(), make_policy(policy_name)
    names = [f"w{number}" for number in range(WORKERS)]
    weights = [1 / (rank + 1) ** 1.1 for rank in range(SESSIONS)]
    prompts = [generator.integers(-(2**63), 2**63 - 1, 40, dtype=np.int64) for _ in weights]
    free = dict.fromkeys(names, 0.0)
    prefilled = dict.fromkeys(names, 0)
    ends: list[tuple[float, int, str, np.ndarray]] = []
    now = cached = asked = waited = 0.0
    for turn in range(TURNS):
        now += source.expovariate(34.0)
        while ends and ends[0][0] <= now:
            _, number, name, hashes = heapq.heappop(ends)
            index.stored(name, Level.DEVICE, hashes.tolist())
            ledger.ended(f"r{number}")
        session = source.choices(range(SESSIONS), weights)[0]
        fresh = generator.integers(-(2**63), 2**63 - 1, source.randint(4, 40), dtype=np.int64)
        if len(prompts[session]) < 400:  # a long session is cut and goes on from its head
            prompts[session] = np.concatenate([prompts[session], fresh])
        else:
            prompts[session] = np.concatenate([prompts[session][:20], fresh])
        hashes = prompts[session]
        request = RouteRequest(f"r{turn}", len(hashes) * PAGE, {PAGE: hashes}, f"s{session}")
        views = [WorkerView(name, page_size=PAGE, load=ledger.view(name, now), rates=RATES)
                 for name in names]  # fmt: skip
        decision = policy.choose(request, views, index, now, chance)
        policy.routed(request, decision, index, now)
        name = decision.worker_id
        # What earlier requests in the worker's queue will have computed is there by its turn.
        match = index.match(hashes, now).get(name)
        earlier = [end[3] for end in ends if end[2] == name]
        common = max(
            (int((h[: len(hashes)] == hashes[: len(h)]).sum()) for h in earlier), default=0
        )
        held = min(max(match.pages if match else 0, common) * PAGE, request.input_tokens - 1)
        computed = request.input_tokens - held
        waited += max(0.0, free[name] - now)
        free[name] = max(free[name], now) + computed / SPEED
        prefilled[name] += computed
        cached, asked = cached + held, asked + request.input_tokens
        ledger.sent(name, f"r{turn}", computed, request.input_tokens, now)
        heapq.heappush(ends, (free[name], turn, name, hashes))
    loads = sorted(prefilled.values())
    return Outcome(loads[-1] / statistics.median(loads), cached / asked, waited / TURNS)


def test_symphony_keeps_load_even_and_hits_near_sticky() -> None:
    for seed in (1, 2):
        sticky, spread = simulate("session_sticky", seed), simulate("round_robin", seed)
        ours = simulate("symphony", seed)
        print(sticky, spread, ours)
        assert sticky.max_over_median > 1.5, "not skewed: this shows nothing"
        assert ours.max_over_median <= 1.3
        assert ours.hit_share >= sticky.hit_share - 0.05
        assert ours.hit_share > spread.hit_share + 0.1
        assert ours.mean_wait_seconds < sticky.mean_wait_seconds
