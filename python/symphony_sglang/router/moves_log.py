"""What the router saw of who owns which session: the log that "one owner" is checked from."""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Callable
from typing import Any

from symphony_sglang.core.migration_log import OwnershipEntry, OwnershipEvent

ENTRIES_MAX = 8192
SESSIONS_MAX = 65_536


class OwnershipJournal:
    """The newest entries; an entry that repeats the last of its session and worker is left out."""

    def __init__(self, *, entries_max: int = ENTRIES_MAX) -> None:
        self._entries: deque[OwnershipEntry] = deque(maxlen=entries_max)
        self._last: OrderedDict[tuple[str, str], tuple[OwnershipEvent, int]] = OrderedDict()
        self.listeners: list[Callable[[OwnershipEntry], None]] = []
        self.written = 0

    def write(self, entry: OwnershipEntry) -> None:
        place = entry.session_id, entry.worker_id
        said = entry.event, entry.epoch
        if self._last.get(place) == said:
            return
        self._last[place] = said
        self._last.move_to_end(place)
        while len(self._last) > SESSIONS_MAX:
            self._last.popitem(last=False)
        self._entries.append(entry)
        self.written += 1
        for listener in self.listeners:
            listener(entry)

    def as_json(self) -> list[dict[str, Any]]:
        return [entry._asdict() for entry in self._entries]
