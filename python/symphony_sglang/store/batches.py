"""One batch of reads or writes: cut into system calls, run by the pool, settled by the table."""

from __future__ import annotations

import errno
import threading
from collections.abc import Sequence
from enum import Enum
from operator import itemgetter
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from symphony_sglang.errors import StoreError
from symphony_sglang.store.committer import Shared
from symphony_sglang.store.disk import BlockFile
from symphony_sglang.store.health import NO_SPACE_ERRORS
from symphony_sglang.store.io_pool import PAGES_PER_CALL_MAX, Batch, Scratch
from symphony_sglang.store.page import (
    HEADER_BYTES,
    PageHeader,
    header_bytes,
    part_bytes_for,
    part_sums,
    read_header,
)
from symphony_sglang.store.transfer import (
    Piece,
    bytes_of,
    is_aligned,
    piece_of,
    read_bounced,
    read_vector,
    write_bounced,
    write_vector,
)

# Pieces a system call may carry (IOV_MAX is 1,024), headers not counted.
PIECES_PER_CALL_MAX = 900
# Below this a call costs more than it moves, so a small batch is not cut further.
CALL_BYTES_MIN = 256 * 1024


class ReadOutcome(Enum):
    HIT = "hit"
    MISS = "miss"
    CORRUPT = "corrupt"  # failed its checksum: dropped, quarantined, a miss
    FAILED = "failed"  # the disk did not deliver: a miss
    BUSY = "busy"  # past the deadline with its system call still running: see ``Hold``


class WriteOutcome(Enum):
    WRITTEN = "written"  # acknowledged as the sync policy says
    PRESENT = "present"  # already on disk, not written again
    REFUSED = "refused"  # no room, a disk that is full or off, or the same key being written
    FAILED = "failed"


class Hold:
    """Caller memory that the kernel may still write to after a read gave up.

    Until `wait` answers True the memory of `positions` must not be used for anything else.
    """

    def __init__(self, batch: Batch, positions: Sequence[int]) -> None:
        self._batch = batch
        self.positions = tuple(positions)

    def wait(self, seconds: float | None) -> bool:
        """True once no system call touches the memory any more."""
        return self._batch.wait(seconds)


class ReadResult(NamedTuple):
    """One outcome per key, in order. `hold` is None unless an outcome is BUSY."""

    outcomes: list[ReadOutcome]
    hold: Hold | None


class Job(NamedTuple):
    """One page of a batch. `length` is its payload's; `pieces` add up to it, unless ranges are
    read."""

    slot: int
    position: int
    key: bytes
    pieces: Sequence[Piece]
    length: int


def cut(shared: Shared, jobs: list[Job], *, merge: bool) -> list[tuple[BlockFile, int, list[Job]]]:
    """Jobs by system call: (file, offset, pages that lie one after the other)."""
    settings = shared.settings
    total = sum([job.length for job in jobs]) + HEADER_BYTES * len(jobs)
    # As many rounds of all threads as the largest call asks for, and every round full.
    rounds = max(1, -(-total // (settings.io_bytes * settings.io_threads)))
    even = -(-total // (settings.io_threads * rounds))
    limit = min(settings.io_bytes, max(even, CALL_BYTES_MIN))
    slot_bytes, in_segment = shared.header.slot_bytes, shared.table.slots_per_segment
    calls: list[tuple[BlockFile, int, list[Job]]] = []
    some: list[Job] = []
    following, size, pieces = -1, 0, 0
    for job in sorted(jobs, key=itemgetter(0)):
        slot, _, _, memory, length = job
        span, parts = HEADER_BYTES + length, len(memory) + 1
        size += span
        pieces += parts
        fits = size <= limit and pieces <= PIECES_PER_CALL_MAX and len(some) < PAGES_PER_CALL_MAX
        if slot != following or not fits:
            some = []
            calls.append((*shared.segments.locate(slot), some))
            size, pieces = span, parts
        some.append(job)
        # The next slot follows on disk without a gap, in the same file.
        full = merge and span == slot_bytes and (slot + 1) % in_segment
        following = slot + 1 if full else -1
    return calls


def release_readers(readers: npt.NDArray[np.uint16], jobs: Sequence[Job]) -> None:
    """Let go of the slots of a call; the same page may stand in it twice."""
    np.subtract.at(readers, [job.slot for job in jobs], 1)


class ReadCall:
    """Reads whole pages that lie one after the other, and verifies them."""

    def __init__(self, shared: Shared, file: BlockFile, offset: int, jobs: list[Job]) -> None:
        self._shared = shared
        self._file = file
        self._offset = offset
        self.jobs = jobs
        self.outcomes = [ReadOutcome.FAILED] * len(jobs)
        self.finished = False
        self.wanted_bytes = sum([job.length for job in jobs])

    def __call__(self, scratch: Scratch) -> None:
        error: OSError | None = None
        try:
            self._read(scratch)
        except OSError as caught:
            error = caught
        finally:
            self._settle(error)

    def _read(self, scratch: Scratch) -> None:
        views, bits = self._shared.regions.views([job.pieces for job in self.jobs])
        headers = scratch.headers
        if not bits & (self._file.alignment - 1):
            vector = []
            for header, memories in zip(headers, views, strict=False):
                vector.append(header)
                vector.extend(memories)
            read_vector(self._file, self._offset, vector)
        else:
            offset = self._offset
            for header, job, memories in zip(headers, self.jobs, views, strict=False):
                read_bounced(self._file, offset, [header, *memories], scratch.bounce)
                offset += HEADER_BYTES + job.length
        verify = self._verify if self._shared.settings.verify_reads else self._identify
        self.outcomes = [
            ReadOutcome.HIT if verify(job, block, memories) else ReadOutcome.CORRUPT
            for job, block, memories in zip(self.jobs, headers, views, strict=False)
        ]

    def _verify(self, job: Job, block: memoryview, memories: Sequence[memoryview]) -> bool:
        """Whether the header is the one that a page of this key and this content has."""
        shared, length = self._shared, job.length
        part = part_bytes_for(length, shared.settings.checksum_bytes)
        sums = part_sums(memories, part)
        epoch = shared.header.epoch
        expected = header_bytes(job.key, shared.layout_id, epoch, length, part, sums)
        if block[: len(expected)] == expected:
            return True
        # Wrong, or written under another epoch or unit of verification.
        header = self.checked_header(job, block)
        return header is not None and part_sums(memories, header.part_bytes) == header.sums

    def _identify(self, job: Job, block: memoryview, _: Sequence[memoryview]) -> bool:
        return self.checked_header(job, block) is not None

    def checked_header(self, job: Job, block: memoryview) -> PageHeader | None:
        header = read_header(block)
        if header is None or header.key != job.key or header.length != job.length:
            return None
        return header if header.layout_id == self._shared.layout_id else None

    def _settle(self, error: OSError | None) -> None:
        """Count, drop what was wrong, let go of the slots. Runs on the I/O thread, even late."""
        shared, table = self._shared, self._shared.table
        lost = error is not None and error.errno == errno.EIO
        with shared.lock:
            counters = shared.counters
            release_readers(table.readers, self.jobs)
            hits = self.outcomes.count(ReadOutcome.HIT)
            counters.hits += hits
            counters.read_bytes += self.wanted_bytes
            for job, outcome in zip(self.jobs, self.outcomes, strict=True):
                if hits == len(self.jobs):
                    break
                if outcome is ReadOutcome.HIT:
                    continue
                counters.read_bytes -= bytes_of(job.pieces)
                counters.corrupt += outcome is ReadOutcome.CORRUPT
                counters.read_failures += outcome is ReadOutcome.FAILED
                # A page that cannot be read now is not worth keeping a slot for: it would stand in
                # the way of writing it again.
                dropped = outcome is ReadOutcome.CORRUPT or lost
                if dropped and table.keys.get(job.key) == job.slot:
                    table.remove(job.key, quarantine=True)
        if error is None:
            shared.health.succeeded()
        else:
            shared.health.failed(error)
        self.finished = True


class RangeCall(ReadCall):
    """Reads ranges of a page's payload, each into its piece; verifies the parts they touch."""

    def __init__(
        self,
        shared: Shared,
        file: BlockFile,
        offset: int,
        job: Job,
        ranges: Sequence[tuple[int, int]],
    ) -> None:
        super().__init__(shared, file, offset, [job])
        self.wanted_bytes = bytes_of(job.pieces)
        self._ranges = ranges

    def _read(self, scratch: Scratch) -> None:
        job = self.jobs[0]
        block = scratch.headers[0]
        memories = [self._shared.regions.view(piece) for piece in job.pieces]
        read_vector(self._file, self._offset, [block])
        header = self.checked_header(job, block)
        good = header is not None
        for (start, _), memory in zip(self._ranges, memories, strict=True):
            good = good and header is not None and self._range(header, start, memory, scratch)
        self.outcomes[0] = ReadOutcome.HIT if good else ReadOutcome.CORRUPT

    def _range(self, header: PageHeader, start: int, memory: memoryview, scratch: Scratch) -> bool:
        payload = self._offset + HEADER_BYTES
        end, part = start + len(memory), header.part_bytes
        if not self._shared.settings.verify_reads:
            self._fill(payload + start, memory, scratch)
            return True
        whole_from = -(-start // part) * part
        whole_to = end if end == header.length else end // part * part
        if whole_from < whole_to:
            middle = memory[whole_from - start : whole_to - start]
            self._fill(payload + whole_from, middle, scratch)
            first = whole_from // part
            sums = part_sums([middle], part)
            if sums != header.sums[first : first + len(sums)]:
                return False
            edges = [(start, whole_from), (whole_to, end)]
        else:
            edges = [(start, end)]
        return all(
            self._edge(header, low, high, memory[low - start : high - start], scratch)
            for low, high in edges
            if low < high
        )

    def _fill(self, offset: int, memory: memoryview, scratch: Scratch) -> None:
        alignment = self._file.alignment
        if offset % alignment == 0 and self._aligned(memory):
            read_vector(self._file, offset, [memory])
        else:
            read_bounced(self._file, offset, [memory], scratch.bounce)

    def _aligned(self, memory: memoryview) -> bool:
        return is_aligned([piece_of(memory)], self._file.alignment)

    def _edge(
        self, header: PageHeader, low: int, high: int, memory: memoryview, scratch: Scratch
    ) -> bool:
        """A range that covers parts of the page only in part: they are read whole to verify."""
        unit = header.part_bytes
        for part in range(low // unit, -(-high // unit)):
            start = part * unit
            end = min(start + unit, header.length)
            content = memoryview(bytearray(end - start))
            offset = self._offset + HEADER_BYTES + start
            read_bounced(self._file, offset, [content], scratch.bounce)
            if part_sums([content], unit) != header.sums[part : part + 1]:
                return False
            taken = content[max(low, start) - start : min(high, end) - start]
            at = max(low, start) - low
            memory[at : at + len(taken)] = taken
        return True


class WriteCall:
    """Writes pages that lie one after the other, each behind its header."""

    def __init__(self, shared: Shared, file: BlockFile, offset: int, jobs: list[Job]) -> None:
        self._shared = shared
        self._file = file
        self._offset = offset
        self.jobs = jobs
        self.finished = False
        self.error: OSError | None = None
        self._abandoned = False
        self._lock = threading.Lock()

    def __call__(self, scratch: Scratch) -> None:
        self.error = OSError(errno.EIO, "the write did not complete")
        try:
            self._write(scratch)
            self.error = None
        except OSError as caught:
            self.error = caught
        finally:
            with self._lock:
                self.finished = True
                abandoned = self._abandoned
            if self.error is None:
                self._shared.health.succeeded()
            else:
                self._shared.health.failed(self.error)
            if abandoned:
                self.give_back()

    def _write(self, scratch: Scratch) -> None:
        epoch, layout_id = self._shared.header.epoch, self._shared.layout_id
        wanted = self._shared.settings.checksum_bytes
        views, bits = self._shared.regions.views([job.pieces for job in self.jobs])
        vector: list[memoryview] = []
        for block, job, memories in zip(scratch.headers, self.jobs, views, strict=False):
            part = part_bytes_for(job.length, wanted)
            sums = part_sums(memories, part)
            content = header_bytes(job.key, layout_id, epoch, job.length, part, sums)
            block[: len(content)] = content
            vector.append(block)
            vector.extend(memories)
        if not bits & (self._file.alignment - 1):
            write_vector(self._file, self._offset, vector)
        else:
            # Pages of this call follow each other without padding, so they are written as one.
            write_bounced(self._file, self._offset, vector, scratch.bounce)

    def abandon(self) -> bool:
        """The caller gave up. True if the call is still running: it then gives its slots back."""
        with self._lock:
            self._abandoned = not self.finished
            return self._abandoned

    def give_back(self) -> None:
        """Free the slots of pages that never became readable."""
        table = self._shared.table
        with self._shared.lock:
            self._shared.counters.write_failures += len(self.jobs)
            bad_media = self.error is not None and self.error.errno not in NO_SPACE_ERRORS
            for job in self.jobs:
                table.abandon(job.slot, quarantine=bad_media)


def check_pieces(
    key: bytes,
    pieces: Sequence[Piece],
    length: int,
    ranges: Sequence[tuple[int, int]] | None,
) -> None:
    """Raises StoreError where the memory given does not fit the page."""
    if ranges is None:
        total = bytes_of(pieces)
        if total != length:
            raise StoreError(f"page {key.hex()} has {length} bytes, its pieces {total}")
        return
    if len(pieces) != len(ranges):
        raise StoreError(f"{len(ranges)} ranges, {len(pieces)} pieces; expected as many of each")
    for (offset, size), (_, room) in zip(ranges, pieces, strict=True):
        if not 0 <= offset < offset + size <= length or size != room:
            raise StoreError(
                f"range of {size} bytes at {offset} into a piece of {room} bytes; expected one "
                f"inside the page's {length} bytes, and a piece of its size"
            )
