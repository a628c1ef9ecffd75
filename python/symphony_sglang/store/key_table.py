"""Which slot a key lies in: open addressing over flat arrays, looked up a batch at a time.

A Python dict of a million 32-byte keys costs 160 bytes a key and misses the processor's cache three
times for each; this table costs 32 bytes a slot for the keys and 16 to 32 for the cells. A cell is
31 bits of the key's first word above 32 bits of slot number, so that most cells of another key are
told apart without a look at the key.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt

KEY_BYTES = 32
_WORDS = KEY_BYTES // 8
# Cells looked at together: beyond it lie less than 1 in 100 keys of a half-full table.
_WINDOW = 8
_NEAR = np.arange(_WINDOW, dtype=np.int64)
_EMPTY = -1
_TAG_SHIFT = 33  # the tag is the first word's top bits; the home cell is its low ones
_TAG_SHIFT_WORD = np.uint64(_TAG_SHIFT)
# From so many keys on, inserting them together beats one by one.
_MANY = 16
_SLOT_MASK = (1 << 32) - 1


class KeyTable:
    """Linear probing, at most half full, deletion by shifting back; keys are uniform digests.

    One writer at a time (under the store's lock). `version` is odd while it writes, so that a
    reader without the lock knows when to look again.
    """

    def __init__(self, slot_count: int) -> None:
        size = 1 << max(4, (2 * slot_count - 1).bit_length())
        self._mask = size - 1
        self._table = np.full(size, _EMPTY, np.int64)
        self._cells = memoryview(self._table)  # type: ignore[arg-type]
        self.words = np.zeros((slot_count, _WORDS), np.uint64)
        self._flat = self.words.reshape(-1)
        self._bytes = memoryview(self.words).cast("B")  # type: ignore[arg-type]
        self._first_words = memoryview(self._flat)  # type: ignore[arg-type]
        self._count = 0
        self.version = 0

    def __len__(self) -> int:
        return self._count

    def __contains__(self, key: bytes) -> bool:
        return self.get(key) is not None

    def __iter__(self) -> Iterator[bytes]:
        """Every key in the table, in no order."""
        for slot in self.slots().tolist():
            yield self.key_at(slot)

    def slots(self) -> npt.NDArray[np.int64]:
        """The slots of all keys in the table."""
        present: npt.NDArray[np.int64] = self._table[self._table != _EMPTY] & _SLOT_MASK
        return present

    def key_at(self, slot: int) -> bytes:
        return bytes(self._bytes[slot * KEY_BYTES : (slot + 1) * KEY_BYTES])

    def keys_at(self, slots: npt.NDArray[np.int64]) -> list[bytes]:
        joined = self.words[slots].tobytes()
        return [joined[at : at + KEY_BYTES] for at in range(0, len(joined), KEY_BYTES)]

    def set_keys(self, first_slot: int, keys: Sequence[bytes]) -> None:
        """Say which keys neighbouring slots hold; they are found only once inserted."""
        raw = np.frombuffer(b"".join(keys), np.uint64).reshape(len(keys), _WORDS)
        self.words[first_slot : first_slot + len(keys)] = raw

    def get(self, key: bytes) -> int | None:
        first = int.from_bytes(key[:8], "little")
        tag, at = first >> _TAG_SHIFT, first & self._mask
        while (cell := self._cells[at]) != _EMPTY:
            slot = cell & _SLOT_MASK
            if cell >> 32 == tag and self._bytes[slot * KEY_BYTES : (slot + 1) * KEY_BYTES] == key:
                return slot
            at = (at + 1) & self._mask
        return None

    def find(self, raw: bytes) -> npt.NDArray[np.int64]:
        """The slot of each key in `raw`, the keys one after the other; -1 where there is none."""
        wanted = np.frombuffer(raw, np.uint64).reshape(-1, _WORDS)
        first = wanted[:, 0]
        home = first.astype(np.int64)[:, None] + _NEAR
        near = self._table.take(home & self._mask)
        same = near >> 32 == (first >> np.uint64(_TAG_SHIFT)).astype(np.int64)[:, None]
        cells = near[np.arange(len(near)), same.argmax(axis=1)]
        slots = np.where(cells < 0, 0, cells & _SLOT_MASK)
        good = (self.words.take(slots, axis=0) == wanted).all(axis=1) & (cells >= 0)
        if not good.all():
            slots[~good] = _EMPTY
            # Either the run of keys is longer than the window, or two keys share their tag.
            unsure = ~good & ((near[:, -1] != _EMPTY) | same.any(axis=1))
            for at in np.flatnonzero(unsure).tolist():
                slot = self.get(raw[at * KEY_BYTES : (at + 1) * KEY_BYTES])
                slots[at] = _EMPTY if slot is None else slot
        return slots

    def insert(self, slots: Sequence[int]) -> None:
        """Make the keys of these slots findable; none of them may be in the table already."""
        self.version += 1
        if len(slots) >= _MANY:
            self._fill(np.asarray(slots, np.int64))
            self._count += len(slots)
            self.version += 1
            return
        cells, words, mask = self._cells, self._first_words, self._mask
        for slot in slots:
            first = words[slot * _WORDS]
            at = first & mask
            while cells[at] != _EMPTY:
                at = (at + 1) & mask
            cells[at] = first >> _TAG_SHIFT << 32 | slot
        self._count += len(slots)
        self.version += 1

    def load(self, slots: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Insert many at once into an empty table; returns slots whose key came twice, left out."""
        _, kept = np.unique(self.words[slots, 0], return_index=True)
        twice = np.ones(len(slots), bool)
        twice[kept] = False
        self._fill(slots[kept])
        self._count = len(kept)
        doubles = []
        for slot in slots[twice].tolist():
            if self.get(self.key_at(slot)) is None:  # only the first word was the same
                self.insert([slot])
            else:
                doubles.append(slot)
        return np.array(doubles, np.int64)

    def _fill(self, slots: npt.NDArray[np.int64]) -> None:
        """Write the cells of keys that are not in the table, all at once."""
        firsts = self._flat[slots * _WORDS]
        left = (firsts >> _TAG_SHIFT_WORD).view(np.int64) << 32 | slots
        at = firsts.view(np.int64) & self._mask
        while len(left):
            # Of those that want the same empty cell the last one written gets it.
            free = self._table[at] == _EMPTY
            self._table[at[free]] = left[free]
            lost = self._table[at] != left
            left, at = left[lost], (at[lost] + 1) & self._mask

    def discard(self, slot: int) -> None:
        """Take the key of a slot out; it must be in the table."""
        self.version += 1
        cells, words, mask = self._cells, self._first_words, self._mask
        hole = words[slot * _WORDS] & mask
        while cells[hole] & _SLOT_MASK != slot:
            hole = (hole + 1) & mask
        at = hole
        while (follower := cells[at := (at + 1) & mask]) != _EMPTY:
            home = words[(follower & _SLOT_MASK) * _WORDS] & mask
            # A follower may fill the hole unless its home lies between the two.
            if (at - home) & mask >= (at - hole) & mask:
                cells[hole] = follower
                hole = at
        cells[hole] = _EMPTY
        self._count -= 1
        self.version += 1
