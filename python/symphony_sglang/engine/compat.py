"""The seams of SGLang that this package stands on, and the check that they are what we expect.

No attribute of SGLang is replaced by us: what we use are registration points and SGLang's own hook
registry. This module is where a patch would have to stand, with its reason; there is none.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from symphony_sglang.errors import IncompatibleSglangError, UnsupportedError

SGLANG_VERSION = "0.5.23"

# Targets of hooks that we register; each must have been applied before the cache is built.
DISPATCHER_HOOK = "sglang.srt.managers.scheduler.Scheduler.init_request_dispatcher"
SCHEDULER_START_HOOK = "sglang.srt.managers.scheduler.Scheduler.__init__"
CLOCK_HOOK = "sglang.srt.managers.scheduler.Scheduler._poll_timeout_aborts"
RESULT_HOOK = "sglang.srt.managers.scheduler.Scheduler.process_batch_result"
AUTH_HOOK = "sglang.srt.utils.auth.decide_request_auth"
FLUSH_HOOK = "sglang.srt.managers.scheduler.Scheduler.flush_cache"
REQUIRED_HOOKS = (DISPATCHER_HOOK, SCHEDULER_START_HOOK, CLOCK_HOOK, RESULT_HOOK, FLUSH_HOOK)


def check_version() -> None:
    """Raise unless the installed SGLang is the release whose internals we read."""
    import sglang

    found = getattr(sglang, "__version__", "unknown")
    if found != SGLANG_VERSION:
        raise IncompatibleSglangError(
            f"sglang is {found}; this version of symphony_sglang extends exactly {SGLANG_VERSION}"
        )


def require_parameters(function: Callable[..., Any], *names: str) -> None:
    """Raise unless `function` takes every parameter in `names`."""
    parameters = inspect.signature(function).parameters
    missing = [name for name in names if name not in parameters]
    if missing:
        where = f"{function.__module__}.{function.__qualname__}"
        raise IncompatibleSglangError(f"{where} takes no {', '.join(missing)} any more")


def require_attributes(owner: Any, *names: str) -> None:
    """Raise unless `owner` has every attribute in `names`."""
    missing = [name for name in names if not hasattr(owner, name)]
    if missing:
        where = getattr(owner, "__qualname__", None) or type(owner).__name__
        raise IncompatibleSglangError(f"{where} has no {', '.join(missing)} any more")


def check_seams() -> None:
    """Raise ``IncompatibleSglangError`` naming the first seam that is not as it was."""
    from sglang.srt.disaggregation.kv_events import EventPublisherFactory
    from sglang.srt.managers.scheduler import Scheduler
    from sglang.srt.managers.scheduler_components.kv_events_publisher import (
        SchedulerKvEventsPublisher,
    )
    from sglang.srt.managers.scheduler_components.load_inquirer import SchedulerLoadInquirer
    from sglang.srt.mem_cache.hybrid_cache import hybrid_pool_assembler as assembler
    from sglang.srt.mem_cache.hybrid_cache.hybrid_cache_controller import HybridCacheController
    from sglang.srt.mem_cache.pool_host.mha import MHATokenToKVPoolHost
    from sglang.srt.mem_cache.registry import create_unified_radix_cache
    from sglang.srt.mem_cache.unified_radix_cache import UnifiedRadixCache

    check_version()
    require_attributes(
        UnifiedRadixCache,
        "_finish_storage_prefetch",
        "_handle_prefetch_result",
        "_evict_device_leaf",
        "_log_write_ack_metrics",
        "_resolve_storage_prefetch_tokens",
        "check_hicache_events",
        "check_prefetch_progress",
        "checkpoint_into_tree",
        "evict_for_alloc",
        "evict_host",
        "init_load_back",
        "load_back",
        "loading_check",
        "match_prefix",
        "prefetch_from_storage",
        "ready_to_load_host_cache",
        "release_aborted_request",
        "reset",
        "take_events",
    )
    require_attributes(
        Scheduler, "init_request_dispatcher", "process_input_requests", "_poll_timeout_aborts"
    )
    require_attributes(
        MHATokenToKVPoolHost,
        "backup_from_device_all_layer",
        "init_kv_buffer",
        "load_to_device_per_layer",
        "prepare_transfer_indices",
    )
    require_attributes(SchedulerKvEventsPublisher, "publish_kv_events", "emit_kv_metrics")
    require_attributes(SchedulerLoadInquirer, "get_num_waiting_uncached_tokens")
    require_parameters(EventPublisherFactory.register_publisher, "name", "ctor")
    require_attributes(assembler, "HostPoolGroup", "StackBuildResult", "build_pool_entry")
    require_parameters(create_unified_radix_cache, "ctx", "cache_class")
    require_parameters(assembler.StackStrategy.build, "cache", "kvcache", "storage_backend")
    require_parameters(HybridCacheController.__init__, "mem_pool_host", "transfer_layer_id_max")
    require_parameters(MHATokenToKVPoolHost.__init__, "buffer_info", "pin_memory", "layout")


def check_hooks_applied() -> None:
    """Raise if a hook of ours was lost: SGLang logs a plugin's failure and goes on without it."""
    from sglang.srt.plugins.hook_registry import HookRegistry

    missing = [target for target in REQUIRED_HOOKS if target not in HookRegistry._patched]
    if missing:
        raise IncompatibleSglangError(
            f"hooks not in place: {', '.join(missing)}; the log above says why the plugin failed"
        )


def refuse_unsupported_modes(memory: Any, parallel: Any, rust_server: bool) -> None:
    """Raise ``UnsupportedError`` naming each mode of SGLang that our cache does not serve.

    Args:
        memory: SGLang's memory settings (``runtime_context.get_memory()``).
        parallel: its parallel settings (``runtime_context.get_parallel()``).
        rust_server: whether ``SGLANG_RUST_SERVER`` is on; it has no Python HTTP process.
    """
    refused = []
    if rust_server:
        refused.append("SGLANG_RUST_SERVER (its HTTP process cannot serve /symphony routes)")
    if memory.hicache_host_memory_mode == "buffer_only":
        refused.append("--hicache-host-memory-mode buffer_only (it keeps no host level)")
    if memory.enable_unified_cache_external_linker:
        refused.append("--enable-unified-cache-external-linker (it bypasses the host level)")
    if memory.enable_lmcache:
        refused.append("--enable-lmcache (a second cache over the same tree)")
    if memory.enable_flexkv:
        refused.append("--enable-flexkv (a second cache over the same tree)")
    if parallel.pp_size > 1:
        refused.append("--pp-size over 1 (levels are kept in step over TP ranks only)")
    if refused:
        raise UnsupportedError(
            "--radix-cache-backend symphony does not support "
            + "; ".join(refused)
            + ". Drop the option, or run stock SGLang with --symphony-off."
        )
