"""Builds the host level under SGLang's unified cache on a machine without a GPU.

Registered through ``register_stack_strategy`` (hybrid_pool_assembler.py:2445). It matches plain
MHA pools on the CPU only; every other combination keeps SGLang's own strategy.
"""

from __future__ import annotations

import os
from typing import Any

from sglang.srt.mem_cache.hicache_storage import PoolName
from sglang.srt.mem_cache.hybrid_cache.hybrid_cache_controller import HybridCacheController
from sglang.srt.mem_cache.hybrid_cache.hybrid_pool_assembler import (
    HostPoolGroup,
    StackBuildResult,
    StackStrategy,
    build_pool_entry,
)
from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool
from sglang.srt.mem_cache.pool_host.common import get_allocator_type
from sglang.srt.mem_cache.unified_cache.components import ComponentType
from sglang.srt.runtime_context import get_memory

from symphony_sglang.config import SymphonyConfig
from symphony_sglang.engine.host_pool import TorchHostPool
from symphony_sglang.engine.launch import AUTOMATIC_HOST_GB_VARIABLE

AUTOMATIC_HOST_DEVICE_RATIO_MAX = 8.0


class CpuStackStrategy(StackStrategy):
    """Host pool and controller for full attention on ``device cpu``."""

    def matches(self, kvcache: Any, components: set[ComponentType]) -> bool:
        return (
            type(kvcache) is MHATokenToKVPool
            and str(kvcache.device).startswith("cpu")
            and components == {ComponentType.FULL}
        )

    def build(
        self,
        *,
        cache: Any,
        kvcache: Any,
        params: Any,
        server_args: Any,
        load_cache_event: Any,
        storage_backend: str | None = None,
        storage_backend_extra_config: dict[str, Any] | None = None,
        prefetch_threshold: int = 256,
        model_name: str | None = None,
        enable_storage_metrics: bool = False,
    ) -> StackBuildResult:
        memory = get_memory()
        layer_count = kvcache.layer_num
        group = HostPoolGroup(
            [
                build_pool_entry(
                    name=PoolName.KV,
                    host_pool=build_host_pool(kvcache, params.page_size),
                    device_pool=kvcache,
                    layer_mapping={layer: layer for layer in range(layer_count)},
                    transfer_layer_id_max=layer_count,
                    is_anchor=True,
                )
            ]
        )
        controller = HybridCacheController(
            params.token_to_kv_pool_allocator,
            group,
            params.page_size,
            params.tp_cache_group,
            load_cache_event=load_cache_event,
            attn_cp_group=params.attn_cp_cache_group,
            attn_tp_group=params.attn_tp_cache_group,
            pp_group=params.pp_cache_group,
            write_policy=memory.hicache_write_policy,
            io_backend=memory.hicache_io_backend,
            storage_backend=storage_backend,
            prefetch_threshold=prefetch_threshold,
            model_name=model_name,
            storage_backend_extra_config=storage_backend_extra_config,
            transfer_layer_id_max=layer_count,
            enable_storage_metrics=enable_storage_metrics,
            host_memory_mode=memory.hicache_host_memory_mode,
        )
        return StackBuildResult(
            host_pool_group=group,
            cache_controller=controller,
            component_host_pools={ComponentType.FULL: group.get_pool(PoolName.KV)},
            pools_desc="KV",
        )


def chosen_host_gb(kvcache: MHATokenToKVPool) -> float:
    """GB of host level by our settings; 0 leaves the size to ``--hicache-size`` or ``-ratio``.

    An automatic size stays within a multiple of the device level: a host level many times larger
    serves few more hits, and touching its memory for the first time delays the start.
    """
    asked = SymphonyConfig.from_environment().host_gb
    if asked > 0:
        return asked
    automatic = float(os.environ.get(AUTOMATIC_HOST_GB_VARIABLE, "0"))
    device_bytes = sum(kvcache.get_kv_size_bytes())
    return min(automatic, AUTOMATIC_HOST_DEVICE_RATIO_MAX * device_bytes / 1e9)


def build_host_pool(kvcache: MHATokenToKVPool, page_size: int) -> TorchHostPool:
    """The host pool for a device pool, sized by ``--symphony-host-gb`` or SGLang's own flags."""
    memory = get_memory()
    info = kvcache.get_device_pool_infos()[0].buffer_info
    capacity = kvcache.host_capacity_tokens
    return TorchHostPool(
        info,
        memory.hicache_ratio,
        chosen_host_gb(kvcache) or memory.hicache_size,
        page_size,
        memory.hicache_mem_layout,
        allocator_type=get_allocator_type(),
        device_capacity_tokens=kvcache.size if capacity is None else capacity,
        start_layer=kvcache.start_layer,
        end_layer=kvcache.end_layer,
    )
