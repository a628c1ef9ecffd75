"""The preallocated files that hold the slots."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from symphony_sglang.store.disk import BlockFile, Disk
from symphony_sglang.store.namespace import sync_folder

_NAME = re.compile(r"segment-(\d{6})\.data")
SEGMENTS_MAX = 1_000_000


class SegmentFiles:
    """Segment files by number. `allocate` keeps the space of each reserved on the file system."""

    def __init__(self, disk: Disk, folder: Path, slot_bytes: int, slots_per_segment: int) -> None:
        self._disk = disk
        self._folder = folder
        self._slot_bytes = slot_bytes
        self._slots_per_segment = slots_per_segment
        self._size = slot_bytes * slots_per_segment
        self._files: dict[int, BlockFile] = {}

    def open_existing(self) -> list[int]:
        """Open every segment that is there; a truncated one is made whole again (its lost pages
        then fail their header check)."""
        for path in sorted(self._folder.iterdir()):
            match = _NAME.fullmatch(path.name)
            if match:
                self._open(int(match.group(1)))
        return sorted(self._files)

    def create(self, segment: int) -> None:
        """Raises OSError, and leaves no file, where the disk has no room."""
        try:
            self._open(segment)
            sync_folder(self._folder)
        except OSError:
            self.remove(segment)
            raise

    def _open(self, segment: int) -> None:
        file = self._disk.open_file(self._path(segment))
        self._files[segment] = file
        file.allocate(self._size)

    def remove(self, segment: int) -> None:
        file = self._files.pop(segment, None)
        if file is not None:
            file.close()
        self._disk.remove_file(self._path(segment))

    def locate(self, slot: int) -> tuple[BlockFile, int]:
        """The file and byte offset of a slot."""
        segment, place = divmod(slot, self._slots_per_segment)
        return self._files[segment], place * self._slot_bytes

    def sync(self, segments: Iterable[int]) -> None:
        for segment in sorted(segments):
            self._files[segment].fdatasync()

    def close(self) -> None:
        for file in self._files.values():
            file.close()
        self._files.clear()

    def _path(self, segment: int) -> Path:
        return self._folder / f"segment-{segment:06d}.data"
