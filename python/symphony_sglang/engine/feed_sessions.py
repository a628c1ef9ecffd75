"""The hash of a session's last whole page, kept up turn by turn."""

from __future__ import annotations

from collections import OrderedDict
from hashlib import sha256
from typing import NamedTuple

from symphony_sglang.core.page_hash import page_hashes
from symphony_sglang.core.prefix import TOKEN_BYTES
from symphony_sglang.core.sessions import SessionKey


class _Chain(NamedTuple):
    """Where a session's page hashes ended: after `size` bytes of tokens, of this digest."""

    size: int
    digest: bytes
    last_page: bytes


class SessionChains:
    """Storage hashes of sessions' last pages; a turn hashes page by page only what it added.

    At most `sessions_max`; of the one that changed longest ago the next turn is hashed whole.
    """

    def __init__(self, page_size: int, sessions_max: int = 65_536) -> None:
        self._page_size = page_size
        self._sessions_max = sessions_max
        self._chains: OrderedDict[SessionKey, _Chain] = OrderedDict()
        self.hashed_pages = 0

    def __len__(self) -> int:
        return len(self._chains)

    def last_page(self, key: SessionKey, token_bytes: bytes) -> bytes:
        """The digest of the last whole page of `token_bytes`, b"" where there is none."""
        page_bytes = self._page_size * TOKEN_BYTES
        tokens = token_bytes[: len(token_bytes) // page_bytes * page_bytes]
        if not tokens:
            return b""
        chain = self._chains.pop(key, None)
        start, parent = 0, None
        if chain is not None and sha256(tokens[: chain.size]).digest() == chain.digest:
            start, parent = chain.size, chain.last_page
        fresh = page_hashes(tokens[start:], self._page_size, key.namespace, parent)
        self.hashed_pages += len(fresh)
        last = fresh[-1] if fresh or parent is None else parent
        self._chains[key] = _Chain(len(tokens), sha256(tokens).digest(), last)
        if len(self._chains) > self._sessions_max:
            self._chains.popitem(last=False)
        return last

    def forget(self, key: SessionKey) -> None:
        self._chains.pop(key, None)
