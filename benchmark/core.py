"""What the advisory core costs on the scheduler thread; prints one JSON object.

    python -m benchmark.core [--live 256] [--tokens 3000] [--samples 4000] [--rounds 5]

Every figure is microseconds of one call: percentiles over all samples of all rounds, and the lowest
and highest P50 of a round as spread. `empty_call` is the cost of measuring itself, the baseline.
"""

from __future__ import annotations

import argparse
import gc
import json
import platform
import random
import sys
from collections.abc import Callable
from time import perf_counter_ns, thread_time_ns  # stopwatches: nothing decides by them
from typing import Any

import numpy as np

from symphony_sglang.core.gate import GateSnapshot, Rate
from symphony_sglang.core.levels import Hop
from symphony_sglang.core.lifecycle import AdviseRequest, BookLimits
from symphony_sglang.core.moves import MoveResult
from symphony_sglang.core.prefix import pack_tokens
from symphony_sglang.core.promoter import Promoter, StepInputs
from symphony_sglang.core.promotion import Demand, PlannerLimits
from symphony_sglang.core.sessions import SessionKey, SessionTable

PAGE_SIZE = 64
POOL_TOKENS = 1_000_000
SHARED_TOKENS = 1024  # a system prompt that all sessions begin with
GATE = GateSnapshot(Rate(50_000, 0.001), Rate(500_000, 0.0005), Rate(10_000))


class Timings:
    """Samples of one operation, by round."""

    def __init__(self, stopwatch: Callable[[], int]) -> None:
        self.stopwatch = stopwatch
        self.rounds: list[list[int]] = []

    def start_round(self) -> None:
        self.rounds.append([])

    def time(self, call: Callable[[], Any]) -> Any:
        start = self.stopwatch()
        result = call()
        self.rounds[-1].append(self.stopwatch() - start)
        return result

    def as_json(self) -> dict[str, Any]:
        filled = [samples for samples in self.rounds if samples]
        everything = np.concatenate([np.asarray(samples) for samples in filled]) / 1000.0
        medians = [float(np.median(samples)) / 1000.0 for samples in filled]
        p50, p90, p99 = np.percentile(everything, [50, 90, 99])
        figures = {"p50": p50, "p90": p90, "p99": p99, "max": everything.max()}
        spread = {"p50_round_min": min(medians), "p50_round_max": max(medians)}
        return {
            "samples": int(everything.size),
            **{name: round(float(value), 2) for name, value in {**figures, **spread}.items()},
        }


class Bench:
    """A promoter with sessions, driven call by call under the stopwatch."""

    def __init__(self, live: int, tokens: int, seed: int) -> None:
        self.random = random.Random(seed)
        self.live = live
        self.now = 0.0
        self.ids = 0
        self.promoter = Promoter(
            device_cap_tokens=int(POOL_TOKENS * 0.3),
            host_cap_tokens=POOL_TOKENS,
            planner=PlannerLimits(page_size=PAGE_SIZE),
            book=BookLimits(),
        )
        self.table = SessionTable()
        shared = [self.random.randrange(100_000) for _ in range(min(tokens, SHARED_TOKENS))]
        self.keys = [SessionKey(f"s{number}") for number in range(2 * live + 2)]
        for key in self.keys:
            own = [self.random.randrange(100_000) for _ in range(tokens - len(shared))]
            self.table.learn(key, pack_tokens([*shared, *own]), 0.0)

    def request(self, number: int) -> tuple[AdviseRequest, SessionKey]:
        key = self.keys[number % len(self.keys)]
        self.ids += 1
        record = self.table.get(key)
        assert record is not None
        request = AdviseRequest(
            advisory_id=f"a{self.ids}",
            identity=record.identity,
            session_id=key.session_id,
            expected_in_seconds=self.random.choice([None, 1.0, 3.0]),
            expires_in_seconds=3600.0,
            priority=self.random.randrange(4),
        )
        return request, key

    def advise(self, request: AdviseRequest, key: SessionKey) -> str:
        """What the scheduler does with one message: look the session up, and enter the hint."""
        record = self.table.touch(key, self.now)
        prefix = None if record is None else record.prefix
        return self.promoter.advise(request, prefix, self.now).advisory_id

    def step(self, demand: Demand) -> Any:
        inputs = StepInputs(self.now, POOL_TOKENS, POOL_TOKENS, demand, GATE)
        return self.promoter.step(inputs)

    def fill(self) -> list[str]:
        return [self.advise(*self.request(number)) for number in range(self.live)]


def measure_messages(bench: Bench, samples: int, timings: dict[str, Timings]) -> None:
    """Advise, repeat and cancel beside a book of live advisories."""
    bench.fill()
    for number in range(samples):
        bench.now += 0.0001
        request, key = bench.request(bench.live + number % (bench.live + 2))
        timings["empty_call"].time(lambda: None)
        advisory_id = timings["advise"].time(lambda r=request, k=key: bench.advise(r, k))
        again, key = bench.request(bench.live + number % (bench.live + 2))
        timings["advise_duplicate"].time(lambda r=again, k=key: bench.advise(r, k))
        timings["cancel"].time(lambda a=advisory_id: bench.promoter.cancel(a, bench.now))
        bench.promoter.take_ended()


def measure_steps(bench: Bench, samples: int, timings: dict[str, Timings]) -> None:
    """A step with nothing live, one that finds all hops busy, and those that move everything."""
    for _ in range(samples):
        bench.now += 0.0001
        timings["step_nothing_live"].time(lambda: bench.step(Demand()))
    for advisory_id in bench.fill():
        bench.promoter.observed(advisory_id, 0, 0, bench.now)
    for number in range(max(1, samples // 8)):
        bench.now += 0.001
        # The number of waiting requests differs each time, so that every step is planned anew.
        busy = Demand(requests_waiting=1 + number, stages_pending=1)
        timings["step_all_queued_busy"].time(lambda d=busy: bench.step(d))
    for _ in range(max(1, samples // 8)):
        bench.now += 0.001
        timings["step_unchanged"].time(lambda d=busy: bench.step(d))
    where: dict[str, list[int]] = {}
    promoter = bench.promoter
    for _ in range(max(1, samples // 4)):
        bench.now += 0.005
        plan = timings["step_moving"].time(lambda: bench.step(Demand()))
        for move in (*plan.stages, *plan.loads):
            place = where.setdefault(move.advisory_id, [0, 0])
            timings["finished"].time(
                lambda m=move: promoter.finished(
                    m.advisory_id, m.hop, MoveResult.DONE, m.tokens, m.tokens, bench.now
                )
            )
            if move.hop is Hop.HOST_TO_DEVICE:
                place[0] += move.tokens
                place[1] -= move.tokens
            else:
                place[1] += move.tokens
        moved = dict.fromkeys(move.advisory_id for move in (*plan.stages, *plan.loads))
        for advisory_id in (*plan.probes, *moved):
            device, host = where.setdefault(advisory_id, [0, 0])
            timings["observed"].time(
                lambda a=advisory_id, d=device, h=host: promoter.observed(a, d, h, bench.now)
            )
        promoter.take_lock_changes()
    promoter.check()
    for _ in range(max(1, samples // 8)):
        bench.now += 0.005
        plan = timings["step_settled"].time(lambda: bench.step(Demand()))
        for advisory_id in plan.probes:
            device, host = where.setdefault(advisory_id, [0, 0])
            promoter.observed(advisory_id, device, host, bench.now)
    timings["give_way"].time(lambda: promoter.give_way(promoter.device.level, 10_000, bench.now))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--live", type=int, default=256, help="live advisories")
    parser.add_argument("--tokens", type=int, default=3000, help="tokens of each session")
    parser.add_argument("--samples", type=int, default=4000, help="per operation and round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--clock",
        choices=["wall", "cpu"],
        default="wall",
        help="cpu leaves out the time in which other processes had the core",
    )
    options = parser.parse_args()
    names = (
        "empty_call advise advise_duplicate cancel finished observed give_way "
        "step_nothing_live step_all_queued_busy step_unchanged step_moving step_settled"
    )
    stopwatch = perf_counter_ns if options.clock == "wall" else thread_time_ns
    timings = {name: Timings(stopwatch) for name in names.split()}
    for seed in range(options.rounds):
        for timing in timings.values():
            timing.start_round()
        gc.collect()
        measure_messages(Bench(options.live, options.tokens, seed), options.samples, timings)
        measure_steps(Bench(options.live, options.tokens, seed), options.samples, timings)
    report = {
        "benchmark": "core",
        "unit": "microseconds",
        "settings": vars(options),
        "python": sys.version.split()[0],
        "machine": platform.machine(),
        "results": {name: timing.as_json() for name, timing in timings.items()},
    }
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
