"""When a failed try is repeated, and after how long."""

from __future__ import annotations

import random
from dataclasses import dataclass

# What another try may cure: peers' routers retry on the same.
RETRYABLE_STATUSES = frozenset({408, 429, 500, 502, 503, 504})
# Beyond this many doublings the backoff is at its maximum anyway, and powers would overflow.
EXPONENT_MAX = 64


@dataclass(frozen=True, slots=True)
class RetrySettings:
    """`retries_max` tries after the first; waits grow by `multiplier`, each off by up to `jitter`
    of itself."""

    retries_max: int = 5
    initial_seconds: float = 0.05
    max_seconds: float = 30.0
    multiplier: float = 1.5
    jitter: float = 0.2

    def backoff_seconds(self, attempt: int, chance: random.Random) -> float:
        """How long to wait before try number `attempt` after the first, counted from 1."""
        grown = self.initial_seconds * self.multiplier ** min(attempt - 1, EXPONENT_MAX)
        bounded = min(grown, self.max_seconds)
        return max(0.0, bounded * (1 + self.jitter * chance.uniform(-1.0, 1.0)))
