"""The settings of one namespace's store, checked when made; sizes resolved against the disk."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from enum import Enum

from symphony_sglang.errors import ConfigError, StoreCapacityError

GIB = 1 << 30
MIB = 1 << 20
SEGMENT_BYTES_MIN = 64 * MIB
SEGMENT_BYTES_MAX = 4 * GIB
# A directory of a few dozen files: enough to give space back in small steps, few descriptors.
SEGMENTS_WANTED = 32
# Slots a segment should hold, so that a batch of 128 pages finds contiguous ones.
SEGMENT_SLOTS_WANTED = 256


class SyncPolicy(Enum):
    """What an acknowledged write survives.

    BATCH: acknowledged after fdatasync and the index transaction: kill -9 and power cut.
    INTERVAL: committed in groups; both may lose the last second, never integrity.
    OFF: never synced: kill -9 loses the last second; a power cut may lose everything, and what
    is torn is found by checksum and served as a miss.
    """

    BATCH = "batch"
    INTERVAL = "interval"
    OFF = "off"


_RANGES: dict[str, tuple[float, float]] = {
    "free_share": (0.01, 1.0),
    "free_floor_share": (0.0, 0.9),
    "interval_seconds": (0.001, 3600.0),
    "io_threads": (1, 64),
    "io_bytes": (64 * 1024, 64 * MIB),
    "deadline_seconds": (0.01, 3600.0),
    "slowest_bytes_per_second": (1e6, 1e12),
    "writes_beside_reads": (1, 64),
    "pin_share": (0.0, 1.0),
    "events_max": (1, 1 << 24),
    "records_max": (1, 1 << 20),
    "record_bytes_max": (1, 64 * MIB),
    "checksum_bytes": (4096, MIB),
    "failures_max": (1, 1024),
    "retry_seconds": (0.001, 3600.0),
    "retry_seconds_max": (0.001, 86400.0),
}


@dataclass(frozen=True, slots=True)
class StoreSettings:
    """Bytes and seconds. Each namespace has a budget, segments and an index of its own."""

    capacity_bytes: int | None = None  # None: `free_share` of the free space at the first opening
    free_share: float = 0.5
    free_floor_share: float = 0.05  # of the file system: below it, no growth, then shrinking
    segment_bytes: int | None = None  # None: from the capacity; fixed at the first opening
    sync: SyncPolicy = SyncPolicy.INTERVAL
    interval_seconds: float = 0.5  # with the time a commit takes, inside the promised second
    verify_reads: bool = True
    checksum_bytes: int = MIB  # unit of verification; a layer-range read costs at least one
    io_threads: int = 8
    io_bytes: int = MIB  # contiguous pages are merged up to this into one system call
    deadline_seconds: float = 5.0  # of a batch, beside its bytes at the slowest useful rate
    slowest_bytes_per_second: float = 100e6
    writes_beside_reads: int = 1  # writes in flight while a read waits
    pin_share: float = 0.5  # of the slots; pins beyond it are not taken
    events_max: int = 65536
    records_max: int = 65536  # of each kind
    record_bytes_max: int = 2 * MIB
    failures_max: int = 8  # failed system calls in a row before the store turns itself off
    retry_seconds: float = 1.0
    retry_seconds_max: float = 60.0

    def __post_init__(self) -> None:
        for name, (low, high) in _RANGES.items():
            value = getattr(self, name)
            if not low <= value <= high:  # false for NaN too
                raise ConfigError(f"store {name} is {value!r}; expected {low:g} to {high:g}")
        for name in ("capacity_bytes", "segment_bytes"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"store {name} is {value!r}; expected a size in bytes")

    def deadline(self, total_bytes: int) -> float:
        """Seconds that a batch of `total_bytes` may take before its caller is let go."""
        return self.deadline_seconds + total_bytes / self.slowest_bytes_per_second

    def with_checksum(self, checksum_bytes: int) -> StoreSettings:
        return dataclasses.replace(self, checksum_bytes=checksum_bytes)


def choose_segment_bytes(settings: StoreSettings, capacity_bytes: int, slot_bytes: int) -> int:
    """Segment size of a new namespace: a power of two from the capacity, whole slots."""
    if settings.segment_bytes is not None:
        wanted = settings.segment_bytes
    else:
        share = max(1, capacity_bytes // SEGMENTS_WANTED)
        wanted = 1 << math.floor(math.log2(share))
        wanted = max(wanted, SEGMENT_BYTES_MIN, min(SEGMENT_SLOTS_WANTED * slot_bytes, GIB))
        wanted = max(min(wanted, SEGMENT_BYTES_MAX), slot_bytes)
    if wanted < slot_bytes:
        raise StoreCapacityError(
            f"a segment of {wanted} bytes cannot hold one page slot of {slot_bytes} bytes"
        )
    return wanted // slot_bytes * slot_bytes


def check_capacity(capacity_bytes: int, segment_bytes: int, slot_bytes: int, where: str) -> None:
    """Refuse a capacity that cannot hold one segment, with the numbers."""
    if capacity_bytes < segment_bytes:
        raise StoreCapacityError(
            f"{where}: the capacity of {capacity_bytes} bytes is smaller than one segment of "
            f"{segment_bytes} bytes ({segment_bytes // slot_bytes} pages of {slot_bytes} bytes)"
        )
