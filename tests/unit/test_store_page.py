"""The bytes of a page: what is written comes back, and no damage passes."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from symphony_sglang.store.page import (
    HEADER_BYTES,
    PARTS_MAX,
    PageHeader,
    part_bytes_for,
    part_sums,
    read_header,
    write_header,
)


def make(parts: int = 3) -> tuple[PageHeader, memoryview]:
    header = PageHeader(bytes(range(32)), b"l" * 16, 7, parts * 512 - 12, 512, tuple(range(parts)))
    block = memoryview(bytearray(HEADER_BYTES))
    write_header(block, header)
    return header, block


def test_header_comes_back() -> None:
    header, block = make()
    assert read_header(block) == header


def test_largest_part_table_fits() -> None:
    header, block = make(PARTS_MAX)
    assert read_header(block) == header


def test_every_flipped_bit_of_a_header_is_seen() -> None:
    header, block = make()
    for at in range(104 + 8 * len(header.sums)):
        for bit in range(8):
            block[at] ^= 1 << bit
            assert read_header(block) is None, (at, bit)
            block[at] ^= 1 << bit
    assert read_header(block) == header


def test_zeros_and_noise_are_no_header() -> None:
    assert read_header(memoryview(bytes(HEADER_BYTES))) is None
    noise = np.random.default_rng(0).integers(0, 256, HEADER_BYTES, dtype=np.uint8)
    assert read_header(memoryview(noise)) is None


@pytest.mark.parametrize("part", [1, 7, 512, 1000, 4096])
def test_part_sums_do_not_depend_on_how_memory_is_cut(part: int) -> None:
    random = np.random.default_rng(part)
    content = memoryview(random.integers(0, 256, 4001, dtype=np.uint8)).cast("B")
    whole = part_sums([content], part)
    assert len(whole) == -(-4001 // part)
    for _ in range(20):
        cuts = sorted({0, 4001, *random.integers(0, 4001, 5).tolist()})
        pieces = [content[low:high] for low, high in itertools.pairwise(cuts)]
        assert part_sums(pieces, part) == whole


def test_a_changed_byte_changes_the_sum_of_its_part_only() -> None:
    content = bytearray(1000)
    before = part_sums([memoryview(content)], 100)
    content[250] ^= 1
    after = part_sums([memoryview(content)], 100)
    assert [at for at in range(10) if before[at] != after[at]] == [2]


def test_part_size_grows_until_the_table_fits() -> None:
    assert part_bytes_for(1 << 20, 4096) == 4096
    grown = part_bytes_for(1 << 30, 4096)
    assert -(-(1 << 30) // grown) <= PARTS_MAX
