"""``GET /symphony/snapshot``: what a worker holds, for whoever cannot listen to its feed.

Answered by the feed's own thread over its replay socket, so no scheduler is asked.
"""

from __future__ import annotations

import asyncio
import dataclasses
from typing import Any

import msgspec
import zmq.asyncio
from fastapi import APIRouter, HTTPException, Request, Response
from sglang.srt.utils.auth import AuthLevel, auth_level

from symphony_sglang.engine.feed_ports import PUBLISHER_NAME, WILDCARDS
from symphony_sglang.engine.routes import require_our_cache, tokenizer_manager
from symphony_sglang.errors import FeedError
from symphony_sglang.wire.feed import Snapshot
from symphony_sglang.wire.feed_address import FeedAddress, stock_addresses
from symphony_sglang.wire.feed_requests import (
    SubscriberLimits,
    address_keys,
    request_snapshot,
)

router = APIRouter(prefix="/symphony", tags=["symphony"])

# Snapshots made at a time; a caller beyond it gets 429.
SNAPSHOTS_MAX = 2
MSGPACK_TYPES = ("application/msgpack", "application/x-msgpack", "application/vnd.msgpack")

_making = 0


def local_addresses(server_args: Any) -> list[FeedAddress]:
    """This server's own feeds, one a data-parallel rank. 404 where it publishes none of ours."""
    from sglang.srt.runtime_context import describe_kv_events_publisher

    described = describe_kv_events_publisher(server_args)
    if not described or described["publisher"] != PUBLISHER_NAME:
        raise HTTPException(404, "this server publishes no feed of ours (--symphony-feed)")
    host = str(described["endpoint_host"]).strip("[]")
    if host in WILDCARDS:
        host = "::1" if host == "::" else "127.0.0.1"
    return [
        dataclasses.replace(address, api_key=server_args.api_key or None)
        for address in stock_addresses("", host, described)
    ]


@router.get("/snapshot")
@auth_level(AuthLevel.NORMAL)
async def get_snapshot(request: Request) -> Response:
    """Pages of every level as event hashes, sessions, and the sequences they belong to.

    JSON, or MessagePack where ``Accept`` names it (page hashes then as packed little-endian int64).
    """
    global _making
    require_our_cache()
    if _making >= SNAPSHOTS_MAX:
        raise HTTPException(429, f"{SNAPSHOTS_MAX} snapshots are being made", {"Retry-After": "1"})
    _making += 1
    try:
        ranks = await snapshots(tokenizer_manager().server_args)
    except FeedError as error:
        raise HTTPException(503, f"the feed does not answer: {error}") from error
    finally:
        _making -= 1
    packed = any(name in request.headers.get("accept", "") for name in MSGPACK_TYPES)
    content = await asyncio.to_thread(render, ranks, packed=packed)
    return Response(content, media_type=MSGPACK_TYPES[0] if packed else "application/json")


async def snapshots(server_args: Any) -> list[Snapshot]:
    """One of each data-parallel rank.

    Raises:
        FeedError: a rank does not answer.
    """
    context, limits = zmq.asyncio.Context.instance(), SubscriberLimits()
    found = []
    for address in local_addresses(server_args):
        keys = await address_keys(address)
        found.append(await request_snapshot(context, address, keys, limits))
    return found


def render(ranks: list[Snapshot], *, packed: bool) -> bytes:
    body = {"ranks": [as_json(snapshot, packed=packed) for snapshot in ranks]}
    return msgspec.msgpack.encode(body) if packed else msgspec.json.encode(body)


def as_json(snapshot: Snapshot, *, packed: bool) -> dict[str, Any]:
    header = snapshot.header
    return {
        "rank": header.rank,
        "page_size": header.page_size,
        "epoch": header.epoch,
        "events_sequence": header.events_sequence,
        "sessions_sequence": header.sessions_sequence,
        "pages": {
            level.value: hashes.tobytes() if packed else hashes.tolist()
            for level, hashes in snapshot.pages.items()
        },
        "sessions": snapshot.sessions,
    }
