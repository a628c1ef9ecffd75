"""Pages for the store's tests: memory that direct I/O takes, contents that follow from the key."""

from __future__ import annotations

import hashlib
import mmap
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from symphony_sglang.store import Namespace, PageStore, Piece, PlacedPage, StoreSettings, piece_of

PAGE_BYTES = 64 * 1024
SLOT_BYTES = PAGE_BYTES + 4096
NAMESPACE = Namespace("tiny", "r1", "bfloat16", "page_first_direct", 16, PAGE_BYTES)
SEGMENT_SLOTS = 16
SEGMENT_BYTES = SEGMENT_SLOTS * SLOT_BYTES


def settings_of(segments: int = 4, **options) -> StoreSettings:
    options.setdefault("interval_seconds", 0.02)
    options.setdefault("io_threads", 4)
    options.setdefault("free_floor_share", 0.0)
    return StoreSettings(
        capacity_bytes=segments * SEGMENT_BYTES, segment_bytes=SEGMENT_BYTES, **options
    )


def open_store(directory: Path, segments: int = 4, namespace: Namespace = NAMESPACE, **options):
    parts = {name: options.pop(name) for name in ("clock", "disk") if name in options}
    return PageStore(directory, namespace, settings_of(segments, **options), **parts)


def key_of(number: int, salt: str = "") -> bytes:
    return hashlib.sha256(f"{salt}{number}".encode()).digest()


def content_of(key: bytes, length: int = PAGE_BYTES) -> np.ndarray:
    seed = int.from_bytes(key[:8], "little")
    return np.random.default_rng(seed).integers(0, 256, length, dtype=np.uint8)


class Pool:
    """Aligned memory for `count` pages, each with a K and a V half."""

    def __init__(self, count: int, page_bytes: int = PAGE_BYTES, misaligned: int = 0) -> None:
        stride = -(-page_bytes // 4096) * 4096 + 4096
        self.memory = mmap.mmap(-1, count * stride + 4096)
        self.array = np.frombuffer(self.memory, np.uint8)
        self._address, _ = piece_of(self.memory)
        self._stride, self._shift = stride, misaligned
        self.page_bytes = page_bytes

    def page(self, at: int, length: int | None = None) -> np.ndarray:
        start = at * self._stride + self._shift
        return self.array[start : start + (self.page_bytes if length is None else length)]

    def pieces(self, at: int, length: int | None = None) -> tuple[Piece, ...]:
        length = self.page_bytes if length is None else length
        start = self._address + at * self._stride + self._shift
        half = length // 2
        return ((start, half), (start + half, length - half)) if half else ((start, length),)

    def fill(self, keys: Sequence[bytes], length: int | None = None) -> list[PlacedPage]:
        """Put the content of each key into the pool, ready to write."""
        pages = []
        for at, key in enumerate(keys):
            page = self.page(at, length)
            page[:] = content_of(key, len(page))
            pages.append(PlacedPage(key, self.pieces(at, length)))
        return pages

    def read(self, store: PageStore, keys: Sequence[bytes], length: int | None = None) -> list:
        """One entry a key: the bytes where it hit, None where not."""
        self.array[:] = 0xEE
        result = store.read(keys, [self.pieces(at, length) for at in range(len(keys))])
        assert result.hold is None
        return [
            self.page(at, length).copy() if outcome.value == "hit" else None
            for at, outcome in enumerate(result.outcomes)
        ]


def assert_served(store: PageStore, pool: Pool, keys: Sequence[bytes]) -> None:
    for key, page in zip(keys, pool.read(store, keys), strict=True):
        assert page is not None, key.hex()
        np.testing.assert_array_equal(page, content_of(key))


class ManualClock:
    """Time that moves when the test says so."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now

    def unix(self) -> float:
        return 1_700_000_000.0 + self.now
