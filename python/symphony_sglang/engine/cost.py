"""What advisories cost the scheduler thread, measured where it is spent.

Times go into buckets a fifth wide, so a percentile is right to 20 % and costs no memory.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from enum import StrEnum
from typing import Any

from symphony_sglang.clock import Clock, SystemClock

FIRST_SECONDS = 1e-6
BUCKETS_PER_OCTAVE = 4
BUCKETS = 96  # up to 16 s


class Work(StrEnum):
    """What the scheduler thread does for advisories."""

    MESSAGE = "message"  # one hint or question
    STEP = "step"  # the step, while anything is live; without the copies that it starts
    # Starting the copies to the device. A GPU makes them beside the scheduler; where the device is
    # the processor they are made here, and it is their bytes that take the time.
    COPY = "copy"
    REQUEST = "request"  # one arriving request: holding its prefix, ending its advisories


class TimeBuckets:
    """A histogram of durations, with their sum and maximum."""

    def __init__(self) -> None:
        self.counts = [0] * BUCKETS
        self.total_seconds = 0.0
        self.max_seconds = 0.0

    def add(self, seconds: float) -> None:
        octaves = math.log2(seconds / FIRST_SECONDS) if seconds > FIRST_SECONDS else 0.0
        self.counts[min(BUCKETS - 1, int(octaves * BUCKETS_PER_OCTAVE))] += 1
        self.total_seconds += seconds
        self.max_seconds = max(self.max_seconds, seconds)

    @property
    def samples(self) -> int:
        return sum(self.counts)

    def percentile(self, share: float) -> float:
        """Upper end of the bucket that holds this share of the samples, in seconds."""
        wanted, seen = share * self.samples, 0
        for index, count in enumerate(self.counts):
            seen += count
            if count and seen >= wanted:
                end = FIRST_SECONDS * 2.0 ** ((index + 1) / BUCKETS_PER_OCTAVE)
                return min(end, self.max_seconds)
        return 0.0

    def as_json(self) -> dict[str, float]:
        return {
            "count": self.samples,
            "total_seconds": self.total_seconds,
            "p50_seconds": self.percentile(0.5),
            "p99_seconds": self.percentile(0.99),
            "max_seconds": self.max_seconds,
        }


class CostMeter:
    """Durations by kind of work, and the length of the scheduler's loop while advisories live."""

    def __init__(self, clock: Clock | None = None) -> None:
        self._clock = clock or SystemClock()
        self.times = {work: TimeBuckets() for work in Work}
        self.loop_seconds = 0.0
        self._stepped_seconds: float | None = None
        self._within_seconds = 0.0  # measured inside what is being measured

    @contextmanager
    def measure(self, work: Work, count: int = 1) -> Iterator[None]:
        """Time `count` equal pieces of work, less what is measured inside of it by itself."""
        started, outer = self._clock.monotonic(), self._within_seconds
        self._within_seconds = 0.0
        try:
            yield
        finally:
            whole = self._clock.monotonic() - started
            seconds = max(0.0, whole - self._within_seconds)
            self._within_seconds = outer + whole
            for _ in range(count):
                self.times[work].add(seconds / count)

    def looped(self, active: bool) -> None:
        """The scheduler came round to the step again; `active` if advisories are being served."""
        now_seconds = self._clock.monotonic() if active else None
        if now_seconds is not None and self._stepped_seconds is not None:
            self.loop_seconds += now_seconds - self._stepped_seconds
        self._stepped_seconds = now_seconds

    def as_json(self) -> dict[str, Any]:
        spent = self.times[Work.STEP].total_seconds
        return {
            **{work.value: self.times[work].as_json() for work in Work},
            "loop_seconds": self.loop_seconds,
            "step_share": spent / self.loop_seconds if self.loop_seconds > 0 else 0.0,
        }
