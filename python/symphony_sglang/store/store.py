"""The page store of one namespace: batches of pages to and from an NVMe disk."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from symphony_sglang.clock import Clock, SystemClock
from symphony_sglang.errors import StoreError, StoreKeyError
from symphony_sglang.store import retention
from symphony_sglang.store.batches import (
    Hold,
    Job,
    RangeCall,
    ReadCall,
    ReadOutcome,
    ReadResult,
    WriteCall,
    WriteOutcome,
    check_pieces,
    cut,
    release_readers,
)
from symphony_sglang.store.committer import Committer, Shared, free_ahead
from symphony_sglang.store.disk import Disk, SystemDisk
from symphony_sglang.store.feed import ResidencyDrain
from symphony_sglang.store.health import HealthEvent, HealthState
from symphony_sglang.store.io_pool import Direction
from symphony_sglang.store.maintenance import (
    CompactReport,
    Progress,
    VerifyReport,
    compact,
    verify,
)
from symphony_sglang.store.namespace import KEY_BYTES, Namespace, check_keys, write_namespace_header
from symphony_sglang.store.opening import OpenReport, logger, open_shared
from symphony_sglang.store.records import SideRecords
from symphony_sglang.store.settings import StoreSettings, SyncPolicy
from symphony_sglang.store.slots import PageFacts, SlotState
from symphony_sglang.store.stat import StoreStat, stat_of
from symphony_sglang.store.transfer import Piece, bytes_of

SNAPSHOT_CHUNK = 4096
_CLOSE_SECONDS = 10.0


class PlacedPage(NamedTuple):
    """A page to write: where its bytes are, and what the cache knows of it."""

    key: bytes
    pieces: Sequence[Piece]
    cost: float = 1.0
    depth: int = 0
    priority: int = 0


class PageStore:
    """Thread-safe. A read returns within ``StoreSettings.deadline`` of its bytes, a write within
    that and two more of ``deadline_seconds`` (to make room before, to commit after).

    Failures of the disk are misses and refusals, never exceptions; what raises is a caller's
    mistake (``StoreError``: a key that is no digest, pieces that do not fit the page).
    """

    def __init__(
        self,
        directory: Path,
        namespace: Namespace,
        settings: StoreSettings | None = None,
        *,
        clock: Clock | None = None,
        disk: Disk | None = None,
    ) -> None:
        """Open or create the namespace in `directory` and start its threads.

        Raises:
            StoreError: see ``opening.open_shared``.
        """
        self.namespace = namespace
        self.settings = settings or StoreSettings()
        self._closed = False
        shared, lock, report = open_shared(
            directory, namespace, self.settings, clock or SystemClock(), disk or SystemDisk()
        )
        self._s: Shared = shared
        self._lock_handle = lock
        self.opened: OpenReport = report
        self._committer = Committer(shared)
        self._records = SideRecords(shared)
        self._shrink_to_capacity()
        self._committer.start()
        self._committer.request()  # the first segment is made before the first write needs it
        logger.info(
            "page store %s: %d pages on disk for %s%s",
            shared.folder,
            report.pages,
            namespace.describe(),
            f", {report.lost} index entries unusable" if report.lost else "",
        )

    def _shrink_to_capacity(self) -> None:
        table = self._s.table
        for _ in range(len(table.segments) - self._s.capacity_segments):
            segment = table.coldest_segment()
            if segment is not None:
                self._committer.drop_segment(segment)

    # --- lookup ---------------------------------------------------------------------------------

    @property
    def folder(self) -> Path:
        return self._s.folder

    @property
    def state(self) -> HealthState:
        return self._s.health.state

    def prefix_length(self, keys: Sequence[bytes]) -> int:
        """How many of `keys`, from the first on, can be read without a gap."""
        return self.prefix_length_joined(b"".join(keys))

    def prefix_length_joined(self, raw: bytes) -> int:
        """As ``prefix_length``, the 32-byte keys one after the other."""
        if not self._s.health.readable or not raw:
            return 0
        missing = self._find(raw) < 0
        return int(missing.argmax()) if missing.any() else len(missing)

    def contains(self, keys: Sequence[bytes]) -> list[bool]:
        if not self._s.health.readable or not keys:
            return [False] * len(keys)
        found: list[bool] = (self._find(b"".join(keys)) >= 0).tolist()
        return found

    def _find(self, raw: bytes) -> npt.NDArray[np.int64]:
        """Look up without the lock, unless a writer was at the table meanwhile."""
        if len(raw) % KEY_BYTES:
            raise StoreKeyError(f"{len(raw)} bytes are no whole number of {KEY_BYTES}-byte keys")
        table = self._s.table.keys
        version = table.version
        if version % 2 == 0:
            slots = table.find(raw)
            if table.version == version:
                return slots
        with self._s.lock:
            return table.find(raw)

    def lengths(self, keys: Sequence[bytes]) -> list[int | None]:
        """Payload bytes of each page, None where it is not there."""
        with self._s.lock:
            table = self._s.table
            slots = [table.keys.get(key) for key in keys]
            return [None if slot is None else int(table.length[slot]) for slot in slots]

    def __len__(self) -> int:
        return len(self._s.table)

    def register_memory(self, address: int, size: int) -> None:
        """Name memory that many pages will use (a host pool), which makes its use cheaper.

        It must stay valid as long as the store is open.
        """
        self._s.regions.add(address, size)

    # --- reading --------------------------------------------------------------------------------

    def read(
        self,
        keys: Sequence[bytes],
        pages: Sequence[Sequence[Piece]],
        ranges: Sequence[tuple[int, int]] | None = None,
    ) -> ReadResult:
        """Read pages into caller memory, verified.

        Args:
            pages: for each key the (address, bytes) pieces to fill, in payload order. The memory
                must stay valid until the call returns, and beyond it for the pages of `hold`.
            ranges: (offset, bytes) parts of the payload to read instead of all of it, the same for
                every page, one piece each: the layers a to b of K and of V, say.

        Returns:
            One outcome a key. Anything but HIT is a miss, and its memory holds no promise.

        Raises:
            StoreError: a page's pieces do not add up to its length, or a range lies outside it.
        """
        check_keys(keys)
        if len(keys) != len(pages):
            raise StoreError(f"{len(keys)} keys, {len(pages)} pages; expected as many of each")
        outcomes = [ReadOutcome.MISS] * len(keys)
        if self._closed or not self._s.health.readable:
            self._s.counters.misses += len(keys)
            return ReadResult(outcomes, None)
        calls = self._take_for_read(keys, pages, ranges)
        total = sum([call.wanted_bytes for call in calls])
        batch = self._s.pool.submit(Direction.READ, calls)
        if not batch.wait(self.settings.deadline(total)):
            self._let_go_of_reads([task for task in batch.cancel() if isinstance(task, ReadCall)])
            self._deadline_passed(f"a read of {total} bytes")
        busy: list[int] = []
        for call in calls:
            for job, outcome in zip(call.jobs, call.outcomes, strict=True):
                outcomes[job.position] = outcome if call.finished else ReadOutcome.BUSY
            if not call.finished:
                busy.extend(job.position for job in call.jobs)
        return ReadResult(outcomes, Hold(batch, sorted(busy)) if busy else None)

    def _take_for_read(
        self,
        keys: Sequence[bytes],
        pages: Sequence[Sequence[Piece]],
        ranges: Sequence[tuple[int, int]] | None,
    ) -> list[ReadCall]:
        """The calls for the pages that are there; their slots are held until each call ends."""
        shared, table = self._s, self._s.table
        with shared.lock:
            found = table.find(keys)
            present = found[found >= 0]
            lengths = table.length.take(found, mode="clip").tolist()
            jobs = []
            for position, slot in enumerate(found.tolist()):
                if slot >= 0:
                    key, pieces, length = keys[position], pages[position], lengths[position]
                    check_pieces(key, pieces, length, ranges)
                    jobs.append(Job(slot, position, key, pieces, length))
            shared.counters.misses += len(keys) - len(jobs)
            np.add.at(table.readers, present, 1)
            table.touch(present, shared.clock.unix())
            cuts = cut(shared, jobs, merge=ranges is None)
        if ranges is None:
            return [ReadCall(shared, *one) for one in cuts]
        return [RangeCall(shared, file, offset, job[0], ranges) for file, offset, job in cuts]

    def _let_go_of_reads(self, calls: Sequence[ReadCall]) -> None:
        with self._s.lock:
            for call in calls:
                call.finished = True
                release_readers(self._s.table.readers, call.jobs)

    def _deadline_passed(self, what: str) -> None:
        self._s.counters.deadlines += 1
        self._s.health.record(HealthEvent.STUCK, f"{what} passed its deadline")

    # --- writing --------------------------------------------------------------------------------

    def write(self, pages: Sequence[PlacedPage]) -> list[WriteOutcome]:
        """Write pages from caller memory; pages already there are not written again.

        WRITTEN means acknowledged as the sync policy says (see ``SyncPolicy``), and readable in
        this process at once. The memory may be reused when the call returns, whatever the outcome:
        a write cut short by the deadline can only end in a slot that is never made visible.

        Raises:
            StoreError: a page is larger than the namespace's pages, or has no bytes.
        """
        keys = [page.key for page in pages]
        check_keys(keys)
        lengths = [bytes_of(page.pieces) for page in pages]
        largest = self.namespace.page_bytes
        for at, total in enumerate(lengths):
            if not 0 < total <= largest:
                raise StoreError(
                    f"page {keys[at].hex()} has {total} bytes; expected 1 to {largest}"
                )
        outcomes = [WriteOutcome.REFUSED] * len(pages)
        jobs = self._place(pages, keys, lengths, outcomes)
        if jobs:
            self._write_jobs(jobs, pages, outcomes)
        # The second mention of a key shares the fate of the first.
        first = dict(zip(reversed(keys), reversed(outcomes), strict=True))
        return outcomes if len(first) == len(keys) else [first[key] for key in keys]

    def _place(
        self,
        pages: Sequence[PlacedPage],
        keys: list[bytes],
        lengths: list[int],
        outcomes: list[WriteOutcome],
    ) -> list[Job]:
        """Reserve slots for what is new, making room if need be; marks what is PRESENT."""
        shared, table = self._s, self._s.table
        new: dict[bytes, int] = {}
        with shared.lock:
            found = table.find(keys)
            present = found[found >= 0]
            if len(present):
                table.touch(present, shared.clock.unix())
                shared.counters.already_present += len(present)
            for at, (key, slot) in enumerate(zip(keys, found.tolist(), strict=True)):
                if slot >= 0:
                    outcomes[at] = WriteOutcome.PRESENT
                elif key not in new and not table.is_writing(key):
                    new[key] = at
        if self._closed or not shared.health.writable or not new:
            shared.counters.refused += len(new)
            return []
        wanted = list(new)
        slots = self._reserve(wanted)
        shared.counters.refused += len(wanted) - len(slots)
        return [
            Job(slot, at, key, pages[at].pieces, lengths[at])
            for key, slot in zip(wanted, slots, strict=False)
            for at in (new[key],)
        ]

    def _reserve(self, keys: list[bytes]) -> list[int]:
        shared, table = self._s, self._s.table
        with shared.lock:
            slots = table.allocate(keys) if table.free >= len(keys) else []
            scarce = table.free < free_ahead(shared) // 2
        if slots:
            if scarce:
                self._committer.request()  # in time for the batches after this one
            return slots
        ticket = self._committer.request(room=len(keys))
        if not self._committer.wait(ticket, self.settings.deadline_seconds):
            if shared.health.writable and not self._committer.answered(ticket):
                self._deadline_passed("making room")
            return []
        with shared.lock:
            keys[:] = [key for key in keys if key not in table.keys and not table.is_writing(key)]
            return table.allocate(keys)

    def _write_jobs(
        self, jobs: list[Job], pages: Sequence[PlacedPage], outcomes: list[WriteOutcome]
    ) -> None:
        shared, table = self._s, self._s.table
        calls = [WriteCall(shared, *one) for one in cut(shared, jobs, merge=True)]
        total = sum([job.length for job in jobs])
        deadline = self.settings.deadline(total)
        batch = shared.pool.submit(Direction.WRITE, calls)
        dropped: set[int] = set()
        if not batch.wait(deadline):
            dropped = {id(task) for task in batch.cancel()}
            self._deadline_passed(f"a write of {total} bytes")
        written: list[Job] = []
        with shared.lock:
            for call in calls:
                if id(call) in dropped:
                    call.give_back()
                elif call.abandon():
                    pass  # it gives its slots back when the system call returns
                elif call.error is not None:
                    call.give_back()
                else:
                    written.extend(call.jobs)
                    continue
                for job in call.jobs:
                    outcomes[job.position] = WriteOutcome.FAILED
            facts = [  # a page's last three fields are those of its facts
                PageFacts(job.length, *pages[job.position][2:]) for job in written
            ]
            table.publish([job.slot for job in written], facts, shared.clock.unix())
            shared.counters.written += len(written)
            shared.counters.payload_bytes += sum([job.length for job in written])
            shared.counters.disk_bytes += len(written) * shared.header.slot_bytes
        durable = True
        if written and self.settings.sync is SyncPolicy.BATCH:
            durable = self.flush(deadline)
        for job in written:
            outcomes[job.position] = WriteOutcome.WRITTEN if durable else WriteOutcome.FAILED

    def flush(self, seconds: float | None = None) -> bool:
        """Make everything written so far durable; False if that failed or took too long."""
        limit = self.settings.deadline_seconds if seconds is None else seconds
        ticket = self._committer.request()
        if self._committer.wait(ticket, limit):
            return True
        if not self._committer.answered(ticket):
            self._deadline_passed("a commit")
        return False

    # --- what the cache decides -----------------------------------------------------------------

    def touch(self, keys: Sequence[bytes]) -> None:
        """Count these pages as used now."""
        retention.touch(self._s, keys)

    def set_priority(self, keys: Sequence[bytes], priority: int) -> int:
        """-128 (goes first) to 127; returns how many of the pages are there."""
        return retention.set_priority(self._s, keys, priority)

    def pin(self, keys: Sequence[bytes]) -> int:
        """Keep pages from eviction until unpinned as often, or until the process ends.

        Returns how many were pinned: what is not there is not, nor what would take the pinned
        pages past `pin_share` of the slots.
        """
        return retention.pin(self._s, keys)

    def unpin(self, keys: Sequence[bytes]) -> int:
        """Take one pin off each page; returns how many had one."""
        return retention.unpin(self._s, keys)

    def remove(self, keys: Sequence[bytes]) -> int:
        """Forget pages, pinned or not; returns how many were there. Durable at the next commit."""
        with self._s.lock:
            return sum(self._s.table.remove(key) for key in keys)

    def clear(self) -> bool:
        """Forget every page, durably: not even a rebuild from headers brings one back."""
        shared = self._s
        with shared.lock:
            header = shared.header
            shared.header = type(header)(
                header.namespace, header.slot_bytes, header.segment_bytes, header.epoch + 1
            )
            try:
                write_namespace_header(shared.folder, shared.header)
            except OSError as error:
                shared.header = header
                shared.health.failed(error)
                return False
            shared.table.remove_slots(shared.table.keys.slots())
        return self.flush()

    # --- residency ------------------------------------------------------------------------------

    def drain_events(self, limit: int = 4096) -> ResidencyDrain:
        """Stored and removed pages since the last call, after their commit, in order."""
        return self._s.feed.drain(limit)

    def snapshot(self) -> Iterator[list[bytes]]:
        """All durable keys, in chunks. Apply the events drained after starting it on top."""
        table = self._s.table
        if not self._s.health.readable:
            return
        for start in range(0, table.slot_count, SNAPSHOT_CHUNK):
            with self._s.lock:
                states = table.state[start : start + SNAPSHOT_CHUNK]
                slots = np.flatnonzero(states == SlotState.COMMITTED) + start
                chunk = table.keys.keys_at(slots)
            if chunk:
                yield chunk

    # --- side records ---------------------------------------------------------------------------

    def put_record(self, kind: str, identity: str, body: bytes) -> None:
        """Keep a small record beside the pages (see ``SideRecords``)."""
        self._records.put(kind, identity, body)

    def delete_record(self, kind: str, identity: str) -> None:
        self._records.delete(kind, identity)

    def records(self, kind: str) -> dict[str, bytes]:
        """All records of a kind by id, oldest first, those not yet durable included."""
        return self._records.all(kind)

    # --- upkeep ---------------------------------------------------------------------------------

    def stat(self) -> StoreStat:
        return stat_of(self._s)

    def verify(self, progress: Progress | None = None) -> VerifyReport:
        """Read and check every page; what is wrong is dropped. See ``maintenance.verify``."""
        return verify(self._s, progress)

    def compact(self, progress: Progress | None = None) -> CompactReport:
        """Move pages together and give whole segments back. See ``maintenance.compact``."""
        return compact(self._s, self._committer, progress)

    def check(self) -> None:
        """Assert the invariants of the index."""
        with self._s.lock:
            self._s.table.check()

    def close(self) -> None:
        """Commit what is pending and release the namespace. Idempotent."""
        if self._closed:
            return
        self._closed = True
        settled = self._committer.close(_CLOSE_SECONDS)
        settled = self._s.pool.close(_CLOSE_SECONDS) and settled
        if settled:
            # A stuck system call still uses the files: then the process's end must close them.
            self._s.segments.close()
            self._s.database.close()
        os.ftruncate(self._lock_handle, 0)
        os.close(self._lock_handle)

    def __enter__(self) -> PageStore:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
