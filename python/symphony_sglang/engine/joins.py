"""Requests that wait for an advisory's storage read instead of starting one of their own.

A request that comes while its advisory is staged would read the same pages again (SGLang keys a
read by request, unified_radix_cache.py:2081). It joins: admission waits for the advisory's chunk,
then the request asks storage for what lies behind it. Decided from the tree, the broadcast clock
and transfer ends alone, so every rank does the same. Scheduler thread only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sglang.srt.runtime_context import get_memory

from symphony_sglang.core.moves import MoveResult
from symphony_sglang.core.prefix import TOKEN_BYTES, Namespace, pack_tokens

if TYPE_CHECKING:
    from symphony_sglang.engine.cache import SymphonyCache
    from symphony_sglang.engine.mover import Mover, Stage

# Requests that wait at once; beyond it a request reads for itself, as it does in stock SGLang.
JOINS_MAX = 4096


@dataclass(frozen=True, slots=True)
class Join:
    """`deadline_seconds` is on the broadcast clock; infinite where the policy waits."""

    stage: Any  # the handle of the advisory's read
    deadline_seconds: float
    end_tokens: int  # how far the request wants to read


class JoinTable:
    """Which request waits for which stage."""

    def __init__(self, cache: SymphonyCache, mover: Mover) -> None:
        self._cache = cache
        self._mover = mover
        self._joins: dict[Any, Join] = {}
        self.joined = 0  # since the start

    def __len__(self) -> int:
        return len(self._joins)

    def __contains__(self, request: Any) -> bool:
        return request in self._joins

    def reset(self) -> None:
        self._joins.clear()

    def join(
        self,
        request: Any,
        matched: Sequence[int],
        missing: Sequence[int],
        namespace: Namespace,
        now_seconds: float,
    ) -> bool:
        """Wait for a stage that reads what this request is about to read; False where none does.

        Args:
            request: The request's handle.
            matched: Tokens of its prompt that are on device or host.
            missing: The tokens behind them that it would read.
            namespace: Its extra_key and cache_salt.
            now_seconds: The broadcast clock.
        """
        if request in self._joins:
            return True
        policy = self._cache.prefetch_stop_policy
        if policy == "best_effort" or len(self._joins) >= JOINS_MAX or not self._may_ask_again():
            # Under best_effort admission waits for nobody's read, not even the request's own.
            return False
        stages = self._mover.reading()
        start = len(matched)
        candidates = [
            (handle, stage)
            for handle, stage in stages
            if stage.prefix.namespace == namespace
            and stage.start_tokens <= start < stage.stop_tokens
        ]
        if not candidates:
            return False
        prompt = pack_tokens([*matched, *missing])
        for handle, stage in candidates:
            if starts_alike(prompt, stage, start):
                self._joins[request] = Join(
                    handle, self._deadline(policy, stage, now_seconds), start + len(missing)
                )
                self.joined += 1
                return True
        return False

    def _may_ask_again(self) -> bool:
        """Whether a request that joined can read what lies behind the advisory's chunk."""
        return int(get_memory().hicache_storage_prefetch_retry_max_attempts) > 0

    def _deadline(self, policy: str, stage: Stage, now_seconds: float) -> float:
        if policy != "timeout":
            return float("inf")
        cache = self._cache
        pages = (stage.stop_tokens - stage.start_tokens) / cache.page_size
        seconds = cache.prefetch_timeout_base + pages * cache.prefetch_timeout_per_page
        return now_seconds + float(seconds)

    def waiting(self, request: Any, now_seconds: float) -> bool:
        """Whether admission has to wait for the stage that this request joined."""
        join = self._joins.get(request)
        if join is None:
            return False
        if now_seconds < join.deadline_seconds and join.stage in self._cache.ongoing_prefetch:
            return True
        if now_seconds >= join.deadline_seconds:
            # Too slow: the request goes on with what it has, as after a read of its own.
            del self._joins[request]
            return False
        # The read has ended in this very step; ``ended`` follows before the next one.
        return True

    def wanted(self, handle: Any) -> bool:
        """Whether a request waits for this stage."""
        return any(join.stage == handle for join in self._joins.values())

    def ended(self, handle: Any, stage: Stage, result: MoveResult, loaded_tokens: int) -> None:
        """A stage ended: the requests that joined it go on.

        Where more may be on disk they ask for it themselves; SGLang issues that in the same step
        (scheduler.py, _process_storage_prefetch_retries).
        """
        for request in [r for r, join in self._joins.items() if join.stage == handle]:
            join = self._joins.pop(request)
            left = join.end_tokens - stage.start_tokens - loaded_tokens
            more = result in (MoveResult.DONE, MoveResult.DECLINED)
            if more and left >= self._cache.page_size:
                self._cache.storage_prefetch_retries.refetch(request.rid)

    def leave(self, request: Any) -> None:
        """The request was aborted, or asks for itself."""
        self._joins.pop(request, None)

    def check(self) -> None:
        assert len(self._joins) <= JOINS_MAX


def starts_alike(prompt: bytes, stage: Stage, start: int) -> bool:
    """Whether the prompt and the stage share at least one page more than the prompt has."""
    head = min(len(prompt), stage.stop_tokens * TOKEN_BYTES)
    if head <= start * TOKEN_BYTES:
        return False
    return prompt[:head] == stage.prefix.token_bytes[:head]
