"""How much work a rank has, as the router wants to know it; read from the scheduler's own state."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from symphony_sglang.core.gate import Rate
from symphony_sglang.wire.feed import Speed, WorkerLoad, WorkerSpeeds

if TYPE_CHECKING:
    from symphony_sglang.engine.cache import SymphonyCache

# A change in the number of requests is told at once, but not more often than this; all else at
# the slower pace. Reading costs a walk over both queues.
CHANGE_SECONDS = 0.005
PACE_SECONDS = 0.1
# Decode steps that a figure is taken over at least, and how much weight the newest has.
STEPS_MIN = 4
WEIGHT = 0.3
IDLE = (0, 0)


class LoadGauge:
    """Reads the load when it is worth telling."""

    def __init__(self, scheduler: Any, cache: SymphonyCache) -> None:
        self._scheduler = scheduler
        self._cache = cache
        self._counts = (-1, -1)
        self._read_at = float("-inf")
        self._last = WorkerLoad()
        self._decode_step_seconds = 0.0
        # Decode steps and their microseconds when the figure was last taken.
        self._decode_marks = (0.0, 0.0)

    def read(self, now_seconds: float) -> WorkerLoad | None:
        """The load, or None where it is too early or nothing changed."""
        scheduler = self._scheduler
        # Those that have ended leave the batch only when the next one is made.
        running = sum(not request.finished() for request in scheduler.running_batch.reqs)
        counts = (running, len(scheduler.waiting_queue))
        pace = CHANGE_SECONDS if counts != self._counts else PACE_SECONDS
        if counts == IDLE != self._counts:
            pace = 0.0  # the scheduler may sleep next
        if now_seconds - self._read_at < pace:
            return None
        self._read_at = now_seconds
        self._counts = counts
        load = self._measure(*counts)
        if load == self._last:
            return None
        self._last = load
        return load

    def _measure(self, running: int, waiting: int) -> WorkerLoad:
        scheduler, cache = self._scheduler, self._cache
        allocator = cache.token_to_kv_pool_allocator
        total = int(allocator.size)
        free = int(allocator.available_size()) + int(cache.full_evictable_size())
        if cache.advisories is not None:
            # What hints protect gives way to running work: it must not send their own turns away.
            free += cache.advisories.promoter.device.resident_tokens
        return WorkerLoad(
            requests_running=running,
            requests_waiting=waiting,
            tokens_waiting_uncached=int(scheduler.load_inquirer.get_num_waiting_uncached_tokens()),
            tokens_running=sum(request.seqlen for request in scheduler.running_batch.reqs),
            device_used_tokens=max(0, total - free),
            device_total_tokens=total,
            requests_max=int(scheduler.max_running_requests),
            decode_step_seconds=self._decode_step(),
            speeds=self._speeds(),
            draining=cache.peer is not None and cache.peer.leaving,
        )

    def _decode_step(self) -> float:
        """Mean time of the latest decode steps, from SGLang's own sums (scheduler.py:424)."""
        steps, _requests, microseconds, *_ = self._scheduler.decode_moment_totals
        count = steps - self._decode_marks[0]
        if count >= STEPS_MIN:
            sample = (microseconds - self._decode_marks[1]) / count / 1e6
            old = self._decode_step_seconds or sample
            self._decode_step_seconds = old + WEIGHT * (sample - old)
            self._decode_marks = (steps, microseconds)
        return self._decode_step_seconds

    def _speeds(self) -> WorkerSpeeds:
        if self._cache.advisories is None:
            return WorkerSpeeds()
        agreed = self._cache.advisories.rates.agreed
        return WorkerSpeeds(
            prefill=speed(agreed.prefill),
            host_to_device=speed(agreed.host_to_device),
            nvme_to_host=speed(agreed.nvme_to_host),
        )


def speed(rate: Rate | None) -> Speed | None:
    return None if rate is None else Speed(rate.tokens_per_second, rate.latency_seconds)
