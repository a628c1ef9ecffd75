"""The short way between workers of one host: the reader copies from the server's memory itself.

``process_vm_readv(2)`` needs the same user and the kernel's leave to trace; where either is
missing, or the two do not share a host, a probe in the server's memory is not found and pages take
the socket. Nothing here trusts an address: a wrong one is a failed copy, never a fault.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import accumulate

import numpy as np

from symphony_sglang.wire.transfer_protocol import FETCH_BYTES_MAX, LocalAddress

# The kernel's bound on the pieces of one call (IOV_MAX).
PIECES_PER_CALL = 1024
# Below this, waking another thread takes longer than its half of the copy.
SPLIT_BYTES_MIN = 2 << 20
Piece = tuple[int, int]


class _Vector(ctypes.Structure):
    _fields_ = (("base", ctypes.c_void_p), ("size", ctypes.c_size_t))


_libc = ctypes.CDLL(None, use_errno=True)
_readv = getattr(_libc, "process_vm_readv", None)
if _readv is not None:
    _readv.restype = ctypes.c_ssize_t
    _readv.argtypes = [
        ctypes.c_int,
        ctypes.POINTER(_Vector),
        ctypes.c_ulong,
        ctypes.POINTER(_Vector),
        ctypes.c_ulong,
        ctypes.c_ulong,
    ]


def address_of(view: memoryview) -> int:
    """Where a contiguous view's bytes are; it may be read-only."""
    if view.readonly:
        return int(np.frombuffer(view, np.uint8).ctypes.data)
    return ctypes.addressof(ctypes.c_char.from_buffer(view))  # in a quarter of the time


def my_address(probe: memoryview) -> LocalAddress:
    return LocalAddress(os.getpid(), os.getuid(), address_of(probe))


def holds_probe(local: LocalAddress, probe: bytes) -> bool:
    """Whether that process, of the same user on this host, holds `probe` where it says."""
    if _readv is None or local.user != os.getuid():
        return False
    found = bytearray(len(probe))
    return copy_from(local.process, [(local.address, len(probe))], [memoryview(found)]) and (
        bytes(found) == probe
    )


def _vectors(pieces: Sequence[Piece]) -> ctypes.Array[_Vector]:
    # By way of an array: one Python object a field takes as long as the copy of a small page.
    raw = np.array(pieces, dtype=np.uint64).tobytes()
    return (_Vector * len(pieces)).from_buffer_copy(raw)


def copy_from(process: int, remote: Sequence[Piece], targets: Sequence[memoryview]) -> bool:
    """Copy `remote` pieces of another process, one after the other, into `targets`.

    False where the kernel refuses, an address is not readable, or the sizes differ; the targets
    then hold no promise.
    """
    if _readv is None or any(not 0 < address < 1 << 63 for address, _ in remote):
        return False
    local = [(address_of(view), len(view)) for view in targets]
    if sum(size for _, size in remote) != sum(size for _, size in local):
        return False
    for theirs, mine in _calls(remote, local):
        total = sum(size for _, size in mine)
        try:
            count = _readv(process, _vectors(mine), len(mine), _vectors(theirs), len(theirs), 0)
        except (ctypes.ArgumentError, OverflowError):
            return False
        if count != total:
            return False
    return True


def pair_pieces(remote: Sequence[Piece], local: Sequence[Piece]) -> list[tuple[Piece, Piece]]:
    """Two lists of as many bytes, cut at each other's ends: (theirs, mine) pieces of one size."""
    pairs: list[tuple[Piece, Piece]] = []
    here = 0
    there = 0
    here_done = there_done = 0
    while here < len(local) and there < len(remote):
        mine, theirs = local[here], remote[there]
        size = min(mine[1] - here_done, theirs[1] - there_done)
        pairs.append(((theirs[0] + there_done, size), (mine[0] + here_done, size)))
        here_done, there_done = here_done + size, there_done + size
        if here_done == mine[1]:
            here, here_done = here + 1, 0
        if there_done == theirs[1]:
            there, there_done = there + 1, 0
    return pairs


def _calls(
    remote: Sequence[Piece], local: Sequence[Piece]
) -> list[tuple[list[Piece], list[Piece]]]:
    """What one call each takes of both lists."""
    if max(len(remote), len(local)) <= PIECES_PER_CALL:
        return [(list(remote), list(local))]  # the kernel cuts them at each other's ends itself
    pairs = pair_pieces(remote, local)
    return [
        ([pair[0] for pair in group], [pair[1] for pair in group])
        for at in range(0, len(pairs), PIECES_PER_CALL)
        for group in (pairs[at : at + PIECES_PER_CALL],)
    ]


def halves(
    remote: Sequence[Piece], targets: Sequence[memoryview]
) -> tuple[tuple[Sequence[Piece], Sequence[memoryview]], ...]:
    """A copy as two of about as many bytes, cut where a target and a piece end together; as one
    where it is small, or there is no such place."""
    sizes = list(accumulate(map(len, targets), initial=0))
    ends = list(accumulate((size for _, size in remote), initial=0))
    total = sizes[-1]
    cuts = set(sizes[1:-1]).intersection(ends)
    if total < SPLIT_BYTES_MIN or not cuts:
        return ((remote, targets),)
    cut = min(cuts, key=lambda end: abs(2 * end - total))
    here, there = sizes.index(cut), ends.index(cut)
    return (remote[:there], targets[:here]), (remote[there:], targets[here:])


class LocalReader:
    """Copies out of the memory of one process of this host, half of it in a thread of its own:
    the kernel looks every page of memory up on the way, which leaves the memory itself idle."""

    way = "local"
    step_bytes = FETCH_BYTES_MAX
    # A copy from memory to memory, as one within this process: no wire that could change a byte.
    summed = False

    def __init__(self, process: int) -> None:
        self._process = process
        self._helper = ThreadPoolExecutor(1, "symphony-local-copy")

    def copy(self, remote: Sequence[Piece], targets: Sequence[memoryview], until: float) -> bool:
        own, *other = halves(remote, targets)
        futures = [self._helper.submit(copy_from, self._process, *half) for half in other]
        results = [copy_from(self._process, *own), *(future.result() for future in futures)]
        return all(results)

    def abort(self) -> None:
        """A copy within one host does not wait for anybody."""

    def close(self) -> None:
        """Idempotent."""
        self._helper.shutdown(wait=True)
