"""Is bringing KV up faster than computing it again? Measured speeds in, a decision out.

The estimator runs on rank 0 only; its snapshot travels with the broadcast, and every rank decides
from the snapshot. A file hit that is slower than recomputing is SGLang issue #26305.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple

from symphony_sglang.core.levels import Hop, Level


class GateReason(StrEnum):
    """Why a level is used or not."""

    FASTER = "faster_than_recompute"
    SLOWER = "slower_than_recompute"
    UNMEASURED = "unmeasured"
    RESIDENT = "already_on_device"


class GateDecision(NamedTuple):
    """`use` with the two times it rests on; NaN where a speed is unknown."""

    use: bool
    load_seconds: float
    recompute_seconds: float
    reason: GateReason


@dataclass(frozen=True, slots=True)
class Rate:
    """A straight line: `latency_seconds` plus a time per token."""

    tokens_per_second: float
    latency_seconds: float = 0.0

    def __post_init__(self) -> None:
        assert math.isfinite(self.tokens_per_second), self
        assert self.tokens_per_second > 0, self
        assert math.isfinite(self.latency_seconds), self
        assert self.latency_seconds >= 0, self

    def seconds(self, tokens: int) -> float:
        return self.latency_seconds + tokens / self.tokens_per_second


@dataclass(frozen=True, slots=True)
class GateSnapshot:
    """Speeds of one instant. None is a speed that was never measured: its level is used.

    `margin` is how many times slower than recomputing a load may look and still be used: loads
    overlap other requests' compute, recomputing delays them. Infinity uses every level.
    """

    nvme_to_host: Rate | None = None
    host_to_device: Rate | None = None
    prefill: Rate | None = None
    margin: float = 1.0

    def worth_loading(self, level: Level, tokens: int) -> GateDecision:
        """Whether `tokens` tokens on `level` should be brought to the device, or computed again.

        NVMe pays both hops one after the other, which is pessimistic: chunks overlap.
        """
        if level is Level.DEVICE or tokens <= 0:
            return GateDecision(True, 0.0, 0.0, GateReason.RESIDENT)
        hops = [self.host_to_device] if level is Level.HOST else []
        if level is Level.NVME:
            hops = [self.nvme_to_host, self.host_to_device]
        load_seconds = sum(math.nan if rate is None else rate.seconds(tokens) for rate in hops)
        if level is Level.PEER:
            load_seconds = math.nan
        recompute_seconds = math.nan if self.prefill is None else self.prefill.seconds(tokens)
        if math.isnan(load_seconds) or math.isnan(recompute_seconds):
            return GateDecision(True, load_seconds, recompute_seconds, GateReason.UNMEASURED)
        use = load_seconds <= recompute_seconds * self.margin
        reason = GateReason.FASTER if use else GateReason.SLOWER
        return GateDecision(use, load_seconds, recompute_seconds, reason)


# Uses every level: what a worker without calibration does.
OPEN_GATE = GateSnapshot()


@dataclass(frozen=True, slots=True)
class EstimatorLimits:
    """What a sample may do to an estimate."""

    weight: float = 0.25  # of the newest sample
    tokens_min: int = 256  # shorter transfers measure latency, not speed
    # A sample this many times off the estimate counts as that much and no more, until the next one
    # is as far off to the same side: then the nearer of the two is the new estimate. One outlier is
    # somebody else's burst, two are what the level has become.
    step_max: float = 8.0
    # The estimate stays this near to its calibration: nothing becomes far faster than what was
    # measured alone, but a copy of 10 us a token that comes to hang for seconds is 10,000 times
    # slower.
    faster_max: float = 64.0
    slower_max: float = 1e6
    # A level that is not used gives no samples: an estimate that got none for this long goes half
    # of the way back to its calibration, so that the level is tried again now and then.
    stale_seconds: float = 30.0

    def __post_init__(self) -> None:
        assert 0 < self.weight <= 1, self.weight
        assert self.step_max > 1, self.step_max
        assert self.faster_max >= 1 <= self.slower_max, self
        assert self.stale_seconds > 0, self.stale_seconds


class RateEstimator:
    """One speed, kept up to date by an exponentially weighted mean of seconds per token.

    Seconds per token, not tokens per second: times add up, speeds don't. What takes longer than
    expected does so for its tokens. What takes less was calibrated on a slower machine, latency and
    all: both shrink alike, or a sample within the latency would say that tokens cost nothing.
    """

    def __init__(
        self, start: Rate, limits: EstimatorLimits | None = None, *, calibrated: bool = True
    ) -> None:
        self.limits = EstimatorLimits() if limits is None else limits
        self.start = start
        self.calibrated = calibrated  # else `start` is only the first sample
        self.samples = 0
        self.ignored = 0
        self._seconds_per_token = 1.0 / start.tokens_per_second
        self._latency_seconds = start.latency_seconds
        self._outlier: float | None = None  # seconds per token of the last sample, if it was one
        self._fresh_seconds: float | None = None  # of the last sample, on the caller's clock

    def add(self, tokens: int, seconds: float, now_seconds: float | None = None) -> bool:
        """Take in one transfer; False where it says nothing (too short, or no valid time)."""
        limits = self.limits
        if tokens < limits.tokens_min or not (0 < seconds < math.inf):
            self.ignored += 1
            return False
        old = self._seconds_per_token
        expected_seconds = self._latency_seconds + tokens * old
        if seconds < expected_seconds:
            sample = old * seconds / expected_seconds
        else:
            sample = (seconds - self._latency_seconds) / tokens
        near = min(max(sample, old / limits.step_max), old * limits.step_max)
        new = old + limits.weight * (near - old)
        last, self._outlier = self._outlier, sample if near != sample else None
        if last is not None and self._outlier is not None and (last > old) == (sample > old):
            new = min(last, sample) if sample > old else max(last, sample)
            self._outlier = None
        calibrated = 1.0 / self.start.tokens_per_second
        new = min(max(new, calibrated / limits.faster_max), calibrated * limits.slower_max)
        self._seconds_per_token = new
        if new < old:
            least_seconds = self.start.latency_seconds / limits.faster_max
            self._latency_seconds = max(self._latency_seconds * new / old, least_seconds)
        self._fresh_seconds = now_seconds
        self.samples += 1
        return True

    def relax(self, now_seconds: float) -> None:
        """Forget part of a slowness that nothing has confirmed for `stale_seconds`."""
        if self._fresh_seconds is None:
            self._fresh_seconds = now_seconds
        if now_seconds - self._fresh_seconds < self.limits.stale_seconds:
            return
        self._fresh_seconds = now_seconds
        start = 1.0 / self.start.tokens_per_second
        if not self.calibrated:
            floor = start / self.limits.faster_max
            self._seconds_per_token = max(floor, self._seconds_per_token / 2)
        elif self._seconds_per_token > start:
            self._seconds_per_token = math.sqrt(self._seconds_per_token * start)

    def rate(self) -> Rate:
        return Rate(1.0 / self._seconds_per_token, self._latency_seconds)

    def check(self) -> None:
        calibrated = 1.0 / self.start.tokens_per_second
        ratio = self._seconds_per_token / calibrated
        slack = 1 + 1e-9
        assert 1 / (self.limits.faster_max * slack) <= ratio, ratio
        assert ratio <= self.limits.slower_max * slack, ratio
        assert self.samples >= 0 <= self.ignored


class Gate:
    """The speeds of a worker; `snapshot` is what is broadcast.

    A speed without calibration starts with its first sample that says anything.
    """

    def __init__(
        self,
        hops: Mapping[Hop, Rate] | None = None,
        prefill: Rate | None = None,
        *,
        margin: float = 1.0,
        limits: EstimatorLimits | None = None,
    ) -> None:
        assert margin > 0, margin
        self.margin = margin
        self.limits = EstimatorLimits() if limits is None else limits
        hops = {} if hops is None else hops
        self._hops = {hop: RateEstimator(hops[hop], limits) for hop in Hop if hop in hops}
        self._prefill = None if prefill is None else RateEstimator(prefill, limits)

    def calibrate(self, snapshot: GateSnapshot) -> None:
        """Start over from these speeds; those that are None stay as they are."""
        measured = (
            (Hop.NVME_TO_HOST, snapshot.nvme_to_host),
            (Hop.HOST_TO_DEVICE, snapshot.host_to_device),
        )
        for hop, rate in measured:
            if rate is not None:
                self._hops[hop] = RateEstimator(rate, self.limits)
        if snapshot.prefill is not None:
            self._prefill = RateEstimator(snapshot.prefill, self.limits)

    def transferred(
        self, hop: Hop, tokens: int, seconds: float, now_seconds: float | None = None
    ) -> None:
        """A transfer took `seconds` from its start, without the time it queued."""
        estimator = self._hops.get(hop)
        if estimator is None:
            estimator = first_estimate(tokens, seconds, self.limits)
            if estimator is None:
                return
            self._hops[hop] = estimator
        estimator.add(tokens, seconds, now_seconds)

    def prefilled(self, tokens: int, seconds: float, now_seconds: float | None = None) -> None:
        """A prefill batch computed `tokens` tokens in `seconds`."""
        if self._prefill is None:
            self._prefill = first_estimate(tokens, seconds, self.limits)
        if self._prefill is not None:
            self._prefill.add(tokens, seconds, now_seconds)

    def snapshot(self, now_seconds: float | None = None) -> GateSnapshot:
        """The speeds now; with a clock, hops that nobody uses any more relax."""
        if now_seconds is not None:
            for estimator in self._hops.values():
                estimator.relax(now_seconds)
        stage = self._hops.get(Hop.NVME_TO_HOST)
        load = self._hops.get(Hop.HOST_TO_DEVICE)
        return GateSnapshot(
            nvme_to_host=None if stage is None else stage.rate(),
            host_to_device=None if load is None else load.rate(),
            prefill=None if self._prefill is None else self._prefill.rate(),
            margin=self.margin,
        )

    def check(self) -> None:
        for estimator in [*self._hops.values(), *filter(None, [self._prefill])]:
            estimator.check()


def first_estimate(tokens: int, seconds: float, limits: EstimatorLimits) -> RateEstimator | None:
    """An estimator that starts from one sample; None where it is too short to say anything."""
    if tokens < limits.tokens_min or not 0 < seconds < math.inf:
        return None
    return RateEstimator(Rate(tokens / seconds), limits, calibrated=False)


class GateCounts:
    """How often each level below the device was used, or computed again instead."""

    def __init__(self) -> None:
        self.used = dict.fromkeys((Level.HOST, Level.NVME), 0)
        self.recomputed = dict.fromkeys((Level.HOST, Level.NVME), 0)

    def count(self, level: Level, used: bool) -> None:
        (self.used if used else self.recomputed)[level] += 1

    @staticmethod
    def merge(*parts: GateCounts) -> GateCounts:
        total = GateCounts()
        for part in parts:
            for level in total.used:
                total.used[level] += part.used[level]
                total.recomputed[level] += part.recomputed[level]
        return total

    def as_json(self) -> dict[str, dict[str, int]]:
        return {
            level.value: {"use": self.used[level], "recompute": self.recomputed[level]}
            for level in self.used
        }


def fit_rate(samples: Sequence[tuple[int, float]]) -> Rate | None:
    """The line through transfers of different lengths: (tokens, seconds) each.

    Least squares; where that gives no sensible line (one length, noise), all time is per token.
    """
    usable = [(tokens, seconds) for tokens, seconds in samples if tokens > 0 and seconds > 0]
    if not usable:
        return None
    count = len(usable)
    mean_tokens = sum(tokens for tokens, _ in usable) / count
    mean_seconds = sum(seconds for _, seconds in usable) / count
    spread = sum((tokens - mean_tokens) ** 2 for tokens, _ in usable)
    if spread > 0:
        slope = (
            sum((tokens - mean_tokens) * (seconds - mean_seconds) for tokens, seconds in usable)
            / spread
        )
        latency = mean_seconds - slope * mean_tokens
        if slope > 0 and latency >= 0:
            return Rate(1.0 / slope, latency)
    return Rate(mean_tokens / mean_seconds)
