"""Pages in memory, as source and sink of a transfer, with faults on demand."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence


class MemoryOpenPages:
    """Views of a dictionary's pages; a page replaced or removed meanwhile counts as changed."""

    def __init__(self, owner: MemoryPages, hashes: Sequence[bytes]) -> None:
        self._owner = owner
        self._hashes = list(hashes)
        self._bodies = [owner.pages.get(key) for key in self._hashes]
        self.views: list[Sequence[memoryview] | None] = [
            None if body is None else owner.cut(memoryview(body)) for body in self._bodies
        ]
        self.released = False

    def unchanged(self) -> Sequence[bool]:
        return [
            body is None or self._owner.pages.get(key) is body
            for key, body in zip(self._hashes, self._bodies, strict=True)
        ]

    def release(self) -> None:
        if not self.released:
            self.released = True
            self._owner.open_count -= 1


class MemoryReservation:
    def __init__(self, owner: MemoryPages, hashes: Sequence[bytes]) -> None:
        self._owner = owner
        self._hashes = list(hashes)
        self._bodies = [bytearray(owner.page_bytes) for _ in hashes]
        self.buffers = [memoryview(body) for body in self._bodies]
        self._ended = False

    def _end(self) -> None:
        assert not self._ended, "a reservation ends once"
        self._ended = True
        self._owner.reserved_pages -= len(self._hashes)

    def commit(self, lengths: Sequence[int | None]) -> Sequence[bool]:
        self._end()
        stored = []
        for key, body, length in zip(self._hashes, self._bodies, lengths, strict=True):
            fits = length is not None and len(self._owner.pages) < self._owner.pages_max
            if fits:
                self._owner.pages[key] = bytes(memoryview(body)[:length])
            stored.append(fits)
        return stored

    def abort(self) -> None:
        self._end()


class MemoryPages:
    """A bounded dictionary of pages that is a ``PageSource`` and a ``PageSink``.

    `pieces` cuts every page into so many views, as a host pool with K and V apart does.
    """

    def __init__(
        self,
        page_bytes: int,
        pages: Mapping[bytes, bytes] | None = None,
        *,
        pages_max: int = 1 << 20,
        reserved_max: int = 1 << 20,
        pieces: int = 1,
    ) -> None:
        self.page_bytes = page_bytes
        self.pages: dict[bytes, bytes] = dict(pages or {})
        self.pages_max = pages_max
        self.reserved_max = reserved_max
        self.reserved_pages = 0
        self.open_count = 0
        self._pieces = pieces
        # Cleared by a test to make the source stall.
        self.may_open = threading.Event()
        self.may_open.set()

    def cut(self, body: memoryview) -> list[memoryview]:
        size = max(1, -(-len(body) // self._pieces))
        return [body[at : at + size] for at in range(0, len(body), size)]

    def lookup(self, hashes: Sequence[bytes]) -> Sequence[bool]:
        return [key in self.pages for key in hashes]

    def at_hand(self, hashes: Sequence[bytes]) -> bool:
        return False

    def open(self, hashes: Sequence[bytes]) -> MemoryOpenPages:
        self.may_open.wait()
        self.open_count += 1
        return MemoryOpenPages(self, hashes)

    def present(self, hashes: Sequence[bytes]) -> Sequence[bool]:
        return self.lookup(hashes)

    def reserve(self, hashes: Sequence[bytes]) -> MemoryReservation | None:
        if self.reserved_pages + len(hashes) > self.reserved_max:
            return None
        self.reserved_pages += len(hashes)
        return MemoryReservation(self, hashes)

    def check(self) -> None:
        """Nothing is reserved or open."""
        assert self.reserved_pages == 0, self.reserved_pages
        assert self.open_count == 0, self.open_count
