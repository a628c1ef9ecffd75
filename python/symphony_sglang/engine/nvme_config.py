"""What the NVMe level must know of SGLang's configuration and of the host pool it serves."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any, NamedTuple

import torch
from sglang.srt.mem_cache.hicache_storage import HiCacheStorageConfig

from symphony_sglang.errors import ConfigError, UnsupportedError
from symphony_sglang.store import Namespace, Piece, StoreSettings, SyncPolicy

DEFAULT_DIRECTORY = Path.home() / ".cache" / "symphony_sglang" / "pages"
HASH_SCHEME = "sglang-sha256-chain-1"
# Smaller parts cost more system time to verify than they save in a read of few layers.
CHECKSUM_BYTES_MIN = 64 * 1024
CHECKSUM_BYTES_MAX = 1 << 20
_CONFIG_TYPES: dict[str, type] = {
    "nvme_dir": str,
    "nvme_bytes": int,
    "nvme_sync": str,
    "nvme_revision": str,
    "nvme_model_path": str,
    "nvme_threads": int,
    "nvme_segment_bytes": int,
    "nvme_free_floor_share": float,
}


class NvmeConfig(NamedTuple):
    """What the extra config says of this level."""

    directory: Path
    revision: str
    settings: StoreSettings


def read_config(extra_config: dict[str, Any]) -> NvmeConfig:
    """Raises ConfigError for an unknown ``nvme_`` key or a value of the wrong type or range."""
    given: dict[str, Any] = {}
    for name, value in extra_config.items():
        if not name.startswith("nvme_"):
            continue
        expected = _CONFIG_TYPES.get(name)
        if expected is None:
            known = ", ".join(sorted(_CONFIG_TYPES))
            raise ConfigError(
                f"storage extra config: unknown key {name!r}; expected one of {known}"
            )
        if expected is float and type(value) is int:
            value = float(value)
        if type(value) is not expected:
            raise ConfigError(
                f"storage extra config: {name} is {value!r}; expected {expected.__name__}"
            )
        given[name] = value
    options: dict[str, Any] = {"capacity_bytes": given.get("nvme_bytes")}
    for name, option in (
        ("nvme_threads", "io_threads"),
        ("nvme_segment_bytes", "segment_bytes"),
        ("nvme_free_floor_share", "free_floor_share"),
    ):
        if name in given:
            options[option] = given[name]
    if "nvme_sync" in given:
        policies = {policy.value: policy for policy in SyncPolicy}
        if given["nvme_sync"] not in policies:
            raise ConfigError(
                f"storage extra config: nvme_sync is {given['nvme_sync']!r}; "
                f"expected one of {', '.join(policies)}"
            )
        options["sync"] = policies[given["nvme_sync"]]
    directory = Path(given.get("nvme_dir") or DEFAULT_DIRECTORY).expanduser()
    revision = given.get("nvme_revision", "") + weights_fingerprint(given.get("nvme_model_path"))
    return NvmeConfig(directory, revision, StoreSettings(**options))


def weights_fingerprint(model_path: str | None) -> str:
    """A digest of names, sizes and times of a local model's files; "" where there are none.

    A model trained on in place keeps its path, and must not be served its old pages.
    """
    folder = Path(model_path) if model_path else None
    if folder is None or not folder.is_dir():
        return ""
    digest = hashlib.sha256()
    for path in sorted(folder.iterdir()):
        if path.is_file():
            facts = path.stat()
            digest.update(f"{path.name}\0{facts.st_size}\0{facts.st_mtime_ns}\n".encode())
    return "+" + digest.hexdigest()[:16]


def namespace_of(config: HiCacheStorageConfig, pool: Any, revision: str) -> Namespace:
    """Everything in SGLang's configuration that decides what bytes a page has."""
    if config.is_mla_model and config.tp_size > 1:
        raise UnsupportedError(
            "NVMe level: latent attention (MLA) with tensor parallelism keeps one copy of a page "
            "for all ranks; this backend keeps one a rank. Start with --tp-size 1"
        )
    if config.should_split_heads:
        raise UnsupportedError("NVMe level: tp_lcm_size (pages split by head) is not supported")
    _, sizes = pool.get_page_buffer_meta(torch.arange(pool.page_size, dtype=torch.int64))
    facts = {
        "pp": f"{config.pp_rank}/{config.pp_size}",
        "dp": str(config.dp_rank),
        "cp": f"{config.attn_cp_rank}/{config.attn_cp_size}",
        "dcp": f"{config.dcp_rank}/{config.dcp_size}",
        "pool": type(pool).__name__,
        "format": str(getattr(pool, "storage_format_tag", None)),
        "pieces": ",".join(map(str, sizes)),
    }
    for name in ("layer_num", "start_layer", "end_layer", "head_num", "head_dim", "v_head_dim"):
        facts[name] = str(getattr(pool, name, None))
    return Namespace(
        model=config.model_name or "",
        revision=revision,
        dtype=str(pool.dtype).removeprefix("torch."),
        layout=pool.layout,
        page_tokens=pool.page_size,
        page_bytes=sum(sizes),
        tp_rank=config.tp_rank,
        tp_size=config.tp_size,
        hash_scheme=HASH_SCHEME,
        extra=tuple(sorted(facts.items())),
    )


def pool_memory(pool: Any) -> list[Piece]:
    """The whole memory of a pool as pieces, where it is contiguous tensors."""
    buffers = pool.kv_buffer if isinstance(pool.kv_buffer, list | tuple) else [pool.kv_buffer]
    return [
        tensor_piece(buffer)
        for buffer in buffers
        if isinstance(buffer, torch.Tensor) and buffer.is_contiguous()
    ]


def layer_bytes_of(pool: Any) -> int | None:
    """Bytes of one layer's K in a page, where a page's layers follow each other; else None."""
    if pool.layout != "page_first_direct" or not hasattr(pool, "token_stride_size"):
        return None
    return int(pool.page_size * pool.token_stride_size)


def checksum_bytes_for(pool: Any) -> int:
    """The unit of verification: whole layers that divide a page's K, of a useful size."""
    layer_bytes = layer_bytes_of(pool)
    if layer_bytes is None:
        return CHECKSUM_BYTES_MAX
    divisors = [count for count in range(1, pool.layer_num + 1) if pool.layer_num % count == 0]
    for count in divisors:
        if CHECKSUM_BYTES_MIN <= count * layer_bytes <= CHECKSUM_BYTES_MAX:
            return count * layer_bytes
    return min(CHECKSUM_BYTES_MAX, max(4096, pool.layer_num * layer_bytes))


def tensor_piece(tensor: torch.Tensor) -> Piece:
    if tensor.device.type != "cpu" or not tensor.is_contiguous():
        raise UnsupportedError(
            f"NVMe level: a {'contiguous' if tensor.is_contiguous() else 'strided'} tensor on "
            f"{tensor.device}; expected a contiguous one on the CPU"
        )
    return tensor.data_ptr(), tensor.numel() * tensor.element_size()
