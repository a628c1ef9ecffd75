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
    if multiprocessing.parent_process() is None:
        _register_replies()
        _register_routes()
        _register_request_hooks()


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

    from symphony_sglang.engine.control import append_tick, attach_control

    HookRegistry.register(compat.DISPATCHER_HOOK, attach_control, HookType.AFTER)
    HookRegistry.register(compat.CLOCK_HOOK, append_tick, HookType.AFTER)
    HookRegistry.register(compat.SCHEDULER_START_HOOK, _bind_rank, HookType.BEFORE)


def _register_replies() -> None:
    from sglang.srt.managers import tokenizer_control_mixin

    from symphony_sglang.engine.messages import COMMUNICATOR_NAME, REPLY_TYPES

    # The list is read when the tokenizer manager starts (tokenizer_control_mixin.py:186).
    for reply_type in REPLY_TYPES:
        tokenizer_control_mixin._COMMUNICATOR_SPECS.append((COMMUNICATOR_NAME, reply_type))


def _register_routes() -> None:
    from sglang.srt.entrypoints import http_server

    from symphony_sglang.engine.routes import router

    router.route_class = http_server.ORJSONRoute
    http_server.app.include_router(router)


def _register_request_hooks() -> None:
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    from symphony_sglang.engine import request_hooks

    HookRegistry.register(
        request_hooks.VALIDATE_HOOK, request_hooks.check_token_ids, HookType.BEFORE
    )
    HookRegistry.register(
        request_hooks.GENERATE_HOOK, request_hooks.generate_with_hints, HookType.AROUND
    )


def _bind_rank(_scheduler: Any, *args: Any, **kwargs: Any) -> None:
    """BEFORE hook of ``Scheduler.__init__``: on our platform, pin the rank to its cores."""
    from sglang.srt.platforms import current_platform
    from sglang.srt.runtime_context import get_device

    from symphony_sglang.platform.cpu import PortableTorchPlatform
    from symphony_sglang.platform.threads import bind_this_rank

    if isinstance(current_platform, PortableTorchPlatform):
        bind_this_rank(get_device().gpu_id)
