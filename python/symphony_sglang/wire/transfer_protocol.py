"""Frames of page transfer: a 16-byte header, then a body whose length every kind bounds.

    0  u8 kind, u8 zero, u16 zero, u32 request, u64 body bytes

Bodies are msgpack of the structs below, except PAGES, which is

    u32 length for each page (ABSENT where it is missing), the payloads back to back,
    u64 xxh3_64 for each page, u8 for each page: 1 where it stayed the same while it was read

so that a receiver knows where every byte goes before the first one comes.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from enum import IntEnum
from typing import NamedTuple, TypeVar

import msgspec

from symphony_sglang.errors import PeerProtocolError
from symphony_sglang.wire.pages import HASH_BYTES, KV_POOL, PeerIdentity

PROTOCOL = "symphony-pages"
VERSION = 1
HEADER = struct.Struct("<BBHIQ")
ABSENT = 0xFFFF_FFFF
LENGTH_BYTES, SUM_BYTES = 4, 8

HASHES_MAX = 8192  # of one look-up
PAGES_PER_FETCH_MAX = 1024
FETCH_BYTES_MAX = 256 << 20
FETCHES_MAX = 8  # under way on one connection
RECORD_BYTES_MAX = 8 << 20
NAME_BYTES_MAX = 4096
WAIT_SECONDS_MAX = 60.0
NONCE_BYTES = 32


class Kind(IntEnum):
    """What a frame is. A kind that is not listed closes the connection."""

    HELLO = 1
    PROOF = 2
    IDENTITY = 3
    REFUSED = 4
    LOOKUP = 10
    FOUND = 11
    FETCH = 12
    PAGES = 13
    PLACED = 14  # the pages' addresses, for a reader of the server's memory
    COPIED = 15
    CHECKED = 16
    GET_RECORD = 17
    RECORD = 18


_SMALL = 64 * 1024
BODY_BYTES_MAX: dict[Kind, int] = {
    Kind.HELLO: 1024,
    Kind.PROOF: 1024,
    Kind.IDENTITY: 1 << 20,
    Kind.REFUSED: _SMALL,
    Kind.LOOKUP: HASHES_MAX * HASH_BYTES + 1024,
    Kind.FOUND: HASHES_MAX + 1024,
    Kind.FETCH: PAGES_PER_FETCH_MAX * HASH_BYTES + 1024,
    Kind.PAGES: FETCH_BYTES_MAX + PAGES_PER_FETCH_MAX * (LENGTH_BYTES + SUM_BYTES + 1),
    Kind.PLACED: 4 << 20,
    Kind.COPIED: 16,
    Kind.CHECKED: _SMALL,
    Kind.GET_RECORD: 2 * NAME_BYTES_MAX + 1024,
    Kind.RECORD: RECORD_BYTES_MAX + 1024,
}


class Hello(msgspec.Struct, frozen=True):
    """First frame of either side. `public_key` is empty where the sender has no transfer key."""

    protocol: str
    version: int
    nonce: bytes
    public_key: bytes


class Proof(msgspec.Struct, frozen=True):
    """Shows that the sender holds the transfer key, over both hellos."""

    code: bytes


class LocalAddress(msgspec.Struct, frozen=True):
    """Where the server's process holds the probe that the client sent: for readers on its host."""

    process: int
    user: int
    address: int


class Introduction(msgspec.Struct, frozen=True):
    """Who the sender is. `probe` is the client's, `local` the server's.

    `engine` names the client's one-sided engine; a server that has the same answers with what that
    engine needs to read its memory.
    """

    identity: PeerIdentity
    probe: bytes = b""
    local: LocalAddress | None = None
    engine: str = ""
    metadata: bytes = b""


class Refused(msgspec.Struct, frozen=True):
    """The last frame before a server closes a connection that it will not serve."""

    reason: str
    message: str


class Lookup(msgspec.Struct, frozen=True):
    """Which of `hashes` (32 bytes each) are there; wait until all are, at most `wait_seconds`."""

    hashes: bytes
    pool: str = KV_POOL
    wait_seconds: float = 0.0


class Found(msgspec.Struct, frozen=True):
    """One byte for each hash: 1 where it is there."""

    found: bytes


class Fetch(msgspec.Struct, frozen=True):
    """Send these pages; with `local`, say where they are instead: the reader copies them.

    With `summed` false the reader does not ask for their checksums.
    """

    hashes: bytes
    pool: str = KV_POOL
    local: bool = False
    summed: bool = True


class Placed(msgspec.Struct, frozen=True):
    """For each page its (address, bytes) pieces in the server's process; None: missing."""

    pages: list[list[tuple[int, int]] | None]


class Copied(msgspec.Struct, frozen=True):
    """The reader has the bytes of a PLACED answer."""


class Checked(msgspec.Struct, frozen=True):
    """After COPIED: u64 xxh3_64 for each page, or 0 where nobody asked for them, and one byte: 1
    where it stayed the same."""

    sums: bytes
    unchanged: bytes


class GetRecord(msgspec.Struct, frozen=True):
    """An opaque small record, such as a session's; wait for it at most `wait_seconds`."""

    kind: str
    name: str
    wait_seconds: float = 0.0


class Record(msgspec.Struct, frozen=True):
    body: bytes | None


class FrameHeader(NamedTuple):
    kind: Kind
    request: int
    size: int


Body = TypeVar("Body", bound=msgspec.Struct)
_encoder = msgspec.msgpack.Encoder()
_decoders: dict[type, msgspec.msgpack.Decoder[msgspec.Struct]] = {}


def pack_frame(kind: Kind, request: int, body: msgspec.Struct) -> bytes:
    """A whole control frame."""
    content = _encoder.encode(body)
    assert len(content) <= BODY_BYTES_MAX[kind], (kind, len(content))
    return HEADER.pack(kind, 0, 0, request, len(content)) + content


def unpack_header(raw: bytes | bytearray | memoryview) -> FrameHeader:
    """Raises PeerProtocolError for an unknown kind or a body over the kind's limit."""
    number, zero, reserved, request, size = HEADER.unpack(raw)
    try:
        kind = Kind(number)
    except ValueError:
        raise PeerProtocolError(f"frame of unknown kind {number}") from None
    if zero or reserved:
        raise PeerProtocolError(f"{kind.name} frame: reserved fields are {zero}, {reserved}")
    if size > BODY_BYTES_MAX[kind]:
        raise PeerProtocolError(
            f"{kind.name} frame of {size} bytes; expected at most {BODY_BYTES_MAX[kind]}"
        )
    return FrameHeader(kind, request, size)


def unpack_body(content: bytes | bytearray | memoryview, body_type: type[Body]) -> Body:
    """Raises PeerProtocolError where the content is not a `body_type`."""
    decoder = _decoders.get(body_type)
    if decoder is None:
        decoder = _decoders[body_type] = msgspec.msgpack.Decoder(body_type)
    try:
        body = decoder.decode(content)
    except (msgspec.DecodeError, UnicodeDecodeError, ValueError) as error:
        raise PeerProtocolError(f"{body_type.__name__}: {error}") from None
    assert isinstance(body, body_type)
    return body


def split_hashes(joined: bytes, limit: int) -> list[bytes]:
    """Raises PeerProtocolError for none, too many, or a part of one."""
    count, rest = divmod(len(joined), HASH_BYTES)
    if rest or not 0 < count <= limit:
        raise PeerProtocolError(
            f"{len(joined)} bytes of hashes; expected 1 to {limit} of {HASH_BYTES} bytes"
        )
    return [joined[at : at + HASH_BYTES] for at in range(0, len(joined), HASH_BYTES)]


def bounded_wait(seconds: float) -> float:
    """A wait that a peer asked for, or 0 for what is no duration."""
    return min(seconds, WAIT_SECONDS_MAX) if seconds > 0 else 0.0


def pages_body_bytes(lengths: Sequence[int | None]) -> int:
    """Body bytes of a PAGES frame with these payloads."""
    fixed = (LENGTH_BYTES + SUM_BYTES + 1) * len(lengths)
    return fixed + sum(length or 0 for length in lengths)


def pack_lengths(lengths: Sequence[int | None]) -> bytes:
    return struct.pack(
        f"<{len(lengths)}I", *(ABSENT if length is None else length for length in lengths)
    )


def unpack_lengths(
    raw: bytes | bytearray | memoryview, count: int, size: int, page_bytes: int
) -> list[int | None]:
    """Raises PeerProtocolError where a page is too long, or all do not add up to the body."""
    lengths = [
        None if length == ABSENT else int(length) for length in struct.unpack(f"<{count}I", raw)
    ]
    for length in lengths:
        if length is not None and not 0 < length <= page_bytes:
            raise PeerProtocolError(f"a page of {length} bytes; expected 1 to {page_bytes}")
    if pages_body_bytes(lengths) != size:
        raise PeerProtocolError(
            f"PAGES frame of {size} bytes; its pages add up to {pages_body_bytes(lengths)}"
        )
    return lengths


def pack_sums(sums: Sequence[int]) -> bytes:
    return struct.pack(f"<{len(sums)}Q", *sums)


def unpack_sums(raw: bytes | bytearray | memoryview, count: int) -> list[int]:
    if len(raw) != SUM_BYTES * count:
        raise PeerProtocolError(f"{len(raw)} bytes of checksums; expected {SUM_BYTES * count}")
    return list(struct.unpack(f"<{count}Q", raw))
