"""Opening a namespace: lock, identity, capacity, index; what a crash can leave is put right."""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import sqlite3
from pathlib import Path
from typing import NamedTuple

from symphony_sglang.clock import Clock
from symphony_sglang.errors import (
    StoreCapacityError,
    StoreError,
    StoreIdentityError,
    StoreLockedError,
)
from symphony_sglang.store.committer import SAVED_AT, Shared
from symphony_sglang.store.database import (
    Database,
    LoadedLeaves,
    Transaction,
    is_damage,
    set_aside,
)
from symphony_sglang.store.disk import ALIGNMENT, Disk
from symphony_sglang.store.feed import ResidencyFeed
from symphony_sglang.store.health import Health
from symphony_sglang.store.io_pool import Direction, IoPool, Scratch, Task
from symphony_sglang.store.namespace import (
    Namespace,
    NamespaceHeader,
    prepare_directory,
    read_namespace_header,
    write_namespace_header,
)
from symphony_sglang.store.page import HEADER_BYTES, LAYOUT_ID_BYTES, read_header
from symphony_sglang.store.segments import SEGMENTS_MAX, SegmentFiles
from symphony_sglang.store.settings import StoreSettings, check_capacity, choose_segment_bytes
from symphony_sglang.store.slots import SlotTable
from symphony_sglang.store.transfer import read_vector

logger = logging.getLogger(__name__)

LOCK_FILE = "lock"


class OpenReport(NamedTuple):
    """What was found: pages served again, index entries that could not be used."""

    pages: int
    lost: int
    rebuilt: bool


def lock_folder(folder: Path) -> int:
    """The descriptor that holds the namespace's lock; another holder is named in the error."""
    path = folder / LOCK_FILE
    handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        holder = os.pread(handle, 32, 0).decode("ascii", "replace").strip() or "unknown"
        os.close(handle)
        if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
            raise
        raise StoreLockedError(
            f"{folder}: the namespace is open in process {holder}; one process may have it open"
        ) from None
    os.ftruncate(handle, 0)
    os.pwrite(handle, f"{os.getpid()}\n".encode("ascii"), 0)
    return handle


def slot_bytes_for(page_bytes: int) -> int:
    return HEADER_BYTES + -(-page_bytes // ALIGNMENT) * ALIGNMENT


def default_capacity(settings: StoreSettings, disk: Disk, folder: Path, slot_bytes: int) -> int:
    """A share of what is free beyond the floor, this namespace's own segments counted as free."""
    space = disk.free_space(folder)
    own = sum(path.stat().st_size for path in folder.glob("segment-*.data"))
    floor = int(space.total_bytes * settings.free_floor_share)
    capacity = int((space.free_bytes + own - floor) * settings.free_share)
    if capacity < slot_bytes:
        raise StoreCapacityError(
            f"{folder}: {space.free_bytes} bytes free, of which {floor} are to stay free: no room "
            f"for a page slot of {slot_bytes} bytes"
        )
    return capacity


def open_shared(
    directory: Path, namespace: Namespace, settings: StoreSettings, clock: Clock, disk: Disk
) -> tuple[Shared, int, OpenReport]:
    """Open or create a namespace; returns its parts, the lock's descriptor and what was found.

    Raises:
        StoreError: the directory cannot be used. StoreIdentityError: it holds something else.
        StoreLockedError: another process has it. StoreCapacityError: less than one segment.
    """
    prepare_directory(directory)
    folder = directory / namespace.folder
    try:
        folder.mkdir(exist_ok=True)
        lock = lock_folder(folder)
    except OSError as error:
        raise StoreError(f"{folder}: cannot hold a page store: {error.strerror}") from error
    try:
        shared, report = _open_locked(folder, namespace, settings, clock, disk)
        return shared, lock, report
    except sqlite3.Error as error:
        os.close(lock)
        raise StoreError(f"{folder}: the index cannot be opened: {error}") from error
    except OSError as error:
        os.close(lock)
        raise StoreError(f"{folder}: cannot hold a page store: {error}") from error
    except BaseException:
        os.close(lock)
        raise


def _open_locked(
    folder: Path, namespace: Namespace, settings: StoreSettings, clock: Clock, disk: Disk
) -> tuple[Shared, OpenReport]:
    found = read_namespace_header(folder)
    if found is not None and found.namespace != namespace:
        raise StoreIdentityError(
            f"{folder}: belongs to {found.namespace.describe()}, not to {namespace.describe()}"
        )
    slot_bytes = slot_bytes_for(namespace.page_bytes)
    database, loaded, rebuilt = open_database(folder, settings)
    try:
        capacity = settings.capacity_bytes or database.meta("capacity_bytes", 0)
        if not capacity:
            capacity = default_capacity(settings, disk, folder, slot_bytes)
        header = found
        if header is None:
            segment_bytes = choose_segment_bytes(settings, capacity, slot_bytes)
            check_capacity(capacity, segment_bytes, slot_bytes, str(folder))
            header = NamespaceHeader(namespace, slot_bytes, segment_bytes, epoch=1)
            write_namespace_header(folder, header)
        check_capacity(capacity, header.segment_bytes, slot_bytes, str(folder))
        shared = _assemble(folder, header, settings, clock, disk, database, capacity)
    except BaseException:
        database.close()
        raise
    lost = shared.table.load(loaded.ids, loaded.entries) + loaded.damaged
    shared.table.lifetime_seconds = float(database.meta("lifetime_seconds", 0))
    if rebuilt:
        rebuild_from_headers(shared)
    if database.meta(SAVED_AT, 0) == 0 and not shared.table.dirty_leaves:
        # From now on segments without this mark mean that the index was lost.
        database.commit(Transaction([], [], {SAVED_AT: int(clock.unix())}, "", 0, 0, 1))
    return shared, OpenReport(len(shared.table), lost, rebuilt)


def _assemble(
    folder: Path,
    header: NamespaceHeader,
    settings: StoreSettings,
    clock: Clock,
    disk: Disk,
    database: Database,
    capacity: int,
) -> Shared:
    segments = SegmentFiles(disk, folder, header.slot_bytes, header.slots_per_segment)
    existing = segments.open_existing()
    capacity_segments = min(capacity // header.segment_bytes, SEGMENTS_MAX)
    table = SlotTable(
        header.slots_per_segment, max([capacity_segments, *[number + 1 for number in existing]])
    )
    for segment in existing:
        table.add_segment(segment)
    feed = ResidencyFeed(settings.events_max)
    health = Health(
        str(folder),
        clock,
        failures_max=settings.failures_max,
        retry_seconds=settings.retry_seconds,
        retry_seconds_max=settings.retry_seconds_max,
        on_change=lambda _: feed.request_resync(),
    )
    return Shared(
        folder=folder,
        header=header,
        settings=settings,
        clock=clock,
        disk=disk,
        table=table,
        segments=segments,
        database=database,
        pool=IoPool("page-store-io", settings.io_threads, settings.writes_beside_reads),
        health=health,
        feed=feed,
        capacity_segments=capacity_segments,
        layout_id=header.namespace.digest[:LAYOUT_ID_BYTES],
    )


def open_database(folder: Path, settings: StoreSettings) -> tuple[Database, LoadedLeaves, bool]:
    """The index and its leaves; a damaged one is set aside and an empty one made. True if that
    happened, or if there are segments and an index that was never written."""
    database = None
    try:
        database = Database(folder, settings.sync)
        fresh = database.meta(SAVED_AT, 0) == 0
        missing = fresh and any(folder.glob("segment-*.data"))
        return database, database.load_leaves(), missing
    except sqlite3.DatabaseError as error:
        if database is not None:
            database.close()
        if not is_damage(error):
            raise
        kept = set_aside(folder)
        logger.warning("%s: index damaged (%s); rebuilding from page headers", kept, error)
        database = Database(folder, settings.sync)
        return database, database.load_leaves(), True


def rebuild_from_headers(shared: Shared) -> None:
    """Fill an empty index from the headers on disk; payloads are verified when they are read.

    Pages whose eviction was lost with the index come back too: their content is still right for
    their key. What was cleared does not, because clearing raises the epoch.
    """
    table = shared.table
    found: dict[int, tuple[bytes, int]] = {}
    layout_id = shared.layout_id

    def scan_of(slots: range) -> Task:
        def scan(scratch: Scratch) -> None:
            block = scratch.headers[0]
            for slot in slots:
                file, offset = shared.segments.locate(slot)
                try:
                    read_vector(file, offset, [block])
                except OSError:
                    continue
                page = read_header(block)
                if page is None or page.layout_id != layout_id:
                    continue
                if page.epoch == shared.header.epoch and page.length <= max_length:
                    found[slot] = (page.key, page.length)

        return scan

    max_length = shared.header.namespace.page_bytes
    tasks: list[Task] = []
    for segment in sorted(table.segments):
        slots = table.segment_slots(segment)
        tasks.extend(scan_of(slots[at : at + 256]) for at in range(0, len(slots), 256))
    shared.pool.submit(Direction.READ, tasks).wait(None)
    now = shared.clock.unix()
    for slot in sorted(found):
        key, length = found[slot]
        if key not in table.keys:
            table.restore(slot, key, length, now)
