"""Where along a prompt its holders stop: bisection over the columns of a `page_table.PageTable`."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

NONE = -1


class Columns(NamedTuple):
    """What a look-up reads: the open-addressed table of rows by `key & mask`, key and state of row
    r at cells 2r and 2r + 1, and the `closed` bits of each state."""

    rows: array[int]
    mask: int
    cells: array[int]
    closed: list[int]


# (low, bits at low, high, bits at high): places in a prompt with a boundary between them.
Range = tuple[int, int, int, int]


def bisect_ends(
    columns: Columns, hashes: Sequence[int], near: Sequence[int]
) -> list[tuple[int, int]]:
    """(pages from the start, `closed` bits that end there), in ascending order.

    Along a chain `closed` only loses bits. `near` are guesses of the ends, in ascending order.
    """
    rows, mask, cells, closed = columns
    ends: list[tuple[int, int]] = []
    # Pages stored together lie in rows one after the other, so the cell of a page is first guessed
    # from that of the last page found. The key tells whether it is the one; a free row may still
    # have a key, but no holders.
    shift, last = 0, len(cells) - 2
    stack = ranges(columns, hashes, near)
    while stack:
        low, low_bits, high, high_bits = stack.pop()
        while high - low > 1:
            middle = (low + high) >> 1
            key = hashes[middle]
            cell = 2 * middle + shift
            bits = closed[cells[cell + 1]] if 0 <= cell <= last and cells[cell] == key else 0
            if not bits:
                place = key & mask
                row = rows[place]
                while row != NONE and cells[2 * row] != key:
                    place = (place + 1) & mask
                    row = rows[place]
                if row != NONE:
                    shift = 2 * (row - middle)
                    bits = closed[cells[2 * row + 1]]
            if bits == low_bits:
                low = middle
            elif bits == high_bits:
                high = middle
            else:
                stack.append((middle, bits, high, high_bits))
                high, high_bits = middle, bits
        ends.append((high, low_bits & ~high_bits))
    return ends


def ranges(columns: Columns, hashes: Sequence[int], near: Sequence[int]) -> list[Range]:
    """Ranges with a boundary inside, the leftmost last. The place after the last page has none."""
    count = len(hashes)
    row = find_row(columns, hashes[0]) if count else NONE
    _rows, _mask, cells, closed = columns
    first = 0 if row == NONE else closed[cells[2 * row + 1]]
    if not first:
        return []
    shift, last = 2 * row, len(cells) - 2  # as in `bisect_ends`
    points = [(0, first)]
    for guess in near:
        for place in (guess - 1, guess):
            if not points[-1][0] < place < count:
                continue
            key = hashes[place]
            cell = 2 * place + shift
            bits = closed[cells[cell + 1]] if 0 <= cell <= last and cells[cell] == key else 0
            if not bits:
                row = find_row(columns, key)
                if row != NONE:
                    shift = 2 * (row - place)
                    bits = closed[cells[2 * row + 1]]
            points.append((place, bits))
    points.append((count, 0))
    found = [(*low, *high) for low, high in pairwise(points) if low[1] != high[1]]
    found.reverse()
    return found


def find_row(columns: Columns, key: int) -> int:
    """The row of a page, or NONE."""
    rows, mask, cells, _closed = columns
    place = key & mask
    row = rows[place]
    while row != NONE and cells[2 * row] != key:
        place = (place + 1) & mask
        row = rows[place]
    return row
