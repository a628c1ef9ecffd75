"""What a routing decision costs; prints one JSON object.

    python -m benchmark.routing [--workers 64] [--tokens 100000] [--page-size 16] [--samples 2000]

Figures are microseconds of processor time of the calling thread: percentiles over all samples, and
the lowest and highest P50 of a round as spread. `decide` is `choose` and `routed` with token ids
tokenized and hashed already; `round_robin` through the same calls is the baseline. Hashing is by
itself: a whole prompt anew, and the next turn of a known session. Sessions share a system prompt
that every worker holds; each lies on one to three workers, on several levels, and now and then with
a hole. Before each decision some workers report new load. `symphony, new prompts` has prompts of
which only the system prompt is anywhere, `symphony, sharing` workers that pull pages from each
other. Memory is that of the process, against an index without pages. The garbage collector is set
as the router sets it.
"""

from __future__ import annotations

import argparse
import gc
import json
import random
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from time import thread_time_ns  # a stopwatch: nothing decides by it
from typing import Any

import numpy as np
import numpy.typing as npt

from benchmark.environment import describe_environment
from symphony_sglang.core.gate import Rate
from symphony_sglang.core.levels import Level
from symphony_sglang.core.location import LocationIndex
from symphony_sglang.core.page_hash import PageChain, event_hashes
from symphony_sglang.core.prefix import pack_tokens
from symphony_sglang.core.routing_policies import make_policy
from symphony_sglang.core.routing_types import LoadView, RouteRequest, WorkerRates, WorkerView
from symphony_sglang.router.service import spare_collections

ROUNDS = 5
SYSTEM_TOKENS = 4096
REPORTS = 4  # workers with a new load before each decision
RATES = WorkerRates(
    prefill=Rate(12_000.0, 0.01),
    host_to_device=Rate(400_000.0, 0.001),
    nvme_to_host=Rate(60_000.0, 0.002),
    peer_to_host=Rate(60_000.0, 0.005),
)
Hashes = npt.NDArray[np.int64]


class Cluster:
    """Workers, their contents and their loads."""

    def __init__(self, workers: int, tokens: int, page_size: int, seed: int) -> None:
        self.random = random.Random(seed)
        self.generator = np.random.default_rng(seed)
        self.page_size = page_size
        self.pages = tokens // page_size
        self.tokens = tokens
        self.sharing = False  # workers pull pages from each other
        self.index = LocationIndex()
        self.views = [self.view(f"worker-{number}") for number in range(workers)]
        self.system = self.hashes(SYSTEM_TOKENS // page_size)
        for view in self.views:
            self.index.stored(view.worker_id, Level.DEVICE, self.system.tolist())
        self.sessions: list[Hashes] = []

    def hashes(self, count: int) -> Hashes:
        return self.generator.integers(-(2**63), 2**63 - 1, count, dtype=np.int64)

    def view(self, worker_id: str) -> WorkerView:
        source = self.random
        load = LoadView(
            requests_running=source.randint(0, 40),
            requests_waiting=source.randint(0, 3),
            tokens_waiting_uncached=source.choice([0, 0, source.randint(0, 30_000)]),
            tokens_running=source.randint(1, 400_000),
            device_used_tokens=source.randint(0, 400_000),
            device_total_tokens=600_000,
            decode_step_seconds=source.uniform(0.015, 0.03),
        )
        return WorkerView(
            worker_id,
            page_size=self.page_size,
            load=load,
            rates=RATES,
            serves_pages=self.sharing,
            pulls_pages=self.sharing,
        )

    def share(self, *, sharing: bool) -> None:
        """From now on workers pull pages from each other, or no more."""
        self.sharing = sharing
        self.views = [self.view(view.worker_id) for view in self.views]

    def add_session(self) -> None:
        """A session of full length on one to three workers, mostly whole."""
        own = self.hashes(self.pages - len(self.system))
        listed, parent = own.tolist(), int(self.system[-1])
        for view in self.random.sample(self.views, self.random.randint(1, 3)):
            name = view.worker_id
            cuts = sorted(self.random.randint(0, len(own)) for _ in range(2))
            self.index.stored(name, Level.NVME, listed, parent)
            self.index.stored(name, Level.HOST, listed[: cuts[1]], parent)
            self.index.stored(name, Level.DEVICE, listed[: cuts[0]], parent)
            if self.random.random() < 0.1:
                hole = self.random.randrange(len(own))
                self.index.removed(name, Level.NVME, listed[hole : hole + 4])
        self.sessions.append(np.concatenate([self.system, own]))

    def new_prompt(self, number: int) -> RouteRequest:
        """A session's first request: nobody has more of it than the system prompt."""
        hashes = np.concatenate([self.system, self.hashes(self.pages - len(self.system))])
        return RouteRequest(
            f"n{number}", self.tokens, {self.page_size: hashes}, session_id=f"n{number}"
        )

    def request(self, number: int) -> RouteRequest:
        session = self.random.randrange(len(self.sessions))
        hashes = np.concatenate([self.sessions[session][:-8], self.hashes(8)])
        return RouteRequest(
            f"r{number}", self.tokens, {self.page_size: hashes}, session_id=f"s{session}"
        )

    def report(self) -> None:
        for _ in range(REPORTS):
            place = self.random.randrange(len(self.views))
            self.views[place] = self.view(self.views[place].worker_id)


def timed(call: Callable[[], Any]) -> float:
    start = thread_time_ns()
    call()
    return (thread_time_ns() - start) / 1000


def summary(rounds: list[list[float]]) -> dict[str, float]:
    everything = np.concatenate([np.asarray(samples) for samples in rounds])
    p50, p90, p99 = np.percentile(everything, [50, 90, 99])
    medians = [float(np.median(samples)) for samples in rounds]
    figures = {"p50": p50, "p90": p90, "p99": p99, "max": everything.max()}
    figures |= {"p50_round_min": min(medians), "p50_round_max": max(medians)}
    return {name: round(float(value), 1) for name, value in figures.items()}


def measure_decisions(
    cluster: Cluster, name: str, samples: int, *, new_prompts: bool = False
) -> dict[str, float]:
    policy = make_policy(name)
    make = cluster.new_prompt if new_prompts else cluster.request
    rounds: list[list[float]] = []
    now = 0.0
    for _ in range(ROUNDS):
        rounds.append([])
        for number in range(samples // ROUNDS):
            now += 0.01
            cluster.report()
            request = make(number)

            def decide(request: RouteRequest = request, now: float = now) -> None:
                decision = policy.choose(request, cluster.views, cluster.index, now, cluster.random)
                policy.routed(request, decision, cluster.index, now)

            rounds[-1].append(timed(decide))
    return summary(rounds)


def measure_hashing(tokens: int, page_size: int, rounds: int) -> dict[str, dict[str, float]]:
    source = np.random.default_rng(0)
    anew: list[list[float]] = []
    turn: list[list[float]] = []
    for _ in range(ROUNDS):
        anew.append([])
        turn.append([])
        for _ in range(rounds):
            prompt = pack_tokens(source.integers(0, 150_000, tokens))
            anew[-1].append(timed(lambda prompt=prompt: event_hashes(prompt, page_size)))
            chain = PageChain(page_size)
            chain.update(prompt)
            longer = prompt + pack_tokens(source.integers(0, 150_000, 1000))
            turn[-1].append(timed(lambda chain=chain, longer=longer: chain.update(longer)))
    return {"whole_prompt": summary(anew), "next_turn_of_1000_tokens": summary(turn)}


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def measure_memory(pages: int, workers: int, copies: int, seed: int) -> dict[str, float]:
    """Bytes for each distinct page; `copies` workers hold each of them."""
    generator = np.random.default_rng(seed)
    gc.collect()
    before = resident_bytes()
    index = LocationIndex()
    start = thread_time_ns()
    for chain in range(pages // 1000):
        listed = generator.integers(-(2**63), 2**63 - 1, 1000, dtype=np.int64).tolist()
        for copy in range(copies):
            name = f"worker-{(chain + copy * 7) % workers}"
            index.stored(name, Level.NVME, listed)
            index.stored(name, Level.HOST, listed[:500])
    seconds = (thread_time_ns() - start) / 1e9
    gc.collect()
    stats = index.stats()
    return {
        "pages": stats.pages,
        "workers": workers,
        "copies": copies,
        "resident_bytes_per_page": round((resident_bytes() - before) / stats.pages, 1),
        "table_bytes_per_page": round(stats.table_bytes / stats.pages, 1),
        "microseconds_per_page_and_level": round(1e6 * seconds / (pages * copies * 1.5), 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--workers", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=100_000)
    parser.add_argument("--page-size", type=int, default=16)
    parser.add_argument("--sessions", type=int, default=150)
    parser.add_argument("--samples", type=int, default=2000)
    parser.add_argument("--pages", type=int, default=1_000_000)
    options = parser.parse_args()
    # Each in a process of its own: what one gave back would be taken for the other's.
    memory = []
    for workers, copies in ((1, 1), (64, 2)):
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as apart:
            memory.append(apart.submit(measure_memory, options.pages, workers, copies, 1).result())
    cluster = Cluster(options.workers, options.tokens, options.page_size, seed=0)
    for _ in range(options.sessions):
        cluster.add_session()
    names = ("symphony", "session_sticky", "round_robin")
    spare_collections()
    decide = {name: measure_decisions(cluster, name, options.samples) for name in names}
    decide["symphony, new prompts"] = measure_decisions(
        cluster, "symphony", options.samples, new_prompts=True
    )
    cluster.share(sharing=True)
    decide["symphony, sharing"] = measure_decisions(cluster, "symphony", options.samples)
    result = {
        "environment": describe_environment(),
        "options": vars(options),
        "index_pages": cluster.index.stats().pages,
        "decide_microseconds": decide,
        "hash_microseconds": measure_hashing(options.tokens, options.page_size, 4),
        "memory": memory,
    }
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
