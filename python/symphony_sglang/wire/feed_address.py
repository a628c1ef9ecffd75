"""Where a worker's feed is: from what the worker says of itself over HTTP."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from symphony_sglang.errors import FeedError


@dataclass(frozen=True, slots=True)
class FeedAddress:
    """One data-parallel rank's feed. `state_port` None: a stock SGLang worker, page events only."""

    worker_id: str
    host: str
    events_port: int
    replay_port: int | None = None
    state_port: int | None = None
    rank: int = 0
    page_size: int = 0
    topic: str = ""
    # What the feed must call itself; "" takes any.
    name: str = ""
    # The worker's API key where its feed asks for it.
    api_key: str | None = None

    @property
    def stock(self) -> bool:
        return self.state_port is None

    def endpoint(self, port: int) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"tcp://{host}:{port}"


def feed_addresses(
    worker_id: str,
    url: str,
    *,
    residency: Mapping[str, Any] | None = None,
    server_info: Mapping[str, Any] | None = None,
    api_key: str | None = None,
) -> list[FeedAddress]:
    """The feeds of a worker, one a data-parallel rank; empty where it publishes none.

    Args:
        worker_id: The worker's id; of several ranks, each gets ``<worker_id>@<rank>``, as
            sglang-router names them.
        url: The worker's URL. Its host is the one to connect to: a worker may bind any address.
        residency: Body of ``GET /symphony/residency``, None for a stock worker.
        server_info: Body of ``GET /server_info``, read where `residency` names no feed.

    Raises:
        FeedError: a descriptor that cannot be read.
    """
    host = urlsplit(url if "//" in url else f"//{url}").hostname
    if not host:
        raise FeedError(f"no host in the worker URL {url[:128]!r}")
    try:
        ranks = (residency or {}).get("ranks") or [residency or {}]
        feeds = [rank["feed"] for rank in ranks if rank.get("feed")]
        if feeds:
            return [
                FeedAddress(
                    worker_id=rank_id(worker_id, int(item["rank"]), len(feeds)),
                    host=host,
                    events_port=port(item["events_port"]),
                    replay_port=port(item["replay_port"]),
                    state_port=port(item["state_port"]),
                    rank=int(item["rank"]),
                    page_size=int(item["page_size"]),
                    topic=str(item.get("topic", "")),
                    name=str(item.get("name", "")),
                    api_key=api_key if item.get("encrypted") else None,
                )
                for item in feeds
            ]
        return stock_addresses(worker_id, host, (server_info or {}).get("kv_events"))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise FeedError(f"worker {worker_id!r}: feed descriptor: {error!r}") from error


def stock_addresses(
    worker_id: str, host: str, described: Mapping[str, Any] | None
) -> list[FeedAddress]:
    """From the ``kv_events`` block of ``/server_info`` (runtime_context.py:2072)."""
    if not described:
        return []
    count = int(described.get("dp_size") or 1)
    replay = described.get("replay_endpoint_port_base")
    return [
        FeedAddress(
            worker_id=rank_id(worker_id, rank, count),
            host=host,
            events_port=port(described["endpoint_port_base"] + rank),
            replay_port=None if replay is None else port(replay + rank),
            rank=rank,
            page_size=int(described["block_size"]),
            topic=str(described.get("topic") or ""),
        )
        for rank in range(count)
    ]


def rank_id(worker_id: str, rank: int, ranks: int) -> str:
    return worker_id if ranks == 1 else f"{worker_id}@{rank}"


def port(value: Any) -> int:
    number = int(value)
    if not 0 < number < 65536:
        raise ValueError(f"port {number}; expected 1 to 65535")
    return number
