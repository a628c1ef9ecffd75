"""How many requests the router takes at once, how many wait, and how fast they may come."""

from __future__ import annotations

import asyncio
from collections import deque
from dataclasses import dataclass
from types import TracebackType

from symphony_sglang.clock import Clock
from symphony_sglang.router.errors import ApiError
from symphony_sglang.telemetry.router import RouterMetrics


@dataclass(frozen=True, slots=True)
class LimitSettings:
    """`concurrent_max` or `per_second` of 0 or less: no such limit."""

    concurrent_max: int = -1
    queue_max: int = 100
    queue_seconds_max: float = 60.0
    per_second: float = 0.0


class RequestGate:
    """Lets requests in: a concurrency limit and a token bucket behind one first-come queue.

    ``async with gate.admit():`` raises `ApiError` 429 where the queue is full and 408 where the
    wait is over.
    """

    def __init__(self, settings: LimitSettings, clock: Clock, metrics: RouterMetrics) -> None:
        self.settings = settings
        self.active = 0
        self._clock = clock
        self._metrics = metrics
        self._waiting: deque[asyncio.Future[None]] = deque()
        # A second's worth may come at once.
        self._tokens = self._burst = max(1.0, settings.per_second)
        self._filled_seconds = clock.monotonic()
        self._timer: asyncio.TimerHandle | None = None

    @property
    def limited(self) -> bool:
        return self.settings.concurrent_max > 0 or self.settings.per_second > 0

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    def admit(self) -> _Admission:
        return _Admission(self)

    async def enter(self) -> None:
        """Take a place, at once or after waiting in line.

        Raises:
            ApiError: 429, the queue is full; 408, the wait was too long.
        """
        if not self._waiting and self._take():
            return
        if len(self._waiting) >= self.settings.queue_max:
            self._metrics.rate_limited(allowed=False)
            self._metrics.queue_left("full", 0.0)
            raise ApiError(
                429,
                "queue_full",
                f"{len(self._waiting)} requests wait already; expected at most "
                f"{self.settings.queue_max}. Try again later",
                ((b"retry-after", b"1"),),
            )
        await self._wait()

    async def _wait(self) -> None:
        place: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append(place)
        self._metrics.queue_size(len(self._waiting))
        self._arm()
        began, result = self._clock.monotonic(), "gone"
        try:
            async with asyncio.timeout(self.settings.queue_seconds_max):
                await place
            result = "sent"
        except TimeoutError:
            result = "timeout"
            self._metrics.rate_limited(allowed=False)
            raise ApiError(
                408,
                "queue_timeout",
                f"waited {self.settings.queue_seconds_max:g} s for a place; try again later",
            ) from None
        finally:
            if result != "sent":
                self._leave(place)
            self._metrics.queue_size(len(self._waiting))
            self._metrics.queue_left(result, self._clock.monotonic() - began)

    def _leave(self, place: asyncio.Future[None]) -> None:
        """Give up waiting; a place that was given in the same instant goes to the next."""
        if place.done() and not place.cancelled():
            self.leave()
        elif place in self._waiting:
            self._waiting.remove(place)

    def leave(self) -> None:
        """Give the place back."""
        self.active -= 1
        self._admit_waiting()

    def _take(self) -> bool:
        if 0 < self.settings.concurrent_max <= self.active:
            return False
        if self.settings.per_second > 0:
            now = self._clock.monotonic()
            earned = (now - self._filled_seconds) * self.settings.per_second
            self._tokens = min(self._burst, self._tokens + earned)
            self._filled_seconds = now
            if self._tokens < 1:
                return False
            self._tokens -= 1
        self.active += 1
        if self.limited:
            self._metrics.rate_limited(allowed=True)
        return True

    def _admit_waiting(self) -> None:
        while self._waiting:
            if self._waiting[0].done():
                self._waiting.popleft()
            elif self._take():
                self._waiting.popleft().set_result(None)
            else:
                break
        self._arm()

    def _arm(self) -> None:
        """Look again when the bucket holds the next token; places that end look by themselves."""
        if self._waiting and self._timer is None and self.settings.per_second > 0:
            missing = max(0.0, 1.0 - self._tokens) / self.settings.per_second
            loop = asyncio.get_running_loop()
            self._timer = loop.call_later(max(missing, 0.001), self._on_timer)

    def _on_timer(self) -> None:
        self._timer = None
        self._admit_waiting()

    def check(self) -> None:
        assert self.active >= 0, self.active
        assert len(self._waiting) <= self.settings.queue_max, len(self._waiting)
        if self.settings.concurrent_max > 0:
            assert self.active <= self.settings.concurrent_max, self.active


class _Admission:
    """The context manager of `RequestGate.admit`; a class, because a generator costs more."""

    __slots__ = ("_gate",)

    def __init__(self, gate: RequestGate) -> None:
        self._gate = gate

    async def __aenter__(self) -> None:
        await self._gate.enter()

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._gate.leave()
