"""Whether the disk can be trusted right now: one state machine, one log line per change."""

from __future__ import annotations

import errno
import logging
import threading
from collections.abc import Callable
from enum import Enum

from symphony_sglang.clock import Clock

logger = logging.getLogger(__name__)

NO_SPACE_ERRORS = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM})


class HealthState(Enum):
    OK = "ok"
    READ_ONLY = "read_only"  # pages are served, none are written
    OFF = "off"  # everything is a miss


class HealthEvent(Enum):
    NO_SPACE = "no_space"  # full, over quota or read-only
    FAILED = "failed"  # too many failed calls in a row
    STUCK = "stuck"  # a batch passed its deadline
    PROBE_OK = "probe_ok"
    PROBE_NO_SPACE = "probe_no_space"


# (state, event) -> next state. Pairs that are not listed change nothing.
TRANSITIONS: dict[tuple[HealthState, HealthEvent], HealthState] = {
    (HealthState.OK, HealthEvent.NO_SPACE): HealthState.READ_ONLY,
    (HealthState.OK, HealthEvent.FAILED): HealthState.OFF,
    (HealthState.OK, HealthEvent.STUCK): HealthState.OFF,
    (HealthState.READ_ONLY, HealthEvent.FAILED): HealthState.OFF,
    (HealthState.READ_ONLY, HealthEvent.STUCK): HealthState.OFF,
    (HealthState.READ_ONLY, HealthEvent.PROBE_OK): HealthState.OK,
    (HealthState.OFF, HealthEvent.PROBE_OK): HealthState.OK,
    (HealthState.OFF, HealthEvent.PROBE_NO_SPACE): HealthState.READ_ONLY,
}

_MEANING = {
    HealthState.OK: "the disk works again: pages are read and written",
    HealthState.READ_ONLY: "pages are read, none are written",
    HealthState.OFF: "every lookup is a miss, nothing is written",
}


class Health:
    """Counts failures, decides the state, and paces the probes that lead back to OK.

    Thread-safe. `on_change` is called without the lock held.
    """

    def __init__(
        self,
        name: str,
        clock: Clock,
        *,
        failures_max: int,
        retry_seconds: float,
        retry_seconds_max: float,
        on_change: Callable[[HealthState], None],
    ) -> None:
        self._name = name
        self._clock = clock
        self._failures_max = failures_max
        self._retry_seconds = retry_seconds
        self._retry_seconds_max = max(retry_seconds, retry_seconds_max)
        self._on_change = on_change
        self._lock = threading.Lock()
        self._state = HealthState.OK
        self._failures = 0
        self._probe_at = 0.0
        self._probe_delay = retry_seconds
        self.changes = 0

    @property
    def state(self) -> HealthState:
        return self._state

    @property
    def readable(self) -> bool:
        return self._state is not HealthState.OFF

    @property
    def writable(self) -> bool:
        return self._state is HealthState.OK

    def succeeded(self) -> None:
        self._failures = 0

    def failed(self, error: OSError) -> None:
        """One system call failed: a full disk counts at once, others by the row."""
        if error.errno in NO_SPACE_ERRORS:
            self.record(HealthEvent.NO_SPACE, str(error))
            return
        with self._lock:
            self._failures += 1
            enough = self._failures >= self._failures_max
        if enough:
            self.record(HealthEvent.FAILED, f"{self._failures} failures in a row, last: {error}")

    def record(self, event: HealthEvent, reason: str) -> None:
        with self._lock:
            following = TRANSITIONS.get((self._state, event), self._state)
            if following is self._state:
                return
            self._state = following
            self._failures = 0
            self._probe_delay = self._retry_seconds
            self._probe_at = self._clock.monotonic() + self._probe_delay
            self.changes += 1
        level = logging.INFO if following is HealthState.OK else logging.WARNING
        logger.log(level, "page store %s: %s (%s)", self._name, _MEANING[following], reason)
        self._on_change(following)

    def probe_due(self) -> bool:
        """Whether to try the disk now; each answer of True doubles the wait for the next."""
        with self._lock:
            now = self._clock.monotonic()
            if self._state is HealthState.OK or now < self._probe_at:
                return False
            self._probe_delay = min(self._probe_delay * 2, self._retry_seconds_max)
            self._probe_at = now + self._probe_delay
            return True
