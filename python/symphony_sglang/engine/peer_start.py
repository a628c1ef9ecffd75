"""Starts the peer level of a rank, where it has pages to share."""

from __future__ import annotations

import atexit
import logging
import os
from typing import TYPE_CHECKING, Any

import zmq
from sglang.srt.runtime_context import get_serving

from symphony_sglang.clock import SystemClock
from symphony_sglang.config import SymphonyConfig
from symphony_sglang.engine.feed_ports import bind_address
from symphony_sglang.engine.nvme_backend import ATTENTION_EQUAL_TOKENS, active_backends
from symphony_sglang.engine.peer import PeerLevel
from symphony_sglang.engine.peer_host import watch_host_pool
from symphony_sglang.engine.peer_ports import PEER_PORT_VARIABLE
from symphony_sglang.wire.nixl_engine import NixlEngine
from symphony_sglang.wire.page_server import ServerSettings
from symphony_sglang.wire.secure_channel import KEY_CHARACTERS_MIN, TransferKey

if TYPE_CHECKING:
    from symphony_sglang.engine.cache import SymphonyCache

logger = logging.getLogger(__name__)


def transfer_key(config: SymphonyConfig, api_key: str | None) -> TransferKey | None:
    """The key asked for, else one made from ``--api-key``: pages are as private as the answers."""
    if config.transfer_key:
        return TransferKey(config.transfer_key)
    return TransferKey(f"api key {api_key}".ljust(KEY_CHARACTERS_MIN)) if api_key else None


def attach_peer(scheduler: Any, cache: SymphonyCache) -> None:
    """Give the cache its peer level; without an NVMe level, or turned off, it stays without."""
    config = SymphonyConfig.from_environment()
    backends = active_backends()
    chosen = os.environ.get(PEER_PORT_VARIABLE, str(config.peer_port))
    if not config.peer or cache.advisories is None or not backends or not chosen.isdigit():
        return
    store, serving = backends[0].store, get_serving()
    namespace = store.namespace
    ranks, rank = namespace.tp_size, namespace.tp_rank
    if int(chosen) == 0 and ranks > 1:
        logger.info("peer level: off, for ranks find each other by the ports that our launcher set")
        return
    # Data-parallel replicas have a page server for each of their ranks, one after the other.
    named = dict(namespace.extra).get("dp", "")
    replica = int(named) if named.isdigit() else 0
    port = int(chosen) + replica * ranks + rank if int(chosen) else 0
    tokens = namespace.page_tokens
    host = watch_host_pool(backends[0].mem_pool_host)
    if host is not None:
        backends[0].on_pages = host.noted
    cache.peer = PeerLevel(
        cache.advisories,
        store,
        settings=ServerSettings(
            host=bind_address(serving.host), port=port, local=config.peer_local
        ),
        key=transfer_key(config, serving.api_key),
        clock=SystemClock(),
        rank=rank,
        ranks=ranks,
        cost_of=lambda depth: 1.0 + depth * tokens / ATTENTION_EQUAL_TOKENS,
        host=host,
        engine=NixlEngine(SystemClock()) if config.transfer == "nixl" else None,
    )
    cache.peer.on_pulled = lambda outcome, size, seconds: note_pull(cache, outcome, size, seconds)
    atexit.register(cache.peer.close)
    wake_scheduler_by(scheduler, cache.peer)
    logger.info("peer level: rank %d serves pages at %s", rank, cache.peer.server.address)


def note_pull(cache: SymphonyCache, outcome: str, size: int, seconds: float) -> None:
    metrics = cache.reporter.metrics
    if metrics is not None:
        metrics.pulled(outcome, moved_bytes=size, seconds=seconds)


def wake_scheduler_by(scheduler: Any, peer: PeerLevel) -> None:
    """Let the end of a pull wake a scheduler that sleeps on idle, as a message does."""
    sleeper = getattr(scheduler, "idle_sleeper", None)
    poller = getattr(getattr(sleeper, "_sleeper", sleeper), "poller", None)
    if poller is None:
        return
    peer.wakeup = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
    poller.register(peer.wakeup, zmq.POLLIN)
