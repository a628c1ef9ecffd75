"""The bytes of a page on disk: one header block, then the payload; checksums for every part of it.

    0    8s   magic
    8    16s  xxh3_128 of all that follows, sums included
    24   u32  version, u32 header bytes, 32s key, 16s layout id (start of the namespace's digest),
         u64  epoch, u64 payload bytes, u32 part bytes, u32 parts
    104  u64  xxh3_64 of each part

A part is a fixed number of payload bytes, so that a range of layers can be verified without the
rest of the page.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import xxhash

HEADER_BYTES = 4096
MAGIC = b"SYMPAGE\x01"
PAGE_VERSION = 1
LAYOUT_ID_BYTES = 16
_DIGEST_AT = len(MAGIC)
_FIELDS_AT = _DIGEST_AT + 16
_FIELDS = struct.Struct("<II32s16sQQII")
_SUMS_AT = _FIELDS_AT + _FIELDS.size
PARTS_MAX = (HEADER_BYTES - _SUMS_AT) // 8


class PageHeader(NamedTuple):
    key: bytes
    layout_id: bytes
    epoch: int
    length: int
    part_bytes: int
    sums: tuple[int, ...]


def part_bytes_for(length: int, wanted: int) -> int:
    """The unit of verification for pages of up to `length` bytes: `wanted`, or more if too many."""
    unit = max(1, wanted)
    while -(-length // unit) > PARTS_MAX:
        unit *= 2
    return unit


@lru_cache(maxsize=64)
def _body(parts: int) -> struct.Struct:
    return struct.Struct(f"{_FIELDS.format}{parts}Q")


def header_bytes(
    key: bytes, layout_id: bytes, epoch: int, length: int, part_bytes: int, sums: Sequence[int]
) -> bytes:
    """The used bytes of a header block: one page has one header, so reads compare with it too."""
    parts = len(sums)
    body = _body(parts).pack(
        PAGE_VERSION, HEADER_BYTES, key, layout_id, epoch, length, part_bytes, parts, *sums
    )
    return MAGIC + xxhash.xxh3_128_digest(body) + body


def write_header(block: memoryview, header: PageHeader) -> None:
    """Fill the header block (HEADER_BYTES, writable)."""
    content = header_bytes(*header)
    block[: len(content)] = content


def read_header(block: memoryview) -> PageHeader | None:
    """The header in `block`, None if it is not one or any bit of it is wrong."""
    if block[:_DIGEST_AT] != MAGIC:
        return None
    version, size, key, layout_id, epoch, length, part_bytes, parts = _FIELDS.unpack_from(
        block, _FIELDS_AT
    )
    if version != PAGE_VERSION or size != HEADER_BYTES or parts > PARTS_MAX or not part_bytes:
        return None
    end = _SUMS_AT + 8 * parts
    if block[_DIGEST_AT:_FIELDS_AT] != xxhash.xxh3_128_digest(block[_FIELDS_AT:end]):
        return None
    if parts != -(-length // part_bytes):
        return None
    sums = struct.unpack_from(f"<{parts}Q", block, _SUMS_AT)
    return PageHeader(key, layout_id, epoch, length, part_bytes, sums)


def part_sums(memories: Sequence[memoryview], part_bytes: int) -> tuple[int, ...]:
    """xxh3_64 of every `part_bytes` of the concatenation of `memories`; the last may be shorter."""
    if sum([len(memory) for memory in memories]) <= part_bytes:  # one part: no cutting
        digest = xxhash.xxh3_64()
        for memory in memories:
            digest.update(memory)
        return (digest.intdigest(),)
    sums: list[int] = []
    carry: xxhash.xxh3_64 | None = None
    room = part_bytes
    for memory in memories:
        at, size = 0, len(memory)
        while at < size:
            step = min(room, size - at)
            whole = at == 0 and step == size
            piece = memory if whole else memory[at : at + step]
            if carry is None and step == part_bytes:
                sums.append(xxhash.xxh3_64_intdigest(piece))
            else:
                carry = carry or xxhash.xxh3_64()
                carry.update(piece)
                room -= step
                if room == 0:
                    sums.append(carry.intdigest())
                    carry, room = None, part_bytes
            at += step
    if carry is not None:
        sums.append(carry.intdigest())
    return tuple(sums)
