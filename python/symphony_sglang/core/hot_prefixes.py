"""Which prefixes many requests found in the cache: bounded counting of heavy hitters.

The sketch is space-saving (Metwally, Agrawal and El Abbadi, ICDT 2005): `entries_max` counters; a
newcomer takes the place of the smallest and inherits its count. A count is never too low, and too
high by at most what was inherited.
"""

from __future__ import annotations

import hashlib
import heapq
from dataclasses import dataclass
from typing import Any, NamedTuple

from symphony_sglang.core.prefix import TOKEN_BYTES, Prefix


class HotPrefix(NamedTuple):
    """`prefix` is 16 hex digits of a digest; at least `requests` requests found it."""

    prefix: str
    tokens: int
    requests: int

    def as_json(self) -> dict[str, Any]:
        return self._asdict()


@dataclass(slots=True)
class _Entry:
    shorter: str  # the prefix of half the pages
    tokens: int
    count: int
    inherited: int

    @property
    def surely(self) -> int:
        return self.count - self.inherited


class HotPrefixes:
    """Counts hits by their prefixes of 1, 2, 4, 8 … pages, so one request is in a few counters.

    Memory is bounded by `entries_max`, work per request by the hashing of `pages_max` pages.
    """

    def __init__(self, page_size: int, *, entries_max: int = 1024, pages_max: int = 1024) -> None:
        assert page_size > 0, page_size
        assert entries_max > 0, entries_max
        self.page_size = page_size
        self.entries_max = entries_max
        self.pages_max = pages_max
        self._entries: dict[str, _Entry] = {}
        # One item an entry; its count may be an old one, then it is put right when it comes up.
        self._heap: list[tuple[int, str]] = []

    def __len__(self) -> int:
        return len(self._entries)

    def found(self, prefix: Prefix, tokens: int) -> None:
        """A request found the first `tokens` tokens of its prompt in the cache."""
        digest = hashlib.blake2b(repr(tuple(prefix.namespace)).encode(), digest_size=8)
        limit = min(tokens // self.page_size, self.pages_max)
        step = self.page_size * TOKEN_BYTES
        shorter, pages, done = "", 1, 0
        while pages <= limit:
            digest.update(prefix.token_bytes[done * step : pages * step])
            name = digest.hexdigest()
            self._count(name, shorter, pages * self.page_size)
            shorter, pages, done = name, 2 * pages, pages

    def _count(self, name: str, shorter: str, tokens: int) -> None:
        entry = self._entries.get(name)
        if entry is not None:
            entry.count += 1
            return
        inherited = self._drop_smallest() if len(self._entries) >= self.entries_max else 0
        self._entries[name] = _Entry(shorter, tokens, inherited + 1, inherited)
        heapq.heappush(self._heap, (inherited + 1, name))

    def _drop_smallest(self) -> int:
        """Remove the entry of the lowest count, which is given back."""
        while True:
            count, name = self._heap[0]
            actual = self._entries[name].count
            if count == actual:
                heapq.heappop(self._heap)
                del self._entries[name]
                return actual
            heapq.heapreplace(self._heap, (actual, name))

    def top(self, count: int) -> list[HotPrefix]:
        """The prefixes that spared the most tokens, of those found at least twice.

        Left out are prefixes that were only ever found as the start of a longer one.
        """
        covered = {
            entry.shorter
            for entry in self._entries.values()
            if (shorter := self._entries.get(entry.shorter)) and entry.surely >= shorter.surely
        }
        found = [
            HotPrefix(name, entry.tokens, entry.surely)
            for name, entry in self._entries.items()
            if entry.surely >= 2 and name not in covered
        ]
        found.sort(key=lambda hot: (-hot.tokens * hot.requests, hot.prefix))
        return found[:count]

    def check(self) -> None:
        """The bound holds, every entry has one heap item, and no count is below its inheritance."""
        assert len(self._entries) <= self.entries_max
        assert sorted(name for _, name in self._heap) == sorted(self._entries)
        assert all(entry.surely > 0 for entry in self._entries.values())
        assert all(count <= self._entries[name].count for count, name in self._heap)
