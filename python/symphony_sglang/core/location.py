"""Where every prefix is: what the workers say they hold, who owns which session, what is expected.

The router feeds it from the workers' event feeds and asks it at every decision; it stands for the
truth as last heard, never for what was routed in the past. Memory: `PageTable`'s 45 bytes or so for
each distinct page, whoever holds it. A worker that is not known to the index holds nothing.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from symphony_sglang.core.expectations import Expectations
from symphony_sglang.core.levels import Level
from symphony_sglang.core.page_table import PageTable
from symphony_sglang.core.routing_types import NO_MATCH, EventHashes, PrefixMatch

PLANES = {Level.DEVICE: 0, Level.HOST: 1, Level.NVME: 2}
DECODED_MAX = 4096
STOPS_MAX = 16  # of one session; the last ones, which lie where prompts differ
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
        stops_max: Sessions of which it is kept where holders stopped; beyond it the least recently
            asked for is looked up from scratch.
        expected_max: Requests whose pages are expected; the oldest is dropped.
        expected_pages_max: Pages of all those together; the oldest is dropped.
        reclaim_pages: How many rows of lost workers one `reclaim` frees.
    """

    pages_max: int = 16 * 2**20
    workers_max: int = 128
    sessions_max: int = 262_144
    stops_max: int = 16_384
    expected_max: int = 4096
    expected_pages_max: int = 4 * 2**20
    reclaim_pages: int = 20_000

    def __post_init__(self) -> None:
        assert self.pages_max > 0 < self.workers_max, self
        assert self.sessions_max > 0 < self.reclaim_pages, self
        assert self.stops_max > 0, self
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


class Found:
    """Where one prompt is: who has how many of its pages, by level when asked.

    `ends` are the table's boundaries: the pages from the start that some hold, and no more, in
    ascending order, with bits that say who and on which levels.
    """

    __slots__ = ("_index", "_pages", "ends", "expected")

    def __init__(self, index: LocationIndex, ends: list[tuple[int, int]]) -> None:
        self._index = index
        self._pages: dict[str, int] | None = None
        self.ends = ends
        self.expected: dict[str, int] = {}  # worker -> pages there or on their way, if more

    @property
    def most(self) -> int:
        """The most pages that any worker has."""
        return self.ends[-1][0] if self.ends else 0

    @property
    def groups(self) -> list[tuple[int, tuple[str, ...]]]:
        """(pages from the start on any level, the workers with so many), in ascending order."""
        holders = self._index.holders
        return [(end, holders(bits)) for end, bits in self.ends]

    @property
    def pages(self) -> dict[str, int]:
        """Worker -> pages there on any level, from the start."""
        if self._pages is None:
            self._pages = {}
            for end, names in self.groups:
                self._pages.update(dict.fromkeys(names, end))
        return self._pages

    def count(self, worker_id: str) -> int:
        """One worker's pages on any level, from the start."""
        nvme = self._index.bits(worker_id)[2]
        for end, bits in self.ends:
            if bits & nvme:
                return end
        return 0

    def match(self, worker_id: str) -> PrefixMatch:
        """The levels of one worker's pages."""
        device, host, nvme, any_level = self._index.bits(worker_id)
        on_device = to_host = pages = 0
        for end, bits in self.ends:
            if bits & any_level:
                if bits & nvme:
                    pages = end
                if bits & host:
                    to_host = end
                if bits & device:
                    on_device = end
        extra = 0
        if self.expected:
            extra = max(0, self.expected.get(worker_id, 0) - pages)
        if not pages and not extra:
            return NO_MATCH
        return PrefixMatch(on_device, to_host - on_device, pages - to_host, extra)


class LocationIndex:
    """Pages by worker and level, sessions by owner; bounded by `IndexLimits`."""

    def __init__(self, limits: IndexLimits | None = None) -> None:
        self.limits = IndexLimits() if limits is None else limits
        self.ignored_workers = 0
        self._table = PageTable(self.limits.workers_max, self.limits.pages_max)
        self._slots: dict[str, int] = {}
        self._names: dict[int, str] = {}
        self._bits: dict[str, tuple[int, int, int, int]] = {}
        self._holders: dict[int, tuple[str, ...]] = {}
        self._sessions: OrderedDict[str, SessionPlace] = OrderedDict()
        self._stops: OrderedDict[str, tuple[int, ...]] = OrderedDict()
        self._expected = Expectations(self.limits.expected_max, self.limits.expected_pages_max)

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
        if self._expected and level is Level.DEVICE:
            self._expected.confirm(worker_id, hashes)

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
            del self._names[slot], self._bits[worker_id]
            self._holders.clear()
        self._expected.forget_worker(worker_id)
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
        """See `Expectations.add`."""
        self._expected.add(worker_id, hashes, now_seconds, ttl_seconds, known_pages)

    def expire(self, now_seconds: float) -> None:
        """Drop expectations whose time is over, oldest first."""
        self._expected.expire(now_seconds)

    # Questions ---------------------------------------------------------------------------------

    def find(
        self,
        hashes: Sequence[int] | EventHashes,
        now_seconds: float = 0.0,
        session_id: str | None = None,
    ) -> Found:
        """Where the head of a prompt is. O(log pages) for each place where some holder stops.

        Args:
            hashes: Event hashes of the prompt's pages, all from its first.
            now_seconds: Decides which expectations still hold.
            session_id: Holders are looked for first where they stopped in its last prompt: from
                one turn to the next, few of them move.
        """
        # A memoryview gives Python integers twice as fast as an array, without a copy.
        view = hashes.data if isinstance(hashes, np.ndarray) else hashes
        if session_id is None:
            found = Found(self, self._table.boundaries(view))
        else:
            found = Found(self, self._table.boundaries(view, self._stops.get(session_id, ())))
            self._remember(session_id, found)
        if self._expected:
            ends = [end for end, _ in found.ends]
            found.expected = self._expected.find(view, ends, found.count, now_seconds)
        return found

    def _remember(self, session_id: str, found: Found) -> None:
        stops = self._stops
        stops[session_id] = tuple([end for end, _ in found.ends[-STOPS_MAX:]])
        stops.move_to_end(session_id)
        if len(stops) > self.limits.stops_max:
            stops.popitem(last=False)

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

    def bits(self, worker_id: str) -> tuple[int, int, int, int]:
        """A worker's bit in each plane, and all three; zeros where it is not known."""
        return self._bits.get(worker_id, (0, 0, 0, 0))

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

    def pages(self, worker_id: str) -> dict[Level, int]:
        """How many pages a worker holds on each level."""
        bits = zip(PLANES, self.bits(worker_id), strict=False)
        return {level: self._table.counts.get(bit, 0) for level, bit in bits}

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
        assert self._bits.keys() == self._slots.keys()
        assert len(self._slots) <= self.limits.workers_max
        assert len(self._sessions) <= self.limits.sessions_max
        assert all(name == place.session_id for name, place in self._sessions.items())
        assert len(self._stops) <= self.limits.stops_max
        self._expected.check()

    def _slot(self, worker_id: str) -> int | None:
        slot = self._slots.get(worker_id)
        if slot is None:
            if len(self._slots) >= self.limits.workers_max:
                self.ignored_workers += 1
                return None
            slot = next(n for n in range(self.limits.workers_max) if n not in self._names)
            self._slots[worker_id] = slot
            self._names[slot] = worker_id
            bits = [1 << slot + plane * self._table.width for plane in PLANES.values()]
            self._bits[worker_id] = (bits[0], bits[1], bits[2], sum(bits))
            self._holders.clear()
        return slot

    def _bit(self, slot: int, level: Level) -> int:
        if level not in PLANES:
            raise ValueError(f"level is {level.value!r}; expected one of {[*map(str, PLANES)]}")
        return 1 << slot + PLANES[level] * self._table.width
