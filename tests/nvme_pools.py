"""Host pools and storage backends as SGLang makes them, for the tests of the NVMe level."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from symphony_sglang.engine.host_pool import TorchHostPool
from symphony_sglang.engine.nvme_backend import NvmeBackend, active_backends

PAGE = 16
KEYS = [hashlib.sha256(f"page {number}".encode()).hexdigest() for number in range(40)]


def host_pool(page_count: int = 64, layers: int = 3, heads: int = 2, dim: int = 64, dtype=None):
    from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool

    device = MHATokenToKVPool(
        size=PAGE * 8,
        page_size=PAGE,
        dtype=dtype or torch.bfloat16,
        head_num=heads,
        head_dim=dim,
        layer_num=layers,
        device="cpu",
        enable_memory_saver=False,
    )
    return TorchHostPool(
        device.get_device_pool_infos()[0].buffer_info,
        2.0,
        0,
        PAGE,
        "page_first_direct",
        device_capacity_tokens=PAGE * 8,
        start_layer=0,
        end_layer=layers - 1,
        host_token_capacity=page_count * PAGE,
    )


def config_of(directory: Path, **changes):
    from sglang.srt.mem_cache.hicache_storage import HiCacheStorageConfig

    extra = {
        "backend_name": "symphony",
        "interface_v1": 1,
        "nvme_dir": str(directory),
        "nvme_bytes": 64 << 20,
        "nvme_segment_bytes": 8 << 20,
        "nvme_free_floor_share": 0.0,
    } | changes.pop("extra", {})
    facts = {
        "tp_rank": 0,
        "tp_size": 1,
        "pp_rank": 0,
        "pp_size": 1,
        "attn_cp_rank": 0,
        "attn_cp_size": 1,
        "is_mla_model": False,
        "enable_storage_metrics": True,
        "is_page_first_layout": False,
        "model_name": "tiny",
    }
    return HiCacheStorageConfig(**(facts | changes), extra_config=extra)


def opened_backends() -> Iterator[Callable[..., NvmeBackend]]:
    """Makes backends, and closes them: the body of a fixture."""
    backends: list[NvmeBackend] = []

    def make(directory: Path, pool=None, **changes) -> NvmeBackend:
        backend = NvmeBackend(config_of(directory, **changes), {})
        backends.append(backend)
        backend.register_mem_pool_host(pool or host_pool())
        backend.on_host_pools_registered()
        return backend

    yield make
    for backend in backends:
        backend.close()
    assert active_backends() == []


def indices(pages: list[int]) -> torch.Tensor:
    return torch.cat([torch.arange(page * PAGE, (page + 1) * PAGE) for page in pages])


def fill(pool, seed: int = 0) -> torch.Tensor:
    """Random bits in every page of the pool; returns a copy."""
    generator = torch.Generator().manual_seed(seed)
    raw = pool.kv_buffer.view(torch.int16)
    raw.copy_(torch.randint(-(2**15), 2**15, raw.shape, generator=generator, dtype=torch.int16))
    return raw.clone()
