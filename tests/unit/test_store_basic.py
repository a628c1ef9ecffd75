"""What the store promises its callers while the disk works."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from store_pages import (
    NAMESPACE,
    PAGE_BYTES,
    SEGMENT_BYTES,
    SEGMENT_SLOTS,
    SLOT_BYTES,
    Pool,
    assert_served,
    content_of,
    key_of,
    open_store,
)
from symphony_sglang.errors import (
    ConfigError,
    StoreCapacityError,
    StoreError,
    StoreIdentityError,
    StoreKeyError,
    StoreLockedError,
)
from symphony_sglang.store import (
    PageStore,
    PlacedPage,
    StoreSettings,
    SyncPolicy,
    WriteOutcome,
    key_from_hex,
    keys_from_hex,
)
from symphony_sglang.testing.disk import FaultyDisk, Operation

KEYS = [key_of(number) for number in range(10)]


@pytest.mark.parametrize("sync", list(SyncPolicy))
def test_pages_come_back_now_and_after_reopening(tmp_path: Path, sync: SyncPolicy) -> None:
    pool = Pool(10)
    with open_store(tmp_path, sync=sync) as store:
        assert store.write(pool.fill(KEYS)) == [WriteOutcome.WRITTEN] * 10
        assert_served(store, pool, KEYS)
        assert store.prefix_length([*KEYS, key_of(99)]) == 10
        store.check()
    with open_store(tmp_path, sync=sync) as store:
        assert store.opened.pages == 10
        assert_served(store, pool, KEYS)


@pytest.mark.parametrize("written", [4096, 10_000, 1 << 20])
def test_pages_written_with_another_unit_of_verification_come_back(
    tmp_path: Path, written: int
) -> None:
    pool = Pool(10)
    with open_store(tmp_path, checksum_bytes=written) as store:
        store.write(pool.fill(KEYS))
    with open_store(tmp_path, checksum_bytes=16384) as store:
        assert_served(store, pool, KEYS)
        table = store._s.table
        path = store.folder / "segment-000000.data"
        with path.open("r+b") as file:  # its last byte, under the unit it was written with
            file.seek(table.keys.get(KEYS[3]) * SLOT_BYTES + 4096 + PAGE_BYTES - 1)
            byte = file.read(1)[0]
            file.seek(-1, os.SEEK_CUR)
            file.write(bytes([byte ^ 1]))
            file.flush()
            os.fsync(file.fileno())
        served = pool.read(store, KEYS)
        assert [page is None for page in served] == [at == 3 for at in range(10)]
        assert store.stat().counters["corrupt"] == 1


@pytest.mark.parametrize(("pages", "calls"), [(16, 4), (10, 4), (3, 1), (64, 8)])
def test_a_batch_is_cut_into_equal_calls_for_every_thread(
    tmp_path: Path, pages: int, calls: int
) -> None:
    disk = FaultyDisk()
    pool, keys = Pool(pages), [key_of(number) for number in range(pages)]
    big = {"segment_bytes": 128 * SLOT_BYTES, "capacity_bytes": 4 * 128 * SLOT_BYTES}
    settings = StoreSettings(**big, io_threads=4, free_floor_share=0.0)
    with PageStore(tmp_path, NAMESPACE, settings, disk=disk) as store:
        store.write(pool.fill(keys))
        written = disk.calls[Operation.WRITE]
        assert_served(store, pool, keys)
        assert written == disk.calls[Operation.READ] == calls
        scattered = keys[::2]
        assert_served(store, pool, scattered)
        assert disk.calls[Operation.READ] == calls + len(scattered)


@pytest.mark.parametrize(("shift", "length"), [(64, None), (0, 50_001), (1, 1), (512, 4096)])
def test_memory_and_sizes_that_direct_io_refuses_bounce(tmp_path, shift, length) -> None:
    pool = Pool(10, misaligned=shift)
    with open_store(tmp_path) as store:
        assert set(store.write(pool.fill(KEYS, length))) == {WriteOutcome.WRITTEN}
        for key, page in zip(KEYS, pool.read(store, KEYS, length), strict=True):
            np.testing.assert_array_equal(page, content_of(key, length or PAGE_BYTES))
        assert np.all(pool.array[pool._shift + (length or PAGE_BYTES) :][:64] == 0xEE)


def test_pages_larger_than_the_bounce_buffer(tmp_path: Path) -> None:
    size = 3 * (1 << 20) + 77
    namespace = dataclasses.replace(NAMESPACE, page_bytes=size)
    pool = Pool(2, size, misaligned=8)
    options = StoreSettings(capacity_bytes=64 << 20, segment_bytes=32 << 20)
    with PageStore(tmp_path, namespace, options) as store:
        store.write(pool.fill(KEYS[:2]))
        for key, page in zip(KEYS, pool.read(store, KEYS[:2]), strict=False):
            np.testing.assert_array_equal(page, content_of(key, size))


RANGES = [
    [(0, 4096), (32768, 4096)],  # first layers of K and of V
    [(8192, 8192), (40960, 8192)],
    [(0, PAGE_BYTES)],
    [(100, 5000)],  # aligned to nothing
    [(PAGE_BYTES - 1, 1), (0, 1), (4095, 2)],
]


@pytest.mark.parametrize("verify", [True, False])
@pytest.mark.parametrize("ranges", RANGES)
def test_ranges_of_layers_are_one_call(tmp_path: Path, ranges, verify: bool) -> None:
    pool, target = Pool(10), Pool(10)
    with open_store(tmp_path, checksum_bytes=4096, verify_reads=verify) as store:
        store.write(pool.fill(KEYS))
        pages = []
        for at in range(10):
            (base, _), *_ = target.pieces(at)
            starts = np.cumsum([0, *(-(-size // 4096) * 4096 for _, size in ranges)])
            pages.append([(base + int(s), n) for s, (_, n) in zip(starts, ranges, strict=False)])
        outcomes = store.read(KEYS, pages, ranges).outcomes
        assert {outcome.value for outcome in outcomes} == {"hit"}
        for at, key in enumerate(KEYS):
            (base, _), *_ = target.pieces(at)
            for (offset, size), (address, _) in zip(ranges, pages[at], strict=True):
                got = target.page(at, PAGE_BYTES + 4096)[address - base :][:size]
                np.testing.assert_array_equal(got, content_of(key)[offset : offset + size])


def test_a_missing_page_is_a_miss_and_leaves_the_others(tmp_path: Path) -> None:
    pool = Pool(10)
    with open_store(tmp_path) as store:
        store.write(pool.fill(KEYS[:3]))
        wanted = [KEYS[0], key_of(77), KEYS[2]]
        pages = pool.read(store, wanted)
        assert [page is not None for page in pages] == [True, False, True]
        assert store.prefix_length(wanted) == 1
        assert store.contains(wanted) == [True, False, True]
        assert store.lengths(wanted) == [PAGE_BYTES, None, PAGE_BYTES]


def test_a_page_on_disk_is_not_written_again(tmp_path: Path) -> None:
    pool = Pool(10)
    with open_store(tmp_path) as store:
        store.write(pool.fill(KEYS))
        before = store.stat().counters["disk_bytes"]
        pages = pool.fill(KEYS)
        pool.array[:] = 0  # other bytes under the same key: the first ones stay
        assert store.write(pages) == [WriteOutcome.PRESENT] * 10
        assert store.stat().counters["disk_bytes"] - before < PAGE_BYTES
        assert_served(store, pool, KEYS)


def test_a_key_named_twice_in_a_batch_is_written_once(tmp_path: Path) -> None:
    pool = Pool(10)
    with open_store(tmp_path) as store:
        pages = pool.fill([KEYS[0], KEYS[1], KEYS[0]])
        assert store.write(pages) == [WriteOutcome.WRITTEN] * 3
        assert len(store) == 2
        assert_served(store, pool, KEYS[:2])


@pytest.mark.parametrize(
    "text",
    [
        "",
        "a" * 63,
        "a" * 65,
        "g" * 64,
        "../" + "a" * 61,
        " " + "a" * 63,
        "é" * 64,
        "a" * 62 + "\n\n",
    ],
)
def test_keys_that_are_no_hashes_are_refused(tmp_path: Path, text: str) -> None:
    with pytest.raises(StoreKeyError, match="64 hexadecimal"):
        key_from_hex(text)
    with pytest.raises(ValueError, match="64 hexadecimal"):
        keys_from_hex(["a" * 64, text])
    before = sorted(path.name for path in tmp_path.rglob("*"))
    with open_store(tmp_path) as store, pytest.raises(StoreKeyError, match="32 bytes"):
        store.write([PlacedPage(text.encode(), Pool(1).pieces(0))])
    assert before == []
    assert all(len(path.name) < 60 for path in tmp_path.rglob("*"))


def test_keys_as_text_and_bytes_agree() -> None:
    assert keys_from_hex([key.hex() for key in KEYS]) == KEYS
    assert keys_from_hex([]) == []


def test_pieces_that_do_not_fit_are_the_callers_mistake(tmp_path: Path) -> None:
    pool = Pool(2, PAGE_BYTES * 2)
    with open_store(tmp_path) as store:
        with pytest.raises(StoreError, match="expected 1 to 65536"):
            store.write([PlacedPage(KEYS[0], pool.pieces(0))])
        with pytest.raises(StoreError, match="has 0 bytes"):
            store.write([PlacedPage(KEYS[0], ())])
        store.write([PlacedPage(KEYS[0], pool.pieces(0, PAGE_BYTES))])
        with pytest.raises(StoreError, match="its pieces 4096"):
            store.read(KEYS[:1], [pool.pieces(0, 4096)])
        with pytest.raises(StoreError, match="inside the page"):
            store.read(KEYS[:1], [[(pool.pieces(0)[0][0], 8192)]], [(PAGE_BYTES - 4096, 8192)])
        store.check()
        assert not store._s.table.readers.any()


def test_eviction_keeps_the_store_inside_its_capacity(tmp_path: Path) -> None:
    pool = Pool(8)
    keys = [key_of(number) for number in range(400)]
    with open_store(tmp_path, segments=2) as store:
        for start in range(0, 400, 8):
            outcomes = store.write(pool.fill(keys[start : start + 8]))
            assert outcomes == [WriteOutcome.WRITTEN] * 8
        store.flush()
        store.check()
        assert 2 * SEGMENT_SLOTS - 8 <= len(store) <= 2 * SEGMENT_SLOTS
        assert sum(path.stat().st_size for path in tmp_path.rglob("segment-*")) == 2 * SEGMENT_BYTES
        assert_served(store, pool, keys[-8:])
        assert store.stat().counters["evicted"] == 400 - len(store)


def test_pins_and_priorities_decide_who_goes(tmp_path: Path) -> None:
    pool = Pool(8)
    keys = [key_of(number) for number in range(200)]
    with open_store(tmp_path, segments=2) as store:
        store.write(pool.fill(keys[:8]))
        store.write(pool.fill(keys[8:16]))
        assert store.pin([*keys[:4], key_of(999)]) == 4
        assert store.set_priority(keys[8:12], 5) == 4
        for start in range(16, 200, 8):
            store.write(pool.fill(keys[start : start + 8]))
        assert all(store.contains(keys[:4]))
        assert all(store.contains(keys[8:12]))
        assert not any(store.contains(keys[4:8]))
        assert store.unpin(keys[:4]) == 4
        store.set_priority(keys[:4], -5)
        for start in range(0, 40, 8):
            store.write(pool.fill([key_of(n, "x") for n in range(start, start + 8)]))
        assert not any(store.contains(keys[:4]))
        store.check()


def test_pins_stop_at_their_share_and_writes_are_refused_not_lost(tmp_path: Path) -> None:
    pool = Pool(16)
    with open_store(tmp_path, segments=1, pin_share=1.0) as store:
        keys = [key_of(number) for number in range(16)]
        assert store.write(pool.fill(keys)) == [WriteOutcome.WRITTEN] * 16
        assert store.pin(keys) == 16
        more = [key_of(number, "more") for number in range(4)]
        assert store.write(pool.fill(more)) == [WriteOutcome.REFUSED] * 4
        store.unpin(keys[:4])
        assert store.write(pool.fill(more)).count(WriteOutcome.WRITTEN) == 4
    with open_store(tmp_path, segments=1, pin_share=0.25) as store:
        assert store.pin(list(store._s.table.keys)) == 4
        assert store.stat().counters["pins_refused"] == len(store) - 4


def test_capacity_below_one_segment_is_refused_with_numbers(tmp_path: Path) -> None:
    options = StoreSettings(capacity_bytes=SEGMENT_BYTES - 1, segment_bytes=SEGMENT_BYTES)
    with pytest.raises(StoreCapacityError, match=f"{SEGMENT_BYTES - 1} bytes.*{SEGMENT_BYTES}"):
        PageStore(tmp_path, NAMESPACE, options)
    with pytest.raises(StoreCapacityError, match=f"{SLOT_BYTES}"):
        PageStore(tmp_path, NAMESPACE, StoreSettings(capacity_bytes=1 << 20, segment_bytes=4096))
    with open_store(tmp_path) as store:
        assert store.opened.pages == 0


def test_default_capacity_is_a_share_of_what_is_free(tmp_path: Path) -> None:
    from symphony_sglang.store import SystemDisk

    options = StoreSettings(free_share=0.02, free_floor_share=0.01)
    space = SystemDisk().free_space(tmp_path)
    with PageStore(tmp_path, NAMESPACE, options) as store:
        expected = (space.free_bytes - 0.01 * space.total_bytes) * 0.02
        assert 0.4 * expected < store.stat().capacity_bytes <= 1.05 * expected


@pytest.mark.parametrize(("name", "value"), [("io_threads", 0), ("pin_share", float("nan"))])
def test_settings_out_of_range_name_themselves(name: str, value: float) -> None:
    with pytest.raises(ConfigError, match=name):
        StoreSettings(**{name: value})


def test_a_smaller_capacity_gives_whole_segments_back(tmp_path: Path) -> None:
    pool = Pool(16)
    keys = [key_of(number) for number in range(48)]
    with open_store(tmp_path, segments=4) as store:
        for start in range(0, 48, 16):
            store.write(pool.fill(keys[start : start + 16]))
    with open_store(tmp_path, segments=2) as store:
        assert store.flush()
        assert store.flush()
        assert len(list(tmp_path.rglob("segment-*"))) == 2
        store.check()
        kept = [key for key in keys if store.contains([key])[0]]
        assert kept
        for start in range(0, len(kept), 16):
            assert_served(store, pool, kept[start : start + 16])


FIELDS = {
    "model": "other",
    "revision": "r2",
    "dtype": "float16",
    "layout": "page_first",
    "page_tokens": 32,
    "tp_rank": 1,
    "tp_size": 4,
    "hash_scheme": "xxh",
    "extra": (("salt", "a"),),
}


@pytest.mark.parametrize("field", list(FIELDS))
def test_another_identity_never_sees_these_pages(tmp_path: Path, field: str) -> None:
    changes = {field: FIELDS[field]} | ({"tp_size": 4} if field == "tp_rank" else {})
    other = dataclasses.replace(NAMESPACE, **changes)
    pool = Pool(10)
    with open_store(tmp_path) as store, open_store(tmp_path, namespace=other) as second:
        store.write(pool.fill(KEYS))
        assert second.prefix_length(KEYS) == 0
        assert pool.read(second, KEYS) == [None] * 10
        second.write(pool.fill(KEYS[:2]))
        assert_served(second, pool, KEYS[:2])
        assert_served(store, pool, KEYS)


def test_a_folder_moved_to_another_identity_is_refused(tmp_path: Path) -> None:
    with open_store(tmp_path) as store:
        folder = store.folder
    other = dataclasses.replace(NAMESPACE, model="other")
    folder.rename(tmp_path / other.folder)
    with pytest.raises(StoreIdentityError, match="damaged or moved"):
        open_store(tmp_path, namespace=other)


def test_segments_of_another_model_are_misses_even_in_place(tmp_path: Path) -> None:
    other = dataclasses.replace(NAMESPACE, model="other")
    pool = Pool(10)
    with open_store(tmp_path) as store, open_store(tmp_path, namespace=other) as second:
        # The same keys in the same slots: only the identity in the header tells them apart.
        store.write(pool.fill(KEYS))
        second.write(pool.fill(KEYS))
        ours, theirs = store.folder, second.folder
    (ours / "segment-000000.data").replace(theirs / "segment-000000.data")
    with open_store(tmp_path, namespace=other) as second:
        assert pool.read(second, KEYS) == [None] * 10
        assert second.stat().counters["corrupt"] == 10


def test_a_directory_that_is_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "store.json").write_text('{"magic": "mine", "version": 1}')
    with pytest.raises(StoreIdentityError, match="'mine' version 1"):
        open_store(tmp_path)
    (tmp_path / "store.json").write_text("not json")
    with pytest.raises(StoreIdentityError, match="not the header"):
        open_store(tmp_path)


def test_a_second_process_is_told_who_holds_the_store(tmp_path: Path) -> None:
    program = (
        "import sys; from pathlib import Path; import store_pages as p\n"
        "from symphony_sglang.errors import StoreLockedError\n"
        "try: p.open_store(Path(sys.argv[1]))\n"
        "except StoreLockedError as error: print(error)\n"
    )
    tests = Path(__file__).resolve().parents[1]
    with open_store(tmp_path) as store:
        done = subprocess.run(
            [sys.executable, "-c", program, str(tmp_path)],
            capture_output=True,
            text=True,
            cwd=tests,
            check=True,
        )
        assert f"process {os.getpid()}" in done.stdout
        assert str(store.folder) in done.stdout
        with pytest.raises(StoreLockedError):
            open_store(tmp_path)
    open_store(tmp_path).close()


def test_clear_forgets_everything_for_good(tmp_path: Path) -> None:
    pool = Pool(10)
    with open_store(tmp_path) as store:
        store.write(pool.fill(KEYS))
        folder = store.folder
        assert store.clear()
        assert len(store) == 0
        store.write(pool.fill(KEYS[:1]))
    for path in folder.glob("index.sqlite*"):
        path.unlink()
    with open_store(tmp_path) as store:  # rebuilt from headers
        assert store.opened.rebuilt
        assert len(store) == 1
        assert_served(store, pool, KEYS[:1])
