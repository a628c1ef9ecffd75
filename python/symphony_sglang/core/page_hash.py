"""SGLang's page hashes: which key a page of a prompt has, on the wire and in the store.

A page's digest is SHA-256 over the digest before it and the page's token ids as little-endian
uint32; the first page starts from a seed where a namespace is set (mem_cache/utils.py:116-152).
There are two chains. Storage keys fold in `extra_key` and `cache_salt`. KV events fold in the salt
alone, by an older rule, and carry the first 8 bytes of the digest as a signed integer
(mem_cache/utils.py:155-214). Without a namespace the two agree. Events of a LoRA adapter are hashed
once more with an id that only the worker knows (disaggregation/kv_events.py:334), so they match
nothing here.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterable

import numpy as np
import numpy.typing as npt

from symphony_sglang.core.prefix import NO_NAMESPACE, TOKEN_BYTES, Namespace

DIGEST_BYTES = 32
# A checkpoint of a chain: far enough apart to be cheap, near enough to resume after an edit.
CHECKPOINT_TOKENS = 1024


def storage_seed(namespace: Namespace) -> bytes | None:
    """What the storage chain of a namespace starts from (mem_cache/utils.py:125).

    An empty salt is no salt (radix_cache.py:77); an empty extra key is one.
    """
    parts = (namespace.extra_key, namespace.cache_salt or None)
    if parts == (None, None):
        return None
    digest = hashlib.sha256(b"sglang-cache-namespace-v1")
    for part in parts:
        if part is None:
            digest.update(b"\x00")
        else:
            raw = part.encode("utf-8")
            digest.update(b"\x01" + len(raw).to_bytes(8, "little") + raw)
    return digest.digest()


def event_seed(namespace: Namespace) -> bytes | None:
    """What the event chain of a namespace starts from: the salt alone (mem_cache/utils.py:199)."""
    if not namespace.cache_salt:
        return None
    raw = namespace.cache_salt.encode("utf-8")
    return hashlib.sha256(b"sglang-cache-salt-v1\0" + raw).digest()


def hash_chain(token_bytes: bytes, page_size: int, parent: bytes | None) -> list[bytes]:
    """Digests of the whole pages of `token_bytes` (little-endian int32), after `parent`.

    Raises:
        ValueError: `page_size` is not positive, or `parent` is not a digest.
    """
    if page_size <= 0:
        raise ValueError(f"page_size is {page_size}; expected at least 1")
    if parent is not None and len(parent) != DIGEST_BYTES:
        raise ValueError(f"a parent of {len(parent)} bytes; expected {DIGEST_BYTES}")
    sha256 = hashlib.sha256
    page_bytes = page_size * TOKEN_BYTES
    digest = b"" if parent is None else parent
    digests = []
    stop = len(token_bytes) - len(token_bytes) % page_bytes
    for start in range(0, stop, page_bytes):
        digest = sha256(digest + token_bytes[start : start + page_bytes]).digest()
        digests.append(digest)
    return digests


def page_hashes(
    token_bytes: bytes,
    page_size: int,
    namespace: Namespace = NO_NAMESPACE,
    parent: bytes | None = None,
) -> list[bytes]:
    """Storage keys of the whole pages of a prompt, 32 bytes each.

    Args:
        token_bytes: Token ids as little-endian int32 (`prefix.pack_tokens`).
        page_size: Tokens in a page.
        namespace: Used where there is no `parent`.
        parent: Digest of the page before, to go on from.
    """
    return hash_chain(token_bytes, page_size, parent or storage_seed(namespace))


def event_hash(digest: bytes) -> int:
    """A digest as KV events carry it: its first 8 bytes, big-endian, signed."""
    return int.from_bytes(digest[:8], "big", signed=True)


def pack_event_hashes(digests: Iterable[bytes]) -> npt.NDArray[np.int64]:
    """`event_hash` of each digest, as an array."""
    words = np.frombuffer(b"".join(digests), dtype=">i8")
    return words[:: DIGEST_BYTES // 8].astype(np.int64)


def event_hashes(
    token_bytes: bytes, page_size: int, namespace: Namespace = NO_NAMESPACE
) -> npt.NDArray[np.int64]:
    """Event hashes of the whole pages of a prompt: what KV events name them."""
    return pack_event_hashes(hash_chain(token_bytes, page_size, event_seed(namespace)))


class PageChain:
    """The event hashes of a prompt that grows: a session's next turn hashes only what is new.

    It keeps no tokens. Every `CHECKPOINT_TOKENS` it notes a digest of the tokens since the last
    note, by which it sees how far the next prompt agrees with this one (a fifteenth of the cost of
    hashing it again page by page), and the page digest to go on from. An edit in the middle costs
    what comes after it. Some 11 bytes a page of 16.
    """

    def __init__(self, page_size: int, namespace: Namespace = NO_NAMESPACE) -> None:
        if page_size <= 0:
            raise ValueError(f"page_size is {page_size}; expected at least 1")
        self.page_size = page_size
        self.namespace = namespace
        self.hashed_pages = 0  # in the last `update`
        self._seed = event_seed(namespace)
        self._block_pages = max(1, CHECKPOINT_TOKENS // page_size)
        self._hashes = array("q")
        # One entry for each whole block: digest of its tokens, digest of its last page.
        self._blocks: list[tuple[bytes, bytes]] = []

    @property
    def cost_bytes(self) -> int:
        """Memory of this chain, roughly."""
        return 512 + self._hashes.itemsize * len(self._hashes) + 200 * len(self._blocks)

    def update(self, token_bytes: bytes) -> npt.NDArray[np.int64]:
        """Event hashes of the whole pages of `token_bytes`, which becomes the chain's prompt."""
        block_bytes = self._block_pages * self.page_size * TOKEN_BYTES
        known = self._agreeing_blocks(token_bytes, block_bytes)
        del self._blocks[known:]
        del self._hashes[known * self._block_pages :]
        parent = self._blocks[-1][1] if known else self._seed
        digests = hash_chain(token_bytes[known * block_bytes :], self.page_size, parent)
        self.hashed_pages = len(digests)
        self._hashes.frombytes(pack_event_hashes(digests).tobytes())
        for number in range(len(digests) // self._block_pages):
            start = (known + number) * block_bytes
            note = hashlib.sha256(token_bytes[start : start + block_bytes]).digest()
            self._blocks.append((note, digests[(number + 1) * self._block_pages - 1]))
        return np.frombuffer(self._hashes, dtype=np.int64).copy()

    def _agreeing_blocks(self, token_bytes: bytes, block_bytes: int) -> int:
        for number, (note, _) in enumerate(self._blocks):
            block = token_bytes[number * block_bytes : (number + 1) * block_bytes]
            if len(block) < block_bytes or hashlib.sha256(block).digest() != note:
                return number
        return len(self._blocks)

    def check(self) -> None:
        """The notes cover every whole block of the hashes."""
        assert len(self._blocks) == len(self._hashes) // self._block_pages
