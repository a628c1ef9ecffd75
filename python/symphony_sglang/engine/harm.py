"""Finds out what an advisory's loads pushed off the device, and who missed it afterwards.

A page is known by its storage hash, which the tree keeps while a storage backend is attached;
without one there is nothing to tell pages by, and harm is not counted. Evictions from the host
level are not counted either: the tree core picks and drops those without naming them, and write-
through has left a copy on disk. Scheduler thread only.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from symphony_sglang.core.ledger import OutcomeLedger
from symphony_sglang.core.prefix import Prefix
from symphony_sglang.engine.storage_view import page_hashes

if TYPE_CHECKING:
    from symphony_sglang.engine.cache import SymphonyCache


class HarmWatch:
    """Feeds ``OutcomeLedger.evicted`` and ``asked`` from what really happens in the tree."""

    def __init__(self, cache: SymphonyCache, outcomes: OutcomeLedger) -> None:
        self._cache = cache
        self._outcomes = outcomes
        # The advisory whose load is being made room for.
        self.loading_for: str | None = None

    def evicting(self, node_id: Any) -> None:
        """The tree is about to drop this node's device copy."""
        if self.loading_for is not None:
            hashes = self._cache.tree_core.get_hash_values(node_id)
            self._outcomes.evicted(self.loading_for, hashes)

    def asked(self, prefix: Prefix, match: Any) -> None:
        """A request came; what of its prompt is not on the device, some advisory may have evicted.

        Pages on the host level are named by the tree; those further down are hashed, which costs
        the scheduler only while evicted pages are remembered.
        """
        if not self._outcomes.remembers_evictions:
            return
        page_size = self._cache.page_size
        first = int(match.device_prefix_len) // page_size
        node = match.best_match_node
        core = self._cache.tree_core
        if self._cache.is_root(node):
            known = []
        else:
            known = [*core.get_prefix_hash_values(node), *core.get_hash_values(node)]
        self._outcomes.asked(known[first:])
        if len(known) < prefix.tokens // page_size and self._outcomes.remembers_evictions:
            self._outcomes.asked(page_hashes(prefix, page_size)[max(first, len(known)) :])
