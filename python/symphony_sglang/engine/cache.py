"""The radix cache with levels: SGLang's unified cache, observed and extended at its own seams.

Written against the handle-level interface of the tree (``UnifiedTreeCoreInterface``), so it runs on
SGLang's Rust and Python tree cores alike.
"""

from __future__ import annotations

import logging
from dataclasses import asdict, dataclass
from typing import Any

from sglang.srt.mem_cache.registry import TreeCacheBuildContext, create_unified_radix_cache
from sglang.srt.mem_cache.unified_radix_cache import UnifiedRadixCache
from sglang.srt.runtime_context import get_memory, get_parallel

from symphony_sglang.engine import compat

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
    """SGLang's unified radix cache, with what the promotion, the routes and the tests need."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.level_counters = LevelCounters()
        # Set by the dispatcher hook: without it no message of ours reaches this scheduler.
        self.control_attached = False
        super().__init__(*args, **kwargs)

    def reset(self) -> None:
        super().reset()
        self.level_counters.resets += 1

    def check_hicache_events(self) -> None:
        """Once a scheduler step, before admission, on every rank (scheduler.py:3878)."""
        if not self.control_attached:
            raise compat.IncompatibleSglangError(
                f"{compat.DISPATCHER_HOOK}: our handlers are not installed in this scheduler"
            )
        super().check_hicache_events()

    def _log_write_ack_metrics(self, ack: Any) -> None:
        self.level_counters.backups += 1
        self.level_counters.backed_up_tokens += int(ack.num_tokens)
        super()._log_write_ack_metrics(ack)

    def ready_to_load_host_cache(self) -> int:
        """Start the queued host-to-device copies; the slot that a batch must wait for, or -1."""
        controller = self.cache_controller
        if controller is not None and controller.load_queue:
            self.level_counters.loads += 1
            self.level_counters.loaded_tokens += sum(
                len(operation.device_indices) for operation in controller.load_queue
            )
        return int(super().ready_to_load_host_cache())


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
    logger.info(
        "symphony cache: page %d tokens, host level %s",
        cache.page_size,
        "off" if cache.cache_controller is None else "on",
    )
    return cache
