"""The few file operations that the store stands on, as a protocol, and the real ones."""

from __future__ import annotations

import errno
import mmap
import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

ALIGNMENT = 4096
# Direct I/O of most devices needs only this; tried once per file system.
ALIGNMENT_FINE = 512


class FreeSpace(NamedTuple):
    free_bytes: int
    total_bytes: int


class BlockFile(Protocol):
    """A segment. `alignment` holds for offsets, lengths and addresses; 1 means any will do."""

    alignment: int

    def preadv(self, memories: Sequence[memoryview], offset: int) -> int: ...
    def pwritev(self, memories: Sequence[memoryview], offset: int) -> int: ...
    def fdatasync(self) -> None: ...
    def allocate(self, size: int) -> None: ...
    def size(self) -> int: ...
    def close(self) -> None: ...


class Disk(Protocol):
    """Where segments live. Every operation may raise OSError."""

    def open_file(self, path: Path) -> BlockFile: ...
    def remove_file(self, path: Path) -> None: ...
    def free_space(self, folder: Path) -> FreeSpace: ...


class SystemFile:
    """A file opened for direct I/O, or buffered where the file system has none."""

    def __init__(self, path: Path) -> None:
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC
        try:
            self._handle = os.open(path, flags | os.O_DIRECT, 0o644)
            self.alignment = ALIGNMENT
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            self._handle = os.open(path, flags, 0o644)
            self.alignment = 1

    def preadv(self, memories: Sequence[memoryview], offset: int) -> int:
        return os.preadv(self._handle, memories, offset)

    def pwritev(self, memories: Sequence[memoryview], offset: int) -> int:
        return os.pwritev(self._handle, memories, offset)

    def fdatasync(self) -> None:
        os.fdatasync(self._handle)

    def allocate(self, size: int) -> None:
        os.posix_fallocate(self._handle, 0, size)
        if self.alignment == ALIGNMENT and size >= ALIGNMENT:
            self.alignment = self._finest_alignment()

    def _finest_alignment(self) -> int:
        with mmap.mmap(-1, ALIGNMENT) as page, memoryview(page) as view:
            sector = view[ALIGNMENT_FINE : 2 * ALIGNMENT_FINE]
            try:
                os.preadv(self._handle, [sector], ALIGNMENT_FINE)
            except OSError as error:
                if error.errno != errno.EINVAL:
                    raise
                return ALIGNMENT
            finally:
                sector.release()
        return ALIGNMENT_FINE

    def size(self) -> int:
        return os.fstat(self._handle).st_size

    def close(self) -> None:
        os.close(self._handle)


class SystemDisk:
    """The machine's own file system."""

    def open_file(self, path: Path) -> BlockFile:
        return SystemFile(path)

    def remove_file(self, path: Path) -> None:
        path.unlink(missing_ok=True)

    def free_space(self, folder: Path) -> FreeSpace:
        facts = os.statvfs(folder)
        return FreeSpace(facts.f_bavail * facts.f_frsize, facts.f_blocks * facts.f_frsize)
