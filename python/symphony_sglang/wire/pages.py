"""What moves between workers: whose pages, from where, into what. Independent of the transport.

A page is named by its 32-byte digest and the pool it belongs to (``kv`` for keys and values).
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum
from typing import NamedTuple, Protocol

import msgspec

HASH_BYTES = 32
KV_POOL = "kv"


class PeerIdentity(msgspec.Struct, frozen=True, kw_only=True):
    """Everything that decides whether pages with equal hashes hold equal bytes.

    Two workers exchange pages only where every field is equal.
    """

    model: str
    revision: str
    dtype: str
    layout: str
    page_tokens: int
    page_bytes: int  # largest payload of a page
    tp_rank: int = 0
    tp_size: int = 1
    hash_scheme: str = ""
    hash_seed: str = ""
    extra: tuple[tuple[str, str], ...] = ()  # further facts of the pool: layers, heads
    namespace: str = ""  # a digest over all of the above, checked last


class Mismatch(NamedTuple):
    """The first field in which two identities differ."""

    field: str
    ours: object
    theirs: object

    def __str__(self) -> str:
        return f"{self.field}: {self.ours!r} here, {self.theirs!r} there"


def find_mismatch(ours: PeerIdentity, theirs: PeerIdentity) -> Mismatch | None:
    """None where the two may exchange pages."""
    for name in PeerIdentity.__struct_fields__:
        mine, other = getattr(ours, name), getattr(theirs, name)
        if mine == other:
            continue
        if name == "extra":
            left, right = dict(mine), dict(other)
            for key in sorted({*left, *right}):
                if left.get(key) != right.get(key):
                    return Mismatch(key, left.get(key), right.get(key))
        return Mismatch(name, mine, other)
    return None


class PageOutcome(Enum):
    """How one page of a pull ended. Anything but ARRIVED leaves no promise about its buffer."""

    ARRIVED = "arrived"  # whole and verified
    MISSING = "missing"  # the peer does not have it
    CHANGED = "changed"  # the peer evicted it while it was being sent
    CORRUPT = "corrupt"  # its checksum is wrong


class OpenPages(Protocol):
    """Pages that a source holds readable until ``release``."""

    @property
    def views(self) -> Sequence[Sequence[memoryview] | None]:
        """For each page its pieces in payload order; None where it is not there."""
        ...

    def unchanged(self) -> Sequence[bool]:
        """For each page whether its bytes stayed the same since it was opened.

        Asked after the last byte was read, so a source may lend memory that it could reuse.
        """
        ...

    def release(self) -> None:
        """The views are used no more. Idempotent."""
        ...


class PageSource(Protocol):
    """Where a page server takes pages from. Called from several threads."""

    def lookup(self, hashes: Sequence[bytes]) -> Sequence[bool]:
        """Which of these pages could be opened now."""
        ...

    def at_hand(self, hashes: Sequence[bytes]) -> bool:
        """Whether opening these pages waits for nothing; a guess will do."""
        ...

    def open(self, hashes: Sequence[bytes]) -> OpenPages:
        """Make pages readable; those that are not there are None in ``views``."""
        ...


class Reservation(Protocol):
    """Room for some pages at the receiver; ended by exactly one of ``commit`` and ``abort``."""

    @property
    def buffers(self) -> Sequence[memoryview]:
        """A writable buffer of ``page_bytes`` for each page."""
        ...

    def commit(self, lengths: Sequence[int | None]) -> Sequence[bool]:
        """Publish the pages that arrived, with their payload bytes; None for those that did not.

        Returns which of them can now be read here.
        """
        ...

    def abort(self) -> None:
        """Give the room back; nothing of it becomes visible."""
        ...


class PageSink(Protocol):
    """Where a pull puts pages. `reserve` and `commit` may come from different threads."""

    def present(self, hashes: Sequence[bytes]) -> Sequence[bool]:
        """Which of these pages are here already and need no transfer."""
        ...

    def reserve(self, hashes: Sequence[bytes]) -> Reservation | None:
        """Room for these pages; None where there is none now."""
        ...


class RemoteReader(Protocol):
    """Copies pages out of a peer's memory, where it says they are: one-sided engines."""

    @property
    def way(self) -> str:
        """Its name, as receipts tell it."""
        ...

    @property
    def step_bytes(self) -> int:
        """Bytes of one copy that suit it."""
        ...

    @property
    def summed(self) -> bool:
        """Whether what it copied is compared with the peer's checksums."""
        ...

    def copy(
        self,
        remote: Sequence[tuple[int, int]],
        targets: Sequence[memoryview],
        until: float,
    ) -> bool:
        """Fill `targets` from the peer's (address, bytes) pieces; False where that fails.

        Nothing writes to the targets after it returned or raised.

        Raises:
            PeerLostError: it was aborted, or took until `until` of the clock.
        """
        ...

    def abort(self) -> None:
        """End a copy under way, from any thread."""
        ...

    def close(self) -> None:
        """Idempotent."""
        ...


class RemoteEngine(Protocol):
    """What makes readers, by what the other side's engine tells of its memory."""

    def metadata(self) -> bytes: ...

    def connect(self, metadata: bytes) -> RemoteReader | None:
        """None where the two engines find no way to each other."""
        ...


class PageTransport(Protocol):
    """One connection to a peer, as a two-sided or a one-sided engine can provide it."""

    def begin(self, hashes: Sequence[bytes], buffers: Sequence[memoryview]) -> int:
        """Ask for pages; several requests may be under way. Returns the request's number."""
        ...

    def finish(self, request: int) -> Sequence[tuple[PageOutcome, int]]:
        """Wait for a request: for each page how it ended, and its payload bytes.

        Raises:
            PeerLostError: the connection ended; none of its requests will arrive.
            PeerProtocolError: the peer broke the protocol.
        """
        ...

    def abort(self) -> None:
        """End the connection now, from any thread; a waiting ``finish`` raises."""
        ...

    def close(self) -> None:
        """Release the connection. Idempotent."""
        ...
