"""What the cache decides about pages on disk: use, priority, pins."""

from __future__ import annotations

from collections.abc import Sequence

from symphony_sglang.errors import StoreError
from symphony_sglang.store.committer import Shared
from symphony_sglang.store.slots import PINS_MAX


def touch(shared: Shared, keys: Sequence[bytes]) -> None:
    with shared.lock:
        slots = shared.table.find(keys)
        shared.table.touch(slots[slots >= 0], shared.clock.unix())


def set_priority(shared: Shared, keys: Sequence[bytes], priority: int) -> int:
    if not -128 <= priority <= 127:
        raise StoreError(f"priority is {priority}; expected -128 to 127")
    with shared.lock:
        table = shared.table
        slots = table.find(keys)
        slots = slots[slots >= 0]
        table.priority[slots] = priority
        table.touched_leaves |= table.leaves_of(slots)
        return len(slots)


def pin(shared: Shared, keys: Sequence[bytes]) -> int:
    pinned = 0
    with shared.lock:
        table = shared.table
        total = shared.capacity_segments * table.slots_per_segment
        limit = int(total * shared.settings.pin_share)
        for slot in table.find(keys).tolist():
            if slot < 0:
                continue
            fresh = table.pins[slot] == 0
            if (fresh and table.pinned >= limit) or table.pins[slot] >= PINS_MAX:
                shared.counters.pins_refused += 1
                continue
            table.pins[slot] += 1
            table.pinned += int(fresh)
            pinned += 1
    return pinned


def unpin(shared: Shared, keys: Sequence[bytes]) -> int:
    count = 0
    with shared.lock:
        table = shared.table
        for slot in table.find(keys).tolist():
            if slot >= 0 and table.pins[slot]:
                table.pins[slot] -= 1
                table.pinned -= int(table.pins[slot] == 0)
                count += 1
    return count
