"""Moving bytes between a segment and caller memory: straight where aligned, by bounce where not."""

from __future__ import annotations

import ctypes
import errno
import os
from collections.abc import Sequence
from functools import lru_cache

from symphony_sglang.store.disk import BlockFile

# (address, bytes) of memory that the caller keeps alive and unmoved until the call returns.
Piece = tuple[int, int]


@lru_cache(maxsize=1024)
def _array_type(size: int) -> type[ctypes.Array[ctypes.c_ubyte]]:
    return ctypes.c_ubyte * size


def view_of(piece: Piece) -> memoryview:
    """The memory of a piece as a writable view; nothing checks that it is the caller's own."""
    address, size = piece
    return memoryview(_array_type(size).from_address(address)).cast("B")


class Regions:
    """Memory that pages come from and go to again and again: views of it are cheap to cut."""

    def __init__(self) -> None:
        self._regions: list[tuple[int, int, memoryview]] = []

    def add(self, address: int, size: int) -> None:
        self._regions.append((address, address + size, view_of((address, size))))

    def view(self, piece: Piece) -> memoryview:
        address, size = piece
        for start, end, whole in self._regions:
            if start <= address and address + size <= end:
                return whole[address - start : address - start + size]
        return view_of(piece)

    def views(self, pages: Sequence[Sequence[Piece]]) -> tuple[list[list[memoryview]], int]:
        """The memory of each page's pieces, and all addresses and sizes OR-ed (see ``fits``)."""
        start, end, whole = self._regions[0] if self._regions else (0, 0, memoryview(b""))
        bits = 0
        views = []
        for pieces in pages:
            memories = []
            for address, size in pieces:
                bits |= address | size
                at = address - start
                if at >= 0 and address + size <= end:
                    memories.append(whole[at : at + size])
                else:
                    memories.append(self.view((address, size)))
            views.append(memories)
        return views, bits


def piece_of(buffer: object) -> Piece:
    """The piece of a writable, contiguous buffer (numpy array, bytearray, mmap)."""
    view = memoryview(buffer).cast("B")  # type: ignore[arg-type]
    return ctypes.addressof(ctypes.c_ubyte.from_buffer(view)), len(view)


def is_aligned(pieces: Sequence[Piece], alignment: int) -> bool:
    """Whether direct I/O takes these pieces as they are."""
    if alignment == 1:
        return True
    bits = 0
    for address, size in pieces:
        bits |= address | size
    return not bits & (alignment - 1)


def bytes_of(pieces: Sequence[Piece]) -> int:
    """Bytes of all pieces together."""
    total = 0
    for _, size in pieces:
        total += size
    return total


def read_vector(file: BlockFile, offset: int, memories: Sequence[memoryview]) -> None:
    """Fill `memories` from `offset` on; raises OSError where the file ends or the disk fails."""
    left = list(memories)
    while left:
        count = file.preadv(left, offset)
        if count <= 0:
            raise OSError(errno.EIO, "the segment ends before the page")
        offset += count
        left = _after(left, count)


def write_vector(file: BlockFile, offset: int, memories: Sequence[memoryview]) -> None:
    """Write all of `memories` at `offset`; raises OSError where the disk fails."""
    left = list(memories)
    while left:
        count = file.pwritev(left, offset)
        if count <= 0:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        offset += count
        left = _after(left, count)


def _after(memories: list[memoryview], count: int) -> list[memoryview]:
    for at, memory in enumerate(memories):
        if count < len(memory):
            return [memory[count:], *memories[at + 1 :]] if count else memories[at:]
        count -= len(memory)
    return []


def read_bounced(
    file: BlockFile, offset: int, memories: Sequence[memoryview], bounce: memoryview
) -> None:
    """As ``read_vector`` for any offset, address and length, through the aligned `bounce`."""
    alignment = max(file.alignment, 1)
    total = sum(len(memory) for memory in memories)
    window = len(bounce) // alignment * alignment - alignment
    moved = 0
    while moved < total:
        start = offset + moved
        base = start - start % alignment
        size = min(window, total - moved)
        span = -(-(start + size - base) // alignment) * alignment
        read_vector(file, base, [bounce[:span]])
        source = bounce[start - base : start - base + size]
        for memory, at, taken in _cut(memories, moved, size):
            memory[:] = source[at : at + taken]
        moved += size


def write_bounced(
    file: BlockFile, offset: int, memories: Sequence[memoryview], bounce: memoryview
) -> None:
    """As ``write_vector`` at an aligned `offset`; the last block is padded with zeros."""
    alignment = max(file.alignment, 1)
    total = sum(len(memory) for memory in memories)
    window = len(bounce) // alignment * alignment
    moved = 0
    while moved < total:
        size = min(window, total - moved)
        for memory, at, taken in _cut(memories, moved, size):
            bounce[at : at + taken] = memory
        span = -(-size // alignment) * alignment
        bounce[size:span] = bytes(span - size)
        write_vector(file, offset + moved, [bounce[:span]])
        moved += size


def _cut(
    memories: Sequence[memoryview], start: int, size: int
) -> list[tuple[memoryview, int, int]]:
    """The parts of the concatenation's [start, start + size): (view, place in the cut, bytes)."""
    parts: list[tuple[memoryview, int, int]] = []
    at, end = 0, start + size
    for memory in memories:
        low, high = max(start, at), min(end, at + len(memory))
        if low < high:
            parts.append((memory[low - at : high - at], low - start, high - low))
        at += len(memory)
    return parts
