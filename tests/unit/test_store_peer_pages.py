"""Pages from one store to another, over the wire and through staging memory."""

from __future__ import annotations

import threading

import pytest

from store_pages import NAMESPACE, PAGE_BYTES, Pool, assert_served, content_of, key_of, open_store
from symphony_sglang.store.peer_pages import StagingPool, StorePageSink, StorePageSource
from symphony_sglang.testing.disk import FaultyDisk, Operation
from symphony_sglang.wire.pull import PageState, PullEnd
from wire_world import identity, pull, serve

KEYS = [key_of(at) for at in range(40)]
WHO = identity(page_bytes=PAGE_BYTES)


def fill(store, keys) -> None:
    pool = Pool(8)
    for at in range(0, len(keys), 8):
        store.write(pool.fill(keys[at : at + 8]))


def move(source, target, keys, *, areas: int = 6, **options):
    staging = StagingPool(PAGE_BYTES, area_bytes=8 * PAGE_BYTES, areas_max=areas)
    pages = StorePageSource(source, staging, wait_seconds=1.0)
    sink_staging = StagingPool(PAGE_BYTES, area_bytes=8 * PAGE_BYTES, areas_max=areas)
    sink = StorePageSink(target, sink_staging, keys, lambda depth: 1.0 + depth)
    with serve(pages, who=WHO) as server:
        report = pull(
            server.address, sink, keys, who=WHO, page_bytes=PAGE_BYTES,
            request_bytes=8 * PAGE_BYTES, **options,
        )  # fmt: skip
    for one in (staging, sink_staging):
        one.check()
        assert one._lent == 0
    return report


def test_pages_move_between_stores(tmp_path) -> None:
    with open_store(tmp_path / "a") as source, open_store(tmp_path / "b") as target:
        fill(source, KEYS)
        report = move(source, target, KEYS)
        assert report.end is PullEnd.COMPLETE, report
        assert_served(target, Pool(40), KEYS)
        target.check()
        # Depths follow the chain: its head goes last.
        assert move(source, target, KEYS).states == [PageState.PRESENT] * 40


def test_one_staging_area_is_enough(tmp_path) -> None:
    with open_store(tmp_path / "a") as source, open_store(tmp_path / "b") as target:
        fill(source, KEYS)
        assert move(source, target, KEYS, areas=1).end in (PullEnd.COMPLETE, PullEnd.SHORT)
        assert move(source, target, KEYS, areas=2).end is PullEnd.COMPLETE


def test_page_damaged_on_the_source_disk_is_missing(tmp_path) -> None:
    source = open_store(tmp_path / "a")
    fill(source, KEYS)
    source.flush()
    folder = source.folder
    source.close()
    wanted = bytes(content_of(KEYS[9])[:64])
    for path in folder.iterdir():
        if path.is_file() and path.stat().st_size > 10 * PAGE_BYTES:
            raw = bytearray(path.read_bytes())
            at = raw.find(wanted)
            if at >= 0:
                raw[at + 7] ^= 1
                path.write_bytes(raw)
    with open_store(tmp_path / "a") as source, open_store(tmp_path / "b") as target:
        report = move(source, target, KEYS)
        assert report.end is PullEnd.SHORT
        assert report.pages_here == 9
        assert report.states[9] is PageState.MISSING


def test_full_disk_at_the_target_ends_the_pull(tmp_path) -> None:
    disk = FaultyDisk()
    with (
        open_store(tmp_path / "a") as source,
        open_store(tmp_path / "b", disk=disk) as target,
    ):
        fill(source, KEYS)
        disk.fail(Operation.WRITE, 28)
        report = move(source, target, KEYS)
        assert report.end is PullEnd.NO_ROOM
        assert report.pages_here == 0
        target.check()


def test_pages_that_the_worker_writes_itself_meanwhile_count_as_here(tmp_path) -> None:
    with open_store(tmp_path / "a") as source, open_store(tmp_path / "b") as target:
        fill(source, KEYS)
        own = threading.Thread(target=fill, args=(target, KEYS))
        own.start()
        report = move(source, target, KEYS)
        own.join()
        assert report.end in (PullEnd.COMPLETE, PullEnd.NO_ROOM)
        assert_served(target, Pool(40), KEYS)


def test_staging_that_a_stuck_read_may_fill_is_not_lent_again(tmp_path) -> None:
    disk = FaultyDisk()
    with open_store(tmp_path / "a", disk=disk, deadline_seconds=0.2) as store:
        fill(store, KEYS[:8])
        staging = StagingPool(PAGE_BYTES, area_bytes=8 * PAGE_BYTES, areas_max=1)
        source = StorePageSource(store, staging, wait_seconds=0.05)
        disk.hang(Operation.READ)
        opened = source.open(KEYS[:8])
        assert not any(opened.views)
        opened.release()
        assert staging.acquire(1) is None
        disk.heal()
        area = staging.acquire(1, 2.0)
        assert area is not None


@pytest.mark.parametrize("other", [{"tp_rank": 1, "tp_size": 2}, {"revision": "r2"}])
def test_identity_of_a_namespace_tells_them_apart(other) -> None:
    import dataclasses

    from symphony_sglang.engine.peer_identity import identity_of
    from symphony_sglang.wire.pages import find_mismatch

    ours = identity_of(NAMESPACE)
    theirs = identity_of(dataclasses.replace(NAMESPACE, **other))
    mismatch = find_mismatch(ours, theirs)
    assert mismatch is not None
    assert mismatch.field in other
