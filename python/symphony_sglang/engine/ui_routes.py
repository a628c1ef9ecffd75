"""The live page of a worker, and the stream that feeds it."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any

import orjson
from fastapi import APIRouter, HTTPException, Query, Request
from fastapi.responses import Response, StreamingResponse
from sglang.srt.utils.auth import AuthDecision, AuthLevel, auth_level

from symphony_sglang import ui
from symphony_sglang.clock import SystemClock
from symphony_sglang.engine.routes import get_residency, require_our_cache
from symphony_sglang.engine.schedulers import departure
from symphony_sglang.errors import LeavingError

router = APIRouter(prefix="/symphony", tags=["symphony"])
clock = SystemClock()

PAGE_PATH = "/symphony/ui"
LISTENERS_MAX = 64
# A stream ends by itself after this, so that a forgotten tab does not hold a worker for ever.
STREAM_SECONDS_MAX = 600.0
INTERVAL_SECONDS = 1.0
INTERVAL_SECONDS_MIN, INTERVAL_SECONDS_MAX = 0.2, 60.0


def let_page_through(decision: AuthDecision, *, method: str, path: str, **_: Any) -> Any:
    """AFTER hook of SGLang's ``decide_request_auth``: the page itself needs no key.

    A browser cannot send one with a plain request, and there is no secret in the page. None leaves
    the decision as it is.
    """
    if method == "GET" and path == PAGE_PATH:
        return AuthDecision(allowed=True)
    return None


class ResidencyFeed:
    """One sample of the schedulers' state for all listeners, however many there are."""

    def __init__(self) -> None:
        self.listeners = 0
        self._lock = asyncio.Lock()
        self._sample = b""
        self._taken_seconds = float("-inf")

    async def sample(self, age_seconds_max: float) -> bytes:
        """The body of ``GET /symphony/residency``, at most so old."""
        async with self._lock:
            if clock.monotonic() - self._taken_seconds > age_seconds_max:
                self._sample = orjson.dumps(await get_residency())
                self._taken_seconds = clock.monotonic()
            return self._sample

    async def events(self, interval_seconds: float) -> AsyncIterator[bytes]:
        """A ``residency`` event at once, and then one an interval, until the server ends."""
        ends_seconds = clock.monotonic() + STREAM_SECONDS_MAX
        self.listeners += 1
        try:
            while clock.monotonic() < ends_seconds and not departure.begun.is_set():
                # Half an interval: two listeners share a sample, and neither sees one twice.
                sample = await self.sample(interval_seconds / 2)
                yield b"event: residency\ndata: " + sample + b"\n\n"
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(interval_seconds):
                        await departure.begun.wait()
        except LeavingError:
            pass  # in the middle of a sample
        finally:
            self.listeners -= 1


def feed_of(request: Request) -> ResidencyFeed:
    found = getattr(request.app.state, "symphony_events", None)
    if found is None:
        found = request.app.state.symphony_events = ResidencyFeed()
    return found


@router.get("/ui")
async def get_ui() -> Response:
    """The live page."""
    return Response(ui.page(), media_type=ui.MEDIA_TYPE, headers=ui.page_headers())


@router.get("/events")
@auth_level(AuthLevel.NORMAL)
async def get_events(
    request: Request,
    interval_s: float = Query(
        INTERVAL_SECONDS, ge=INTERVAL_SECONDS_MIN, le=INTERVAL_SECONDS_MAX, allow_inf_nan=False
    ),
) -> StreamingResponse:
    """Server-sent events: the residency once at once and then every `interval_s` seconds."""
    require_our_cache()
    if departure.begun.is_set():
        raise LeavingError("the server is ending")
    feed = feed_of(request)
    if feed.listeners >= LISTENERS_MAX:
        raise HTTPException(503, f"{feed.listeners} listeners already; expected at most that")
    return StreamingResponse(
        feed.events(interval_s),
        media_type="text/event-stream",
        headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"},
    )
