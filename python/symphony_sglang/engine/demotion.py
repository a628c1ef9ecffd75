"""Takes a session's KV off the device at its caller's word, where the host level has a copy.

The tree evicts from the leaves up and refuses, fatally on SGLang's Rust core, to evict what is not
a free leaf. So the free part is worked out first: a lock on the path's end says by how much it
shrinks the evictable tokens, and locks cover whole heads, so what it covers is the path's tail.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sglang.srt.mem_cache.base_prefix_cache import MatchPrefixParams

from symphony_sglang.core.prefix import Prefix

if TYPE_CHECKING:
    from symphony_sglang.engine.cache import SymphonyCache
    from symphony_sglang.engine.mover import Mover


def demote(cache: SymphonyCache, mover: Mover, prefix: Prefix, tokens: int) -> int:
    """Drop the device copies of the tail of a prefix; returns how many tokens left the device.

    What running work or another session holds stays, and so does what has no host copy.
    """
    match = cache.match_prefix(MatchPrefixParams(key=mover.key(prefix, tokens)))
    if cache.is_root(match.best_match_node):
        return 0
    (path,) = cache.tree_core.collect_path_info([match.best_match_node])
    unlocked = unlocked_tail(cache, match.last_device_node)
    dropped = 0
    below: Any = None
    for node in reversed(path):
        size = node.full_value_len
        if size is not None:
            # A child that is not on our path may be on the device: then this is no leaf.
            only_ours = node.num_children == (0 if below is None else 1)
            if not only_ours or dropped + size > unlocked or not cache.is_backuped(node.node_id):
                break
            cache.drop_device_copy(node.node_id)
            dropped += size
        below = node
    return dropped


def unlocked_tail(cache: SymphonyCache, node_id: Any) -> int:
    """Device tokens on the path to a node, from its end up, that nothing locks."""
    if cache.is_root(node_id):
        return 0
    result = cache.inc_lock_ref(node_id)
    cache.dec_lock_ref(node_id, result.to_dec_params())
    return int(result.delta or 0)
