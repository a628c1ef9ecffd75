"""What this process's page store holds, for the residency and session routes."""

from __future__ import annotations

from typing import Any

from symphony_sglang.core.prefix import TOKEN_BYTES, Prefix, unpack_tokens
from symphony_sglang.engine.nvme_backend import active_backends


def nvme_use() -> dict[str, Any] | None:
    """Tokens and bytes of the NVMe level, or None without one."""
    backends = active_backends()
    if not backends:
        return None
    stat = backends[0].store.stat()
    namespace = backends[0].store.namespace
    token_bytes = max(1, namespace.page_bytes // namespace.page_tokens)
    return {
        "total_tokens": stat.capacity_bytes // token_bytes,
        "used_tokens": stat.pages * namespace.page_tokens,
        "total_bytes": stat.capacity_bytes,
        "used_bytes": stat.pages * namespace.page_bytes,
        "state": stat.state.value,
    }


def stored_tokens(prefix: Prefix, page_size: int) -> int:
    """Length of the head of `prefix` whose pages are all on disk."""
    backends = active_backends()
    if not backends or not prefix.tokens:
        return 0
    return backends[0].batch_exists(page_hashes(prefix, page_size)) * page_size


def page_hashes(prefix: Prefix, page_size: int) -> list[str]:
    """The storage keys of a prefix's whole pages: SGLang's own chain (mem_cache/utils.py)."""
    from sglang.srt.mem_cache.utils import get_hash_str, storage_namespace_seed

    seed = storage_namespace_seed(prefix.namespace.extra_key, prefix.namespace.cache_salt)
    whole = prefix.tokens // page_size * page_size
    tokens = unpack_tokens(prefix.token_bytes[: whole * TOKEN_BYTES])
    keys: list[str] = get_hash_str(tokens, seed, page_size=page_size) if whole else []
    return keys
