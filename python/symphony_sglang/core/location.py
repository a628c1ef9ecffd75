"""Where every prefix is: what the workers say they hold, who owns which session, what is expected.

The router feeds it from the workers' event feeds and asks it at every decision; it stands for the
truth as last heard, never for what was routed in the past. Memory: `PageTable`'s 45 bytes or so for
each distinct page, whoever holds it. A worker that is not known to the index holds nothing.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from symphony_sglang.core.levels import Level
from symphony_sglang.core.page_table import PageTable
from symphony_sglang.core.routing_types import NO_MATCH, EventHashes, PrefixMatch

PLANES = {Level.DEVICE: 0, Level.HOST: 1, Level.NVME: 2}
DECODED_MAX = 4096
SESSION_BYTES = 400  # of a place with its id and table slots, roughly


class PageRun(NamedTuple):
    """Pages of a snapshot: consecutive ones of one chain after `parent` (None: from the start of a
    prompt), or loose ones in any order where `linked` is False."""

    hashes: Sequence[int]
    parent: int | None = None
    linked: bool = True


class SessionPlace(NamedTuple):
    """Who serves a session, as of its last turn there."""

    worker_id: str
    session_id: str
    total_tokens: int
    last_page_hash: int | None
    turns: int
    epoch: int


@dataclass(frozen=True, slots=True)
class IndexLimits:
    """Bounds, each with what happens beyond it.

    Attributes:
        pages_max: Distinct pages. Leaves that no device holds are forgotten, or else the new page
            is refused: its holder counts as having less than it has.
        workers_max: Workers known at a time. What further ones report is ignored.
        sessions_max: Sessions with an owner; the longest unheard of is forgotten.
        expected_max: Requests whose pages are expected; the oldest is dropped.
        expected_pages_max: Pages of all those together; the oldest is dropped.
        reclaim_pages: How many rows of lost workers one `reclaim` frees.
    """

    pages_max: int = 16 * 2**20
    workers_max: int = 128
    sessions_max: int = 262_144
    expected_max: int = 4096
    expected_pages_max: int = 4 * 2**20
    reclaim_pages: int = 20_000

    def __post_init__(self) -> None:
        assert self.pages_max > 0 < self.workers_max, self
        assert self.sessions_max > 0 < self.reclaim_pages, self
        assert self.expected_max > 0 < self.expected_pages_max, self


class IndexStats(NamedTuple):
    """The index in figures; `table_bytes` is what the pages cost."""

    pages: int
    workers: int
    sessions: int
    expected: int
    holder_sets: int
    table_bytes: int
    refused_pages: int
    forgotten_pages: int
    false_parents: int
    ignored_workers: int
    reclaimable_pages: int


@dataclass(slots=True, eq=False)
class Expected:
    """Pages that a request just routed to `worker_id` will leave there."""

    number: int
    worker_id: str
    hashes: Sequence[int]
    expires_seconds: float
    anchors: list[int] = field(default_factory=list)


class Found:
    """Where one prompt is: pages by worker at a glance, by level when asked."""

    __slots__ = ("_index", "ends", "expected", "pages")

    def __init__(self, index: LocationIndex, ends: list[tuple[int, int]]) -> None:
        self._index = index
        self.ends = ends
        self.expected: dict[str, int] = {}  # worker -> pages there or on their way, if more
        self.pages: dict[str, int] = {}  # worker -> pages there on any level, from the start
        for end, bits in ends:
            for worker_id in index.holders(bits):
                self.pages[worker_id] = end

    def match(self, worker_id: str) -> PrefixMatch:
        """The levels of one worker's pages."""
        pages = self.pages.get(worker_id, 0)
        extra = max(0, self.expected.get(worker_id, 0) - pages)
        if not pages:
            return PrefixMatch(0, 0, 0, extra) if extra else NO_MATCH
        device, host, _ = self._index.bits(worker_id)
        on_device = to_host = 0
        for end, bits in self.ends:
            if bits & device:
                on_device = end
            if bits & host:
                to_host = end
        return PrefixMatch(on_device, to_host - on_device, pages - to_host, extra)


class LocationIndex:
    """Pages by worker and level, sessions by owner; bounded by `IndexLimits`."""

    def __init__(self, limits: IndexLimits | None = None) -> None:
        self.limits = IndexLimits() if limits is None else limits
        self.ignored_workers = 0
        self._table = PageTable(self.limits.workers_max, self.limits.pages_max)
        self._slots: dict[str, int] = {}
        self._names: dict[int, str] = {}
        self._holders: dict[int, tuple[str, ...]] = {}
        self._sessions: OrderedDict[str, SessionPlace] = OrderedDict()
        self._expected: OrderedDict[int, Expected] = OrderedDict()
        self._anchors: dict[int, dict[str, Expected]] = {}
        self._expected_pages = 0
        self._expected_number = 0

    # What workers report -----------------------------------------------------------------------

    def stored(
        self,
        worker_id: str,
        level: Level,
        hashes: Sequence[int],
        parent: int | None = None,
        *,
        linked: bool = True,
    ) -> None:
        """A worker has these pages on `level` now.

        Args:
            worker_id: Becomes known if it was not.
            level: Any but PEER.
            hashes: Event hashes, consecutive pages of one chain.
            parent: The page before the first of them; None where a prompt starts with it.
            linked: False for loose pages in any order, whose parents are not known. They count
                once a prompt that contains them was looked up.
        """
        slot = self._slot(worker_id)
        if slot is None:
            return
        self._table.add(hashes, parent, self._bit(slot, level), linked=linked)
        if self._anchors and level is Level.DEVICE:
            self._confirm(worker_id, hashes)

    def removed(self, worker_id: str, level: Level, hashes: Sequence[int]) -> None:
        """A worker has these pages on `level` no more."""
        slot = self._slots.get(worker_id)
        if slot is not None:
            self._table.remove(hashes, self._bit(slot, level))

    def cleared(self, worker_id: str, level: Level | None = None) -> None:
        """A worker has nothing on `level` any more, or nothing at all."""
        slot = self._slots.get(worker_id)
        if slot is None:
            return
        if level is None:
            self._table.clear(slot)
        else:
            self._table.clear_bit(self._bit(slot, level))

    def replace(self, worker_id: str, snapshot: Mapping[Level, Iterable[PageRun]]) -> None:
        """A worker has exactly this: what was known before is void."""
        self.cleared(worker_id)
        for level, runs in snapshot.items():
            for run in runs:
                self.stored(worker_id, level, run.hashes, run.parent, linked=run.linked)

    def forget_worker(self, worker_id: str) -> None:
        """A worker is gone with all it held; its sessions have no owner."""
        self.cleared(worker_id)
        slot = self._slots.pop(worker_id, None)
        if slot is not None:
            del self._names[slot]
            self._holders.clear()
        for number in [n for n, e in self._expected.items() if e.worker_id == worker_id]:
            self._drop(number)
        for session_id in [s for s, place in self._sessions.items() if place[0] == worker_id]:
            del self._sessions[session_id]

    def reclaim(self) -> int:
        """Free some of what lost workers left; returns how many pages remain. For a timer."""
        return self._table.reclaim(self.limits.reclaim_pages)

    # What the router expects -------------------------------------------------------------------

    def speculate(
        self,
        worker_id: str,
        hashes: EventHashes,
        now_seconds: float,
        ttl_seconds: float,
        known_pages: int = 0,
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
        self._expected_number += 1
        number = self._expected_number
        entry = Expected(number, worker_id, hashes.data, now_seconds + ttl_seconds)
        for place in anchor_places(count, known_pages):
            anchor = entry.hashes[place]
            entry.anchors.append(anchor)
            self._anchors.setdefault(anchor, {})[worker_id] = entry
        self._expected[number] = entry
        self._expected_pages += count
        limits = self.limits
        while len(self._expected) > limits.expected_max or (
            self._expected_pages > limits.expected_pages_max and len(self._expected) > 1
        ):
            self._drop(next(iter(self._expected)))

    def expire(self, now_seconds: float) -> None:
        """Drop expectations whose time is over, oldest first."""
        while self._expected:
            number, entry = next(iter(self._expected.items()))
            if entry.expires_seconds > now_seconds:
                return
            self._drop(number)

    def _drop(self, number: int) -> None:
        entry = self._expected.pop(number)
        self._expected_pages -= len(entry.hashes)
        for anchor in entry.anchors:
            entries = self._anchors.get(anchor)
            if entries is not None and entries.get(entry.worker_id) is entry:
                del entries[entry.worker_id]
                if not entries:
                    del self._anchors[anchor]

    def _confirm(self, worker_id: str, hashes: Sequence[int]) -> None:
        """The truth has come: what was expected up to one of these pages is expected no more."""
        anchors = self._anchors
        for key in hashes:
            if key in anchors:
                entry = anchors[key].get(worker_id)
                if entry is not None and entry.anchors[-1] == key:
                    self._drop(entry.number)

    def _expect(self, found: Found, hashes: Sequence[int], now_seconds: float) -> None:
        """Fill in what is expected at each worker beyond what is there; at least half of it.

        A chain stands under the places 0, 1, 3, 7 … and under the first page that its worker
        lacked, which is where that worker's pages end now.
        """
        count = len(hashes)
        ends = {end for end, _ in found.ends if end < count}
        seen: set[str] = set()
        for place in sorted(ends.union(anchor_places(count, 0)), reverse=True):
            entries = self._anchors.get(hashes[place])
            if entries is None or entries.keys() <= seen:
                continue
            for worker_id, entry in entries.items():
                if worker_id in seen or entry.expires_seconds <= now_seconds:
                    continue
                seen.add(worker_id)
                pages = found.pages.get(worker_id, 0)
                if pages <= place or (
                    pages < min(count, len(entry.hashes)) and entry.hashes[pages] == hashes[pages]
                ):
                    known = max(pages, place + 1)
                    found.expected[worker_id] = common_pages(entry.hashes, hashes, known)

    # Questions ---------------------------------------------------------------------------------

    def find(self, hashes: Sequence[int] | EventHashes, now_seconds: float = 0.0) -> Found:
        """Where the head of a prompt is. O(log pages) for each place where some holder stops.

        Args:
            hashes: Event hashes of the prompt's pages, all from its first.
            now_seconds: Decides which expectations still hold.
        """
        # A memoryview gives Python integers twice as fast as an array, without a copy.
        view = hashes.data if isinstance(hashes, np.ndarray) else hashes
        found = Found(self, self._table.boundaries(view))
        if self._anchors:
            self._expect(found, view, now_seconds)
        return found

    def match(
        self, hashes: Sequence[int] | EventHashes, now_seconds: float = 0.0
    ) -> dict[str, PrefixMatch]:
        """`find` in full: every worker that has, or is about to have, any of the prompt."""
        found = self.find(hashes, now_seconds)
        return {
            worker_id: found.match(worker_id) for worker_id in {**found.pages, **found.expected}
        }

    def holders(self, bits: int) -> tuple[str, ...]:
        """The workers of a set of `closed` bits, by those of their last plane."""
        low = bits >> 2 * self._table.width
        names = self._holders.get(low)
        if names is None:
            if len(self._holders) >= DECODED_MAX:
                self._holders.clear()
            names = tuple(name for slot, name in self._names.items() if low >> slot & 1)
            self._holders[low] = names
        return names

    def bits(self, worker_id: str) -> tuple[int, int, int]:
        """The bit of a known worker in each plane."""
        slot, width = self._slots[worker_id], self._table.width
        return (1 << slot, 1 << slot + width, 1 << slot + 2 * width)

    def has(self, worker_id: str, level: Level, page_hash: int) -> bool:
        """Whether a worker has one page on a level, whatever it has before it."""
        slot = self._slots.get(worker_id)
        return slot is not None and bool(self._table.present(page_hash) & self._bit(slot, level))

    # Sessions ----------------------------------------------------------------------------------

    def session_turn(
        self,
        worker_id: str,
        session_id: str,
        total_tokens: int,
        last_page_hash: int | None,
        turns: int,
        epoch: int,
        *,
        live: bool = True,
    ) -> bool:
        """A turn of a session ended at `worker_id`; False where another owner stands.

        The newer epoch owns. Within one epoch it is whoever served last: the latest `live` report;
        among those of snapshots (`live` False), which have no order, the longer prefix.
        """
        old = self._sessions.get(session_id)
        if old is not None:
            older = epoch < old.epoch
            same = epoch == old.epoch and worker_id != old.worker_id
            if older or (same and not live and total_tokens <= old.total_tokens):
                return False
        place = SessionPlace(worker_id, session_id, total_tokens, last_page_hash, turns, epoch)
        self._sessions[session_id] = place
        self._sessions.move_to_end(session_id)
        if len(self._sessions) > self.limits.sessions_max:
            self._sessions.popitem(last=False)
        return True

    def session_gone(self, worker_id: str, session_id: str) -> bool:
        """A worker has forgotten a session; False where it was not the owner."""
        old = self._sessions.get(session_id)
        if old is None or old.worker_id != worker_id:
            return False
        del self._sessions[session_id]
        return True

    def session(self, session_id: str) -> SessionPlace | None:
        return self._sessions.get(session_id)

    def sessions_of(self, worker_id: str) -> tuple[SessionPlace, ...]:
        """All sessions of a worker, longest unheard of first; looks at every session."""
        return tuple(place for place in self._sessions.values() if place.worker_id == worker_id)

    # Figures -----------------------------------------------------------------------------------

    def stats(self) -> IndexStats:
        table = self._table
        return IndexStats(
            pages=table.rows,
            workers=len(self._slots),
            sessions=len(self._sessions),
            expected=len(self._expected),
            holder_sets=table.states,
            table_bytes=table.table_bytes,
            refused_pages=table.refused,
            forgotten_pages=table.forgotten,
            false_parents=table.conflicts,
            ignored_workers=self.ignored_workers,
            reclaimable_pages=table.reclaimable,
        )

    def check(self) -> None:
        """Every part agrees with the others; walks everything."""
        self._table.check()
        assert {slot: name for name, slot in self._slots.items()} == self._names
        assert len(self._slots) <= self.limits.workers_max
        assert len(self._sessions) <= self.limits.sessions_max
        assert all(name == place.session_id for name, place in self._sessions.items())
        assert len(self._expected) <= self.limits.expected_max
        assert self._expected_pages == sum(len(e.hashes) for e in self._expected.values())
        current = {id(entry) for entry in self._expected.values()}
        for entries in self._anchors.values():
            assert entries
            assert all(id(entry) in current for entry in entries.values())

    def _slot(self, worker_id: str) -> int | None:
        slot = self._slots.get(worker_id)
        if slot is None:
            if len(self._slots) >= self.limits.workers_max:
                self.ignored_workers += 1
                return None
            slot = next(n for n in range(self.limits.workers_max) if n not in self._names)
            self._slots[worker_id] = slot
            self._names[slot] = worker_id
            self._holders.clear()
        return slot

    def _bit(self, slot: int, level: Level) -> int:
        if level not in PLANES:
            raise ValueError(f"level is {level.value!r}; expected one of {[*map(str, PLANES)]}")
        return 1 << slot + PLANES[level] * self._table.width


def anchor_places(count: int, known: int) -> list[int]:
    """Places in a chain of `count` pages under which it is found: `known`, then those of 0, 1, 3,
    7 … that follow, and the last."""
    places = [known] if known < count else []
    places += [p for p in ((1 << power) - 1 for power in range(count.bit_length())) if p > known]
    if places and places[-1] != count - 1:
        places.append(count - 1)
    return places


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
