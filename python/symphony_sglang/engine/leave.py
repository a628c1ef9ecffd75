"""A worker that is told to end hands its sessions off first, where a router takes them."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import Any

from symphony_sglang.clock import Clock, SystemClock
from symphony_sglang.config import SymphonyConfig
from symphony_sglang.engine.messages import PeerRequest
from symphony_sglang.engine.schedulers import ask_schedulers, departure

WATCHDOG_HOOK = "sglang.srt.managers.tokenizer_manager.TokenizerManager.sigterm_watchdog"
POLL_SECONDS = 0.1
# SGLang looks every five seconds only (tokenizer_manager.py:3509).
SIGNAL_POLL_SECONDS = 0.2
# Nobody has taken anything for so long: there is no router, or it has nowhere to put them.
IDLE_SECONDS_MAX = 2.0
ANSWER_SECONDS_MAX = 5.0

logger = logging.getLogger(__name__)


async def hand_off_then_leave(original: Callable[[Any], Awaitable[None]], manager: Any) -> None:
    """AROUND hook of ``TokenizerManager.sigterm_watchdog``: what comes after SIGTERM.

    SGLang's own part follows: it waits for the requests that run, and ends the ranks.
    """
    while not manager.gracefully_exit:  # noqa: ASYNC110 - a signal handler sets it
        await asyncio.sleep(SIGNAL_POLL_SECONDS)
    departure.begun.set()
    grace_seconds = SymphonyConfig.from_environment().grace
    if grace_seconds > 0:
        try:
            left = await hand_off(lambda: ask_ranks(manager), grace_seconds, SystemClock())
            logger.info("leaving: %d sessions are not handed off", left)
        except Exception:  # whatever goes wrong here, the server must end
            logger.exception("handing sessions off failed")
    await original(manager)
    departure.end()


async def hand_off(
    ask: Callable[[], Awaitable[tuple[int, int] | None]], grace_seconds: float, clock: Clock
) -> int:
    """Wait until no session is left, nobody takes any, or the time is over; how many are left.

    `ask` gives (sessions that are left, a count that grows with what is taken), None without a peer
    level.
    """
    began = moved_at = clock.monotonic()
    seen: tuple[int, int] | None = None
    while True:
        now = clock.monotonic()
        found = await ask()
        if found is None:
            return 0
        if found != seen:
            seen, moved_at = found, now
        late = now - began >= grace_seconds or now - moved_at >= IDLE_SECONDS_MAX
        if found[0] == 0 or late:
            return found[0]
        await asyncio.sleep(POLL_SECONDS)


async def ask_ranks(manager: Any) -> tuple[int, int] | None:
    """Tell the ranks that the worker leaves, which the feed passes on, and how far it is."""
    request = PeerRequest(verb="leave", sent_seconds=SystemClock().monotonic())
    try:
        async with asyncio.timeout(ANSWER_SECONDS_MAX):
            replies = await ask_schedulers(manager, request)
    except TimeoutError:
        return None
    bodies = [reply.body for reply in replies if "sessions" in reply.body]
    if not bodies:
        return None
    return sum(body["sessions"] for body in bodies), sum(body["taken"] for body in bodies)
