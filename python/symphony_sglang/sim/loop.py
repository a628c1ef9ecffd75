"""Virtual time: callbacks in order of their times, and of their making among equal ones."""

from __future__ import annotations

import heapq
from collections.abc import Callable
from typing import Any


class Timer:
    """A callback to come; `cancel` it and it never comes."""

    __slots__ = ("call", "cancelled", "values")

    def __init__(self, call: Callable[..., None], values: tuple[Any, ...]) -> None:
        self.call = call
        self.values = values
        self.cancelled = False

    def cancel(self) -> None:
        self.cancelled = True


class EventLoop:
    """Single-threaded and deterministic: no clock and no chance of its own."""

    def __init__(self) -> None:
        self.now_seconds = 0.0
        self.events = 0
        self._heap: list[tuple[float, int, Timer]] = []
        self._made = 0

    def at(self, seconds: float, call: Callable[..., None], *values: Any) -> Timer:
        """Call at a time, which may not be in the past."""
        assert seconds >= self.now_seconds, (seconds, self.now_seconds)
        timer = Timer(call, values)
        self._made += 1
        heapq.heappush(self._heap, (seconds, self._made, timer))
        return timer

    def after(self, seconds: float, call: Callable[..., None], *values: Any) -> Timer:
        return self.at(self.now_seconds + seconds, call, *values)

    def run(
        self,
        until_seconds: float = float("inf"),
        is_over: Callable[[], bool] | None = None,
    ) -> None:
        """Run to the end of the events, or of the time, or until `is_over`; later events stay."""
        heap, pop = self._heap, heapq.heappop
        while heap and heap[0][0] <= until_seconds:
            if is_over is not None and is_over():
                return
            seconds, _, timer = pop(heap)
            if timer.cancelled:
                continue
            self.now_seconds = seconds
            self.events += 1
            timer.call(*timer.values)
        if until_seconds != float("inf"):
            self.now_seconds = max(self.now_seconds, until_seconds)


class Channel:
    """A link or a disk queue: one transfer after the other, at a rate.

    `busy_until_seconds` is when what is queued now will be through.
    """

    def __init__(self, loop: EventLoop, bytes_per_second: float, latency_seconds: float) -> None:
        assert bytes_per_second > 0, bytes_per_second
        self._loop = loop
        self.bytes_per_second = bytes_per_second
        self.latency_seconds = latency_seconds
        self.busy_until_seconds = 0.0
        self.bytes = 0

    def reserve(self, size_bytes: int, *, not_before_seconds: float = 0.0) -> float:
        """Queue a transfer; gives the time at which it is through."""
        start = max(self._loop.now_seconds, self.busy_until_seconds, not_before_seconds)
        self.busy_until_seconds = start + self.latency_seconds + size_bytes / self.bytes_per_second
        self.bytes += size_bytes
        return self.busy_until_seconds
