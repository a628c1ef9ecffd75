"""Damaged files, unusable directories: what is wrong is a miss or a clear refusal, never served."""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from store_pages import (
    SEGMENT_BYTES,
    SLOT_BYTES,
    ManualClock,
    Pool,
    assert_served,
    content_of,
    key_of,
    open_store,
)
from symphony_sglang.errors import StoreError, StoreIdentityError
from symphony_sglang.store import HealthState, WriteOutcome

COUNT = 40
KEYS = [key_of(number) for number in range(COUNT)]
TESTS = Path(__file__).resolve().parents[1]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    pool = Pool(COUNT)
    with open_store(tmp_path) as store:
        assert set(store.write(pool.fill(KEYS))) == {WriteOutcome.WRITTEN}
        return store.folder


def served(directory: Path) -> set[bytes]:
    """The keys that read back; each must read back equal."""
    pool = Pool(COUNT)
    with open_store(directory) as store:
        pages = pool.read(store, KEYS)
        for key, page in zip(KEYS, pages, strict=True):
            if page is not None:
                np.testing.assert_array_equal(page, content_of(key))
        store.check()
        good = {key for key, page in zip(KEYS, pages, strict=True) if page is not None}
        # What was found wrong can be written again.
        lost = [key for key in KEYS if key not in good]
        assert set(store.write(pool.fill(lost))) <= {WriteOutcome.WRITTEN}
        assert_served(store, pool, KEYS)
        return good


def test_a_truncated_segment_loses_only_its_lost_pages(folder: Path) -> None:
    os.truncate(folder / "segment-000001.data", 5 * SLOT_BYTES + 100)
    lost = COUNT - len(served(folder.parent))
    assert lost == 11  # 16 pages lay in it, 5 are whole


def test_a_missing_segment_loses_only_its_pages(folder: Path) -> None:
    (folder / "segment-000000.data").unlink()
    assert len(served(folder.parent)) == COUNT - 16


def test_no_flipped_bit_of_a_segment_is_served(folder: Path) -> None:
    path = folder / "segment-000000.data"
    flips = random.Random(7)
    broken = set()
    with path.open("r+b") as file:
        for _ in range(8):
            at = flips.randrange(SEGMENT_BYTES)
            file.seek(at)
            byte = file.read(1)[0]
            file.seek(at)
            file.write(bytes([byte ^ 1 << flips.randrange(8)]))
            if at % SLOT_BYTES >= 4096 or at % SLOT_BYTES < 112:
                broken.add(at // SLOT_BYTES)
    assert len(served(folder.parent)) == COUNT - len(broken)


@pytest.mark.parametrize("seed", range(30))
def test_no_damage_of_the_index_is_served(folder: Path, seed: int) -> None:
    path = folder / "index.sqlite"
    damage = random.Random(seed)
    size = path.stat().st_size
    with path.open("r+b") as file:
        for _ in range(damage.choice([1, 10, 200])):
            file.seek(damage.randrange(size))
            file.write(damage.randbytes(damage.choice([1, 4, 64])))
    served(folder.parent)


@pytest.mark.parametrize("size", [0, 1, 100, 4096, 5000, 8192])
def test_a_truncated_index_is_rebuilt_from_the_pages(folder: Path, size: int) -> None:
    os.truncate(folder / "index.sqlite", size)
    assert len(served(folder.parent)) == COUNT


@pytest.mark.parametrize("content", [None, b"", b"not a database at all" * 500])
def test_a_lost_or_foreign_index_is_rebuilt_from_the_pages(folder: Path, content) -> None:
    (folder / "index.sqlite").unlink()
    if content is not None:
        (folder / "index.sqlite").write_bytes(content)
    assert len(served(folder.parent)) == COUNT


def test_a_rebuild_keeps_to_the_newest_epoch_and_to_whole_headers(folder: Path) -> None:
    (folder / "index.sqlite").unlink()
    with (folder / "segment-000000.data").open("r+b") as file:
        file.seek(3 * SLOT_BYTES + 20)
        file.write(b"\xff")
    assert len(served(folder.parent)) == COUNT - 1


def test_a_log_of_garbage_is_ignored(folder: Path) -> None:
    (folder / "index.sqlite-wal").write_bytes(os.urandom(10000))
    assert len(served(folder.parent)) == COUNT


@pytest.mark.parametrize("change", [b"{", b"", b'{"namespace": 1}'])
def test_a_damaged_namespace_header_is_refused(folder: Path, change: bytes) -> None:
    (folder / "namespace.json").write_bytes(change)
    with pytest.raises(StoreIdentityError, match="damaged"):
        open_store(folder.parent)


def test_a_changed_geometry_in_the_header_is_refused(folder: Path) -> None:
    path = folder / "namespace.json"
    path.write_text(path.read_text().replace(str(SLOT_BYTES), str(SLOT_BYTES + 4096)))
    with pytest.raises(StoreIdentityError, match="damaged"):
        open_store(folder.parent)


def test_a_missing_directory_is_made(tmp_path: Path) -> None:
    with open_store(tmp_path / "a" / "b") as store:
        assert store.folder.is_dir()


def test_a_path_through_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="Not a directory"):
        open_store(tmp_path / "file" / "store")


def test_a_directory_that_may_not_be_written_is_refused(tmp_path: Path) -> None:
    program = (
        "import os, sys; from pathlib import Path; import store_pages as p\n"
        "from symphony_sglang.errors import StoreError\n"
        "if os.getuid() == 0: os.setuid(65534)\n"
        "try: p.open_store(Path(sys.argv[1]))\n"
        "except StoreError as error: print(type(error).__name__, error)\n"
    )
    tmp_path.chmod(0o555)
    closed = tmp_path / "store"
    done = subprocess.run(
        [sys.executable, "-c", program, str(closed)], capture_output=True, text=True, cwd=TESTS
    )
    assert done.stdout.startswith("StoreError"), done.stderr
    assert "ermission denied" in done.stdout
    assert str(closed) in done.stdout


@pytest.fixture
def small_disk(tmp_path: Path):
    """A file system of 6 MB, where root may mount one."""
    mount = tmp_path / "small"
    mount.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=6m", "tmpfs", str(mount)]
    if os.getuid() != 0 or shutil.which("mount") is None:
        pytest.skip("mounting needs root")
    if subprocess.run(command, capture_output=True).returncode != 0:
        pytest.skip("mounting is not allowed here")
    yield mount
    subprocess.run(["umount", "-l", str(mount)], check=True)


def test_a_full_file_system_is_misses_until_there_is_room(small_disk: Path) -> None:
    filler = small_disk / "filler"
    with filler.open("wb") as file:
        file.write(bytes(5_300_000))
    pool, clock = Pool(8), ManualClock()
    with open_store(small_disk, clock=clock, segments=3) as store:
        assert store.write(pool.fill(KEYS[:8])) == [WriteOutcome.REFUSED] * 8
        assert store.state is HealthState.READ_ONLY
        assert pool.read(store, KEYS[:8]) == [None] * 8
        filler.unlink()
        for _ in range(100):
            clock.now += 1.0
            if store.flush() and store.state is HealthState.OK:
                break
        assert store.write(pool.fill(KEYS[:8])) == [WriteOutcome.WRITTEN] * 8
        assert_served(store, pool, KEYS[:8])
        store.check()
