"""How many advisories a caller may send, and how many tokens it may have in flight."""

from __future__ import annotations

import itertools
import math
from collections import OrderedDict
from dataclasses import dataclass, field
from enum import StrEnum
from typing import NamedTuple


class Refusal(StrEnum):
    """Which limit stood in the way."""

    RATE = "rate"
    TOKENS = "tokens_in_flight"
    CALLERS = "callers"


class Admission(NamedTuple):
    """`retry_after_seconds` is 0 where allowed; for tokens in flight it is an estimate."""

    allowed: bool
    retry_after_seconds: float = 0.0
    refusal: Refusal | None = None


@dataclass(frozen=True, slots=True)
class CallerLimits:
    """Per caller. Infinity turns a limit off."""

    rate_per_second: float = 200.0
    burst: float = 400.0
    tokens_in_flight_max: float = math.inf
    # Told to a caller whose live advisories hold too many tokens: they end at their own pace.
    tokens_retry_seconds: float = 1.0
    # Beyond this the longest idle caller that has nothing in flight is forgotten; where there is
    # none, a new caller is refused.
    callers_max: int = 4096
    # Live advisories remembered per caller; beyond it the oldest is taken for ended.
    advisories_max: int = 2048

    def __post_init__(self) -> None:
        assert self.rate_per_second > 0, self
        assert self.burst >= 1, self
        assert self.tokens_in_flight_max > 0, self
        assert self.callers_max > 0, self
        assert self.advisories_max > 0, self


class _Live(NamedTuple):
    tokens: int
    ends_by_seconds: float


@dataclass(slots=True)
class _Account:
    credit: float
    updated_seconds: float
    tokens_in_flight: int = 0
    # No advisory of the caller lives beyond it.
    busy_until_seconds: float = -math.inf
    live: dict[str, _Live] = field(default_factory=dict)

    def drop(self, advisory_id: str) -> None:
        known = self.live.pop(advisory_id, None)
        if known is not None:
            self.tokens_in_flight -= known.tokens

    def drop_expired(self, now_seconds: float) -> None:
        for key in [k for k, live in self.live.items() if live.ends_by_seconds <= now_seconds]:
            self.drop(key)


class CallerBudget:
    """One token bucket per caller, and the tokens of its live advisories.

    Tokens are known once an advisory was accepted, so the one that crosses the limit is let in and
    the next is refused. An advisory counts until `ended`, or until its expiry has passed.
    """

    def __init__(self, limits: CallerLimits | None = None) -> None:
        self.limits = CallerLimits() if limits is None else limits
        self._accounts: OrderedDict[str, _Account] = OrderedDict()

    def admit(self, caller: str, now_seconds: float, *, count: int = 1) -> Admission:
        """Charge `count` advisories to `caller`, all or none.

        More than a full burst is never allowed, so `retry_after_seconds` is infinite then.
        """
        assert count > 0, count
        limits = self.limits
        account = self._account(caller, now_seconds)
        if account is None:
            return Admission(False, limits.tokens_retry_seconds, Refusal.CALLERS)
        elapsed = max(0.0, now_seconds - account.updated_seconds)
        account.credit = min(limits.burst, account.credit + elapsed * limits.rate_per_second)
        account.updated_seconds = max(account.updated_seconds, now_seconds)
        if account.tokens_in_flight >= limits.tokens_in_flight_max:
            account.drop_expired(now_seconds)
        if account.tokens_in_flight >= limits.tokens_in_flight_max:
            return Admission(False, limits.tokens_retry_seconds, Refusal.TOKENS)
        if account.credit < count:
            wait = (count - account.credit) / limits.rate_per_second
            return Admission(False, math.inf if count > limits.burst else wait, Refusal.RATE)
        account.credit -= count
        return Admission(True)

    def started(
        self,
        caller: str,
        advisory_id: str,
        tokens: int,
        ends_by_seconds: float,
        now_seconds: float,
    ) -> None:
        """An advisory of `tokens` tokens was accepted, and expires at `ends_by_seconds`.

        The same id again stands for the same advisory, renewed.
        """
        account = self._account(caller, now_seconds)
        if account is None:
            return
        account.drop(advisory_id)
        if len(account.live) >= self.limits.advisories_max:
            account.drop(next(iter(account.live)))
        account.live[advisory_id] = _Live(tokens, ends_by_seconds)
        account.tokens_in_flight += tokens
        account.busy_until_seconds = max(account.busy_until_seconds, ends_by_seconds)

    def ended(self, caller: str, advisory_id: str) -> None:
        """It reached a final state; unknown ones are fine."""
        account = self._accounts.get(caller)
        if account is not None:
            account.drop(advisory_id)

    def live(self, caller: str, count: int) -> list[str]:
        """The `count` advisories of the caller that have counted longest."""
        account = self._accounts.get(caller)
        return [] if account is None else list(itertools.islice(account.live, count))

    def tokens_in_flight(self, caller: str) -> int:
        account = self._accounts.get(caller)
        return 0 if account is None else account.tokens_in_flight

    def _account(self, caller: str, now_seconds: float) -> _Account | None:
        account = self._accounts.get(caller)
        if account is None:
            full = len(self._accounts) >= self.limits.callers_max
            if full and not self._forget_one(now_seconds):
                return None
            account = _Account(self.limits.burst, now_seconds)
            self._accounts[caller] = account
        self._accounts.move_to_end(caller)
        return account

    def _forget_one(self, now_seconds: float) -> bool:
        for caller, account in self._accounts.items():
            if not account.live or account.busy_until_seconds <= now_seconds:
                del self._accounts[caller]
                return True
        return False

    def check(self) -> None:
        assert len(self._accounts) <= self.limits.callers_max
        for account in self._accounts.values():
            assert 0 <= account.credit <= self.limits.burst, account
            assert len(account.live) <= self.limits.advisories_max
            assert account.tokens_in_flight == sum(live.tokens for live in account.live.values())
