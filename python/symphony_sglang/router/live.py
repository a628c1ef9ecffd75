"""The live page, and the stream of server-sent events that feeds it."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import msgspec

from symphony_sglang.router.errors import ApiError
from symphony_sglang.router.http import Request
from symphony_sglang.router.moves import Mover
from symphony_sglang.ui import MEDIA_TYPE, page, page_headers

LISTENERS_MAX = 64
LISTEN_SECONDS_MAX = 600.0
INTERVAL_SECONDS = (0.2, 1.0, 60.0)  # least, default, most


class LiveView:
    """Handlers. `residency` makes the document that ``GET /symphony/residency`` answers."""

    def __init__(self, residency: Callable[[], Awaitable[dict[str, Any]]], mover: Mover) -> None:
        self._residency = residency
        self._mover = mover
        # The time limits of the streams under way.
        self._listeners: set[asyncio.Timeout] = set()
        self._leaving = False

    async def page(self, request: Request) -> None:
        """The page; it holds no secret and asks for the key by itself."""
        named = {"content-type": MEDIA_TYPE, **page_headers()}
        headers = [(n.lower().encode("ascii"), v.encode("latin-1")) for n, v in named.items()]
        request.reply(200, page(), *headers)

    async def events(self, request: Request) -> None:
        """Residency and moves, until the listener leaves, the time is over or the router ends."""
        interval = interval_of(request)
        if len(self._listeners) >= LISTENERS_MAX:
            raise ApiError(503, "too_many_listeners", f"{len(self._listeners)} listeners already")
        limit = asyncio.timeout(0 if self._leaving else LISTEN_SECONDS_MAX)
        self._listeners.add(limit)
        try:
            headers = [(b"content-type", b"text/event-stream"), (b"cache-control", b"no-store")]
            request.start(200, headers)
            async with limit:
                await self._tell(request, interval)
        except TimeoutError:
            request.send(b"", more=False)
        finally:
            self._listeners.discard(limit)

    async def _tell(self, request: Request, interval_seconds: float) -> None:
        _old, seen = self._mover.changed(0)
        while True:
            moves, seen = self._mover.changed(seen)
            for move in moves:
                data = msgspec.json.encode(move)
                request.send(b"event: move\ndata: " + data + b"\n\n", more=True)
            data = msgspec.json.encode(await self._residency())
            request.send(b"event: residency\ndata: " + data + b"\n\n", more=True)
            await request.drained()
            await asyncio.sleep(interval_seconds)

    def leave(self) -> None:
        """End all streams: the router waits for what is under way, and they would go on."""
        self._leaving = True
        now_seconds = asyncio.get_running_loop().time()
        for limit in self._listeners:
            limit.reschedule(now_seconds)

    def check(self) -> None:
        assert len(self._listeners) <= LISTENERS_MAX


def interval_of(request: Request) -> float:
    """Seconds between two events.

    Raises:
        ApiError: 400, not a number in range.
    """
    least, default, most = INTERVAL_SECONDS
    text = request.query.get("interval_s", str(default))
    try:
        interval = float(text)
    except ValueError:
        interval = -1.0
    if not least <= interval <= most:
        problem = f"interval_s: {text[:80]!r}; expected a number from {least:g} to {most:g}"
        raise ApiError(400, "invalid_request", problem)
    return interval
