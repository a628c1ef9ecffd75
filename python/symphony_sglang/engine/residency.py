"""How full each level of one worker is, from the pools themselves.

Everything here is read on the scheduler thread between two steps, so the figures belong to
one instant.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from symphony_sglang.engine.storage_view import nvme_use

HOT_PREFIXES_SHOWN = 10


@dataclass(frozen=True, slots=True)
class LevelUse:
    """One level. `used` includes what could be evicted; `protected` is the part that could not."""

    total_tokens: int
    used_tokens: int
    evictable_tokens: int
    protected_tokens: int
    token_bytes: int

    def as_json(self) -> dict[str, int]:
        body = asdict(self)
        for name in ("total", "used", "evictable", "protected"):
            body[f"{name}_bytes"] = body[f"{name}_tokens"] * self.token_bytes
        return body


def device_use(cache: Any) -> LevelUse:
    """The device pool: KV of running requests and of the tree."""
    allocator = cache.token_to_kv_pool_allocator
    pool = allocator.get_kvcache()
    total = int(allocator.size)
    kv_bytes = pool.get_kv_size_bytes()
    pool_bytes = sum(kv_bytes) if isinstance(kv_bytes, tuple) else kv_bytes
    return LevelUse(
        total_tokens=total,
        used_tokens=total - int(allocator.available_size()),
        evictable_tokens=int(cache.full_evictable_size()),
        protected_tokens=int(cache.full_protected_size()),
        # The pool holds one page more than it hands out (memory_pool.py, padding slot).
        token_bytes=round(pool_bytes / (pool.size + pool.page_size)),
    )


def host_use(cache: Any) -> LevelUse | None:
    """The host pool, or None without one."""
    if cache.cache_controller is None:
        return None
    pool = cache.cache_controller.mem_pool_host
    anchor = getattr(pool, "anchor_entry", None)
    host = pool if anchor is None else anchor.host_pool
    total, free = int(host.logical_size), int(host.available_size())
    return LevelUse(
        total_tokens=total,
        used_tokens=total - free,
        evictable_tokens=total - free,
        protected_tokens=0,
        token_bytes=int(host.size_per_token),
    )


def hot_prefixes(cache: Any) -> list[dict[str, Any]]:
    """The prefixes that spared the most tokens; none without a host level."""
    if cache.advisories is None:
        return []
    return [hot.as_json() for hot in cache.advisories.hot_prefixes.top(HOT_PREFIXES_SHOWN)]


def residency(cache: Any) -> dict[str, Any]:
    """The body of ``GET /symphony/residency`` for this scheduler."""
    host = host_use(cache)
    return {
        "page_size": int(cache.page_size),
        "levels": {
            "device": device_use(cache).as_json(),
            "host": None if host is None else host.as_json(),
            "nvme": nvme_use(),
        },
        "rates": None if cache.advisories is None else cache.advisories.rates.as_json(),
        "feed": None if cache.feed is None else cache.feed.publisher.describe(),
        "peer": None if cache.peer is None else cache.peer.describe(),
        "hot_prefixes": hot_prefixes(cache),
        "counters": {
            **cache.level_counters.as_json(),
            "advisories": None if cache.advisories is None else cache.advisories.counters(),
        },
    }
