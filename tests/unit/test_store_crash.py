"""kill -9 at any instant, and simulated power cuts: nothing committed lost, nothing wrong served.

The power cut is ext4's shutdown without a log flush, on a loop mount; it needs root.
"""

from __future__ import annotations

import fcntl
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from store_crash_child import SEGMENTS
from store_pages import SEGMENT_SLOTS, ManualClock, Pool, content_of, key_of, open_store
from symphony_sglang.store import SyncPolicy

TESTS = Path(__file__).resolve().parents[1]
EXT4_IOC_SHUTDOWN = 0x8004587D
NO_LOG_FLUSH = (2).to_bytes(4, "little")
# Batches of at most 8; the slots evicted ahead and the batch that was under way may be gone.
SURELY_KEPT = SEGMENTS * SEGMENT_SLOTS - 4 - 3 * 8


class Writers:
    """The forking process, and what the current writer has acknowledged."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "store_crash_child.py"],
            cwd=TESTS,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            bufsize=1,
        )
        self.acknowledged: list[int] = []
        self.removed: set[int] = set()

    def start(self, directory: Path, sync: SyncPolicy, first: int, batches: int = 10**9) -> int:
        self._process.stdin.write(f"{directory} {sync.value} {first} {batches}\n")
        return int(self._process.stdout.readline().split()[1])

    def kill(self, pid: int) -> None:
        """Kill -9, and take down what the writer had said until then."""
        os.kill(pid, signal.SIGKILL)
        for line in self._process.stdout:
            words = line.split()
            if words[0] == "dead":
                return
            if words[0] == "ack":
                self.acknowledged.extend(range(int(words[1]), int(words[2])))
            if words[0] == "remove":
                self.removed.add(int(words[1]))
        raise AssertionError("the writers' process is gone")

    def close(self) -> None:
        self._process.stdin.close()
        self._process.stdout.close()
        self._process.wait(10)


@pytest.fixture
def writers() -> Iterator[Writers]:
    made = Writers()
    yield made
    made.close()


def check_all(directory: Path, sync: SyncPolicy, *, lossless: bool) -> tuple[set[bytes], int]:
    """Open after a crash and read every page of the index: each equal, none torn.

    Returns the keys that read back, and how many were found wrong and not served.
    """
    pool = Pool(SEGMENTS * SEGMENT_SLOTS)
    # A clock in the past: these reads do not count as uses, so the newest pages stay the newest.
    options = {"sync": sync, "interval_seconds": 3600.0, "clock": ManualClock()}
    with open_store(directory, SEGMENTS, **options) as store:
        keys = [key for chunk in store.snapshot() for key in chunk]
        assert len(keys) == store.opened.pages == len(store)
        assert store.opened.lost == 0
        pages = pool.read(store, keys)
        wrong = 0
        for key, page in zip(keys, pages, strict=True):
            if page is None:
                wrong += 1
            else:
                np.testing.assert_array_equal(page, content_of(key))
        if lossless:
            assert wrong == 0
        store.check()
        return {key for key, page in zip(keys, pages, strict=True) if page is not None}, wrong


def crash_rounds(directory: Path, writers: Writers, sync: SyncPolicy, rounds: int) -> None:
    chance = random.Random(rounds)
    first = 0
    for _ in range(rounds):
        pid = writers.start(directory, sync, first)
        threading.Event().wait(chance.uniform(0.0, 0.15))
        writers.kill(pid)
        served, _ = check_all(directory, sync, lossless=True)
        known = {key_of(number) for number in range(first + 5000)}
        assert served <= known
        if sync is SyncPolicy.BATCH:
            assert_newest_kept(writers, served)
        first += 5000
    assert len(writers.acknowledged) > rounds


def assert_newest_kept(writers: Writers, served: set[bytes]) -> None:
    """All that was acknowledged last and not removed since is there."""
    newest = set(writers.acknowledged[-SURELY_KEPT:]) - writers.removed
    assert {number for number in newest if key_of(number) not in served} == set()


@pytest.mark.parametrize("sync", list(SyncPolicy))
def test_what_is_a_second_old_survives_kill_9(tmp_path: Path, writers: Writers, sync) -> None:
    pid = writers.start(tmp_path, sync, 0, batches=5)
    threading.Event().wait(1.0)
    writers.kill(pid)
    served, _ = check_all(tmp_path, sync, lossless=True)
    assert len(writers.acknowledged) >= 5
    assert_newest_kept(writers, served)


@pytest.mark.parametrize("sync", list(SyncPolicy))
def test_kill_9_loses_nothing_committed(tmp_path: Path, writers: Writers, sync) -> None:
    crash_rounds(tmp_path, writers, sync, rounds=14)


@pytest.mark.soak
@pytest.mark.parametrize("sync", list(SyncPolicy))
def test_kill_9_two_hundred_times(tmp_path: Path, writers: Writers, sync: SyncPolicy) -> None:
    crash_rounds(tmp_path, writers, sync, rounds=200)


class LoopDisk:
    """An ext4 file system in a file, that can lose power."""

    def __init__(self, folder: Path) -> None:
        self.image, self.mount = folder / "image", folder / "mount"
        self.mount.mkdir()
        with self.image.open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, 64 << 20)
        run("mkfs.ext4", "-q", "-F", str(self.image))
        self.attach()

    def attach(self) -> None:
        # commit=1: the journal is written often, so that a cut falls between two states.
        run("mount", "-o", "loop,commit=1", str(self.image), str(self.mount))

    def detach(self) -> None:
        run("umount", str(self.mount))

    def cut_power(self) -> None:
        handle = os.open(self.mount, os.O_RDONLY)
        try:
            fcntl.ioctl(handle, EXT4_IOC_SHUTDOWN, NO_LOG_FLUSH)
        finally:
            os.close(handle)


def run(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True)


@pytest.fixture
def loop_disk(tmp_path: Path) -> Iterator[LoopDisk]:
    if os.getuid() != 0 or shutil.which("mkfs.ext4") is None:
        pytest.skip("a loop mount needs root and mkfs.ext4")
    try:
        disk = LoopDisk(tmp_path)
    except subprocess.CalledProcessError as error:
        pytest.skip(f"no loop mount here: {error.stderr!r}")
    yield disk
    subprocess.run(["umount", "-l", str(disk.mount)], capture_output=True)


def power_cut_rounds(disk: LoopDisk, writers: Writers, sync: SyncPolicy, rounds: int) -> None:
    chance = random.Random(rounds)
    store = disk.mount / "store"
    for number in range(rounds):
        writers.acknowledged.clear()
        pid = writers.start(store, sync, number * 100_000)
        threading.Event().wait(chance.uniform(0.2, 1.6))
        disk.cut_power()
        threading.Event().wait(0.05)
        writers.kill(pid)
        disk.detach()
        disk.attach()
        served, _ = check_all(store, sync, lossless=sync is not SyncPolicy.OFF)
        if sync is SyncPolicy.BATCH:
            assert writers.acknowledged
            assert_newest_kept(writers, served)


@pytest.mark.parametrize("sync", list(SyncPolicy))
def test_a_power_cut_serves_nothing_wrong(loop_disk: LoopDisk, writers: Writers, sync) -> None:
    power_cut_rounds(loop_disk, writers, sync, rounds=2)


@pytest.mark.soak
@pytest.mark.parametrize("sync", list(SyncPolicy))
def test_twenty_power_cuts_serve_nothing_wrong(loop_disk, writers, sync) -> None:
    power_cut_rounds(loop_disk, writers, sync, rounds=20)
