"""A disk that fails on demand: full, broken, stuck, slow or torn, around a real one."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Sequence
from enum import Enum
from pathlib import Path

from symphony_sglang.store.disk import BlockFile, Disk, FreeSpace, SystemDisk


class Operation(Enum):
    READ = "read"
    WRITE = "write"
    SYNC = "sync"
    ALLOCATE = "allocate"


class FaultyDisk:
    """Wraps a disk; each fault stays until it is taken back, except what names a count.

    Thread-safe. `calls` counts the operations that were attempted.
    """

    def __init__(self, inner: Disk | None = None) -> None:
        self._inner = inner or SystemDisk()
        self._lock = threading.Lock()
        self._errors: dict[Operation, tuple[int, int | None]] = {}
        self._gates: dict[Operation, threading.Event] = {}
        self._delays: dict[Operation, float] = {}
        self._tear_bytes: int | None = None
        self._free_bytes: int | None = None
        self.calls = dict.fromkeys(Operation, 0)
        self.history: list[Operation] = []

    def fail(self, operation: Operation, number: int = errno.EIO, count: int | None = None) -> None:
        """Raise OSError(number) from `operation`, `count` times or until ``heal``."""
        with self._lock:
            self._errors[operation] = (number, count)

    def hang(self, operation: Operation) -> None:
        """Block `operation` until ``heal``, as a stuck device does."""
        with self._lock:
            self._gates[operation] = threading.Event()

    def delay(self, operation: Operation, seconds: float) -> None:
        with self._lock:
            self._delays[operation] = seconds

    def tear_writes(self, kept_bytes: int) -> None:
        """Write only the first bytes of each call and report all of them written."""
        with self._lock:
            self._tear_bytes = kept_bytes

    def report_free(self, free_bytes: int | None) -> None:
        """Say that so much is free; None says the truth again."""
        with self._lock:
            self._free_bytes = free_bytes

    def heal(self) -> None:
        """Take every fault back and let go of what hangs."""
        with self._lock:
            self._errors.clear()
            self._delays.clear()
            self._tear_bytes = None
            for gate in self._gates.values():
                gate.set()
            self._gates.clear()

    def enter(self, operation: Operation) -> None:
        """What every operation of every file passes through first."""
        with self._lock:
            self.calls[operation] += 1
            self.history.append(operation)
            gate = self._gates.get(operation)
            seconds = self._delays.get(operation)
            number, count = self._errors.get(operation, (0, None))
            if number and count is not None:
                if count <= 1:
                    del self._errors[operation]
                else:
                    self._errors[operation] = (number, count - 1)
        if gate is not None:
            gate.wait()
        if seconds is not None:
            threading.Event().wait(seconds)
        if number:
            raise OSError(number, os.strerror(number))

    @property
    def torn_at(self) -> int | None:
        return self._tear_bytes

    def open_file(self, path: Path) -> BlockFile:
        return FaultyFile(self, self._inner.open_file(path))

    def remove_file(self, path: Path) -> None:
        self._inner.remove_file(path)

    def free_space(self, folder: Path) -> FreeSpace:
        space = self._inner.free_space(folder)
        return space if self._free_bytes is None else space._replace(free_bytes=self._free_bytes)


class FaultyFile:
    """A file of a ``FaultyDisk``."""

    def __init__(self, disk: FaultyDisk, inner: BlockFile) -> None:
        self._disk = disk
        self._inner = inner
        self.alignment = inner.alignment

    def preadv(self, memories: Sequence[memoryview], offset: int) -> int:
        self._disk.enter(Operation.READ)
        return self._inner.preadv(memories, offset)

    def pwritev(self, memories: Sequence[memoryview], offset: int) -> int:
        self._disk.enter(Operation.WRITE)
        kept = self._disk.torn_at
        if kept is None:
            return self._inner.pwritev(memories, offset)
        left = kept
        for memory in memories:
            step = min(left, len(memory)) // self.alignment * self.alignment
            if step:
                self._inner.pwritev([memory[:step]], offset + kept - left)
            left -= step
            if step < len(memory):
                break
        return sum(len(memory) for memory in memories)

    def fdatasync(self) -> None:
        self._disk.enter(Operation.SYNC)
        self._inner.fdatasync()

    def allocate(self, size: int) -> None:
        self._disk.enter(Operation.ALLOCATE)
        self._inner.allocate(size)
        self.alignment = self._inner.alignment

    def size(self) -> int:
        return self._inner.size()

    def close(self) -> None:
        self._inner.close()
