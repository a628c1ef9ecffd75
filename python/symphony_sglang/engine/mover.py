"""Moves prefixes up the levels without a request, on SGLang's own transfer paths.

NVMe to host goes through ``prefetch_from_storage`` under our own handle (unified_radix_cache.py
:2081), host to device through ``load_back`` without a request (:1820). Both end in drains that
SGLang keeps in step over tensor-parallel ranks, so every rank sees the same end in the same step.

Scheduler thread only.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from sglang.srt.mem_cache.base_prefix_cache import CacheRequestHandle, MatchPrefixParams
from sglang.srt.mem_cache.radix_cache import RadixKey

from symphony_sglang.core.moves import MoveResult
from symphony_sglang.core.prefix import TOKEN_BYTES, Prefix, unpack_tokens
from symphony_sglang.engine.joins import JoinTable

if TYPE_CHECKING:
    from symphony_sglang.engine.cache import SymphonyCache

HANDLE_PREFIX = "symphony-advisory-"
END_ROUNDS, END_ROUND_SECONDS = 400, 0.005


class Found(NamedTuple):
    """Where a prefix is: `device_tokens` from its start, then `host_tokens` behind them."""

    device_tokens: int
    host_tokens: int
    device_node: Any
    host_node: Any  # deepest host node: storage continues behind it
    best_node: Any  # deepest node of all: what a load brings up


class MoveEnd(NamedTuple):
    """How a move ended, and how many tokens of it arrived."""

    advisory_id: str
    result: MoveResult
    tokens: int


@dataclass(slots=True)
class Stage:
    """One read from storage, of tokens `start_tokens:stop_tokens` of a prefix."""

    advisory_id: str
    prefix: Prefix
    start_tokens: int
    stop_tokens: int
    # Why it fell short, where SGLang said so while the operation was running.
    declined: bool = False
    failed: bool = False
    told: bool = False  # SGLang gave some reason already


@dataclass(slots=True)
class _Load:
    advisory_id: str
    node: Any
    tokens: int


class Mover:
    """The transfers that advisories have in flight on one rank."""

    def __init__(self, cache: SymphonyCache) -> None:
        self._cache = cache
        self._stages: dict[CacheRequestHandle, Stage] = {}
        self._loads: list[_Load] = []
        self._counter = 0
        self.joins = JoinTable(cache, self)

    @property
    def busy(self) -> bool:
        """Something of ours is under way, for an advisory that lives or for nobody any more."""
        return bool(self._stages or self._loads)

    @property
    def loads_in_flight(self) -> int:
        """Loads of ours whose pages are published on the device before their copy has ended."""
        return len(self._loads)

    @property
    def stages_in_flight(self) -> int:
        return len(self._stages)

    def reset(self) -> None:
        """The tree was emptied: every handle is void."""
        self._stages.clear()
        self._loads.clear()
        self.joins.reset()

    def key(self, prefix: Prefix, tokens: int) -> RadixKey:
        namespace = prefix.namespace
        return RadixKey(
            unpack_tokens(prefix.token_bytes[: tokens * TOKEN_BYTES]),
            extra_key=namespace.extra_key,
            cache_salt=namespace.cache_salt,
        )

    def find(self, prefix: Prefix, tokens: int) -> Found:
        """Where the first `tokens` of `prefix` are now; refreshes their recency on the way."""
        match = self._cache.match_prefix(MatchPrefixParams(key=self.key(prefix, tokens)))
        return Found(
            int(match.device_prefix_len),
            int(match.host_hit_length),
            match.last_device_node,
            match.last_host_node,
            match.best_match_node,
        )

    # NVMe to host -------------------------------------------------------------------------------

    def start_stage(self, advisory_id: str, prefix: Prefix, stop_tokens: int) -> int | None:
        """Ask storage for what follows the resident head, up to `stop_tokens`.

        Returns where the stage starts, or None where SGLang declined (its staging limit, or nothing
        to ask for).
        """
        cache = self._cache
        found = self.find(prefix, stop_tokens)
        start = found.device_tokens + found.host_tokens
        if start >= stop_tokens:
            return None
        # Storage holds contiguous chains: behind a node that was never written there is nothing.
        if not (cache.is_backuped(found.host_node) or cache.is_root(found.host_node)):
            return None
        tokens = unpack_tokens(prefix.token_bytes[: stop_tokens * TOKEN_BYTES])
        self._counter += 1
        handle = CacheRequestHandle(f"{HANDLE_PREFIX}{self._counter}", 0)
        cache.prefetch_from_storage(
            handle,
            found.host_node,
            tokens[start:],
            cache.get_last_hash_value(found.host_node),
            cache.get_prefix_hash_values(found.host_node)
            if cache.hicache_storage_pass_prefix_keys
            else None,
            matched_prefix_tokens=tokens[:start],
            extra_key=prefix.namespace.extra_key,
            cache_salt=prefix.namespace.cache_salt,
        )
        if handle not in cache.ongoing_prefetch:
            cache.storage_prefetch_retries.cancel(handle.rid)
            return None
        self._stages[handle] = Stage(advisory_id, prefix, start, stop_tokens)
        return start

    def owns(self, handle: CacheRequestHandle) -> bool:
        """Whether a read is an advisory's own: SGLang knows it by the same kind of handle."""
        return handle.rid.startswith(HANDLE_PREFIX)

    def reading(self) -> list[tuple[CacheRequestHandle, Stage]]:
        """Stages whose read has not ended, in starting order."""
        ongoing = self._cache.ongoing_prefetch
        return [(handle, stage) for handle, stage in self._stages.items() if handle in ongoing]

    def requests_need_host(self) -> bool:
        """Whether a request's read has no memory yet: alike on all ranks, as the table is."""
        return any(
            entry.host_indices is None and not self.owns(handle)
            for handle, entry in self._cache.ongoing_prefetch.items()
        )

    def note_shortfall(self, handle: CacheRequestHandle, reason: str | None) -> None:
        """SGLang gave up part of a stage (``_finish_storage_prefetch``); remember why."""
        stage = self._stages.get(handle)
        if stage is None or reason is None:
            return
        stage.declined |= reason == "host_capacity"
        stage.failed |= reason in ("storage_transfer", "deadline")
        # Every revoked read is called dropped at its end, also one that found nothing on disk: only
        # where nothing else was said before, something was really dropped.
        stage.failed |= reason == "dropped" and not stage.told
        stage.told = True

    def cancel_stage(self, advisory_id: str) -> None:
        """Stop reading for an advisory that ended, unless a request waits for what is read."""
        for handle, stage in self.reading():
            if stage.advisory_id == advisory_id and not self.joins.wanted(handle):
                self._cache.release_aborted_request(handle)

    def end_all(self) -> None:
        """Let every transfer of ours run out soon, so that the cache can be emptied.

        SGLang refuses a flush, and with it the flush after a weight update, while anything is under
        way. Rounds are counted, not timed: each drains what all ranks agree on, so all ranks stop
        after the same one. A read that hangs longer leaves the flush refused.
        """
        ongoing = self._cache.ongoing_prefetch
        for handle, _ in self.reading():
            self._cache.cache_controller.terminate_prefetch(ongoing[handle].operation)
        for _ in range(END_ROUNDS):
            loads = [load for load in self._loads if load.node in self._cache.ongoing_load_back]
            if not loads and not self.reading():
                return
            time.sleep(END_ROUND_SECONDS)
            self._cache.drain_transfers()

    def take_ended_stages(self) -> list[MoveEnd]:
        """Stages that left SGLang's table since the last call, in starting order."""
        if not self._stages:
            return []
        cache = self._cache
        ended = [handle for handle in self._stages if handle not in cache.ongoing_prefetch]
        ends = []
        for handle in ended:
            stage = self._stages.pop(handle)
            loaded, _start = cache.pop_prefetch_loaded_span(handle)
            cache.discard_storage_prefetch_accounting(handle)
            cache.storage_prefetch_retries.cancel(handle.rid)
            result = stage_result(stage, loaded)
            self.joins.ended(handle, stage, result, loaded)
            ends.append(MoveEnd(stage.advisory_id, result, loaded))
        return ends

    # Host to device -----------------------------------------------------------------------------

    def queue_load(self, advisory_id: str, prefix: Prefix, stop_tokens: int) -> int:
        """Allocate device pages and queue the copy of the host part up to `stop_tokens`.

        Returns the tokens queued; 0 where the device level had no room. The copy starts with
        ``start_queued``; matches see the pages at once, so a batch must wait for the copy
        (``SymphonyCache.ready_to_load_host_cache``).
        """
        found = self.find(prefix, stop_tokens)
        if found.host_tokens == 0:
            return 0
        # A chain of several evicted nodes is loaded as one; its bottom node names it.
        if found.best_node in self._cache.ongoing_load_back:
            return 0
        if not self._cache.load_back_for_advisory(found.best_node):
            return 0
        self._loads.append(_Load(advisory_id, found.best_node, found.host_tokens))
        return found.host_tokens

    def start_queued(self) -> None:
        """Begin the queued copies as one merged, layer-major transfer."""
        self._cache.start_advisory_loads()

    def take_ended_loads(self) -> list[MoveEnd]:
        """Loads whose copy was acknowledged since the last call."""
        if not self._loads:
            return []
        ongoing = self._cache.ongoing_load_back
        ended = [load for load in self._loads if load.node not in ongoing]
        if ended:
            self._loads = [load for load in self._loads if load.node in ongoing]
        return [MoveEnd(load.advisory_id, MoveResult.DONE, load.tokens) for load in ended]


def stage_result(stage: Stage, loaded_tokens: int) -> MoveResult:
    """Why a stage ended where it did."""
    if loaded_tokens >= stage.stop_tokens - stage.start_tokens:
        return MoveResult.DONE
    if stage.declined:
        return MoveResult.DECLINED
    if stage.failed:
        return MoveResult.ERROR
    return MoveResult.SHORT
