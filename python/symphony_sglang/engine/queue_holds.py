"""Prefixes of queued requests, protected until they run. Scheduler thread only."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from symphony_sglang.core.prefix import Namespace, Prefix, pack_tokens
from symphony_sglang.core.promoter import Promoter

# A queued request's prefix is protected this long at most.
QUEUE_HOLD_SECONDS = 60.0


class QueueHolds:
    """Which queued requests hold something; the lock changes are the promoter's."""

    def __init__(self, promoter: Promoter) -> None:
        self._promoter = promoter
        self._holding: dict[str, None] = {}

    def __len__(self) -> int:
        return len(self._holding)

    def clear(self) -> None:
        """The tree was emptied."""
        self._holding.clear()

    def hold(
        self, rid: str, prefix: Prefix, device_tokens: int, host_tokens: int, now_seconds: float
    ) -> None:
        """Protect what request `rid` was found to have; once more with more, as it comes."""
        if not (device_tokens or host_tokens):
            return
        expires_seconds = now_seconds + QUEUE_HOLD_SECONDS
        self._promoter.hold_request(
            rid, prefix, device_tokens, host_tokens, expires_seconds, now_seconds
        )
        self._holding[rid] = None

    def release_admitted(self, waiting_queue: Iterable[Any], now_seconds: float) -> None:
        """Requests that left the queue run under their own locks, or are gone."""
        waiting = {request.rid for request in waiting_queue}
        for rid in [rid for rid in self._holding if rid not in waiting]:
            del self._holding[rid]
            self._promoter.release_request(rid, now_seconds)


def queued_behind_others(waiting_queue: Sequence[Any], handle: Any) -> Any:
    """The queued request whose storage read has just ended; None where it is admitted now.

    One that waits behind others would find what was read evicted again, by the reads of the next
    ones, and compute it: a queue that is long for a moment then grows by itself.
    """
    if len(waiting_queue) < 2:
        return None
    return next((one for one in waiting_queue if one.cache_request_handle == handle), None)


def prompt_of(request: Any) -> Prefix:
    """The whole prompt of one of SGLang's requests, as a prefix."""
    namespace = Namespace(request.extra_key, request.cache_salt)
    return Prefix(namespace, pack_tokens(request.origin_input_ids))
