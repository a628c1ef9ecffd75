"""The store against a dict: random sizes, batches, removals, pins, evictions and reopenings."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)

from store_pages import PAGE_BYTES, Pool, content_of, key_of, open_store
from symphony_sglang.store import ReadOutcome, SyncPolicy, WriteOutcome

NUMBERS = st.integers(0, 60)
# Sizes that are whole blocks, just off them, tiny, and the largest.
SIZES = st.sampled_from([1, 511, 512, 4096, 4097, 10_000, 32_768, PAGE_BYTES - 1, PAGE_BYTES])
BATCH = st.lists(NUMBERS, min_size=1, max_size=12)


class StoreMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.scratch = tempfile.TemporaryDirectory(prefix="store-model-")
        self.directory = Path(self.scratch.name)
        self.sizes: dict[bytes, int] = {}  # of every key ever written; content follows from both
        self.pinned: dict[bytes, int] = {}
        self.pool = Pool(12)
        self.odd = Pool(12, misaligned=24)
        self.store = None

    @initialize(sync=st.sampled_from(list(SyncPolicy)), segments=st.integers(1, 3))
    def open(self, sync: SyncPolicy, segments: int) -> None:
        self.options = {"sync": sync, "segments": segments, "io_threads": 2, "checksum_bytes": 4096}
        self.store = open_store(self.directory, **self.options)

    def content(self, key: bytes) -> np.ndarray:
        return content_of(key, self.sizes[key])

    @rule(numbers=BATCH, size=SIZES, odd=st.booleans())
    def write(self, numbers: list[int], size: int, odd: bool) -> None:
        pool = self.odd if odd else self.pool
        keys = [key_of(number) for number in numbers]
        present = self.store.contains(keys)
        fresh = [key for key, there in zip(keys, present, strict=True) if not there]
        self.sizes |= dict.fromkeys(fresh, size)
        pages = pool.fill(fresh, size)
        outcomes = self.store.write(pages)
        assert set(outcomes) <= {WriteOutcome.WRITTEN, WriteOutcome.REFUSED}
        if outcomes and not self.pinned:
            assert outcomes[0] is WriteOutcome.WRITTEN
        for key, outcome in zip(fresh, outcomes, strict=True):
            if outcome is WriteOutcome.REFUSED:
                assert not self.store.contains([key])[0]

    @rule(numbers=BATCH, odd=st.booleans())
    def read(self, numbers: list[int], odd: bool) -> None:
        pool = self.odd if odd else self.pool
        keys = [key_of(number) for number in dict.fromkeys(numbers)]
        present = self.store.contains(keys)
        head = present.index(False) if False in present else len(present)
        assert self.store.prefix_length(keys) <= head
        pages = [pool.pieces(at, self.sizes.get(key, 1)) for at, key in enumerate(keys)]
        outcomes = self.store.read(keys, pages).outcomes
        for at, (key, there, outcome) in enumerate(zip(keys, present, outcomes, strict=True)):
            if outcome is ReadOutcome.HIT:
                assert there
                np.testing.assert_array_equal(pool.page(at, self.sizes[key]), self.content(key))
            else:
                assert outcome is ReadOutcome.MISS
                assert not self.store.contains([key])[0]  # not there, or evicted since

    # Drawn without a look at the store: its threads evict when they get to it.
    @rule(number=NUMBERS, start=st.integers(0, PAGE_BYTES - 1), span=st.integers(1, PAGE_BYTES))
    def read_range(self, number: int, start: int, span: int) -> None:
        key = key_of(number)
        if not self.store.contains([key])[0]:
            return
        size = self.sizes[key]
        offset = start % size
        length = min(span, size - offset)
        (address, _), *_ = self.pool.pieces(0, length)
        result = self.store.read([key], [[(address, length)]], [(offset, length)])
        if result.outcomes == [ReadOutcome.MISS]:
            assert not self.store.contains([key])[0]
            return
        assert result.outcomes == [ReadOutcome.HIT]
        expected = self.content(key)[offset : offset + length]
        np.testing.assert_array_equal(self.pool.page(0, length), expected)

    @rule(numbers=BATCH)
    def remove(self, numbers: list[int]) -> None:
        keys = list({key_of(number) for number in numbers})
        there = self.store.contains(keys)
        assert self.store.remove(keys) <= sum(there)
        assert not any(self.store.contains(keys))
        for key in keys:
            self.pinned.pop(key, None)

    @rule(numbers=st.lists(NUMBERS, min_size=1, max_size=3, unique=True))
    def pin(self, numbers: list[int]) -> None:
        for number in numbers:
            key = key_of(number)
            if self.store.pin([key]):
                self.pinned[key] = self.pinned.get(key, 0) + 1

    @rule()
    def unpin(self) -> None:
        for key, count in self.pinned.items():
            for _ in range(count):
                assert self.store.unpin([key]) == 1
        self.pinned.clear()

    @rule(numbers=BATCH, priority=st.integers(-128, 127))
    def prioritise(self, numbers: list[int], priority: int) -> None:
        keys = [key_of(number) for number in numbers]
        there = sum(self.store.contains(keys))
        assert self.store.set_priority(keys, priority) <= there

    @rule()
    def flush(self) -> None:
        assert self.store.flush()
        keys = [key_of(number) for number in range(61)]
        present = self.store.contains(keys)
        assert sum(present) == len(self.store)
        assert self.store.prefix_length(keys) == present.index(False)
        found = {key for chunk in self.store.snapshot() for key in chunk}
        assert found == {key for key, there in zip(keys, present, strict=True) if there}

    @rule()
    def compact(self) -> None:
        assert self.store.flush()  # after a whole round nothing is left to evict
        before = set(self.store._s.table.keys)
        self.store.compact()
        assert set(self.store._s.table.keys) == before

    @rule(segments=st.integers(1, 3))
    def reopen(self, segments: int) -> None:
        # Without a smaller capacity, a clean close keeps every page.
        assert self.store.flush()
        kept = set(self.store._s.table.keys) if segments >= self.options["segments"] else None
        self.store.close()
        self.pinned.clear()
        self.options["segments"] = segments
        self.store = open_store(self.directory, **self.options)
        assert self.store.opened.lost == 0
        if kept is not None:
            assert self.store.opened.pages == len(kept)
            assert all(self.store.contains(list(kept)))

    @precondition(lambda self: self.store is not None)
    @invariant()
    def holds(self) -> None:
        self.store.check()
        assert all(self.store.contains(list(self.pinned)))

    def teardown(self) -> None:
        if self.store is not None:
            self.store.close()
        self.scratch.cleanup()


TestStore = StoreMachine.TestCase
TestStore.settings = settings(
    max_examples=25,
    stateful_step_count=30,
    deadline=None,
    derandomize=True,
    suppress_health_check=list(HealthCheck),
)
