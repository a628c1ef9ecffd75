"""The index in memory: which page lies in which slot, what may be evicted, what awaits a commit.

A slot is numbered across segments: ``segment * slots_per_segment + place``. Everything about a slot
stands in flat arrays, so a million pages cost about 75 bytes each and no Python object of their
own. Not thread-safe: the store holds its lock.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import IntEnum
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from symphony_sglang.store.eviction import choose_victims, keep_scores
from symphony_sglang.store.key_table import KeyTable

LEAF_SLOTS = 64
PINS_MAX = (1 << 16) - 1
DEPTH_MAX = (1 << 16) - 1
COST_MAX = 60000.0
LEAF_ENTRY = np.dtype(
    [
        ("key", "V32"),
        ("length", "<u4"),
        ("accessed", "<f8"),
        ("depth", "<u2"),
        ("cost", "<f2"),
        ("priority", "i1"),
        ("used", "u1"),
        ("spare", "<u2"),
    ]
)


class SlotState(IntEnum):
    ABSENT = 0  # its segment does not exist
    FREE = 1
    WRITING = 2  # reserved; the page is not readable yet
    PENDING = 3  # readable in this process, not durable
    SYNCING = 4  # in the commit that is under way
    COMMITTED = 5
    EVICTED = 6  # gone for readers; its index row is not yet deleted
    QUARANTINED = 7  # failed verification or I/O: not used again until the store is reopened


_S = SlotState
# state -> states that may follow.
TRANSITIONS: dict[SlotState, frozenset[SlotState]] = {
    _S.ABSENT: frozenset({_S.FREE}),
    _S.FREE: frozenset({_S.WRITING, _S.ABSENT, _S.COMMITTED}),
    _S.WRITING: frozenset({_S.PENDING, _S.FREE, _S.QUARANTINED, _S.ABSENT}),
    _S.PENDING: frozenset({_S.SYNCING, _S.EVICTED, _S.QUARANTINED}),
    _S.SYNCING: frozenset({_S.COMMITTED, _S.PENDING, _S.EVICTED, _S.QUARANTINED}),
    _S.COMMITTED: frozenset({_S.EVICTED, _S.QUARANTINED}),
    _S.EVICTED: frozenset({_S.FREE, _S.ABSENT}),
    _S.QUARANTINED: frozenset({_S.ABSENT}),
}
# Indexed by state and following state; by state.
_ALLOWED = np.array([[following in TRANSITIONS[state] for following in _S] for state in _S])
_BEFORE = {following: {s for s in _S if following in TRANSITIONS[s]} for following in _S}
_READABLE = np.array([state in (_S.PENDING, _S.SYNCING, _S.COMMITTED) for state in _S])
Slots = Sequence[int] | npt.NDArray[np.int64]


class PageFacts(NamedTuple):
    """What the cache knows of a page beside its bytes."""

    length: int
    cost: float = 1.0  # seconds to recompute, in any unit; only ratios count
    depth: int = 0  # pages before it in its prefix
    priority: int = 0  # -128 to 127; a lower one goes first, whatever its age


class SlotTable:
    def __init__(self, slots_per_segment: int, segments_max: int) -> None:
        self.slots_per_segment = slots_per_segment
        self.leaves_per_segment = -(-slots_per_segment // LEAF_SLOTS)
        self.segments_max = segments_max
        count = slots_per_segment * segments_max
        self.keys = KeyTable(count)
        self.segments: set[int] = set()
        self.retiring: set[int] = set()
        self._state = bytearray(count)
        self.state = np.frombuffer(self._state, np.uint8)
        self.length = np.zeros(count, np.uint32)
        self.accessed = np.zeros(count, np.float64)
        self.cost = np.ones(count, np.float16)
        self.depth = np.zeros(count, np.uint16)
        self.priority = np.zeros(count, np.int8)
        self.pins = np.zeros(count, np.uint16)
        self.readers = np.zeros(count, np.uint16)
        self._free_in_segment = np.zeros(segments_max, np.int64)
        self._next_in_segment = [0] * segments_max  # behind the last slots that were reserved
        self.pinned = 0
        self.dirty_leaves: set[int] = set()
        self.touched_leaves: set[int] = set()
        self.pending: set[int] = set()
        self.evicted: set[int] = set()
        self.unpublished: list[bytes] = []  # removed keys that the next commit announces
        self.lifetime_seconds = 0.0
        self._writing: dict[bytes, int] = {}

    def __len__(self) -> int:
        return len(self.keys)

    @property
    def slot_count(self) -> int:
        return len(self.state)

    @property
    def free(self) -> int:
        return int(self._free_in_segment.sum())

    def free_of(self, segment: int) -> int:
        return int(self._free_in_segment[segment])

    def state_of(self, slot: int) -> SlotState:
        return SlotState(self._state[slot])

    def find(self, keys: Sequence[bytes]) -> npt.NDArray[np.int64]:
        """The slot of each readable page, -1 where there is none."""
        return self.keys.find(b"".join(keys))

    def move(self, slots: Slots, following: SlotState) -> None:
        """The only way slots change state; a step that the table does not allow is a bug."""
        where = np.asarray(slots, np.int64)
        current = self.state[where]
        allowed = _ALLOWED[current, following]
        if not allowed.all():
            at = int(np.argmin(allowed))
            raise AssertionError(
                f"slot {where[at]}: {SlotState(current[at]).name} -> {following.name}"
            )
        self.state[where] = following
        if following is _S.FREE:
            np.add.at(self._free_in_segment, where // self.slots_per_segment, 1)
        elif _S.FREE in _BEFORE[following]:
            freed = where[current == _S.FREE]
            np.subtract.at(self._free_in_segment, freed // self.slots_per_segment, 1)

    def leaf_of(self, slot: int) -> int:
        segment, place = divmod(slot, self.slots_per_segment)
        return segment * self.leaves_per_segment + place // LEAF_SLOTS

    def leaves_of(self, slots: Slots) -> set[int]:
        segments, places = np.divmod(np.asarray(slots, np.int64), self.slots_per_segment)
        return set((segments * self.leaves_per_segment + places // LEAF_SLOTS).tolist())

    def leaf_slots(self, leaf: int) -> range:
        segment, place = divmod(leaf, self.leaves_per_segment)
        start = segment * self.slots_per_segment + place * LEAF_SLOTS
        return range(start, min(start + LEAF_SLOTS, (segment + 1) * self.slots_per_segment))

    def segment_slots(self, segment: int) -> range:
        start = segment * self.slots_per_segment
        return range(start, start + self.slots_per_segment)

    def add_segment(self, segment: int) -> None:
        slots = self.segment_slots(segment)
        self.state[slots.start : slots.stop] = _S.FREE
        self._free_in_segment[segment] = self.slots_per_segment
        self._next_in_segment[segment] = 0
        self.segments.add(segment)

    def retire_segment(self, segment: int) -> None:
        """Take no more pages into a segment: its slots vanish as they become free."""
        self.retiring.add(segment)
        slots = self.segment_slots(segment)
        states = self.state[slots.start : slots.stop]
        states[(states == _S.FREE) | (states == _S.QUARANTINED)] = _S.ABSENT
        self._free_in_segment[segment] = 0

    def retired(self) -> list[int]:
        """Retiring segments that hold nothing any more; forgotten by this call."""
        empty = []
        for segment in sorted(self.retiring):
            slots = self.segment_slots(segment)
            states = self.state[slots.start : slots.stop]
            states[states == _S.QUARANTINED] = _S.ABSENT
            if not states.any() and not self.readers[slots.start : slots.stop].any():
                empty.append(segment)
        self.retiring.difference_update(empty)
        self.segments.difference_update(empty)
        return empty

    def live_slots(self, segment: int) -> list[int]:
        """The slots of a segment that hold a readable page."""
        slots = self.segment_slots(segment)
        states = self.state[slots.start : slots.stop]
        found: list[int] = (np.flatnonzero(_READABLE[states]) + slots.start).tolist()
        return found

    def coldest_segment(self) -> int | None:
        """The segment whose pages were used longest ago in the mean; an empty one first."""
        best: tuple[float, int] | None = None
        for segment in self.segments - self.retiring:
            live = self.live_slots(segment)
            age = float(self.accessed[live].mean()) if live else -1.0
            if best is None or (age, segment) < best:
                best = (age, segment)
        return best[1] if best else None

    def is_writing(self, key: bytes) -> bool:
        return key in self._writing

    def allocate(self, keys: Sequence[bytes]) -> list[int]:
        """Reserve a slot for each of the first keys, contiguous where it can; may return fewer."""
        slots: list[int] = []
        while len(slots) < len(keys):
            segment = int(self._free_in_segment.argmax())
            if self._free_in_segment[segment] == 0:
                break
            run = self._free_run(segment, len(keys) - len(slots))
            some = keys[len(slots) : len(slots) + len(run)]
            self.move(np.arange(run.start, run.stop), _S.WRITING)
            self.keys.set_keys(run.start, some)
            self._writing.update(zip(some, run, strict=True))
            slots.extend(run)
        return slots

    def _free_run(self, segment: int, wanted: int) -> range:
        """A run of `wanted` free slots in a segment: behind the last one, else the first one, else
        the longest one."""
        base = segment * self.slots_per_segment
        behind = self._next_in_segment[segment]
        if behind + wanted <= self.slots_per_segment:
            start = base + behind
            if self._state.count(_S.FREE, start, start + wanted) == wanted:
                self._next_in_segment[segment] = behind + wanted
                return range(start, start + wanted)
        states = self.state[base : base + self.slots_per_segment]
        free = np.flatnonzero(states == _S.FREE)
        breaks = np.flatnonzero(free[1:] - free[:-1] != 1) + 1
        starts = np.concatenate(([0], breaks))
        sizes = np.diff(np.concatenate((starts, [len(free)])))
        enough = sizes >= wanted
        best = int(enough.argmax()) if enough.any() else int(sizes.argmax())
        place = int(free[starts[best]])
        count = min(wanted, int(sizes[best]))
        self._next_in_segment[segment] = place + count
        return range(base + place, base + place + count)

    def publish(self, slots: Sequence[int], facts: Sequence[PageFacts], now: float) -> None:
        """Written pages become readable in this process."""
        if not slots:
            return
        where = np.array(slots, np.int64)
        self.move(where, _S.PENDING)
        for key in self.keys.keys_at(where):
            del self._writing[key]
        self.keys.insert(slots)
        self.accessed[where] = now
        lengths, costs, depths, priorities = zip(*facts, strict=True)
        self.length[where] = lengths
        self.cost[where] = np.clip(costs, 0.0, COST_MAX)
        self.depth[where] = np.clip(depths, 0, DEPTH_MAX)
        self.priority[where] = priorities
        self.pending.update(slots)

    def restore(self, slot: int, key: bytes, length: int, now: float) -> None:
        """Take up a page found on disk without the index; the next commit makes it durable."""
        self.move([slot], _S.COMMITTED)
        self.keys.set_keys(slot, [key])
        self.keys.insert([slot])
        self.length[slot] = length
        self.accessed[slot] = now
        self.dirty_leaves.add(self.leaf_of(slot))

    def abandon(self, slot: int, *, quarantine: bool) -> None:
        """Give back a slot whose page was never readable."""
        del self._writing[self.keys.key_at(slot)]
        retiring = slot // self.slots_per_segment in self.retiring
        free = _S.ABSENT if retiring else _S.FREE
        self.move([slot], _S.QUARANTINED if quarantine else free)

    def remove(self, key: bytes, *, quarantine: bool = False) -> bool:
        """Make a page unreadable now; its slot is free after the next commit (or quarantined)."""
        slot = self.keys.get(key)
        if slot is None:
            return False
        self.remove_slots([slot], quarantine=quarantine)
        return True

    def remove_slots(self, slots: Slots, *, quarantine: bool = False) -> None:
        """As ``remove``, for slots that hold readable pages."""
        where = np.asarray(slots, np.int64)
        numbers: list[int] = where.tolist()
        for slot in numbers:
            self.keys.discard(slot)
        announced = where[self.state[where] != _S.PENDING]
        self.unpublished.extend(self.keys.keys_at(announced))
        self.pending.difference_update(numbers)
        self.pinned -= int((self.pins[where] > 0).sum())
        self.pins[where] = 0
        self.move(where, _S.QUARANTINED if quarantine else _S.EVICTED)
        self.dirty_leaves |= self.leaves_of(where)
        if not quarantine:
            self.evicted.update(numbers)

    def release(self, slots: Sequence[int]) -> None:
        """The eviction of these slots is durable: they may be written again."""
        self.evicted.difference_update(slots)
        if not self.retiring:
            self.move(slots, _S.FREE)
            return
        by_fate: dict[SlotState, list[int]] = {_S.FREE: [], _S.ABSENT: []}
        for slot in slots:
            retiring = slot // self.slots_per_segment in self.retiring
            by_fate[_S.ABSENT if retiring else _S.FREE].append(slot)
        for fate, some in by_fate.items():
            self.move(some, fate)

    def facts(self, slot: int) -> PageFacts:
        return PageFacts(
            int(self.length[slot]),
            float(self.cost[slot]),
            int(self.depth[slot]),
            int(self.priority[slot]),
        )

    def touch(self, slots: Slots, now: float) -> None:
        """Count pages as used at `now`; time does not go back."""
        where = np.asarray(slots, np.int64)
        older = where[self.accessed[where] < now]
        if len(older):
            self.accessed[older] = now
            self.touched_leaves |= self.leaves_of(older)

    def plan_victims(self, count: int) -> list[tuple[int, float]]:
        """(slot, last use) of pages to evict, worst first. Safe to call without the lock: what
        changed since is noticed by ``evict``."""
        readable = (self.state == _S.PENDING) | (self.state == _S.COMMITTED)
        slots = np.flatnonzero(readable & (self.pins == 0) & (self.readers == 0))
        accessed = self.accessed[slots]
        scores = keep_scores(
            accessed,
            self.cost[slots],
            self.depth[slots],
            self.priority[slots],
            self.lifetime_seconds,
        )
        chosen = choose_victims(slots, scores, count)
        return list(zip(chosen.tolist(), self.accessed[chosen].tolist(), strict=True))

    def evict(self, victims: Sequence[tuple[int, float]], now: float) -> int:
        """Evict the planned victims that were not used, pinned or moved since; returns how many."""
        slots = np.array([slot for slot, _ in victims], np.int64)
        planned = np.array([accessed for _, accessed in victims], np.float64)
        state = self.state[slots]
        same = ((state == _S.PENDING) | (state == _S.COMMITTED)) & (self.accessed[slots] == planned)
        same &= (self.pins[slots] == 0) & (self.readers[slots] == 0)
        self.remove_slots(slots[same])
        for age in np.maximum(now - planned[same], 0.0).tolist():
            self.lifetime_seconds += (age - self.lifetime_seconds) / 64
        return int(same.sum())

    def build_leaf(self, leaf: int) -> npt.NDArray[np.void]:
        """The durable form of a leaf: what is committed, and what the running commit synced."""
        slots = self.leaf_slots(leaf)
        entries = np.zeros(LEAF_SLOTS, LEAF_ENTRY)
        part = entries[: len(slots)]
        at = slice(slots.start, slots.stop)
        part["key"] = self.keys.words[at].view("V32")[:, 0]
        for name in ("length", "accessed", "depth", "cost", "priority"):
            part[name] = getattr(self, name)[at]
        kept = (self.state[at] == _S.SYNCING) | (self.state[at] == _S.COMMITTED)
        part["used"] = kept
        part[~kept] = np.zeros((), LEAF_ENTRY)
        return entries

    def load(self, leaves: npt.NDArray[np.int64], entries: npt.NDArray[np.void]) -> int:
        """Fill from the durable index, all at once; returns the entries that could not be used.

        Args:
            leaves: (n,) ids, ascending.
            entries: (n, LEAF_SLOTS) of LEAF_ENTRY.
        """
        segments, places = np.divmod(leaves, self.leaves_per_segment)
        present = np.isin(segments, list(self.segments))
        in_segment = places[:, None] * LEAF_SLOTS + np.arange(LEAF_SLOTS)
        used = (entries["used"] == 1) & present[:, None] & (in_segment < self.slots_per_segment)
        claimed = int((entries["used"] == 1).sum())
        slots = (segments[:, None] * self.slots_per_segment + in_segment)[used]
        chosen = entries[used]
        for name in ("length", "accessed", "depth", "cost", "priority"):
            getattr(self, name)[slots] = chosen[name]
        self.keys.words[slots] = np.ascontiguousarray(chosen["key"]).view(np.uint64).reshape(-1, 4)
        self.move(slots, _S.COMMITTED)
        doubles = self.keys.load(slots)
        if len(doubles):
            self.state[doubles] = _S.FREE
            np.add.at(self._free_in_segment, doubles // self.slots_per_segment, 1)
            self.dirty_leaves |= self.leaves_of(doubles)
        return claimed - len(self.keys)

    def check(self) -> None:
        """Every invariant of the table, as assertions."""
        counts = np.bincount(self.state, minlength=len(SlotState))
        readable = int(counts[_READABLE].sum())
        assert readable == len(self.keys), (readable, len(self.keys))
        assert int(counts[_S.FREE]) == self.free, (counts, self.free)
        assert int(counts[_S.WRITING]) == len(self._writing)
        assert int(counts[_S.EVICTED]) == len(self.evicted)
        assert int(counts[_S.PENDING]) == len(self.pending)
        whole = len(self.segments - self.retiring) * self.slots_per_segment
        present = len(self.state) - int(counts[_S.ABSENT])
        assert whole <= present <= len(self.segments) * self.slots_per_segment
        slots = self.keys.slots()
        assert _READABLE[self.state[slots]].all()
        found = self.keys.find(self.keys.words[slots].tobytes())
        assert (found == slots).all()
        readers = self.state[np.flatnonzero(self.readers)]
        assert (_READABLE[readers] | (readers >= _S.EVICTED)).all()
        pinned = np.flatnonzero(self.pins)
        assert len(pinned) == self.pinned
        assert _READABLE[self.state[pinned]].all()
