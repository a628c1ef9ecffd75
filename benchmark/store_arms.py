"""The arms of the store benchmark: each writes and reads the same volume in the same batches."""

from __future__ import annotations

import ctypes
import hashlib
import json
import mmap
import os
import random
import resource
import shutil
import subprocess
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from symphony_sglang.store import (
    Namespace,
    PageStore,
    PlacedPage,
    ReadOutcome,
    StoreSettings,
    SyncPolicy,
    WriteOutcome,
    piece_of,
)

BATCH = 128
DEPTH = 8
# Rounds that fit into the store before it evicts.
STORE_ROUNDS = 3


@dataclass(frozen=True, slots=True)
class Sample:
    """One arm, one direction, one round."""

    gigabytes_per_second: float
    cpu_seconds_per_gigabyte: float


class Arm(Protocol):
    name: str

    def run(self, round_number: int) -> dict[str, Sample]:
        """Write, then read cold; samples by direction."""
        ...

    def close(self) -> None: ...


def measured(total_bytes: int, work: Callable[[], None]) -> Sample:
    def cpu() -> float:
        usage = resource.getrusage(resource.RUSAGE_SELF)
        return usage.ru_utime + usage.ru_stime

    cpu_before, started = cpu(), time.perf_counter()  # noqa: TID251
    work()
    seconds = time.perf_counter() - started  # noqa: TID251
    gigabytes = total_bytes / 1e9
    return Sample(gigabytes / seconds, (cpu() - cpu_before) / gigabytes)


class PageMemory:
    """Memory for one batch, random and touched before anything is timed."""

    def __init__(self, page_bytes: int) -> None:
        self.page_bytes = page_bytes
        self._memory = mmap.mmap(-1, BATCH * page_bytes)
        self._memory.madvise(mmap.MADV_HUGEPAGE)
        self.array = np.frombuffer(self._memory, np.uint8)
        words = self.array[: len(self.array) // 8 * 8].view(np.uint64)
        words[:] = np.random.default_rng(page_bytes).integers(0, 1 << 63, len(words), np.uint64)
        address, _ = piece_of(self._memory)
        half = page_bytes // 8192 * 4096
        self.pieces = [
            ((base, half), (base + half, page_bytes - half))
            for base in range(address, address + BATCH * page_bytes, page_bytes)
        ]


class StoreArm:
    """Our store by its public calls: K and V pieces, checksums, eviction after STORE_ROUNDS."""

    def __init__(
        self, folder: Path, memory: PageMemory, batches: int, sync: SyncPolicy, *, scattered: bool
    ) -> None:
        self.name = f"store, {sync.value}" + (", scattered reads" if scattered else "")
        self._memory, self._batches, self._scattered = memory, batches, scattered
        namespace = Namespace("bench", "", "bfloat16", "page_first_direct", 16, memory.page_bytes)
        slot = memory.page_bytes + 4096
        capacity = STORE_ROUNDS * batches * BATCH * slot
        options = StoreSettings(
            capacity_bytes=capacity, segment_bytes=capacity // 6, sync=sync, io_threads=DEPTH
        )
        self._store = PageStore(folder, namespace, options)
        self._store.register_memory(memory.pieces[0][0][0], len(memory.array))
        self._pending: list[list[bytes]] = []

    def run(self, round_number: int) -> dict[str, Sample]:
        total = self._batches * BATCH * self._memory.page_bytes
        salt = f"{self.name}/{self._memory.page_bytes}/{round_number}"
        batches = [
            [hashlib.sha256(f"{salt}/{b}/{at}".encode()).digest() for at in range(BATCH)]
            for b in range(self._batches)
        ]
        return {
            "write": measured(total, lambda: self._write(batches)),
            "read": measured(total, lambda: self._read(self._order(batches, round_number))),
        }

    def _order(self, batches: list[list[bytes]], seed: int) -> list[list[bytes]]:
        chance = random.Random(seed)
        if not self._scattered:
            return chance.sample(batches, len(batches))
        keys = [key for batch in batches for key in batch]
        chance.shuffle(keys)
        return [keys[at : at + BATCH] for at in range(0, len(keys), BATCH)]

    def _write(self, batches: list[list[bytes]]) -> None:
        for keys in batches:
            pages = [PlacedPage(k, p) for k, p in zip(keys, self._memory.pieces, strict=True)]
            if set(self._store.write(pages)) != {WriteOutcome.WRITTEN}:
                raise RuntimeError("a page was not written")
        if not self._store.flush(60.0):
            raise RuntimeError("the flush failed")

    def _read(self, batches: list[list[bytes]]) -> None:
        for keys in batches:
            if set(self._store.read(keys, self._memory.pieces).outcomes) != {ReadOutcome.HIT}:
                raise RuntimeError("a page was not read")

    def close(self) -> None:
        self._store.close()


class FileBackendArm:
    """SGLang's HiCacheFile through its own batch calls, with tensors that are there already.

    Files are synced at the end of the write, inside its time, as every other arm's data is; their
    cache is dropped before the read, outside its time.
    """

    name = "SGLang file backend"

    def __init__(self, folder: Path, memory: PageMemory, batches: int) -> None:
        import torch

        from symphony_sglang.platform.torchvision_ops import define_missing_torchvision_ops

        define_missing_torchvision_ops()
        from sglang.srt.mem_cache.hicache_storage import HiCacheFile, HiCacheStorageConfig

        config = HiCacheStorageConfig(
            tp_rank=0,
            tp_size=1,
            pp_rank=0,
            pp_size=1,
            attn_cp_rank=0,
            attn_cp_size=1,
            is_mla_model=False,
            enable_storage_metrics=False,
            is_page_first_layout=False,
            model_name="bench",
        )
        self._folder, self._batches = folder, batches
        self._backend: Any = HiCacheFile(config, str(folder))
        self._tensors = [
            torch.from_numpy(memory.array[at : at + memory.page_bytes])
            for at in range(0, BATCH * memory.page_bytes, memory.page_bytes)
        ]
        self._page_bytes = memory.page_bytes

    def run(self, round_number: int) -> dict[str, Sample]:
        total = self._batches * BATCH * self._page_bytes
        batches = [
            [hashlib.sha256(f"{round_number}/{b}/{at}".encode()).hexdigest() for at in range(BATCH)]
            for b in range(self._batches)
        ]
        written = measured(total, lambda: self._write(batches))
        for path in self._folder.iterdir():
            drop_cache(path)
        order = random.Random(round_number).sample(batches, len(batches))
        read = measured(total, lambda: self._read(order))
        for path in list(self._folder.iterdir()):
            path.unlink()
        return {"write": written, "read": read}

    def _write(self, batches: list[list[str]]) -> None:
        for keys in batches:
            if not self._backend.batch_set(keys, self._tensors):
                raise RuntimeError("a page was not written")
        sync_file_system(self._folder)

    def _read(self, batches: list[list[str]]) -> None:
        for keys in batches:
            if any(page is None for page in self._backend.batch_get(keys, self._tensors)):
                raise RuntimeError("a page was not read")

    def close(self) -> None:
        shutil.rmtree(self._folder, ignore_errors=True)


class FioArm:
    """fio, O_DIRECT, one job at queue depth 8, blocks of the page size, on a file of its own.

    The file is as large as the store and each round takes the next part of it, as the store does:
    a disk with a cache of its own takes the same small file faster and faster.
    """

    name = "fio"

    def __init__(self, folder: Path, page_bytes: int, batches: int) -> None:
        self._path, self._page_bytes = folder / "fio.data", page_bytes
        self._total = batches * BATCH * page_bytes
        with self._path.open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, STORE_ROUNDS * self._total)

    def run(self, round_number: int) -> dict[str, Sample]:
        part = f"--offset={round_number % STORE_ROUNDS * self._total}"
        # fdatasync after each batch, as a store that acknowledges must.
        return {
            "write": self._fio("write", [part, f"--fdatasync={BATCH}"]),
            "read": self._fio("randread", [part, f"--randseed={round_number}"]),
        }

    def _fio(self, mode: str, options: list[str]) -> Sample:
        command = [
            "fio", "--name=bench", f"--filename={self._path}", f"--size={self._total}",
            f"--bs={self._page_bytes}", f"--rw={mode}", "--direct=1", "--ioengine=io_uring",
            f"--iodepth={DEPTH}", "--numjobs=1", "--output-format=json", "--end_fsync=1", *options,
        ]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        job = json.loads(done.stdout[done.stdout.index("{") :])["jobs"][0]
        side = job["read" if "read" in mode else "write"]
        seconds = side["io_bytes"] / side["bw_bytes"]
        cpu = (job["usr_cpu"] + job["sys_cpu"]) / 100 * seconds
        return Sample(side["bw_bytes"] / 1e9, cpu / (side["io_bytes"] / 1e9))

    def close(self) -> None:
        self._path.unlink(missing_ok=True)


class PlainLoopArm:
    """Stands in for fio where there is none: eight threads of O_DIRECT calls, no checksums."""

    name = "plain O_DIRECT loop (no fio here)"

    def __init__(self, folder: Path, memory: PageMemory, batches: int) -> None:
        self._memory, self._count = memory, batches * BATCH
        self._path = folder / "loop.data"
        self._file = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_DIRECT)
        os.posix_fallocate(self._file, 0, STORE_ROUNDS * self._count * memory.page_bytes)
        self._threads = ThreadPoolExecutor(DEPTH)

    def run(self, round_number: int) -> dict[str, Sample]:
        size = self._memory.page_bytes
        view = memoryview(self._memory.array)
        first = round_number % STORE_ROUNDS * self._count
        places = list(range(first, first + self._count))

        def call(operation: Callable[..., int], at: int) -> None:
            start = at % BATCH * size
            operation(self._file, [view[start : start + size]], at * size)

        def all_of(operation: Callable[..., int]) -> None:
            list(self._threads.map(lambda at: call(operation, at), places))
            os.fdatasync(self._file)

        written = measured(self._count * size, lambda: all_of(os.pwritev))
        random.Random(round_number).shuffle(places)
        return {"write": written, "read": measured(self._count * size, lambda: all_of(os.preadv))}

    def close(self) -> None:
        self._threads.shutdown()
        os.close(self._file)
        self._path.unlink()


def drop_cache(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fdatasync(handle)
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(handle)


def sync_file_system(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        if ctypes.CDLL(None, use_errno=True).syncfs(handle) != 0:
            raise OSError(ctypes.get_errno(), "syncfs")
    finally:
        os.close(handle)
