"""What a worker's feed has said so far: the mirror of residency, of sessions, and the replay.

Pure state behind the feed server. The mirror lets a snapshot belong to a sequence without asking
the radix tree, which offers no enumeration.
"""

from __future__ import annotations

from array import array
from collections import OrderedDict, deque
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice

from symphony_sglang.core.levels import Level
from symphony_sglang.wire.feed import LEVEL_OF_MEDIUM, SessionChange

_BITS = {Level.DEVICE: 1, Level.HOST: 2}
_SLICE = 8192


class ResidencyMirror:
    """Which pages the device and host levels hold, by event hash.

    NVMe is left out: the page store enumerates itself. Bounded by `pages_max`, which the pools'
    own sizes keep out of reach; beyond it the oldest page is forgotten and counted.
    """

    def __init__(self, pages_max: int = 1 << 24) -> None:
        assert pages_max > 0
        self._pages_max = pages_max
        self._bits: dict[int, int] = {}
        self.overflows = 0

    def __len__(self) -> int:
        return len(self._bits)

    def stored(self, level: Level, hashes: Iterable[int]) -> None:
        bit, bits = _BITS[level], self._bits
        for page in hashes:
            bits[page] = bits.get(page, 0) | bit
        while len(bits) > self._pages_max:
            del bits[next(iter(bits))]
            self.overflows += 1

    def removed(self, level: Level, hashes: Iterable[int]) -> None:
        keep, bits = ~_BITS[level], self._bits
        for page in hashes:
            left = bits.get(page, 0) & keep
            if left:
                bits[page] = left
            else:
                bits.pop(page, None)

    def cleared(self) -> None:
        self._bits.clear()

    def level_of(self, medium: str | None) -> Level | None:
        """The level that an event is about, None for one that is not mirrored."""
        # Not through str(): SGLang's media are an Enum that equals its text but does not print it.
        level = LEVEL_OF_MEDIUM.get(medium or "GPU")
        return level if level in _BITS else None

    def pages(self, level: Level) -> array[int]:
        """The hashes on one level, in slices so that other threads get a turn in between."""
        bit, found = _BITS[level], array("q")
        items = iter(self._bits.items())
        while part := list(islice(items, _SLICE)):
            found.extend([page for page, bits in part if bits & bit])
        return found

    def check(self) -> None:
        assert len(self._bits) <= self._pages_max
        assert all(bits in (1, 2, 3) for bits in self._bits.values())


class SessionMirror:
    """The newest change of each session that is still here.

    The session table that feeds it is bounded; beyond `sessions_max` the least recently changed
    session is dropped, and counted.
    """

    def __init__(self, sessions_max: int = 65_536) -> None:
        assert sessions_max > 0
        self._sessions_max = sessions_max
        self._changes: OrderedDict[tuple[str, str | None, str | None], SessionChange] = (
            OrderedDict()
        )
        self.overflows = 0

    def __len__(self) -> int:
        return len(self._changes)

    def apply(self, change: SessionChange) -> None:
        if change.gone:
            self._changes.pop(change.key, None)
            return
        self._changes[change.key] = change
        self._changes.move_to_end(change.key)
        if len(self._changes) > self._sessions_max:
            self._changes.popitem(last=False)
            self.overflows += 1

    def sessions(self) -> list[SessionChange]:
        return list(self._changes.values())

    def check(self) -> None:
        assert len(self._changes) <= self._sessions_max
        assert not any(change.gone for change in self._changes.values())


class ReplayBuffer:
    """The newest batches by sequence, without a gap; bounded in number and bytes, oldest go."""

    def __init__(self, batches_max: int, bytes_max: int) -> None:
        assert batches_max > 0
        assert bytes_max > 0
        self._batches_max = batches_max
        self._bytes_max = bytes_max
        self._batches: deque[tuple[int, bytes]] = deque()
        self.bytes = 0

    def __len__(self) -> int:
        return len(self._batches)

    def append(self, sequence: int, payload: bytes) -> None:
        if self._batches and sequence != self._batches[-1][0] + 1:
            self.clear()
        self._batches.append((sequence, payload))
        self.bytes += len(payload)
        while self._batches and (
            len(self._batches) > self._batches_max or self.bytes > self._bytes_max
        ):
            self.bytes -= len(self._batches.popleft()[1])

    def since(self, sequence: int) -> Sequence[tuple[int, bytes]]:
        """The buffered batches from `sequence` on; a first one that is later says what is lost."""
        if not self._batches:
            return ()
        skip = max(0, sequence - self._batches[0][0])
        return tuple(islice(self._batches, skip, None))

    def clear(self) -> None:
        self._batches.clear()
        self.bytes = 0

    def check(self) -> None:
        assert len(self._batches) <= self._batches_max
        assert self.bytes == sum(len(payload) for _, payload in self._batches) <= self._bytes_max
        sequences = [sequence for sequence, _ in self._batches]
        first = sequences[0] if sequences else 0
        assert sequences == list(range(first, first + len(sequences)))


def chunks(hashes: array[int], size: int) -> Iterator[array[int]]:
    for start in range(0, len(hashes), size):
        yield hashes[start : start + size]
