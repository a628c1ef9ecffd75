"""Pages of a store for other workers, and from them: through staging memory that direct I/O takes.

The classes have the shape that ``wire.pages`` asks for (source, sink) without importing it. The
store is thread-safe, so page servers and pulls use it from threads of their own.
"""

from __future__ import annotations

import mmap
import threading
from collections.abc import Callable, Sequence

from symphony_sglang.store.batches import Hold, ReadOutcome, WriteOutcome
from symphony_sglang.store.store import PageStore, PlacedPage
from symphony_sglang.store.transfer import Piece, piece_of

ALIGNMENT = 4096
CostOf = Callable[[int], float]


class Staging:
    """Aligned memory for some pages, each in a slot of its own."""

    def __init__(self, pages: int, page_bytes: int) -> None:
        self.pages = pages
        self._page_bytes = page_bytes
        self._stride = -(-page_bytes // ALIGNMENT) * ALIGNMENT
        self._view = memoryview(mmap.mmap(-1, pages * self._stride))
        self._address, _ = piece_of(self._view)
        self.hold: Hold | None = None

    def view(self, at: int, length: int | None = None) -> memoryview:
        start = at * self._stride
        return self._view[start : start + (self._page_bytes if length is None else length)]

    def piece(self, at: int, length: int) -> Piece:
        return self._address + at * self._stride, length

    @property
    def memory(self) -> memoryview:
        return self._view

    @property
    def busy(self) -> bool:
        """Whether a read that gave up may still fill it."""
        if self.hold is not None and self.hold.wait(0):
            self.hold = None
        return self.hold is not None


class StagingPool:
    """A bounded number of staging areas, made at first use and used again. Thread-safe."""

    def __init__(self, page_bytes: int, *, area_bytes: int = 8 << 20, areas_max: int = 6) -> None:
        self.page_bytes = page_bytes
        self._area_pages = max(1, area_bytes // page_bytes)
        self._areas_max = areas_max
        self._idle: list[Staging] = []
        self._stuck: list[Staging] = []
        self._lent = 0
        self._returned = threading.Condition()

    def prepare(self) -> list[memoryview]:
        """Make every area now, for an engine that moves registered memory only; their memory.

        An area for pages that do not fit into one is made when it is needed, and is not known.
        """
        with self._returned:
            while len(self._idle) + self._lent < self._areas_max:
                self._idle.append(Staging(self._area_pages, self.page_bytes))
            return [area.memory for area in self._idle]

    def acquire(self, pages: int, seconds: float = 0.0) -> Staging | None:
        """Room for `pages`; None where none came free within `seconds`."""
        with self._returned:
            if not self._returned.wait_for(self._has_room, seconds):
                return None
            self._lent += 1
            if pages <= self._area_pages:
                while self._idle:
                    area = self._idle.pop()
                    if not area.busy:
                        return area
                    self._stuck.append(area)
        return Staging(max(pages, self._area_pages), self.page_bytes)

    def _has_room(self) -> bool:
        self._stuck = [area for area in self._stuck if area.busy]
        return self._lent + len(self._stuck) < self._areas_max

    def release(self, area: Staging) -> None:
        with self._returned:
            self._lent -= 1
            if area.busy:
                self._stuck.append(area)
            elif area.pages == self._area_pages and len(self._idle) < self._areas_max:
                self._idle.append(area)
            self._returned.notify()

    def check(self) -> None:
        """Never more areas than the bound, and none both lent and idle."""
        with self._returned:
            assert 0 <= self._lent <= self._areas_max, (self._lent, self._areas_max)
            assert len(self._idle) <= self._areas_max, len(self._idle)


class StoredPages:
    """Pages read from the store into staging memory, until released."""

    def __init__(
        self, pool: StagingPool, area: Staging | None, views: list[Sequence[memoryview] | None]
    ) -> None:
        self._pool = pool
        self._area = area
        self.views = views

    def unchanged(self) -> Sequence[bool]:
        """A copy of its own does not change."""
        return [True] * len(self.views)

    def release(self) -> None:
        area, self._area = self._area, None
        self.views = [None] * len(self.views)
        if area is not None:
            self._pool.release(area)


class StorePageSource:
    """Serves the pages of a store. A page that fails its checksum is missing, never sent."""

    def __init__(
        self, store: PageStore, staging: StagingPool, *, wait_seconds: float = 5.0
    ) -> None:
        """`wait_seconds` is for staging memory; without any in time the pages count as missing."""
        self._store = store
        self._staging = staging
        self._wait_seconds = wait_seconds

    def lookup(self, hashes: Sequence[bytes]) -> Sequence[bool]:
        return self._store.contains(hashes)

    def at_hand(self, hashes: Sequence[bytes]) -> bool:
        return False

    def open(self, hashes: Sequence[bytes]) -> StoredPages:
        lengths = self._store.lengths(hashes)
        wanted = [at for at, length in enumerate(lengths) if length is not None]
        views: list[Sequence[memoryview] | None] = [None] * len(hashes)
        area = self._staging.acquire(len(hashes), self._wait_seconds) if wanted else None
        if area is None:
            return StoredPages(self._staging, None, views)
        try:
            result = self._store.read(
                [hashes[at] for at in wanted],
                [[area.piece(at, lengths[at] or 0)] for at in wanted],
            )
        except BaseException:
            self._staging.release(area)
            raise
        area.hold = result.hold
        for at, outcome in zip(wanted, result.outcomes, strict=True):
            if outcome is ReadOutcome.HIT:
                views[at] = [area.view(at, lengths[at])]
        return StoredPages(self._staging, area, views)


class StoreReservation:
    """Staging memory for pages on their way into the store."""

    def __init__(self, sink: StorePageSink, hashes: Sequence[bytes], area: Staging) -> None:
        self._sink = sink
        self._hashes = list(hashes)
        self._area: Staging | None = area
        self.buffers = [area.view(at) for at in range(len(hashes))]

    def commit(self, lengths: Sequence[int | None]) -> Sequence[bool]:
        """Write what arrived; True for what the store has now."""
        area, self._area = self._area, None
        assert area is not None, "a reservation ends once"
        try:
            return self._sink.write(self._hashes, lengths, area)
        finally:
            self._sink.staging.release(area)

    def abort(self) -> None:
        area, self._area = self._area, None
        if area is not None:
            self._sink.staging.release(area)


class StorePageSink:
    """Takes pulled pages of one chain into a store, under the same hashes."""

    def __init__(
        self,
        store: PageStore,
        staging: StagingPool,
        chain: Sequence[bytes],
        cost_of: CostOf = lambda _depth: 1.0,
    ) -> None:
        """`chain` gives each page its depth, `cost_of` what a page there costs to recompute."""
        self._store = store
        self.staging = staging
        self._depths = {key: at for at, key in enumerate(chain)}
        self._cost_of = cost_of

    def present(self, hashes: Sequence[bytes]) -> Sequence[bool]:
        found = self._store.contains(hashes)
        # The head of a chain must outlive the copy of its tail.
        self._store.touch([key for key, here in zip(hashes, found, strict=True) if here])
        return found

    def reserve(self, hashes: Sequence[bytes]) -> StoreReservation | None:
        area = self.staging.acquire(len(hashes))
        return None if area is None else StoreReservation(self, hashes, area)

    def write(
        self, hashes: Sequence[bytes], lengths: Sequence[int | None], area: Staging
    ) -> list[bool]:
        """Store the pages of `area` that have a length."""
        arrived = [(at, length) for at, length in enumerate(lengths) if length is not None]
        stored = [False] * len(hashes)
        if not arrived:
            return stored
        pages = []
        for at, length in arrived:
            depth = self._depths.get(hashes[at], 0)
            piece = area.piece(at, length)
            pages.append(PlacedPage(hashes[at], [piece], self._cost_of(depth), depth))
        outcomes = self._store.write(pages)
        for (at, _), outcome in zip(arrived, outcomes, strict=True):
            stored[at] = outcome in (WriteOutcome.WRITTEN, WriteOutcome.PRESENT)
        # REFUSED also means that the worker itself is writing the page at this moment.
        left = [at for at, _ in arrived if not stored[at]]
        for at, here in zip(left, self._store.contains([hashes[at] for at in left]), strict=True):
            stored[at] = here
        return stored
