"""How many hints a caller may send through the router, and how many tokens they may hold.

Workers ask the same of their callers, but see one: the router, where it has a key of its own.
"""

from __future__ import annotations

import asyncio
import hashlib
import math
from collections.abc import Awaitable, Callable
from typing import Any

from symphony_sglang.clock import Clock
from symphony_sglang.core.budget import Admission, CallerBudget, CallerLimits, Refusal
from symphony_sglang.core.lifecycle import FINAL_STATES
from symphony_sglang.router.auth import bearer
from symphony_sglang.router.errors import ApiError
from symphony_sglang.router.http import Request

# Advisories of a caller over its tokens that are looked up before it is refused, and how often.
REFRESH_MAX = 16
REFRESH_SECONDS = 0.1

# The state of an advisory at its worker; None where it is not known any more.
StateOf = Callable[[str], Awaitable[str | None]]


class AdvisoryBudget:
    """Admits hints, and counts their tokens until they end."""

    def __init__(self, limits: CallerLimits, clock: Clock, state_of: StateOf) -> None:
        self._budget = CallerBudget(limits)
        self._clock = clock
        self._state_of = state_of
        # When a caller's advisories were looked up; at most as many as the budget has callers.
        self._refreshed: dict[str, float] = {}

    async def admit(self, request: Request, count: int) -> str:
        """Charge `count` hints to the request's caller; who that is.

        Raises:
            ApiError: 429, one of its limits stands in the way.
        """
        caller = caller_of(request)
        admission = self._budget.admit(caller, self._clock.monotonic(), count=count)
        if admission.refusal is Refusal.TOKENS and await self._refresh(caller):
            admission = self._budget.admit(caller, self._clock.monotonic(), count=count)
        if not admission.allowed:
            raise refused(admission, count, self._budget.limits)
        return caller

    async def _refresh(self, caller: str) -> bool:
        """Ask workers which of the caller's oldest advisories have ended; False: asked just now."""
        now = self._clock.monotonic()
        if now - self._refreshed.get(caller, -math.inf) < REFRESH_SECONDS:
            return False
        if len(self._refreshed) >= self._budget.limits.callers_max:
            self._refreshed.clear()
        self._refreshed[caller] = now
        live = self._budget.live(caller, REFRESH_MAX)
        states = await asyncio.gather(*(self._state_of(name) for name in live))
        for name, state in zip(live, states, strict=True):
            if state is None or state in FINAL_STATES:
                self._budget.ended(caller, name)
        return True

    def took(self, caller: str, receipt: dict[str, Any], expires_seconds: float) -> None:
        """A worker answered one of the caller's hints."""
        name, tokens = receipt.get("advisory_id"), receipt.get("tokens")
        if not isinstance(name, str) or not isinstance(tokens, dict):
            return
        if receipt.get("state") in FINAL_STATES:
            self._budget.ended(caller, name)
            return
        held = tokens.get("goal", tokens.get("total", 0))
        held = held if isinstance(held, int) and held >= 0 else 0
        self._budget.started(caller, name, held, expires_seconds, self._clock.monotonic())

    def ended(self, request: Request, advisory_id: str) -> None:
        """The caller has cancelled it."""
        self._budget.ended(caller_of(request), advisory_id)

    def check(self) -> None:
        self._budget.check()
        assert len(self._refreshed) <= self._budget.limits.callers_max


def refused(admission: Admission, count: int, limits: CallerLimits) -> ApiError:
    """429, with how long to wait where waiting helps."""
    problem = f"over the caller's budget of advisories ({admission.refusal})"
    wait = admission.retry_after_seconds
    if math.isinf(wait):
        problem = f"{problem}: {count} at once; expected at most {limits.burst:g}"
        return ApiError(429, "advisory_budget", problem)
    header = (b"retry-after", b"%d" % max(1, math.ceil(wait)))
    return ApiError(429, "advisory_budget", problem, (header,))


def caller_of(request: Request) -> str:
    """Whom to charge: the key where there is one, else the address. No key is stored."""
    key = bearer(request)
    return hashlib.blake2b(key, digest_size=8).hexdigest() if key else request.caller
