"""The circuit breaker of one worker, with sglang-router's states and thresholds.

closed --`failure_threshold` failures in a row, within the window--> open
open --`timeout_seconds` later, when somebody asks--> half-open
half-open --`success_threshold` successes--> closed; --one failure--> open
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from symphony_sglang.telemetry.router import BreakerState


@dataclass(frozen=True, slots=True)
class BreakerSettings:
    """`enabled` False: every request is allowed, outcomes are counted all the same."""

    failure_threshold: int = 10
    success_threshold: int = 3
    timeout_seconds: float = 60.0
    window_seconds: float = 120.0
    enabled: bool = True


class CircuitBreaker:
    """Counts outcomes in a row; `on_change` hears of every transition (old, new)."""

    def __init__(
        self,
        settings: BreakerSettings,
        on_change: Callable[[BreakerState, BreakerState], None] | None = None,
    ) -> None:
        self.settings = settings
        self.failures = 0
        self.successes = 0
        self._state = BreakerState.CLOSED
        self._first_failure_seconds = 0.0
        self._opened_seconds = 0.0
        self.on_change = on_change

    def state(self, now_seconds: float) -> BreakerState:
        """The state now; an open breaker becomes half-open once its timeout is over."""
        due = self._opened_seconds + self.settings.timeout_seconds
        if self._state is BreakerState.OPEN and now_seconds >= due:
            self._turn(BreakerState.HALF_OPEN)
        return self._state

    def allows(self, now_seconds: float) -> bool:
        """Whether requests may be sent."""
        return not self.settings.enabled or self.state(now_seconds) is not BreakerState.OPEN

    def succeeded(self, now_seconds: float) -> None:
        state = self.state(now_seconds)
        self.failures = 0
        self.successes += 1
        if state is BreakerState.HALF_OPEN and self.successes >= self.settings.success_threshold:
            self._turn(BreakerState.CLOSED)

    def failed(self, now_seconds: float) -> None:
        state = self.state(now_seconds)
        stale = now_seconds - self._first_failure_seconds > self.settings.window_seconds
        if self.failures == 0 or stale:
            self.failures = 0
            self._first_failure_seconds = now_seconds
        self.failures += 1
        self.successes = 0
        broken = self.failures >= self.settings.failure_threshold
        if state is BreakerState.HALF_OPEN or (state is BreakerState.CLOSED and broken):
            self._opened_seconds = now_seconds
            self._turn(BreakerState.OPEN)

    def reset(self) -> None:
        """Closed, with nothing counted: the worker was replaced."""
        self.failures = self.successes = 0
        if self._state is not BreakerState.CLOSED:
            self._turn(BreakerState.CLOSED)

    def _turn(self, new: BreakerState) -> None:
        old, self._state = self._state, new
        self.successes = 0
        if new is BreakerState.CLOSED:
            self.failures = 0
        if self.on_change is not None and self.settings.enabled:
            self.on_change(old, new)
