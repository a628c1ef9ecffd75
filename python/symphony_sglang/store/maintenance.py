"""Upkeep: checking every page, and giving space back without rewriting the world."""

from __future__ import annotations

import mmap
from collections.abc import Callable, Sequence
from typing import NamedTuple

from symphony_sglang.errors import StoreError
from symphony_sglang.store.batches import Job, ReadCall, ReadOutcome, WriteCall, cut
from symphony_sglang.store.committer import Committer, Shared, free_ahead
from symphony_sglang.store.io_pool import Direction
from symphony_sglang.store.transfer import piece_of

# (done, total) pages.
Progress = Callable[[int, int], None]

_BATCH_BYTES = 64 << 20


class VerifyReport(NamedTuple):
    """Pages checked, of them wrong (dropped and quarantined) and unreadable."""

    pages: int
    bytes: int
    corrupt: int
    failed: int


class CompactReport(NamedTuple):
    """What compaction gave back and what it cost."""

    segments_removed: int
    bytes_freed: int
    pages_moved: int


class _Window:
    """Pre-touched memory for a batch of whole pages."""

    def __init__(self, shared: Shared) -> None:
        stride = -(-shared.header.namespace.page_bytes // 4096) * 4096
        self.pages = max(1, _BATCH_BYTES // stride)
        self._memory = mmap.mmap(-1, self.pages * stride)
        self._address, _ = piece_of(self._memory)
        self._stride = stride

    def piece(self, at: int, length: int) -> tuple[tuple[int, int], ...]:
        return ((self._address + at * self._stride, length),)


def _read_slots(shared: Shared, window: _Window, slots: Sequence[int]) -> list[ReadCall]:
    """Read the pages of `slots` that are still there into `window`, one after the other."""
    table = shared.table
    with shared.lock:
        jobs = []
        for at, slot in enumerate(slots):
            key, length = table.keys.key_at(slot), int(table.length[slot])
            if table.keys.get(key) == slot:
                jobs.append(Job(slot, at, key, window.piece(at, length), length))
                table.readers[slot] += 1
        calls = [ReadCall(shared, *one) for one in cut(shared, jobs, merge=True)]
    shared.pool.submit(Direction.READ, calls).wait(None)
    return calls


def verify(shared: Shared, progress: Progress | None = None) -> VerifyReport:
    """Read every page there is and check it, whatever `verify_reads` says of ordinary reads."""
    if not shared.settings.verify_reads:
        raise StoreError(f"{shared.folder}: opened without verification, so it cannot verify")
    window = _Window(shared)
    with shared.lock:
        slots = [
            slot
            for segment in sorted(shared.table.segments)
            for slot in shared.table.live_slots(segment)
        ]
    pages = size = corrupt = failed = 0
    for start in range(0, len(slots), window.pages):
        for call in _read_slots(shared, window, slots[start : start + window.pages]):
            for job, outcome in zip(call.jobs, call.outcomes, strict=True):
                pages += 1
                size += job.length
                corrupt += outcome is ReadOutcome.CORRUPT
                failed += outcome is ReadOutcome.FAILED
        if progress is not None:
            progress(min(start + window.pages, len(slots)), len(slots))
    return VerifyReport(pages, size, corrupt, failed)


def compact(
    shared: Shared, committer: Committer, progress: Progress | None = None
) -> CompactReport:
    """Empty the sparsest segments into the free slots of the others, and remove them.

    Only the pages of segments that can go as a whole are moved. A crash at any point leaves each
    page in its old slot or in its new one.
    """
    table = shared.table
    before, moved = len(table.segments), 0
    window = _Window(shared)
    total = len(table)
    while True:
        with shared.lock:
            segment = _sparsest_that_fits(shared)
            if segment is None:
                break
            table.retire_segment(segment)
            slots = table.live_slots(segment)
        for start in range(0, len(slots), window.pages):
            moved += _move(shared, window, slots[start : start + window.pages])
            committer.wait(committer.request(), shared.settings.deadline_seconds)
            if progress is not None:
                progress(min(moved, total), total)
        if not committer.wait(committer.request(), shared.settings.deadline_seconds):
            break
    shared.database.vacuum()
    removed = before - len(table.segments)
    return CompactReport(removed, removed * shared.header.segment_bytes, moved)


def _sparsest_that_fits(shared: Shared) -> int | None:
    """The segment with the fewest pages, if the others can take them and still a batch beside."""
    table = shared.table
    if table.retiring or len(table.segments) < 2:
        return None
    live = {segment: len(table.live_slots(segment)) for segment in table.segments}
    segment = min(live, key=lambda number: (live[number], -number))
    free_elsewhere = table.free - table.free_of(segment) - free_ahead(shared)
    return segment if live[segment] <= free_elsewhere else None


def _move(shared: Shared, window: _Window, slots: Sequence[int]) -> int:
    """Copy pages to slots of other segments; the old slots are evicted in the same commit."""
    table = shared.table
    good = [
        job
        for call in _read_slots(shared, window, slots)
        for job, outcome in zip(call.jobs, call.outcomes, strict=True)
        if outcome is ReadOutcome.HIT
    ]
    with shared.lock:
        targets = table.allocate([job.key for job in good])
        jobs = [job._replace(slot=slot) for job, slot in zip(good, targets, strict=False)]
        calls = [WriteCall(shared, *one) for one in cut(shared, jobs, merge=True)]
    shared.pool.submit(Direction.WRITE, calls).wait(None)
    moved = 0
    with shared.lock:
        old = {job.key: job.slot for job in good}
        for call in calls:
            if call.error is not None:
                call.give_back()
                continue
            for job in call.jobs:
                former = old[job.key]
                if table.keys.get(job.key) != former:
                    table.abandon(job.slot, quarantine=False)
                    continue
                facts = table.facts(former)
                used, pins = float(table.accessed[former]), int(table.pins[former])
                table.remove(job.key)
                table.publish([job.slot], [facts], used)
                table.pins[job.slot] = pins
                table.pinned += int(pins > 0)
                shared.counters.disk_bytes += shared.header.slot_bytes
                moved += 1
    return moved
