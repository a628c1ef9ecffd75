"""The radix cache with levels: SGLang's unified cache, observed and extended at its own seams.

Written against the handle-level interface of the tree (``UnifiedTreeCoreInterface``), so it runs on
SGLang's Rust and Python tree cores alike.
"""

from __future__ import annotations

import logging
from array import array
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

from sglang.srt.mem_cache.base_prefix_cache import (
    CacheRequestHandle,
    EvictParams,
    EvictResult,
    InitLoadBackParams,
    MatchPrefixParams,
    MatchResult,
)
from sglang.srt.mem_cache.registry import TreeCacheBuildContext, create_unified_radix_cache
from sglang.srt.mem_cache.unified_cache.components import ComponentType
from sglang.srt.mem_cache.unified_radix_cache import UnifiedRadixCache
from sglang.srt.mem_cache.utils import get_hash_str
from sglang.srt.runtime_context import get_memory, get_parallel

from symphony_sglang.clock import SystemClock
from symphony_sglang.config import SymphonyConfig
from symphony_sglang.core.levels import Level, page_floor
from symphony_sglang.core.prefix import Namespace
from symphony_sglang.core.promoter import Promoter
from symphony_sglang.core.promotion import PlannerLimits
from symphony_sglang.core.sessions import SessionTable
from symphony_sglang.engine import compat
from symphony_sglang.engine.advisories import AdvisoryDriver
from symphony_sglang.engine.feed import FeedDriver
from symphony_sglang.engine.feed_disk import DiskEvents
from symphony_sglang.engine.metrics import Reporter
from symphony_sglang.engine.peer import PeerLevel

BACKEND_NAME = "symphony"
# Loading it takes less where it is compiled already.
PAGE_HASH_SECONDS = 2.0

clock = SystemClock()

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
        self.reporter = Reporter(self)
        # None on ranks that publish no feed.
        self.feed: FeedDriver | None = None
        # None on ranks without an NVMe level, or where it is turned off.
        self.peer: PeerLevel | None = None
        # None unless another publisher of SGLang's events than our feed was chosen.
        self.disk_events: DiskEvents | None = None
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
        self.reporter.step()

    def drain_transfers(self) -> None:
        """SGLang's part of the step alone: take the transfers that ended on all ranks."""
        super().check_hicache_events()

    def take_events(self) -> list[Any]:
        """SGLang's events; the feed adds the NVMe level itself, for other publishers it is here."""
        events: list[Any] = super().take_events()
        return events if self.disk_events is None else self.disk_events.added_to(events)

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

    def evict_host(
        self, num_tokens: int, component_type: ComponentType = ComponentType.FULL
    ) -> int:
        """What hints protect on the host gives way to the reads of requests, as on the device."""
        freed = int(super().evict_host(num_tokens, component_type))
        driver = self.advisories
        if freed < num_tokens and driver is not None and driver.mover.requests_need_host():
            driver.give_way_on_host(num_tokens - freed)
            freed += int(super().evict_host(num_tokens - freed, component_type))
        return freed

    def drop_device_copy(self, node_id: Any) -> None:
        """Evict one free device leaf that has a host copy (``demotion`` makes sure of both)."""
        self._evict_device_leaf(node_id, dict.fromkeys(self.tree_components, 0))

    def _evict_device_leaf(self, node_id: Any, tracker: dict[Any, int]) -> Any:
        if self.advisories is not None:
            self.advisories.harm.evicting(node_id)
        return super()._evict_device_leaf(node_id, tracker)

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
        with self._loads_measured():
            self.cache_controller.start_loading()

    def ready_to_load_host_cache(self) -> int:
        """Start the queued host-to-device copies; the slot that a batch must wait for, or -1.

        A load without a request publishes its pages before their copy has ended. While one is under
        way, a batch waits for the newest slot: copies run in order on one stream, so it covers the
        advisory's (decode_hicache_mixin.py:281 names the same race).
        """
        with self._loads_measured():
            slot = int(super().ready_to_load_host_cache())
        if slot < 0 and self.advisories is not None and self.advisories.mover.loads_in_flight:
            return int(self.cache_controller.layer_done_counter.producer_index)
        return slot

    @contextmanager
    def _loads_measured(self) -> Iterator[None]:
        """Count the queued loads; where the device copies at once (CPU), time them too."""
        queue = [] if self.cache_controller is None else self.cache_controller.load_queue
        tokens = sum(len(operation.device_indices) for operation in queue)
        if tokens:
            self.level_counters.loads += 1
            self.level_counters.loaded_tokens += tokens
        started = clock.monotonic()
        yield
        if tokens and self.advisories is not None and str(self.device).startswith("cpu"):
            self.advisories.rates.loaded(tokens, clock.monotonic() - started)

    def loading_check(self, finish_count: int | None = None) -> None:
        """Take the loads that ended; a device with timed events says how long each took."""
        driver, controller = self.advisories, self.cache_controller
        ended = [] if controller is None or driver is None else list(controller.ack_load_queue)
        super().loading_check(finish_count)
        if driver is not None and controller is not None:
            for ack in ended[: len(ended) - len(controller.ack_load_queue)]:
                if ack.timing_enabled:
                    milliseconds = ack.start_event.elapsed_time(ack.finish_event)
                    driver.rates.loaded(ack.num_tokens, milliseconds / 1000.0)

    def init_load_back(self, params: InitLoadBackParams) -> tuple[int, Any] | None:
        """A request's own load from host, unless computing its tokens again is faster.

        Declining is what SGLang does when the device has no room (schedule_policy.py, add_one_req).
        """
        host_tokens, driver = int(params.host_hit_length), self.advisories
        if (
            driver is not None
            and host_tokens > 0
            and self.tree_components == (ComponentType.FULL,)
            and not driver.rates.worth_loading(Level.HOST, host_tokens)
        ):
            return 0, params.req.last_node
        loaded: tuple[int, Any] | None = super().init_load_back(params)
        return loaded

    # Storage reads ------------------------------------------------------------------------------

    def prefetch_from_storage(
        self,
        request: CacheRequestHandle,
        last_host_node_id: Any,
        new_input_tokens: Sequence[int],
        last_hash: str | None = None,
        prefix_keys: list[str] | None = None,
        matched_prefix_tokens: Sequence[int] | None = None,
        extra_key: str | None = None,
        cache_salt: str | None = None,
        storage_hit_end: int | None = None,
    ) -> bool | None:
        """A read for a request joins an advisory's, or is left out where recomputing is faster."""
        driver = self.advisories
        if driver is not None and self.enable_storage and not driver.mover.owns(request):
            tokens = page_floor(len(new_input_tokens), self.page_size)
            namespace = Namespace(extra_key, cache_salt)
            matched = matched_prefix_tokens or ()
            joined = driver.mover.joins.join(
                request, matched, new_input_tokens, namespace, driver.now_seconds
            )
            if joined or (tokens and not driver.rates.worth_loading(Level.NVME, tokens)):
                self.storage_prefetch_retries.cancel(request.rid)
                return None
        issued: bool | None = super().prefetch_from_storage(
            request,
            last_host_node_id,
            new_input_tokens,
            last_hash,
            prefix_keys,
            matched_prefix_tokens,
            extra_key,
            cache_salt,
            storage_hit_end,
        )
        return issued

    def check_prefetch_progress(self, request: CacheRequestHandle) -> bool:
        """Whether a request can be admitted: the read it joined counts as its own."""
        driver = self.advisories
        if driver is not None and driver.mover.joins.waiting(request, driver.now_seconds):
            return False
        return bool(super().check_prefetch_progress(request))

    def _handle_prefetch_result(self, operation: Any) -> None:
        """SGLang's end of a read, on all ranks in the same step."""
        super()._handle_prefetch_result(operation)
        if self.advisories is not None:
            self.advisories.request_read(operation.handle)

    def release_aborted_request(self, request: CacheRequestHandle) -> None:
        if self.advisories is not None:
            self.advisories.request_gone(request)
        super().release_aborted_request(request)

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
    cache.advisories = AdvisoryDriver(cache, promoter, SessionTable(), break_even=config.break_even)


def load_page_hash() -> None:
    """Have SGLang compile its page hash now, where this machine has not done so yet.

    It does so at first use (native_hash.py:21), in the thread that looks pages up on disk. A flush
    in the meantime gives that thread ten seconds and then ends the scheduler
    (cache_controller.py:531), and the calibration at the start ends in a flush.
    """
    started = clock.monotonic()
    try:
        get_hash_str(array("q", [0]), None, page_size=1)
    except RuntimeError as error:
        logger.warning("page hash: %s (%s); no page will be found on disk", error, error.__cause__)
        return
    seconds = clock.monotonic() - started
    if seconds > PAGE_HASH_SECONDS:
        logger.info("page hash: compiled in %.0f s, once a machine", seconds)


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
    if cache.cache_controller is not None:
        load_page_hash()
    logger.info(
        "symphony cache: page %d tokens, host level %s",
        cache.page_size,
        "off" if cache.cache_controller is None else "on",
    )
    return cache
