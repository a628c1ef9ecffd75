"""What a feed server is told: its addresses, its bounds, and where the NVMe level is."""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol


class DiskDrain(NamedTuple):
    """Runs of (stored, event hashes) in order of commit; `resync`: some were dropped before."""

    runs: Sequence[tuple[bool, list[int]]]
    resync: bool = False
    # The level was opened since the last drain: announce all of it.
    opened: bool = False


class DiskPages(Protocol):
    """The NVMe level as the feed sees it; called on the feed's thread."""

    def drain(self) -> DiskDrain: ...

    def pages(self) -> Iterator[array[int]]:
        """Event hashes of all durable pages, in chunks."""
        ...


class NoDisk:
    """A worker without an NVMe level."""

    def drain(self) -> DiskDrain:
        return DiskDrain(())

    def pages(self) -> Iterator[array[int]]:
        return iter(())


@dataclass(frozen=True, slots=True)
class FeedEndpoints:
    """ZMQ addresses to bind; port 0 (``tcp://127.0.0.1:0``) lets the system choose."""

    events: str
    replay: str
    state: str


@dataclass(frozen=True, slots=True)
class FeedSettings:
    """Bounds and times of a feed."""

    page_size: int
    rank: int = 0
    topic: str = ""
    # Tells this worker from others that may have its ports one day, as its HTTP port does.
    name: str = ""
    # Items of the producer; beyond it the sequence is broken (see the module's docstring).
    queue_max: int = 10_000
    # Oldest batches go first; a subscriber further behind takes a snapshot.
    replay_batches_max: int = 10_000
    replay_bytes_max: int = 64 << 20
    # Frames queued for one slow subscriber; ZMQ drops what is beyond it, and it finds a gap.
    send_frames_max: int = 2_000
    # Replays and snapshots at a time; a further request is answered "busy".
    replies_max: int = 8
    # For one reply; a client that has not read it by then has to ask again.
    reply_seconds: float = 30.0
    heartbeat_seconds: float = 0.5
    disk_poll_seconds: float = 0.05

    def __post_init__(self) -> None:
        assert self.page_size > 0, self
        assert self.queue_max > 0, self
        assert self.heartbeat_seconds > 0, self
        assert self.disk_poll_seconds > 0, self


@dataclass(slots=True)
class FeedCounters:
    """What happened since the start."""

    batches: int = 0
    pages: int = 0
    breaks: int = 0  # sequences broken on purpose, by overflow or a resync of the store
    snapshots: int = 0
    replays: int = 0
    replies_refused: int = 0
    replies_given_up: int = 0
    malformed_requests: int = 0
    faults: int = 0
