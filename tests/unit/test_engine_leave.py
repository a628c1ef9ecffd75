"""Handing sessions off before a worker ends."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import pytest

from symphony_sglang.engine import leave
from symphony_sglang.engine.leave import hand_off


class Waiting:
    """A clock that moves with the sleeps of the code under test."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        monkeypatch.setattr(leave.asyncio, "sleep", self._sleep)

    async def _sleep(self, seconds: float) -> None:
        self.now += seconds

    def monotonic(self) -> float:
        return self.now

    def time(self) -> float:
        return self.now


def left(clock: Waiting, answers: Iterator[tuple[int, int] | None], grace: float = 20.0) -> int:
    async def ask() -> tuple[int, int] | None:
        return next(answers)

    return asyncio.run(hand_off(ask, grace, clock))


def test_worker_leaves_as_soon_as_its_sessions_are_gone(monkeypatch) -> None:
    clock = Waiting(monkeypatch)
    assert left(clock, iter([(2, 0), (1, 5), (0, 9)])) == 0
    assert clock.now < 0.5


def test_worker_without_sessions_or_peers_does_not_wait(monkeypatch) -> None:
    clock = Waiting(monkeypatch)
    assert left(clock, iter([(0, 0)])) == 0
    assert left(clock, iter([None])) == 0
    assert clock.now == 0


def test_worker_that_nobody_empties_waits_two_seconds(monkeypatch) -> None:
    clock = Waiting(monkeypatch)
    assert left(clock, iter([(3, 0)] * 100)) == 3
    assert 2.0 <= clock.now < 2.5


def test_worker_being_emptied_waits_for_its_grace_time(monkeypatch) -> None:
    clock = Waiting(monkeypatch)
    assert left(clock, iter((9, taken) for taken in range(1000))) == 9
    assert 20.0 <= clock.now < 20.5
