"""The tree locks behind the protections that the promoter decided on.

A protection is a length of a prefix; a lock is on a node. Matching exactly that length splits the
tree there, so the lock covers what is protected and not a page more. Scheduler thread only.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from symphony_sglang.core.levels import Level
from symphony_sglang.core.prefix import Prefix
from symphony_sglang.core.promoter import LockChange

if TYPE_CHECKING:
    from symphony_sglang.engine.cache import SymphonyCache
    from symphony_sglang.engine.mover import Mover

FindPrefix = Callable[[Level, str], Prefix | None]


class LockTable:
    """One lock a (level, holder); ``apply`` follows the promoter's lock changes."""

    def __init__(self, cache: SymphonyCache, mover: Mover, find_prefix: FindPrefix) -> None:
        self._cache = cache
        self._mover = mover
        self._find_prefix = find_prefix
        self._device: dict[str, Any] = {}  # holder -> TreeLock
        self._host: dict[str, tuple[Any, Any]] = {}  # holder -> (node, release parameters)

    def __len__(self) -> int:
        return len(self._device) + len(self._host)

    def reset(self) -> None:
        """The tree was emptied: its locks went with it."""
        self._device.clear()
        self._host.clear()

    def apply(self, changes: tuple[LockChange, ...]) -> None:
        """Take the new lock before the old one goes, so that nothing is evictable in between."""
        for change in changes:
            if change.level is Level.DEVICE:
                self._change_device(change)
            else:
                self._change_host(change)

    def _change_device(self, change: LockChange) -> None:
        old = self._device.pop(change.holder_id, None)
        prefix = self._find_prefix(change.level, change.holder_id) if change.tokens else None
        if prefix is not None:
            found = self._mover.find(prefix, change.tokens)
            if found.device_tokens:
                self._device[change.holder_id] = self._cache.lock(found.device_node)
        if old is not None:
            self._cache.unlock(old)

    def _change_host(self, change: LockChange) -> None:
        old = self._host.pop(change.holder_id, None)
        prefix = self._find_prefix(change.level, change.holder_id) if change.tokens else None
        if prefix is not None:
            node = self._mover.find(prefix, change.tokens).host_node
            # A write-through still under way has no host copy to hold yet; its own lock holds it.
            if not self._cache.is_root(node) and self._cache.is_backuped(node):
                receipt = self._cache.inc_host_lock_ref(node).to_dec_params()
                self._host[change.holder_id] = (node, receipt)
        if old is not None:
            self._cache.dec_host_lock_ref(*old)

    def check(self) -> None:
        """Nothing is locked for a holder that protects nothing."""
        for level, holders in ((Level.DEVICE, self._device), (Level.HOST, self._host)):
            for holder_id in holders:
                assert self._find_prefix(level, holder_id) is not None, (level, holder_id)
