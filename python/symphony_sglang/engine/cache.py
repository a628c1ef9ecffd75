"""The radix cache with levels: SGLang's unified cache, observed and extended at its own seams.

Written against the handle-level interface of the tree (``UnifiedTreeCoreInterface``), so it runs on
SGLang's Rust and Python tree cores alike.
"""

from __future__ import annotations

import logging
from dataclasses import asdict, dataclass
from typing import Any

from sglang.srt.mem_cache.base_prefix_cache import (
    EvictParams,
    EvictResult,
    MatchPrefixParams,
    MatchResult,
)
from sglang.srt.mem_cache.registry import TreeCacheBuildContext, create_unified_radix_cache
from sglang.srt.mem_cache.unified_radix_cache import UnifiedRadixCache
from sglang.srt.runtime_context import get_memory, get_parallel

from symphony_sglang.config import SymphonyConfig
from symphony_sglang.core.levels import page_floor
from symphony_sglang.core.promoter import Promoter
from symphony_sglang.core.promotion import PlannerLimits
from symphony_sglang.core.sessions import SessionTable
from symphony_sglang.engine import compat
from symphony_sglang.engine.advisories import AdvisoryDriver

BACKEND_NAME = "symphony"

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class LevelCounters:
    """What moved between levels since the start, in tokens."""

    loaded_tokens: int = 0  # host to device
    loads: int = 0
    backed_up_tokens: int = 0  # device to host
    backups: int = 0
    resets: int = 0

    def as_json(self) -> dict[str, int]:
        return asdict(self)


class SymphonyCache(UnifiedRadixCache):
    """SGLang's unified radix cache, driven by advisories beside requests."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.level_counters = LevelCounters()
        # Set by the dispatcher hook: without it no message of ours reaches this scheduler.
        self.control_attached = False
        # None where there is no host level to promote from.
        self.advisories: AdvisoryDriver | None = None
        # An advisory's own load must not take the memory that other advisories protect.
        self._loading_for_advisory = False
        super().__init__(*args, **kwargs)

    def reset(self) -> None:
        """Empty the tree (flush, weight update): every handle and lock of ours is void."""
        super().reset()
        self.level_counters.resets += 1
        if self.advisories is not None:
            self.advisories.reset()

    # The scheduler's step -----------------------------------------------------------------------

    def check_hicache_events(self) -> None:
        """Once a scheduler step, before admission, on every rank (scheduler.py:3878)."""
        if not self.control_attached:
            raise compat.IncompatibleSglangError(
                f"{compat.DISPATCHER_HOOK}: our handlers are not installed in this scheduler"
            )
        super().check_hicache_events()
        if self.advisories is not None:
            self.advisories.step()

    def match_prefix(self, params: MatchPrefixParams) -> MatchResult:
        """SGLang's match; the first one of a request tells the advisories that it came."""
        result = super().match_prefix(params)
        if params.req is not None and self.advisories is not None:
            self.advisories.request_matched(params.req, result)
        return result

    def checkpoint_into_tree(self, req: Any, *, up_to: int, **kwargs: Any) -> None:
        """SGLang's insert; at the end of a turn the session table learns its tokens."""
        super().checkpoint_into_tree(req, up_to=up_to, **kwargs)
        if self.advisories is not None and not self.disable and req.finished():
            self.advisories.turn_ended(req, req.full_untruncated_fill_ids[:up_to])

    # Memory -------------------------------------------------------------------------------------

    def evict_for_alloc(self, params: EvictParams, **kwargs: Any) -> EvictResult:
        """The choke point of device allocation: protected prefixes give way to running work."""
        if self.advisories is not None and not self._loading_for_advisory:
            short = params.num_tokens - int(self.full_evictable_size())
            if short > 0:
                self.advisories.give_way(short)
        return super().evict_for_alloc(params, **kwargs)

    # Loads --------------------------------------------------------------------------------------

    def load_back_for_advisory(self, node_id: Any) -> bool:
        """``load_back`` without a request; what others protect stays protected."""
        self._loading_for_advisory = True
        try:
            return bool(self.load_back(node_id))
        finally:
            self._loading_for_advisory = False

    def start_advisory_loads(self) -> None:
        """Begin the copies that advisories queued, as one merged transfer."""
        self._count_loads()
        self.cache_controller.start_loading()

    def ready_to_load_host_cache(self) -> int:
        """Start the queued host-to-device copies; the slot that a batch must wait for, or -1.

        A load without a request publishes its pages before their copy has ended. While one is under
        way, a batch waits for the newest slot: copies run in order on one stream, so it covers the
        advisory's (decode_hicache_mixin.py:281 names the same race).
        """
        self._count_loads()
        slot = int(super().ready_to_load_host_cache())
        if slot < 0 and self.advisories is not None and self.advisories.mover.loads_in_flight:
            return int(self.cache_controller.layer_done_counter.producer_index)
        return slot

    def _count_loads(self) -> None:
        controller = self.cache_controller
        if controller is not None and controller.load_queue:
            self.level_counters.loads += 1
            self.level_counters.loaded_tokens += sum(
                len(operation.device_indices) for operation in controller.load_queue
            )

    def _log_write_ack_metrics(self, ack: Any) -> None:
        self.level_counters.backups += 1
        self.level_counters.backed_up_tokens += int(ack.num_tokens)
        super()._log_write_ack_metrics(ack)

    def _resolve_storage_prefetch_tokens(
        self, request: Any, num_tokens: int, reason: str | None = None
    ) -> None:
        if self.advisories is not None and num_tokens > 0:
            self.advisories.mover.note_shortfall(request, reason)
        super()._resolve_storage_prefetch_tokens(request, num_tokens, reason)

    def _finish_storage_prefetch(
        self, request: Any, fulfilled_tokens: int, reason: str | None
    ) -> None:
        if self.advisories is not None:
            self.advisories.mover.note_shortfall(request, reason)
        super()._finish_storage_prefetch(request, fulfilled_tokens, reason)


def attach_advisories(cache: SymphonyCache) -> None:
    """Give a cache with a host level its advisory driver, sized by the protect budgets."""
    if cache.cache_controller is None:
        return
    config = SymphonyConfig.from_environment()
    host_pool = cache.cache_controller.mem_pool_host
    promoter = Promoter(
        device_cap_tokens=page_floor(
            int(config.protect_device * cache.token_to_kv_pool_allocator.size), cache.page_size
        ),
        host_cap_tokens=page_floor(
            int(config.protect_host * host_pool.logical_size), cache.page_size
        ),
        planner=PlannerLimits(page_size=cache.page_size),
    )
    cache.advisories = AdvisoryDriver(cache, promoter, SessionTable())


def build_cache(ctx: TreeCacheBuildContext) -> SymphonyCache:
    """SGLang's factory for ``--radix-cache-backend symphony``.

    SGLang logs and swallows what goes wrong in a plugin, so this is where a half-installed one is
    found out: every check here raises, and the server does not start.
    """
    from sglang.srt.environ import envs

    compat.check_seams()
    compat.check_hooks_applied()
    compat.refuse_unsupported_modes(
        get_memory(), get_parallel(), bool(envs.SGLANG_RUST_SERVER.get())
    )
    cache = create_unified_radix_cache(ctx, cache_class=SymphonyCache)
    assert isinstance(cache, SymphonyCache), type(cache)
    attach_advisories(cache)
    logger.info(
        "symphony cache: page %d tokens, host level %s",
        cache.page_size,
        "off" if cache.cache_controller is None else "on",
    )
    return cache
