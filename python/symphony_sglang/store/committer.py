"""The thread that makes pages durable, keeps slots free, and tries a failed disk again."""

from __future__ import annotations

import datetime
import errno
import logging
import mmap
import sqlite3
import threading
from collections import OrderedDict, deque
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt

from symphony_sglang.clock import Clock
from symphony_sglang.store.database import (
    Database,
    Leaf,
    RecordChange,
    Transaction,
    is_damage,
    set_aside,
)
from symphony_sglang.store.disk import ALIGNMENT, Disk
from symphony_sglang.store.feed import ResidencyFeed
from symphony_sglang.store.health import Health, HealthEvent
from symphony_sglang.store.io_pool import Batch, Direction, IoPool, Scratch
from symphony_sglang.store.namespace import NamespaceHeader
from symphony_sglang.store.segments import SegmentFiles
from symphony_sglang.store.settings import StoreSettings, SyncPolicy
from symphony_sglang.store.slots import SlotState, SlotTable
from symphony_sglang.store.transfer import Regions

logger = logging.getLogger(__name__)

# Kept free for the next batches, so that they need not wait for an eviction's commit: half a
# second of writes, at least two batches, at most a sixteenth of the store.
FREE_AHEAD_BYTES = 1 << 30
FREE_AHEAD_SLOTS_MIN = 256
# Part of the pages that one scan for victims picks.
VICTIMS_SHARE = 50
# Last uses reach the disk with other changes of their leaf, at the latest after this long.
RECENCY_SECONDS = 600.0
FLOOR_SECONDS = 5.0
PROBE_FILE = "probe"
SAVED_AT = "saved_at"


@dataclass(slots=True)
class Counters:
    """Totals since the store was opened; pages unless the name says bytes."""

    hits: int = 0
    misses: int = 0
    corrupt: int = 0
    read_failures: int = 0
    written: int = 0
    already_present: int = 0
    refused: int = 0
    write_failures: int = 0
    evicted: int = 0
    deadlines: int = 0
    commits: int = 0
    commit_failures: int = 0
    records_dropped: int = 0
    pins_refused: int = 0
    read_bytes: int = 0
    payload_bytes: int = 0
    disk_bytes: int = 0  # headers, padding, index rows and moved pages included


@dataclass(slots=True)
class Shared:
    """What the parts of one open store work on. `lock` guards `table` and `counters`."""

    folder: Path
    header: NamespaceHeader
    settings: StoreSettings
    clock: Clock
    disk: Disk
    table: SlotTable
    segments: SegmentFiles
    database: Database
    pool: IoPool
    health: Health
    feed: ResidencyFeed
    capacity_segments: int
    layout_id: bytes
    lock: threading.RLock = field(default_factory=threading.RLock)
    counters: Counters = field(default_factory=Counters)
    regions: Regions = field(default_factory=Regions)
    records: OrderedDict[tuple[str, str], bytes | None] = field(default_factory=OrderedDict)
    records_committing: dict[tuple[str, str], bytes | None] = field(default_factory=dict)
    probe_memory: mmap.mmap = field(default_factory=lambda: mmap.mmap(-1, 2 * ALIGNMENT))


class Committer:
    """Group commit. A request is answered by the first commit that starts after it."""

    def __init__(self, shared: Shared) -> None:
        self._s = shared
        self._wake = threading.Condition()
        self._requested = 0
        self._finished = 0
        self._durable = 0
        self._room = 0
        self._closing = False
        self._cannot_grow_until = 0.0
        self._saved_bytes = (0, 0)
        self._recency_at = shared.clock.monotonic() + RECENCY_SECONDS
        self._floor_at = 0.0
        self._victims: deque[tuple[int, float]] = deque()
        self._probing: Batch | None = None
        self._thread = threading.Thread(target=self._run, name="page-store-commit", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def request(self, room: int = 0) -> int:
        """Ask for a commit (and for `room` free slots after it); returns a ticket for ``wait``."""
        with self._wake:
            self._requested += 1
            self._room = max(self._room, room)
            self._wake.notify_all()
            return self._requested

    def wait(self, ticket: int, seconds: float) -> bool:
        """Whether a commit that covers `ticket` succeeded within `seconds`."""
        with self._wake:
            self._wake.wait_for(lambda: self._finished >= ticket, seconds)
            return self._durable >= ticket

    def answered(self, ticket: int) -> bool:
        """Whether a round that covers `ticket` has ended, well or badly."""
        return self._finished >= ticket

    def close(self, seconds: float) -> bool:
        """Commit what is left and stop; False if the disk does not answer."""
        with self._wake:
            self._closing = True
            self._wake.notify_all()
        self._thread.join(seconds)
        return not self._thread.is_alive()

    def _run(self) -> None:
        while True:
            with self._wake:
                if self._requested == self._finished and not self._closing:
                    self._wake.wait(self._s.settings.interval_seconds)
                ticket, room, closing = self._requested, self._room, self._closing
                self._room = 0
            done = self._step(room, closing)
            with self._wake:
                self._finished = ticket
                if done:
                    self._durable = ticket
                self._wake.notify_all()
                if closing:
                    return

    def _step(self, room: int, closing: bool) -> bool:
        """One round; True when everything that was pending is durable."""
        shared = self._s
        try:
            if shared.health.probe_due():
                self._probe()
            if not closing:
                self._keep_floor()
                self._make_room(room)
            self._spread_recency(closing)
            done = self._commit()
            self._remove_retired()
        except OSError as error:
            shared.health.failed(error)
            return False
        except Exception as error:
            logger.exception("page store %s: commit failed unexpectedly", shared.folder)
            shared.health.record(HealthEvent.FAILED, f"commit: {error!r}")
            return False
        return done

    def _commit(self) -> bool:
        shared, table = self._s, self._s.table
        with shared.lock:
            if not (table.pending or table.dirty_leaves or table.evicted or shared.records):
                return True
            syncing = sorted(table.pending)
            table.move(syncing, SlotState.SYNCING)
            table.pending.clear()
        try:
            if shared.settings.sync is not SyncPolicy.OFF:
                shared.segments.sync({slot // table.slots_per_segment for slot in syncing})
        except OSError as error:
            self._revert(syncing)
            shared.health.failed(error)
            return False
        with shared.lock:
            leaves = table.dirty_leaves | table.leaves_of(syncing)
            table.dirty_leaves = set()
            table.touched_leaves -= leaves
            built = [(leaf, table.build_leaf(leaf)) for leaf in sorted(leaves)]
            freed = [slot for slot in table.evicted if not table.readers[slot]]
            removed, table.unpublished = table.unpublished, []
            records = [RecordChange(*name, body) for name, body in shared.records.items()]
            shared.records_committing, shared.records = dict(shared.records), OrderedDict()
            work = self._transaction(built, records)
        try:
            index_bytes = shared.database.commit(work)
        except sqlite3.Error as error:
            with shared.lock:
                table.dirty_leaves |= leaves
                table.unpublished = removed + table.unpublished
                self._return_records(records)
            self._revert(syncing)
            self._database_failed(error)
            return False
        self._committed(work, index_bytes)
        with shared.lock:
            shared.records_committing = {}
            stored = self._settle(syncing, freed)
        shared.feed.publish(removed, stored)
        return True

    def _transaction(self, built: list[Leaf], records: list[RecordChange]) -> Transaction:
        shared = self._s
        now = shared.clock.unix()
        counters = shared.counters
        return Transaction(
            leaves=built,
            records=records,
            meta={
                "capacity_bytes": shared.capacity_segments * shared.header.segment_bytes,
                "lifetime_seconds": int(shared.table.lifetime_seconds),
                SAVED_AT: int(now),
            },
            day=datetime.datetime.fromtimestamp(now, datetime.UTC).date().isoformat(),
            payload_bytes=counters.payload_bytes - self._saved_bytes[0],
            disk_bytes=counters.disk_bytes - self._saved_bytes[1],
            records_max=shared.settings.records_max,
        )

    def _committed(self, work: Transaction, index_bytes: int) -> None:
        counters = self._s.counters
        self._saved_bytes = (
            self._saved_bytes[0] + work.payload_bytes,
            self._saved_bytes[1] + work.disk_bytes,
        )
        with self._s.lock:
            counters.commits += 1
            counters.disk_bytes += 2 * index_bytes  # once to the log, once to the table

    def _settle(self, syncing: list[int], freed: list[int]) -> list[bytes]:
        """After the transaction: pages are committed, evicted slots are free."""
        table = self._s.table
        still = self._still_syncing(syncing)
        table.move(still, SlotState.COMMITTED)
        table.release(freed)
        return table.keys.keys_at(still)

    def _still_syncing(self, syncing: list[int]) -> npt.NDArray[np.int64]:
        """Without those that were removed since the commit began."""
        slots = np.array(syncing, np.int64)
        still: npt.NDArray[np.int64] = slots[self._s.table.state[slots] == SlotState.SYNCING]
        return still

    def _revert(self, syncing: list[int]) -> None:
        with self._s.lock:
            self._s.counters.commit_failures += 1
            still = self._still_syncing(syncing)
            self._s.table.move(still, SlotState.PENDING)
            self._s.table.pending.update(still.tolist())

    def _return_records(self, records: list[RecordChange]) -> None:
        # What was put since is newer, and stays behind what comes back.
        newer, self._s.records = self._s.records, OrderedDict()
        self._s.records_committing = {}
        for change in records:
            self._s.records[change.kind, change.id] = change.body
        for name, body in newer.items():
            self._s.records[name] = body
            self._s.records.move_to_end(name)

    def _database_failed(self, error: sqlite3.Error) -> None:
        shared = self._s
        code = getattr(error, "sqlite_errorcode", sqlite3.SQLITE_ERROR) & 0xFF
        if is_damage(error):
            shared.database.close()
            damaged = set_aside(shared.folder)
            logger.warning("%s: index damaged (%s), rewriting it from memory", damaged, error)
            shared.database = Database(shared.folder, shared.settings.sync)
            with shared.lock:
                present = np.flatnonzero(shared.table.state)
                shared.table.dirty_leaves |= shared.table.leaves_of(present)
        elif code in (sqlite3.SQLITE_FULL, sqlite3.SQLITE_READONLY, sqlite3.SQLITE_CANTOPEN):
            shared.health.record(HealthEvent.NO_SPACE, f"index: {error}")
        else:
            shared.health.failed(OSError(errno.EIO, f"index: {error}"))

    def _spread_recency(self, closing: bool) -> None:
        shared = self._s
        now = shared.clock.monotonic()
        if closing or now >= self._recency_at:
            self._recency_at = now + RECENCY_SECONDS
            with shared.lock:
                shared.table.dirty_leaves |= shared.table.touched_leaves
                shared.table.touched_leaves = set()

    def _make_room(self, room: int) -> None:
        """Grow while that is allowed, then evict, so that the next batch finds free slots."""
        shared, table = self._s, self._s.table
        if not shared.health.writable:
            return
        wanted = max(room, free_ahead(shared))
        while table.free < wanted and self._grow():
            pass
        missing = min(wanted, len(table)) - table.free - len(table.evicted)
        if missing > 0:
            self._evict(missing)

    def _evict(self, count: int) -> None:
        shared, table = self._s, self._s.table
        now = shared.clock.unix()
        for fresh in (False, True):
            if fresh:
                planned = max(count, len(table) // VICTIMS_SHARE)
                self._victims = deque(table.plan_victims(planned))
            with shared.lock:
                while count > 0 and self._victims:
                    step = min(count, len(self._victims))
                    some = [self._victims.popleft() for _ in range(step)]
                    evicted = table.evict(some, now)
                    shared.counters.evicted += evicted
                    count -= evicted
            if count <= 0:
                return

    def _grow(self) -> bool:
        """Add a segment; False where capacity, floor or disk forbid it."""
        shared, table = self._s, self._s.table
        now = shared.clock.monotonic()
        if len(table.segments) >= shared.capacity_segments or now < self._cannot_grow_until:
            return False
        space = shared.disk.free_space(shared.folder)
        floor = int(space.total_bytes * shared.settings.free_floor_share)
        segment = min(set(range(shared.capacity_segments)) - table.segments)
        try:
            if space.free_bytes - shared.header.segment_bytes < floor:
                raise OSError(
                    errno.ENOSPC,
                    f"{space.free_bytes} bytes free, a segment takes "
                    f"{shared.header.segment_bytes}, {floor} are to stay free",
                )
            shared.segments.create(segment)
        except OSError as error:
            self._cannot_grow_until = now + FLOOR_SECONDS
            if table.segments:
                logger.info("page store %s: not growing: %s", shared.folder, error)
            else:
                shared.health.failed(error)
            return False
        with shared.lock:
            table.add_segment(segment)
        return True

    def _keep_floor(self) -> None:
        """Give a segment back where others have filled the disk below the floor."""
        shared, table = self._s, self._s.table
        now = shared.clock.monotonic()
        if now < self._floor_at:
            return
        self._floor_at = now + FLOOR_SECONDS
        space = shared.disk.free_space(shared.folder)
        if space.free_bytes >= int(space.total_bytes * shared.settings.free_floor_share):
            return
        with shared.lock:
            if table.retiring:
                return
            segment = table.coldest_segment()
        if segment is not None:
            logger.warning(
                "page store %s: %d bytes free on the disk, giving back a segment of %d bytes",
                shared.folder,
                space.free_bytes,
                shared.header.segment_bytes,
            )
            self.drop_segment(segment)

    def drop_segment(self, segment: int) -> None:
        """Evict a segment's pages and retire it; its file goes once the eviction is durable."""
        shared, table = self._s, self._s.table
        with shared.lock:
            table.retire_segment(segment)
            live = table.live_slots(segment)
            table.remove_slots(live)
            shared.counters.evicted += len(live)

    def _remove_retired(self) -> None:
        shared = self._s
        with shared.lock:
            empty = shared.table.retired()
        for segment in empty:
            shared.segments.remove(segment)

    def _probe(self) -> None:
        """Write, sync and read one block by the pool's threads, as a page would be."""
        shared = self._s
        if self._probing is not None and not self._probing.wait(0):
            return  # the last probe is still stuck: do not lose another thread to it
        failure: list[OSError] = []
        passed: list[bool] = []

        def attempt(_: Scratch) -> None:
            try:
                probe_disk(shared)
                passed.append(True)
            except OSError as error:
                failure.append(error)

        batch = self._probing = shared.pool.submit(Direction.READ, [attempt])
        if not batch.wait(shared.settings.deadline_seconds):
            batch.cancel()
            return
        if passed:
            self._cannot_grow_until = 0.0
            if shared.table.segments or self._grow():
                shared.health.record(HealthEvent.PROBE_OK, "probe succeeded")
        elif failure and failure[0].errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):
            shared.health.record(HealthEvent.PROBE_NO_SPACE, str(failure[0]))


def free_ahead(shared: Shared) -> int:
    """Slots to keep free for the next batch."""
    total = shared.capacity_segments * shared.table.slots_per_segment
    return min(total // 16, max(FREE_AHEAD_SLOTS_MIN, FREE_AHEAD_BYTES // shared.header.slot_bytes))


def probe_disk(shared: Shared) -> None:
    """Raises OSError where a block cannot be written, synced and read back."""
    path = shared.folder / PROBE_FILE
    file = shared.disk.open_file(path)
    view = memoryview(shared.probe_memory)
    try:
        stamp = shared.health.changes.to_bytes(8, "little") * (ALIGNMENT // 8)
        view[:ALIGNMENT] = stamp
        file.allocate(ALIGNMENT)
        file.pwritev([view[:ALIGNMENT]], 0)
        file.fdatasync()
        file.preadv([view[ALIGNMENT:]], 0)
        if view[ALIGNMENT:] != stamp:
            raise OSError(errno.EIO, "the probe block reads back wrong")
    finally:
        view.release()
        file.close()
