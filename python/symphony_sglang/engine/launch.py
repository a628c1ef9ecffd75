"""Turns our settings into SGLang's arguments: what the user left open, and nothing they chose."""

from __future__ import annotations

import argparse
import json
import logging
import os
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from symphony_sglang.config import SymphonyConfig
from symphony_sglang.engine.feed_ports import bind_address, events_config, reserve_ports
from symphony_sglang.engine.peer_ports import PEER_PORT_VARIABLE, reserve_peer_ports
from symphony_sglang.errors import UnsupportedError
from symphony_sglang.platform.support import SUPPORT_FIELDS, refuse_unsupported

GIB = 1 << 30
# Smaller pages waste less at a prefix's end; larger ones move with fewer operations. SGLang's
# tiered-cache guides use 64 on GPUs; on CPUs copies are cheap to issue.
PAGE_SIZE_CPU = 16
PAGE_SIZE_GPU = 64
# Weights and device level of a CPU machine: the host level and everything else live there too.
MEMORY_SHARE_CPU = 0.4
# SGLang runs it before the server takes requests (``calibration.warm_up``).
WARMUP_NAME = "symphony"
# Decided once, here: ranks that measured free memory themselves would size their levels apart.
AUTOMATIC_HOST_GB_VARIABLE = "SYMPHONY_AUTOMATIC_HOST_GB"
# SGLang refuses to size a pinned pool into the last 10 GiB (pool_host/base.py:31).
GPU_RESERVE_BYTES = 10 * GIB

# One directory a port: a restarted worker finds its pages, two workers do not share a namespace.
DEFAULT_NVME_DIRECTORY = Path.home() / ".cache" / "symphony_sglang" / "pages"

logger = logging.getLogger(__name__)


def explicit_flags(argv: Sequence[str]) -> set[str]:
    """Names of the ``ServerArgs`` fields that `argv` sets, in whatever spelling argparse takes."""
    from sglang.srt.server_args import ServerArgs

    parser = argparse.ArgumentParser(add_help=False)
    ServerArgs.add_cli_args(parser)
    if "--config" in argv:
        from sglang.srt.utils.server_args_config_parser import ConfigArgumentMerger

        argv = ConfigArgumentMerger(parser).merge_config_with_args(list(argv))
    for action in parser._actions:
        action.default = argparse.SUPPRESS
        action.required = False
    namespace, _ = parser.parse_known_args(list(argv))
    return set(vars(namespace))


def host_level_gb(config: SymphonyConfig, *, free_bytes: int, ranks: int, on_cpu: bool) -> float:
    """GB of host level per rank: what was asked for, or a bounded share of free memory.

    On a CPU machine the device level is memory too, so the share is smaller.
    """
    if config.host_gb >= 0:
        return config.host_gb
    if on_cpu:
        share, floor, ceiling = 0.15 * free_bytes, 0.25, 4.0
    else:
        share, floor, ceiling = 0.5 * max(free_bytes - GPU_RESERVE_BYTES, 0), 1.0, 256.0
    return round(min(max(share / ranks / 1e9, floor), ceiling), 2)


def level_arguments(explicit: Collection[str], *, host_gb: float, on_cpu: bool) -> list[str]:
    """The SGLang arguments that turn the levels on, for the fields that `explicit` lacks."""
    wanted: list[tuple[str, list[str]]] = [
        ("radix_cache_backend", ["--radix-cache-backend", "symphony"]),
        ("enable_cache_report", ["--enable-cache-report"]),
        ("page_size", ["--page-size", str(PAGE_SIZE_CPU if on_cpu else PAGE_SIZE_GPU)]),
    ]
    if host_gb > 0:
        wanted += [
            ("enable_hierarchical_cache", ["--enable-hierarchical-cache"]),
            ("hicache_write_policy", ["--hicache-write-policy", "write_through"]),
            ("hicache_mem_layout", ["--hicache-mem-layout", "page_first_direct"]),
            ("hicache_io_backend", ["--hicache-io-backend", "direct"]),
        ]
        if not {"hicache_size", "hicache_ratio"} & set(explicit):
            # On a CPU our own pool decides the size; a ratio keeps SGLang from sizing it against
            # its reserve of 10 GiB, and from refusing to start on a machine that has less.
            size = ["--hicache-ratio", "2.0"]
            if not on_cpu:
                size = ["--hicache-size", str(max(1, round(host_gb)))]
            wanted.append(("hicache_size", size))
    return [word for field, words in wanted if field not in explicit for word in words]


def nvme_arguments(
    explicit: Collection[str], config: SymphonyConfig, *, page_size: int, port: int, model_path: str
) -> list[str]:
    """The SGLang arguments that put our page store below the host level."""
    if config.nvme_gb == 0 or "hicache_storage_backend" in explicit:
        return []
    directory = config.nvme_dir or str(DEFAULT_NVME_DIRECTORY / f"port-{port}")
    extra: dict[str, Any] = {
        "backend_name": "symphony",
        "module_path": "symphony_sglang.engine.nvme_backend",
        "class_name": "NvmeBackend",
        "interface_v1": 1,
        "hicache_storage_pass_prefix_keys": True,
        # SGLang leaves prefixes below 256 tokens on disk by default; one page is worth a read here.
        "prefetch_threshold": page_size,
        "nvme_dir": directory,
        "nvme_sync": config.nvme_sync,
        "nvme_model_path": model_path,
    }
    if config.nvme_gb > 0:
        extra["nvme_bytes"] = int(config.nvme_gb * 1e9)
    return [
        *("--hicache-storage-backend", "dynamic"),
        *("--hicache-storage-backend-extra-config", json.dumps(extra)),
    ]


def feed_arguments(
    explicit: Collection[str],
    config: SymphonyConfig,
    *,
    host: str,
    http_port: int,
    ranks: int,
    nodes: int,
) -> list[str]:
    """The SGLang argument that turns the feed on; holds its ports in this process.

    Raises:
        ConfigError: ``--symphony-feed-port`` names ports that are taken.
    """
    if not config.feed or "kv_events_config" in explicit:
        return []
    if nodes > 1:
        logger.info("feed: off, a rank on another node could not bind this node's address")
        return []
    address = bind_address(host)
    ports = reserve_ports(address, ranks, base=config.feed_port, http_port=http_port)
    return ["--kv-events-config", events_config(address, ports)]


def choose_peer_ports(config: SymphonyConfig, namespace: Mapping[str, Any]) -> None:
    """Hold the page servers' ports in this process, and tell the ranks the first.

    Raises:
        ConfigError: ``--symphony-peer-port`` names ports that are taken.
    """
    if namespace["nnodes"] > 1:
        logger.info("peer level: off, a puller would look for every rank on one node")
        os.environ[PEER_PORT_VARIABLE] = "off"
    elif config.peer:
        ranks = namespace["tp_size"] * namespace["dp_size"]
        address, port = bind_address(namespace["host"]), namespace["port"]
        first = reserve_peer_ports(address, ranks, base=config.peer_port, http_port=port)
        os.environ[PEER_PORT_VARIABLE] = str(first)


def complete_arguments(argv: Sequence[str], config: SymphonyConfig) -> list[str]:
    """`argv` with the levels on, and the settings exported to the processes SGLang will spawn.

    Raises:
        UnsupportedError: an argument that our cache cannot serve, by name.
    """
    from symphony_sglang.platform import FORCE_CPU_VARIABLE, accelerator_present

    on_cpu = os.environ.get(FORCE_CPU_VARIABLE) == "1" or not accelerator_present()
    os.environ.update(config.to_environment())
    explicit = explicit_flags(argv)
    completed = list(argv)
    if on_cpu:
        if "device" not in explicit:
            completed += ["--device", "cpu"]
        # Here too, and not only in the platform: SGLang's own checks of a model come before those.
        refuse_unsupported(SimpleNamespace(**read_fields(argv, SUPPORT_FIELDS)))
        logger.info(
            "CPU: portable torch platform, %d cores, own attention backend, no overlap schedule",
            len(os.sched_getaffinity(0)),
        )
        if not {"max_total_tokens", "mem_fraction_static"} & explicit:
            completed += ["--mem-fraction-static", str(MEMORY_SHARE_CPU)]
    if config.off or "disable_radix_cache" in explicit:
        return completed
    namespace = read_fields(
        argv,
        (
            *("tp_size", "dp_size", "nnodes", "tokenizer_worker_num"),
            *("page_size", "host", "port", "model_path"),
        ),
    )
    if namespace["tokenizer_worker_num"] > 1:
        raise UnsupportedError(
            f"--tokenizer-worker-num {namespace['tokenizer_worker_num']}: the /symphony routes "
            "live in one HTTP process; leave it at 1, or run stock SGLang with --symphony-off"
        )
    import psutil

    host_gb = host_level_gb(
        config,
        free_bytes=psutil.virtual_memory().available,
        ranks=namespace["tp_size"] * namespace["dp_size"],
        on_cpu=on_cpu,
    )
    if config.host_gb < 0 and {"hicache_size", "hicache_ratio"} & explicit:
        logger.info("host level: sized by SGLang's --hicache-size/--hicache-ratio")
    else:
        os.environ["SYMPHONY_HOST_GB"] = str(config.host_gb)
        os.environ[AUTOMATIC_HOST_GB_VARIABLE] = str(host_gb)
        logger.info("host level: %.2f GB per rank", host_gb)
    completed += level_arguments(explicit, host_gb=host_gb, on_cpu=on_cpu)
    completed += feed_arguments(
        explicit,
        config,
        host=namespace["host"],
        http_port=namespace["port"],
        ranks=namespace["dp_size"],
        nodes=namespace["nnodes"],
    )
    if host_gb <= 0:
        return completed
    choose_peer_ports(config, namespace)
    if config.break_even > 0 and "warmups" not in explicit:
        completed += ["--warmups", WARMUP_NAME]
    return completed + nvme_arguments(
        explicit,
        config,
        page_size=namespace["page_size"] or (PAGE_SIZE_CPU if on_cpu else PAGE_SIZE_GPU),
        port=namespace["port"],
        model_path=namespace["model_path"] or "",
    )


def read_fields(argv: Sequence[str], names: Sequence[str]) -> dict[str, Any]:
    """Fields of ``ServerArgs`` as `argv` sets them, else SGLang's defaults."""
    from sglang.srt.server_args import ServerArgs

    parser = argparse.ArgumentParser(add_help=False)
    ServerArgs.add_cli_args(parser)
    for action in parser._actions:
        action.required = False
    namespace, _ = parser.parse_known_args(list(argv))
    return {name: getattr(namespace, name) for name in names}
