"""Workers, prompts and a clock for tests of placement."""

from __future__ import annotations

import random

import numpy as np

from symphony_sglang.core.gate import Rate
from symphony_sglang.core.location import LocationIndex
from symphony_sglang.core.routing_policies import make_policy
from symphony_sglang.core.routing_types import (
    LoadView,
    PolicySettings,
    RouteRequest,
    WorkerRates,
    WorkerView,
)

PAGE = 16
RATES = WorkerRates(
    prefill=Rate(1000.0), host_to_device=Rate(50_000.0), nvme_to_host=Rate(10_000.0)
)


def chain(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(-(2**63), 2**63 - 1, count, dtype=np.int64)


def worker(name: str, **load: float) -> WorkerView:
    made = LoadView(**load)  # type: ignore[arg-type]
    return WorkerView(name, page_size=PAGE, load=made, rates=RATES)


def request(hashes: np.ndarray, session: str | None = None, **more: object) -> RouteRequest:
    return RouteRequest("r", len(hashes) * PAGE + 4, {PAGE: hashes}, session, **more)  # type: ignore[arg-type]


class World:
    """An index, some workers and a policy, with one clock."""

    def __init__(self, policy: str = "symphony", workers: int = 3, **settings: object) -> None:
        self.index = LocationIndex()
        self.workers = [worker(f"w{number}") for number in range(workers)]
        self.policy = make_policy(policy, PolicySettings(**settings))  # type: ignore[arg-type]
        self.random = random.Random(0)
        self.now = 100.0

    def choose(self, asked: RouteRequest):
        return self.policy.choose(asked, self.workers, self.index, self.now, self.random)

    def send(self, asked: RouteRequest):
        decision = self.choose(asked)
        self.policy.routed(asked, decision, self.index, self.now)
        return decision

    def advise(self, asked: RouteRequest):
        choice = self.policy.choose_for_advisory(
            asked, self.workers, self.index, self.now, self.random
        )
        self.policy.advised(asked, choice, self.now)
        return choice
