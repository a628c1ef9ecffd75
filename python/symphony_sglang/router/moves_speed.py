"""What moves teach: how fast pages come from peers, and which sessions bring how much work."""

from __future__ import annotations

import math
from collections import OrderedDict
from dataclasses import dataclass
from typing import NamedTuple

from symphony_sglang.core.gate import Rate

WEIGHT = 0.3
TOKENS_MIN = 64  # of fewer the time is all overhead
OVERHEAD_SECONDS = 0.02
UNMEASURED = Rate(40_000.0, OVERHEAD_SECONDS)
WORK_HALF_LIFE_SECONDS = 30.0
SESSIONS_MAX = 8192


class CopySpeeds:
    """Tokens a second into each worker from its peers, and the time that a move takes beside."""

    def __init__(self) -> None:
        self._tokens_per_second: dict[str, float] = {}
        self._overhead_seconds: dict[str, float] = {}

    def copied(self, worker_id: str, tokens: int, seconds: float) -> None:
        if tokens < TOKENS_MIN or seconds <= 0:
            return
        sample = tokens / seconds
        old = self._tokens_per_second.get(worker_id, sample)
        self._tokens_per_second[worker_id] = old + WEIGHT * (sample - old)

    def overhead(self, worker_id: str, seconds: float) -> None:
        old = self._overhead_seconds.get(worker_id, seconds)
        self._overhead_seconds[worker_id] = old + WEIGHT * (seconds - old)

    def rate(self, worker_id: str) -> Rate | None:
        """To the worker's NVMe level; None where nothing was measured."""
        speed = self._tokens_per_second.get(worker_id)
        if speed is None:
            return None
        return Rate(speed, self._overhead_seconds.get(worker_id, OVERHEAD_SECONDS))

    def to_host(self, worker_id: str, nvme_to_host: Rate | None) -> Rate:
        """Into the worker's host memory: pages go through its own disk, so never faster than it."""
        return joined(self.rate(worker_id) or UNMEASURED, nvme_to_host)

    def forget(self, worker_id: str) -> None:
        self._tokens_per_second.pop(worker_id, None)
        self._overhead_seconds.pop(worker_id, None)


def joined(first: Rate, second: Rate | None) -> Rate:
    """Two hops, one after the other."""
    if second is None:
        return first
    seconds = 1 / first.tokens_per_second + 1 / second.tokens_per_second
    return Rate(1 / seconds, first.latency_seconds + second.latency_seconds)


class Work(NamedTuple):
    """`seconds` of a worker's time that a session brought lately; older work counts less."""

    session_key: str
    seconds: float
    idle_seconds: float


@dataclass(slots=True)
class _Account:
    seconds: float
    at_seconds: float

    def now(self, now_seconds: float) -> float:
        return self.seconds * math.exp2((self.at_seconds - now_seconds) / WORK_HALF_LIFE_SECONDS)


class WorkMeter:
    """Work by session; without one, by worker. Of too many the one idle longest is forgotten."""

    def __init__(self, *, sessions_max: int = SESSIONS_MAX) -> None:
        self._sessions_max = sessions_max
        self._sessions: OrderedDict[str, _Account] = OrderedDict()
        self._workers: dict[str, _Account] = {}

    def add(
        self, session_key: str | None, worker_id: str, seconds: float, now_seconds: float
    ) -> None:
        """A turn took this much of the worker's time."""
        if session_key is None:
            old = self._workers.get(worker_id)
            before = 0.0 if old is None else old.now(now_seconds)
            self._workers[worker_id] = _Account(before + seconds, now_seconds)
            return
        known = self._sessions.pop(session_key, None)
        before = 0.0 if known is None else known.now(now_seconds)
        self._sessions[session_key] = _Account(before + seconds, now_seconds)
        if len(self._sessions) > self._sessions_max:
            self._sessions.popitem(last=False)

    def sessions(self, now_seconds: float) -> list[Work]:
        """Most recently seen last."""
        return [
            Work(key, account.now(now_seconds), now_seconds - account.at_seconds)
            for key, account in self._sessions.items()
        ]

    def of_worker(self, worker_id: str, now_seconds: float) -> float:
        """Work without a session."""
        account = self._workers.get(worker_id)
        return 0.0 if account is None else account.now(now_seconds)

    def forget_session(self, session_key: str) -> None:
        self._sessions.pop(session_key, None)

    def forget_worker(self, worker_id: str) -> None:
        self._workers.pop(worker_id, None)

    def check(self) -> None:
        assert len(self._sessions) <= self._sessions_max
