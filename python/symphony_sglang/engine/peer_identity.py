"""Who this rank is to other workers: the identity of its page store's namespace."""

from __future__ import annotations

from symphony_sglang.store import Namespace
from symphony_sglang.wire.pages import PeerIdentity


def identity_of(namespace: Namespace, hash_seed: str = "") -> PeerIdentity:
    """What a peer must equal to exchange pages with a store of this namespace."""
    return PeerIdentity(
        model=namespace.model,
        revision=namespace.revision,
        dtype=namespace.dtype,
        layout=namespace.layout,
        page_tokens=namespace.page_tokens,
        page_bytes=namespace.page_bytes,
        tp_rank=namespace.tp_rank,
        tp_size=namespace.tp_size,
        hash_scheme=namespace.hash_scheme,
        hash_seed=hash_seed,
        extra=namespace.extra,
        namespace=namespace.digest.hex(),
    )
