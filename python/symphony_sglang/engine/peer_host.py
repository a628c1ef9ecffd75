"""Pages served to peers straight from the host pool, while they are there.

The scheduler owns the pool and may give a page's memory to another prefix at any moment. So every
page has a generation, which goes up when its memory is handed out again; a reader notes it before
the first byte and asks for it after the last. A page whose generation moved is not taken, and is
found in the store the next time. Nothing is locked, and the scheduler never waits for a reader.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from sglang.srt.mem_cache.pool_host.mha import MHATokenToKVPoolHost
from sglang.srt.mem_cache.pool_host.mla import MLATokenToKVPoolHost

from symphony_sglang.engine.host_pool import TorchHostPool
from symphony_sglang.engine.nvme_config import pool_memory
from symphony_sglang.store.peer_pages import StoredPages, StorePageSource

# In others a page's memory may move, or be written without having been allocated.
POOLS = (TorchHostPool, MHATokenToKVPoolHost, MLATokenToKVPoolHost)


class Place(NamedTuple):
    """Where a page was put, and the generation of that memory at the time."""

    page: int
    generation: int


class PieceRow(NamedTuple):
    """One of a page's pieces: that of page `n` starts at `start + n * stride` of the pool."""

    start: int
    stride: int
    size: int


class HostPages:
    """Which pages are in a host pool, by hash. At most as many as the pool has. Thread-safe."""

    def __init__(self, memory: memoryview, rows: Sequence[PieceRow], page_count: int) -> None:
        """`memory`: the whole pool; `rows`: a page's pieces in payload order."""
        self.memory = memory
        self._rows = list(rows)
        self._generations = np.zeros(page_count, np.int64)
        self._lock = threading.Lock()
        self._places: dict[bytes, Place] = {}
        self._keys: list[bytes | None] = [None] * page_count

    def __len__(self) -> int:
        return len(self._places)

    def put(self, keys: Sequence[bytes], pages: Sequence[int]) -> None:
        """These pages hold these keys' bytes now, and will until their memory is handed out."""
        with self._lock:
            for key, page in zip(keys, pages, strict=True):
                before = self._keys[page]
                if before is not None and before != key and self._places[before].page == page:
                    del self._places[before]
                known = self._places.get(key)
                if known is not None and known.page != page:
                    self._keys[known.page] = None
                self._keys[page] = key
                self._places[key] = Place(page, int(self._generations[page]))

    def noted(self, keys: Sequence[bytes], host_indices: torch.Tensor) -> None:
        """`put` for token slots, int64 ``[len(keys) * page_size]``."""
        self.put(keys, page_numbers(host_indices, len(host_indices) // len(keys)).tolist())

    def handed_out(self, pages: np.ndarray[Any, np.dtype[np.int64]]) -> None:
        """The memory of these pages is about to be written. Scheduler thread."""
        self._generations[pages] += 1

    def clear(self) -> None:
        """Nothing that is here may be used any more: a flush, other weights."""
        with self._lock:
            self._generations += 1
            self._places.clear()
            self._keys = [None] * len(self._keys)

    def find(self, keys: Sequence[bytes]) -> list[Place | None]:
        """Where each page is; None for one that is not here."""
        found: list[Place | None] = []
        for key in keys:
            place = self._places.get(key)
            found.append(place if place is not None and self.holds(place) else None)
        return found

    def holds(self, place: Place) -> bool:
        """Whether the page's memory has not been handed out since."""
        return bool(self._generations[place.page] == place.generation)

    def views(self, place: Place) -> list[memoryview]:
        """The page's pieces in the pool itself."""
        return [
            self.memory[row.start + place.page * row.stride :][: row.size] for row in self._rows
        ]

    def check(self) -> None:
        """Every key names one page and every page one key."""
        with self._lock:
            assert len(self._places) <= len(self._keys)
            for key, place in self._places.items():
                assert self._keys[place.page] == key, (key.hex(), place)


class OpenedPages:
    """Some pages in the host pool, the others read from the store."""

    def __init__(
        self, host: HostPages, places: Sequence[Place | None], stored: StoredPages | None
    ) -> None:
        """`stored` has the pages without a place, in their order; None where there is none."""
        self._host = host
        self._places = places
        self._stored = stored
        rest = iter(stored.views if stored is not None else ())
        self.views: list[Sequence[memoryview] | None] = [
            next(rest) if place is None else host.views(place) for place in places
        ]

    def unchanged(self) -> Sequence[bool]:
        return [place is None or self._host.holds(place) for place in self._places]

    def release(self) -> None:
        stored, self._stored = self._stored, None
        if stored is not None:
            stored.release()


class HostPageSource:
    """A ``PageSource``: from the host pool what is there, the rest from the store."""

    def __init__(self, host: HostPages, stored: StorePageSource) -> None:
        self._host = host
        self._stored = stored
        self._lock = threading.Lock()
        self.pages_from_host = 0

    def lookup(self, hashes: Sequence[bytes]) -> Sequence[bool]:
        here = [place is not None for place in self._host.find(hashes)]
        if all(here):
            return here
        stored = self._stored.lookup(hashes)
        return [one or other for one, other in zip(here, stored, strict=True)]

    def at_hand(self, hashes: Sequence[bytes]) -> bool:
        return all(place is not None for place in self._host.find(hashes))

    def open(self, hashes: Sequence[bytes]) -> OpenedPages:
        places = self._host.find(hashes)
        rest = [key for key, place in zip(hashes, places, strict=True) if place is None]
        opened = OpenedPages(self._host, places, self._stored.open(rest) if rest else None)
        with self._lock:
            self.pages_from_host += len(hashes) - len(rest)
        return opened


def rows_of(pool: Any, base: int) -> list[PieceRow] | None:
    """A page's pieces as SGLang's pools lay them out; None where that is not one row a piece."""
    size = int(pool.page_size)
    count = int(pool.size) // size
    if count < 2:
        return None
    tokens = torch.tensor([0, size, (count - 1) * size], dtype=torch.int64)
    slots = (tokens[:, None] + torch.arange(size)[None, :]).flatten()
    addresses, sizes = pool.get_page_buffer_meta(slots)
    pieces = len(addresses) // 3
    rows = []
    for at in range(pieces):
        first, second, last = addresses[at::pieces]
        if last - first != (second - first) * (count - 1):
            return None
        rows.append(PieceRow(first - base, second - first, sizes[at]))
    return rows


def watch_host_pool(pool: Any) -> HostPages | None:
    """Follow a host pool from now on; None for one whose pages can move or lie apart.

    SGLang has no seam at a host pool's allocation, so the methods of this one pool are wrapped.
    """
    if type(pool) not in POOLS or pool.shared_allocation_domain is not None or pool.dcp_size != 1:
        return None
    memory = pool_memory(pool)
    if len(memory) != 1:
        return None
    base, size = memory[0]
    rows = rows_of(pool, base)
    if rows is None:
        return None
    whole = memoryview((ctypes.c_ubyte * size).from_address(base)).cast("B")
    pages = HostPages(whole, rows, int(pool.size) // int(pool.page_size))
    alloc, clear = pool.alloc, pool.clear

    def watched_alloc(need_size: int, *args: Any, **kwargs: Any) -> torch.Tensor | None:
        taken: torch.Tensor | None = alloc(need_size, *args, **kwargs)
        if taken is not None and len(taken):
            pages.handed_out(page_numbers(taken, pool.page_size))
        return taken

    def watched_clear() -> None:
        pages.clear()
        clear()

    pool.alloc, pool.clear = watched_alloc, watched_clear
    return pages


def page_numbers(host_indices: torch.Tensor, page_size: int) -> np.ndarray[Any, np.dtype[np.int64]]:
    """The pages of whole pages' token slots (int64 ``[token_count]``)."""
    numbers: np.ndarray[Any, np.dtype[np.int64]] = (
        host_indices[::page_size].cpu().numpy() // page_size
    )
    return numbers
