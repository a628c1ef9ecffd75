"""Heads of prompts that many sessions share, as the router sees them go by.

Counted by heads of 1, 2, 4, 8 … pages, so one request is in a few counters; a count halves every
half minute. The counters are bounded as in ``core.hot_prefixes``: a newcomer takes the place of the
smallest and inherits its count. Token ids are kept of the hottest alone, for a copy names them.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from symphony_sglang.core.prefix import TOKEN_BYTES, Namespace
from symphony_sglang.core.routing_types import EventHashes

HALF_LIFE_SECONDS = 30.0
ENTRIES_MAX = 2048
TOKENS_MIN = 256
HEAD_TOKENS_MAX = 32_768
KEPT_BYTES_MAX = 16 << 20
# A longer head stands for the shorter one in it where it is nearly as hot.
SHARE_MIN = 0.7
REQUESTS_MIN = 4.0

HeadKey = tuple[int, int]  # page size, event hash of the head's last page


class HotHead(NamedTuple):
    """One head; `hashes` are those of its pages, `token_bytes` its ids as int32."""

    key: HeadKey
    tokens: int
    requests_per_second: float
    hashes: EventHashes
    token_bytes: bytes
    namespace: Namespace


@dataclass(slots=True)
class _Entry:
    count: float
    at_seconds: float
    shorter: HeadKey | None
    pages: int
    hashes: EventHashes
    namespace: Namespace
    last_session: str | None = None
    token_bytes: bytes = b""

    def now(self, now_seconds: float) -> float:
        return self.count * math.exp2((self.at_seconds - now_seconds) / HALF_LIFE_SECONDS)


class HotHeads:
    """What many requests of different sessions begin with."""

    def __init__(
        self, *, entries_max: int = ENTRIES_MAX, kept_bytes_max: int = KEPT_BYTES_MAX
    ) -> None:
        assert entries_max > 0, entries_max
        self._entries_max = entries_max
        self._kept_bytes_max = kept_bytes_max
        self._kept_bytes = 0
        self._entries: dict[HeadKey, _Entry] = {}

    def __len__(self) -> int:
        return len(self._entries)

    def asked(
        self,
        session_key: str | None,
        page_size: int,
        hashes: EventHashes,
        token_bytes: bytes,
        namespace: Namespace,
        now_seconds: float,
    ) -> None:
        """A request with this prompt goes by. Several in a row of one session count once."""
        pages = 1 << max(0, math.ceil(math.log2(max(1, TOKENS_MIN / page_size))))
        most = min(len(hashes), HEAD_TOKENS_MAX // page_size)
        shorter: HeadKey | None = None
        while pages <= most:
            key = page_size, int(hashes[pages - 1])
            entry = self._entries.get(key)
            if entry is None:
                entry = self._insert(key, pages, hashes, shorter, namespace, now_seconds)
                entry.last_session = session_key
                break  # a longer one is looked at when this one comes again
            if session_key is not None and entry.last_session == session_key:
                break  # and so in all longer ones
            entry.count = entry.now(now_seconds) + 1
            entry.at_seconds = now_seconds
            entry.last_session = session_key
            if not entry.token_bytes and entry.count >= REQUESTS_MIN:
                self._keep(entry, token_bytes[: pages * page_size * TOKEN_BYTES])
            shorter = key
            pages *= 2

    def _insert(
        self,
        key: HeadKey,
        pages: int,
        hashes: EventHashes,
        shorter: HeadKey | None,
        namespace: Namespace,
        now_seconds: float,
    ) -> _Entry:
        count = 1.0
        if len(self._entries) >= self._entries_max:
            # Looking at a few is nearly as good as at all.
            some = itertools.islice(self._entries, 16)
            victim = min(some, key=lambda one: self._entries[one].now(now_seconds))
            gone = self._entries.pop(victim)
            self._kept_bytes -= len(gone.token_bytes)
            count += gone.now(now_seconds)
        head = np.array(hashes[:pages])
        entry = self._entries[key] = _Entry(count, now_seconds, shorter, pages, head, namespace)
        return entry

    def _keep(self, entry: _Entry, token_bytes: bytes) -> None:
        if self._kept_bytes + len(token_bytes) <= self._kept_bytes_max:
            entry.token_bytes = token_bytes
            self._kept_bytes += len(token_bytes)

    def hottest(self, now_seconds: float, count_max: int = 32) -> list[HotHead]:
        """Heads that can be copied, by the tokens that they spare a second; the longest of each
        chain."""
        hot = {
            key: entry
            for key, entry in self._entries.items()
            if entry.token_bytes and entry.now(now_seconds) >= REQUESTS_MIN
        }
        for entry in list(hot.values()):
            shorter = hot.get(entry.shorter) if entry.shorter is not None else None
            if shorter is not None and entry.now(now_seconds) >= SHARE_MIN * shorter.now(
                now_seconds
            ):
                hot.pop(entry.shorter)  # type: ignore[arg-type]
        heads = [
            HotHead(
                key,
                entry.pages * key[0],
                entry.now(now_seconds) * math.log(2) / HALF_LIFE_SECONDS,
                entry.hashes,
                entry.token_bytes,
                entry.namespace,
            )
            for key, entry in hot.items()
        ]
        heads.sort(key=lambda head: (-head.requests_per_second * head.tokens, head.key))
        return heads[:count_max]

    def expire(self, now_seconds: float) -> None:
        """Forget what has faded; about once a second."""
        for key in list(itertools.islice(self._entries, 256)):
            entry = self._entries[key]
            if entry.now(now_seconds) < 0.1:
                self._kept_bytes -= len(entry.token_bytes)
                del self._entries[key]

    def check(self) -> None:
        assert len(self._entries) <= self._entries_max
        assert self._kept_bytes == sum(len(e.token_bytes) for e in self._entries.values())
        assert self._kept_bytes <= self._kept_bytes_max
