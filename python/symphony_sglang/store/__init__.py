"""The NVMe level: a page store that is fast, bounded, and survives kill -9. See docs/store.md."""

from symphony_sglang.store.batches import Hold, ReadOutcome, ReadResult, WriteOutcome
from symphony_sglang.store.disk import BlockFile, Disk, FreeSpace, SystemDisk
from symphony_sglang.store.feed import ResidencyDrain, ResidencyEvent
from symphony_sglang.store.health import HealthState
from symphony_sglang.store.namespace import (
    Namespace,
    joined_from_hex,
    key_from_hex,
    keys_from_hex,
)
from symphony_sglang.store.settings import StoreSettings, SyncPolicy
from symphony_sglang.store.stat import StoreStat
from symphony_sglang.store.store import PageStore, PlacedPage
from symphony_sglang.store.transfer import Piece, piece_of

__all__ = [
    "BlockFile",
    "Disk",
    "FreeSpace",
    "HealthState",
    "Hold",
    "Namespace",
    "PageStore",
    "Piece",
    "PlacedPage",
    "ReadOutcome",
    "ReadResult",
    "ResidencyDrain",
    "ResidencyEvent",
    "StoreSettings",
    "StoreStat",
    "SyncPolicy",
    "SystemDisk",
    "WriteOutcome",
    "joined_from_hex",
    "key_from_hex",
    "keys_from_hex",
    "piece_of",
]
