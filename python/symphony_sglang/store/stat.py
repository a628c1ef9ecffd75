"""What a store holds and has done, as one frozen view."""

from __future__ import annotations

import sqlite3
from dataclasses import asdict, dataclass

from symphony_sglang.store.committer import Shared
from symphony_sglang.store.health import HealthState


@dataclass(frozen=True, slots=True)
class StoreStat:
    """Sizes in bytes unless the name says pages, slots or segments."""

    folder: str
    identity: str
    state: HealthState
    pages: int
    pending_pages: int  # readable, not yet durable
    pinned_pages: int
    slots: int
    free_slots: int
    slot_bytes: int
    segments: int
    capacity_bytes: int
    allocated_bytes: int
    payload_bytes_today: int
    disk_bytes_today: int
    write_amplification: float | None  # disk bytes over payload bytes since the store was opened
    counters: dict[str, int]


def stat_of(shared: Shared) -> StoreStat:
    try:
        days = shared.database.daily()
    except sqlite3.Error:  # the health state tells; the counters in memory still stand
        days = []
    _, payload_today, disk_today = days[0] if days else ("", 0, 0)
    with shared.lock:
        table, counters = shared.table, shared.counters
        written = counters.payload_bytes
        return StoreStat(
            folder=str(shared.folder),
            identity=shared.header.namespace.describe(),
            state=shared.health.state,
            pages=len(table),
            pending_pages=len(table.pending),
            pinned_pages=table.pinned,
            slots=len(table.segments) * table.slots_per_segment,
            free_slots=table.free,
            slot_bytes=shared.header.slot_bytes,
            segments=len(table.segments),
            capacity_bytes=shared.capacity_segments * shared.header.segment_bytes,
            allocated_bytes=len(table.segments) * shared.header.segment_bytes,
            payload_bytes_today=payload_today,
            disk_bytes_today=disk_today,
            write_amplification=counters.disk_bytes / written if written else None,
            counters=asdict(counters),
        )
