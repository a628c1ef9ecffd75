"""Is bringing KV up faster than computing it again? Measured speeds in, a decision out.

The estimator runs on rank 0 only; its snapshot travels with the broadcast, and every rank decides
from the snapshot. A file hit that is slower than recomputing is SGLang issue #26305.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
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
    overlap other requests' compute, recomputing delays them.
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

    weight: float = 0.2  # of the newest sample
    tokens_min: int = 256  # shorter transfers measure latency, not speed
    step_max: float = 4.0  # a sample counts as at most this many times the estimate, or its part
    drift_max: float = 64.0  # the estimate stays within this factor of its calibration

    def __post_init__(self) -> None:
        assert 0 < self.weight <= 1, self.weight
        assert self.step_max > 1, self.step_max
        assert self.drift_max >= 1, self.drift_max


class RateEstimator:
    """One speed, kept up to date by an exponentially weighted mean of seconds per token.

    Seconds per token, not tokens per second: times add up, speeds don't. Latency stays as
    calibrated; a sample's time beyond it is what its tokens cost.
    """

    def __init__(self, start: Rate, limits: EstimatorLimits | None = None) -> None:
        self.limits = EstimatorLimits() if limits is None else limits
        self.start = start
        self.samples = 0
        self.ignored = 0
        self._seconds_per_token = 1.0 / start.tokens_per_second

    def add(self, tokens: int, seconds: float) -> bool:
        """Take in one transfer; False where it says nothing (too short, or no valid time)."""
        limits = self.limits
        if tokens < limits.tokens_min or not (0 < seconds < math.inf):
            self.ignored += 1
            return False
        old = self._seconds_per_token
        sample = max(0.0, seconds - self.start.latency_seconds) / tokens
        sample = min(max(sample, old / limits.step_max), old * limits.step_max)
        new = old + limits.weight * (sample - old)
        calibrated = 1.0 / self.start.tokens_per_second
        new = min(max(new, calibrated / limits.drift_max), calibrated * limits.drift_max)
        self._seconds_per_token = new
        self.samples += 1
        return True

    def rate(self) -> Rate:
        return Rate(1.0 / self._seconds_per_token, self.start.latency_seconds)

    def check(self) -> None:
        calibrated = 1.0 / self.start.tokens_per_second
        ratio = self._seconds_per_token / calibrated
        slack = self.limits.drift_max * (1 + 1e-9)
        assert 1 / slack <= ratio <= slack, ratio
        assert self.samples >= 0 <= self.ignored


class Gate:
    """The speeds of a worker; `snapshot` is what is broadcast."""

    def __init__(
        self,
        hops: Mapping[Hop, Rate],
        prefill: Rate | None,
        *,
        margin: float = 1.0,
        limits: EstimatorLimits | None = None,
    ) -> None:
        assert margin > 0, margin
        self.margin = margin
        self._hops = {hop: RateEstimator(hops[hop], limits) for hop in Hop if hop in hops}
        self._prefill = None if prefill is None else RateEstimator(prefill, limits)

    def transferred(self, hop: Hop, tokens: int, seconds: float) -> None:
        """A transfer took `seconds` from its start, without the time it queued."""
        if hop in self._hops:
            self._hops[hop].add(tokens, seconds)

    def prefilled(self, tokens: int, seconds: float) -> None:
        """A prefill batch computed `tokens` tokens in `seconds`."""
        if self._prefill is not None:
            self._prefill.add(tokens, seconds)

    def snapshot(self) -> GateSnapshot:
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
