"""Which pages form which chains, and who holds them: the table under `location.LocationIndex`.

A page hash commits to the whole prompt before it, so pages form a forest: one row a page, linked
to the page before it. What a row says of its holders is two integers of three planes of bits, one
bit a worker slot and plane:

- present: on the device | on the host | on NVMe;
- closed: the prompt up to and with this page is, without a gap, on the device | on the device or
  host | on any level.

`closed` is kept up to date by every change, down the chain. Along a chain it can only lose bits,
so a query finds where it does by bisection: some ten look-ups a boundary, not one for each page,
and exact whatever holes eviction, loss or reordering have left. Equal pairs of integers are stored
once, and a row is two 64-bit and four 32-bit columns: about 45 bytes, whoever holds it.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence

import numpy as np

from symphony_sglang.core.page_bisect import NONE, Columns, bisect_ends

ROOT, UNLINKED, FREE = -2, -3, -4  # in the parent column, beside row numbers
EMPTY = 0  # the state of a row that nobody holds
INDEX_SIZE_MIN = 1024
# How many rows an overflow looks at for one to forget before it refuses the new page.
FORGET_LOOKS = 64


class PageTable:
    """Rows of pages with their holders. `width` is how many worker slots a plane has."""

    def __init__(self, width: int, rows_max: int) -> None:
        assert width > 0 < rows_max, (width, rows_max)
        self.width = width
        self.rows_max = rows_max
        self.plane = (1 << width) - 1
        self.full = (1 << 3 * width) - 1
        self.rows = 0
        self.refused = 0  # pages that found no room
        self.forgotten = 0  # rows given up for others
        self.conflicts = 0  # parents that would have closed a circle
        # Key and state of row r at 2r and 2r + 1: a query touches one cache line of a row.
        self._cells = array("q")
        self._parent = array("i")
        self._child = array("i")
        self._next = array("i")
        self._before = array("i")
        self._free = NONE  # free rows are chained through `_next`
        self._index = array("i", [NONE]) * INDEX_SIZE_MIN
        self._mask = INDEX_SIZE_MIN - 1
        self._present = [0]
        self._closed = [0]
        self._references = [0]
        self._state_ids = {(0, 0): EMPTY}
        self._free_states: list[int] = []
        self._drops = 0  # of states, whose numbers then mean something else
        self.counts: dict[int, int] = {}  # bit of `present` -> rows that have it
        self._dead = array("i")  # rows that a mass removal emptied, to be freed bit by bit
        self._hand = 0

    # Holders -----------------------------------------------------------------------------------

    def add(self, hashes: Iterable[int], parent: int | None, bit: int, *, linked: bool) -> None:
        """The holder of `bit` has these pages now; consecutive after `parent` where `linked`.

        Beyond `rows_max`, leaves that no device holds are forgotten; if none is near, the page and
        what follows it is refused. Either way the holder counts as having less than it has.
        """
        if not linked:
            for key in hashes:
                row = self._obtain(key, NONE)
                if row == NONE:
                    self.refused += 1
                else:
                    self._include(row, bit)
            return
        before = ROOT if parent is None else self._obtain(parent, NONE)
        steps: dict[tuple[int, int], int] = {}
        for key in hashes:
            row = NONE if before == NONE else self._obtain(key, before)
            if row == NONE:
                self.refused += 1
                self._release(before)
            else:
                if self._parent[row] == UNLINKED:
                    self._link(row, before)
                self._step(row, before, bit, steps)
            before = row
        self._release(before)  # a parent that nobody holds and that got no child

    def _step(self, row: int, before: int, bit: int, steps: dict[tuple[int, int], int]) -> None:
        """`_include` a row of a chain: the same step from state to state comes again and again.

        `steps` has those since the last state was dropped, by the states of the row and of the one
        before it; a dropped state's number may come to mean something else.
        """
        cells, drops = self._cells, self._drops
        number = cells[2 * row + 1]
        step = (number, cells[2 * before + 1] if before >= 0 else before)
        new = steps.get(step, NONE)
        if new == number:
            return
        apart = self._child[row] != NONE or self._parent[row] != before
        if new == NONE or apart or self._references[number] == 1:
            self._include(row, bit)
            if drops != self._drops:
                steps.clear()
            elif not apart:
                steps[step] = cells[2 * row + 1]
        else:
            cells[2 * row + 1] = new
            self._references[new] += 1
            self._references[number] -= 1
            if self._present[new] != self._present[number]:
                self.counts[bit] = self.counts.get(bit, 0) + 1

    def _include(self, row: int, bit: int) -> None:
        present = self._present[self._cells[2 * row + 1]]
        if not present & bit:
            self._put(row, present | bit)

    def remove(self, hashes: Iterable[int], bit: int) -> None:
        """The holder of `bit` has these pages no more; unknown ones are fine."""
        for key in hashes:
            row = self.find(key)
            if row == NONE:
                continue
            present = self._present[self._cells[2 * row + 1]]
            if present & bit:
                self._put(row, present & ~bit)
                self._release(row)

    def clear(self, slot: int) -> None:
        """All bits of a worker slot go, in one pass over the states and one over the state column.

        Rows left empty are freed by `reclaim`.
        """
        bits = 1 << slot | 1 << slot + self.width | 1 << slot + 2 * self.width
        touched = [number for number, present in enumerate(self._present) if present & bits]
        if not touched:
            return
        remap = np.arange(len(self._present))
        for number in touched:
            pair = (self._present[number] & ~bits, self._closed[number] & ~bits)
            remap[number] = self._intern(pair)
            self._references[self._state_ids[pair]] += self._references[number]
        if len(self._present) > len(remap):  # states made above map to themselves
            remap = np.concatenate([remap, np.arange(len(remap), len(self._present))])
        for plane in range(3):
            self.counts.pop(1 << slot + plane * self.width, None)
        states = np.frombuffer(self._cells, dtype=np.int64)[1::2]
        states[:] = remap[states]
        for number in touched:
            self._drop_state(number)
        child = np.frombuffer(self._child, dtype=np.int32)
        parent = np.frombuffer(self._parent, dtype=np.int32)
        dead = np.flatnonzero((states == EMPTY) & (child == NONE) & (parent != FREE))
        del states, child, parent
        self._dead = array("i", dead.astype(np.int32).tobytes())

    def clear_bit(self, bit: int) -> None:
        """One level of one worker goes: a removal of each of its pages."""
        numbers = [number for number, present in enumerate(self._present) if present & bit]
        states = np.frombuffer(self._cells, dtype=np.int64)[1::2]
        rows = np.flatnonzero(np.isin(states, numbers)).tolist()
        del states
        for row in rows:
            present = self._present[self._cells[2 * row + 1]]
            if present & bit:  # a release above may have freed the row
                self._put(row, present & ~bit)
                self._release(row)

    def reclaim(self, limit: int, keep: int = NONE) -> int:
        """Free up to `limit` rows that `clear` emptied; returns how many are left to look at."""
        dead = self._dead
        for _ in range(min(limit, len(dead))):
            self._release(dead.pop(), keep)
        return len(dead)

    # Reading -----------------------------------------------------------------------------------

    def find(self, key: int) -> int:
        """The row of a page, or NONE."""
        index, mask, cells = self._index, self._mask, self._cells
        place = key & mask
        row = index[place]
        while row != NONE and cells[2 * row] != key:
            place = (place + 1) & mask
            row = index[place]
        return row

    def present(self, key: int) -> int:
        """Bits of `present` of a page; 0 where it is unknown."""
        row = self.find(key)
        return 0 if row == NONE else self._present[self._cells[2 * row + 1]]

    def boundaries(self, hashes: Sequence[int], near: Sequence[int] = ()) -> list[tuple[int, int]]:
        """Where a prompt's holders stop: (pages from the start, `closed` bits that end there).

        In ascending order; together the bits are those of the first page. Pages that lack a link
        get it from `hashes`, which is a prompt's whole chain from its first page. `near` are
        guesses of where holders stop, in ascending order: a right one costs two look-ups, not ten.
        """
        while True:
            columns = Columns(self._index, self._mask, self._cells, self._closed)
            ends = bisect_ends(columns, hashes, near)
            if not self._link_at(hashes, ends[-1][0] if ends else 0):
                return ends

    def _link_at(self, hashes: Sequence[int], end: int) -> bool:
        """Link pages without a link from `end` on, as far as they follow on each other."""
        before = ROOT if end == 0 else self.find(hashes[end - 1])
        linked = False
        while end < len(hashes) and before != NONE:
            row = self.find(hashes[end])
            if row == NONE or self._parent[row] != UNLINKED or not self._link(row, before):
                break
            linked = True
            before = row
            end += 1
        return linked

    @property
    def states(self) -> int:
        return len(self._state_ids)

    @property
    def reclaimable(self) -> int:
        return len(self._dead)

    @property
    def table_bytes(self) -> int:
        """Bytes of the columns and of the index; states are extra, a few hundred bytes each."""
        columns = (self._cells, self._parent, self._child, self._next, self._before)
        sizes = [column.buffer_info()[1] * column.itemsize for column in (*columns, self._index)]
        return sum(sizes)

    # Rows --------------------------------------------------------------------------------------

    def _obtain(self, key: int, keep: int) -> int:
        """The row of a page, made where there is none; NONE where there is no room for it."""
        row = self.find(key)
        if row != NONE:
            return row
        if self.rows >= self.rows_max and not self._forget_one(keep):
            return NONE
        row = self._free
        if row == NONE:
            row = len(self._parent)
            self._cells.append(key)
            self._cells.append(EMPTY)
            self._parent.append(UNLINKED)
            self._child.append(NONE)
            self._next.append(NONE)
            self._before.append(NONE)
        else:
            self._free = self._next[row]
            self._cells[2 * row] = key
            self._parent[row] = UNLINKED
            self._next[row] = NONE
        self._references[EMPTY] += 1
        self.rows += 1
        if 2 * self.rows > len(self._index):
            self._grow()  # the row has its key already and is entered with the others
        else:
            self._enter(row, key)
        return row

    def _enter(self, row: int, key: int) -> None:
        place = key & self._mask
        while self._index[place] != NONE:
            place = (place + 1) & self._mask
        self._index[place] = row

    def _grow(self) -> None:
        size = 2 * len(self._index)
        self._index = array("i", [NONE]) * size
        self._mask = size - 1
        for row, parent in enumerate(self._parent):
            if parent != FREE:
                self._enter(row, self._cells[2 * row])

    def _link(self, row: int, parent: int) -> bool:
        """Put a row behind another; False where that would close a circle (a false parent)."""
        above = parent if self._child[row] != NONE else NONE
        while above >= 0 and above != row:
            above = self._parent[above]
        if row in (above, parent):
            self.conflicts += 1
            return False
        self._parent[row] = parent
        if parent >= 0:
            sibling = self._child[parent]
            self._next[row] = sibling
            if sibling != NONE:
                self._before[sibling] = row
            self._child[parent] = row
        if self._cells[2 * row + 1] != EMPTY or self._child[row] != NONE:
            self._put(row, self._present[self._cells[2 * row + 1]])
        return True

    def _release(self, row: int, keep: int = NONE) -> None:
        """Free a row that nobody holds and nothing follows, and those before it that it kept."""
        while (
            row >= 0
            and row != keep
            and self._cells[2 * row + 1] == EMPTY
            and self._child[row] == NONE
            and self._parent[row] != FREE
        ):
            parent = self._parent[row]
            if parent >= 0:
                before, after = self._before[row], self._next[row]
                if before != NONE:
                    self._next[before] = after
                else:
                    self._child[parent] = after
                if after != NONE:
                    self._before[after] = before
            self._leave(self._cells[2 * row])
            self._parent[row] = FREE
            self._before[row] = NONE
            self._next[row] = self._free
            self._free = row
            self._references[EMPTY] -= 1
            self.rows -= 1
            row = parent

    def _leave(self, key: int) -> None:
        """Take a key out of the index and close the gap (Knuth, TAOCP 6.4, algorithm R)."""
        index, mask, cells = self._index, self._mask, self._cells
        gap = key & mask
        while cells[2 * index[gap]] != key:
            gap = (gap + 1) & mask
        place = gap
        while True:
            place = (place + 1) & mask
            row = index[place]
            if row == NONE:
                break
            home = cells[2 * row] & mask
            if (place - home) & mask >= (place - gap) & mask:
                index[gap] = row
                gap = place
        index[gap] = NONE

    def _forget_one(self, keep: int) -> bool:
        """Give up a leaf that no device holds, found near a hand that goes round (a clock)."""
        rows = self.rows
        if self._dead:
            self.reclaim(FORGET_LOOKS, keep)
        for _ in range(FORGET_LOOKS):
            if self.rows < rows:
                break
            self._hand = (self._hand + 1) % len(self._parent)
            row = self._hand
            if row == keep or self._child[row] != NONE or self._parent[row] == FREE:
                continue
            if not self._present[self._cells[2 * row + 1]] & self.plane:
                self._put(row, 0)
                self._release(row, keep)
                self.forgotten += 1
        return self.rows < self.rows_max

    # States ------------------------------------------------------------------------------------

    def _put(self, row: int, present: int) -> None:
        """Set what is present at a row, and bring `closed` up to date from there down."""
        self._recount(self._present[self._cells[2 * row + 1]], present)
        width, plane = self.width, self.plane
        cells, parents, children = self._cells, self._parent, self._child
        stack = [row]
        first = True
        while stack:
            row = stack.pop()
            number = cells[2 * row + 1]
            if not first:
                present = self._present[number]
            first = False
            parent = parents[row]
            if parent >= 0:
                allowed = self._closed[cells[2 * parent + 1]]
            else:
                allowed = self.full if parent == ROOT else 0
            device = present & plane
            host = present >> width & plane | device
            nvme = present >> 2 * width & plane | host
            closed = (device | host << width | nvme << 2 * width) & allowed
            changed = closed != self._closed[number]
            if changed or present != self._present[number]:
                new = self._intern((present, closed))
                self._references[new] += 1
                self._references[number] -= 1
                cells[2 * row + 1] = new
                if number != EMPTY and not self._references[number]:
                    self._drop_state(number)
            if changed:
                child = children[row]
                while child != NONE:
                    stack.append(child)
                    child = self._next[child]

    def _recount(self, old: int, new: int) -> None:
        """A row's `present` changes from `old` to `new`."""
        counts, changed = self.counts, old ^ new
        while changed:
            bit = changed & -changed
            changed ^= bit
            counts[bit] = counts.get(bit, 0) + (1 if new & bit else -1)

    def _intern(self, pair: tuple[int, int]) -> int:
        number = self._state_ids.get(pair)
        if number is None:
            if self._free_states:
                number = self._free_states.pop()
                self._present[number], self._closed[number] = pair
                self._references[number] = 0
            else:
                number = len(self._present)
                self._present.append(pair[0])
                self._closed.append(pair[1])
                self._references.append(0)
            self._state_ids[pair] = number
        return number

    def _drop_state(self, number: int) -> None:
        self._drops += 1
        del self._state_ids[(self._present[number], self._closed[number])]
        self._present[number] = self._closed[number] = 0
        self._references[number] = 0
        self._free_states.append(number)

    # Soundness ---------------------------------------------------------------------------------

    def check(self) -> None:
        """Index, links, states and `closed` agree with each other; walks the whole table."""
        live = [row for row in range(len(self._parent)) if self._parent[row] != FREE]
        assert len(live) == self.rows <= self.rows_max
        assert sum(1 for row in self._index if row != NONE) == self.rows
        held: dict[int, int] = {}
        for row in live:
            present = self._present[self._cells[2 * row + 1]]
            for place in range(present.bit_length()):
                if present >> place & 1:
                    held[1 << place] = held.get(1 << place, 0) + 1
        assert held == {bit: count for bit, count in self.counts.items() if count}
        counts = [0] * len(self._present)
        dead = set(self._dead)
        for row in live:
            assert self.find(self._cells[2 * row]) == row
            number, parent = self._cells[2 * row + 1], self._parent[row]
            counts[number] += 1
            present, width = self._present[number], self.width
            host = present | present >> width
            allowed = self._closed[self._cells[2 * parent + 1]] if parent >= 0 else 0
            for plane, bits in enumerate((present, host, host | present >> 2 * width)):
                closed = self._closed[number] >> plane * width & self.plane
                above = self.plane if parent == ROOT else allowed >> plane * width
                assert closed == bits & above & self.plane, row
            child, before = self._child[row], NONE
            while child != NONE:
                assert (self._parent[child], self._before[child]) == (row, before)
                before, child = child, self._next[child]
            assert number != EMPTY or self._child[row] != NONE or row in dead, row
        for number, count in enumerate(counts):
            assert count == self._references[number], number
            assert bool(count) or number == EMPTY or number in self._free_states
