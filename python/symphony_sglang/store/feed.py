"""What became durable and what went, for the residency feed: bounded, in order, after commit."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Sequence
from typing import NamedTuple


class ResidencyEvent(NamedTuple):
    """`stored` is True for a page that is now on disk, False for one that is gone."""

    stored: bool
    key: bytes


class ResidencyDrain(NamedTuple):
    """`resync` says that events were dropped: take a snapshot, then apply what follows."""

    events: list[ResidencyEvent]
    resync: bool


class ResidencyFeed:
    """A queue of at most `events_max` events. Overflow empties it and asks for a resync."""

    def __init__(self, events_max: int) -> None:
        self._events_max = events_max
        self._lock = threading.Lock()
        self._events: deque[ResidencyEvent] = deque()
        self._resync = False
        self.overflows = 0

    def publish(self, removed: Sequence[bytes], stored: Sequence[bytes]) -> None:
        """Removals first: a key that moved within one commit ends up present."""
        with self._lock:
            if len(self._events) + len(removed) + len(stored) > self._events_max:
                self.overflows += 1
                self._events.clear()
                self._resync = True
                return
            self._events.extend(ResidencyEvent(False, key) for key in removed)
            self._events.extend(ResidencyEvent(True, key) for key in stored)

    def request_resync(self) -> None:
        """What can be served changed as a whole (the disk went, or came back)."""
        with self._lock:
            self._events.clear()
            self._resync = True

    def drain(self, limit: int) -> ResidencyDrain:
        with self._lock:
            count = min(limit, len(self._events))
            events = [self._events.popleft() for _ in range(count)]
            resync, self._resync = self._resync, False
            return ResidencyDrain(events, resync)

    def __len__(self) -> int:
        return len(self._events)
