"""What requests that were just routed will leave at their workers, before the workers say so.

An expectation is found by a dozen of its pages, however long its prompt: those at the places 0, 1,
3, 7 … after what the worker held already, and the last.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

from symphony_sglang.core.routing_types import EventHashes


@dataclass(slots=True, eq=False)
class Expected:
    """Pages that a request just routed to `worker_id` will leave there."""

    number: int
    worker_id: str
    hashes: Sequence[int]
    expires_seconds: float
    anchors: list[int]


class Expectations:
    """At most `count_max` requests with `pages_max` pages together; the oldest is dropped."""

    def __init__(self, count_max: int, pages_max: int) -> None:
        self._count_max = count_max
        self._pages_max = pages_max
        self._entries: OrderedDict[int, Expected] = OrderedDict()
        self._anchors: dict[int, dict[str, Expected]] = {}
        self._pages = 0
        self._number = 0

    def __len__(self) -> int:
        return len(self._entries)

    def add(
        self,
        worker_id: str,
        hashes: EventHashes,
        now_seconds: float,
        ttl_seconds: float,
        known_pages: int,
    ) -> None:
        """A request with this prompt was just sent to `worker_id`: it will soon hold its pages.

        Gone when the worker reports the last of them, after `ttl_seconds`, or when there are too
        many. Costs a dozen table entries, however long the prompt, and a reference to `hashes`.
        The first `known_pages` it holds already; naming them spares a look-up to everybody who
        shares only those.
        """
        self.expire(now_seconds)
        count = len(hashes)
        if known_pages >= count:
            return
        number = self._number = self._number + 1
        pages, anchors = hashes.data, self._anchors
        keys = [pages[place] for place in anchor_places(count, known_pages)]
        entry = Expected(number, worker_id, pages, now_seconds + ttl_seconds, keys)
        for key in keys:
            entries = anchors.get(key)
            if entries is None:
                anchors[key] = {worker_id: entry}
            else:
                entries[worker_id] = entry
        self._entries[number] = entry
        self._pages += count
        while len(self._entries) > self._count_max or (
            self._pages > self._pages_max and len(self._entries) > 1
        ):
            self._drop(next(iter(self._entries)))

    def expire(self, now_seconds: float) -> None:
        """Drop what is over, oldest first."""
        while self._entries:
            number, entry = next(iter(self._entries.items()))
            if entry.expires_seconds > now_seconds:
                return
            self._drop(number)

    def forget_worker(self, worker_id: str) -> None:
        for number in [n for n, e in self._entries.items() if e.worker_id == worker_id]:
            self._drop(number)

    def confirm(self, worker_id: str, hashes: Sequence[int]) -> None:
        """The truth has come: what was expected up to one of these pages is expected no more."""
        anchors = self._anchors
        for key in hashes:
            if key in anchors:
                entry = anchors[key].get(worker_id)
                if entry is not None and entry.anchors[-1] == key:
                    self._drop(entry.number)

    def find(
        self,
        hashes: Sequence[int],
        ends: Sequence[int],
        held: Callable[[str], int],
        now_seconds: float,
    ) -> dict[str, int]:
        """Worker -> pages of a prompt there or on their way, if more; at least half of what is.

        Args:
            hashes: The prompt's pages, from its first.
            ends: Where workers' own pages end: a chain stands under the first that its worker
                lacked.
            held: A worker's own pages of the prompt.
            now_seconds: What is over by then does not count.
        """
        count = len(hashes)
        places = {end for end in ends if end < count}.union(prompt_places(count))
        anchors = self._anchors
        hits = [place for place in places if hashes[place] in anchors]
        hits.sort(reverse=True)
        expected: dict[str, int] = {}
        seen: set[str] = set()
        for place in hits:
            for worker_id, entry in anchors[hashes[place]].items():
                if worker_id in seen or entry.expires_seconds <= now_seconds:
                    continue
                seen.add(worker_id)
                pages = held(worker_id)
                if pages <= place or (
                    pages < min(count, len(entry.hashes)) and entry.hashes[pages] == hashes[pages]
                ):
                    known = max(pages, place + 1)
                    expected[worker_id] = common_pages(entry.hashes, hashes, known)
        return expected

    def _drop(self, number: int) -> None:
        entry = self._entries.pop(number)
        self._pages -= len(entry.hashes)
        for anchor in entry.anchors:
            entries = self._anchors.get(anchor)
            if entries is not None and entries.get(entry.worker_id) is entry:
                del entries[entry.worker_id]
                if not entries:
                    del self._anchors[anchor]

    def check(self) -> None:
        assert len(self._entries) <= self._count_max
        assert self._pages == sum(len(entry.hashes) for entry in self._entries.values())
        current = {id(entry) for entry in self._entries.values()}
        for entries in self._anchors.values():
            assert entries
            assert all(id(entry) in current for entry in entries.values())


def anchor_places(count: int, known: int) -> list[int]:
    """Places in a chain of `count` pages under which it is found: `known`, then those of 0, 1, 3,
    7 … that follow, and the last."""
    if known >= count:
        return []
    powers = range((known + 1).bit_length(), count.bit_length())
    places = [known, *[(1 << power) - 1 for power in powers]]
    if places[-1] != count - 1:
        places.append(count - 1)
    return places


@lru_cache(maxsize=4096)
def prompt_places(count: int) -> tuple[int, ...]:
    """`anchor_places` of a whole chain."""
    return tuple(anchor_places(count, 0))


def common_pages(left: Sequence[int], right: Sequence[int], known: int) -> int:
    """Length of the common head of two chains that agree on `known` pages: chains that part once
    never meet again, so bisection finds it."""
    low, high = known, min(len(left), len(right))
    while low < high:
        middle = (low + high) >> 1
        if left[middle] == right[middle]:
            low = middle + 1
        else:
            high = middle
    return low
