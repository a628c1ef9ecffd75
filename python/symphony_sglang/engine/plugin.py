"""What SGLang runs in each of its processes, through the entry-point group ``sglang.srt.plugins``.

Everything registered here is a name in a registry; nothing takes effect until a server selects it.
"""

from __future__ import annotations

import multiprocessing
from typing import Any

from symphony_sglang.config import SymphonyConfig
from symphony_sglang.engine import compat


def register() -> None:
    """Register cache, host level, message types, routes and the CPU attention backend.

    SGLang swallows what this raises, so ``cache.build_cache`` checks again and refuses to start.
    """
    if SymphonyConfig.from_environment().off:
        return
    compat.check_version()
    _register_attention_choice()
    _register_cache()
    _register_hooks()
    _register_feed()
    if multiprocessing.parent_process() is None:
        _register_replies()
        _register_routes()
        _register_request_hooks()
        _register_warmup()


def _register_attention_choice() -> None:
    from symphony_sglang.platform.attention import (
        register_attention_backend,
        register_attention_choice,
    )

    register_attention_choice()
    register_attention_backend()


def _register_cache() -> None:
    from sglang.srt.mem_cache.hybrid_cache.hybrid_pool_assembler import register_stack_strategy
    from sglang.srt.mem_cache.registry import register_radix_cache_backend

    from symphony_sglang.engine.cache import BACKEND_NAME, build_cache
    from symphony_sglang.engine.stack import CpuStackStrategy

    register_radix_cache_backend(BACKEND_NAME, build_cache)
    register_stack_strategy(CpuStackStrategy())


def _register_hooks() -> None:
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    from symphony_sglang.engine import nvme_backend
    from symphony_sglang.engine.control import (
        append_tick,
        attach_control,
        make_way_for_flush,
        measure_batch,
    )

    HookRegistry.register(compat.DISPATCHER_HOOK, attach_control, HookType.AFTER)
    HookRegistry.register(compat.CLOCK_HOOK, append_tick, HookType.AFTER)
    HookRegistry.register(compat.RESULT_HOOK, measure_batch, HookType.BEFORE)
    HookRegistry.register(compat.FLUSH_HOOK, make_way_for_flush, HookType.BEFORE)
    HookRegistry.register(compat.SCHEDULER_START_HOOK, _bind_rank, HookType.BEFORE)
    HookRegistry.register(
        nvme_backend.BACKUP_HOOK, nvme_backend.skip_backup_while_unwritable, HookType.AROUND
    )


def _register_feed() -> None:
    from sglang.srt.disaggregation.kv_events import EventPublisherFactory

    from symphony_sglang.engine.feed import FeedPublisher
    from symphony_sglang.engine.feed_ports import PUBLISHER_NAME

    EventPublisherFactory.register_publisher(PUBLISHER_NAME, FeedPublisher)


def _register_replies() -> None:
    from sglang.srt.managers import tokenizer_control_mixin

    from symphony_sglang.engine.messages import COMMUNICATOR_NAME, REPLY_TYPES

    # The list is read when the tokenizer manager starts (tokenizer_control_mixin.py:186).
    for reply_type in REPLY_TYPES:
        tokenizer_control_mixin._COMMUNICATOR_SPECS.append((COMMUNICATOR_NAME, reply_type))


def _register_routes() -> None:
    from sglang.srt.entrypoints import http_server

    from symphony_sglang.engine import feed_routes, peer_routes, ui_routes
    from symphony_sglang.engine.routes import BusyError, answer_busy, answer_leaving, router
    from symphony_sglang.errors import LeavingError

    http_server.app.add_exception_handler(BusyError, answer_busy)
    http_server.app.add_exception_handler(LeavingError, answer_leaving)
    for part in (router, feed_routes.router, peer_routes.router, ui_routes.router):
        part.route_class = http_server.ORJSONRoute
        http_server.app.include_router(part)


def _register_request_hooks() -> None:
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    from symphony_sglang.engine import leave, request_hooks, ui_routes

    HookRegistry.register(leave.WATCHDOG_HOOK, leave.hand_off_then_leave, HookType.AROUND)
    HookRegistry.register(compat.AUTH_HOOK, ui_routes.let_page_through, HookType.AFTER)
    HookRegistry.register(
        request_hooks.VALIDATE_HOOK, request_hooks.check_token_ids, HookType.BEFORE
    )
    HookRegistry.register(
        request_hooks.GENERATE_HOOK, request_hooks.generate_with_hints, HookType.AROUND
    )
    HookRegistry.register(
        request_hooks.CHAT_STREAM_HOOK, request_hooks.watch_chat_stream, HookType.AROUND
    )
    HookRegistry.register(
        request_hooks.CHAT_ANSWER_HOOK, request_hooks.watch_chat_answer, HookType.AROUND
    )


def _register_warmup() -> None:
    from sglang.srt.entrypoints.warmup import warmup

    from symphony_sglang.engine.calibration import warm_up
    from symphony_sglang.engine.launch import WARMUP_NAME

    warmup(WARMUP_NAME)(warm_up)


def _bind_rank(_scheduler: Any, *args: Any, **kwargs: Any) -> None:
    """BEFORE hook of ``Scheduler.__init__``: on our platform, pin the rank to its cores."""
    from sglang.srt.platforms import current_platform
    from sglang.srt.runtime_context import get_device

    from symphony_sglang.platform.cpu import PortableTorchPlatform
    from symphony_sglang.platform.threads import bind_this_rank

    if isinstance(current_platform, PortableTorchPlatform):
        bind_this_rank(get_device().gpu_id)
