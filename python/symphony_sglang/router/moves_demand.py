"""Requests and moves: where a request goes whose session moves, and pages that it waits for.

With no advisory at all, the prefix can still be elsewhere when its request comes. Where copying it
is measured to be faster than computing it (``Decision.pull``), the request waits for the copy: of a
session as a move, so that its owner follows; of another prompt as a plain pull. It never waits for
longer than computing would take.
"""

from __future__ import annotations

import asyncio
import logging
from typing import Any

import msgspec

from symphony_sglang.clock import Clock
from symphony_sglang.core.migration import Move, MoveCause
from symphony_sglang.core.migration_book import Early, EarlyChoice
from symphony_sglang.core.prefix import NO_NAMESPACE, unpack_tokens
from symphony_sglang.core.routing_types import PullOffer, RouteRequest
from symphony_sglang.router.health import HealthMonitor
from symphony_sglang.router.moves_heads import HotHeads
from symphony_sglang.router.moves_mover import SessionMover
from symphony_sglang.router.moves_orders import peer_of
from symphony_sglang.router.moves_speed import WorkMeter
from symphony_sglang.router.placement import Placed
from symphony_sglang.router.upstream import UpstreamError

logger = logging.getLogger(__name__)

WAIT_SECONDS_MIN = 0.05
WAIT_SECONDS_MAX = 10.0
POLL_SECONDS = 0.01
PULLS_MAX = 64
PULL_ENDED = ("stored", "failed", "cancelled")


class MovingRequests:
    """What placement and the proxy ask for at each request."""

    def __init__(
        self,
        mover: SessionMover,
        health: HealthMonitor,
        meter: WorkMeter,
        heads: HotHeads,
        clock: Clock,
    ) -> None:
        self._mover = mover
        self._health = health
        self._meter = meter
        self._heads = heads
        self._clock = clock
        self._pulls = 0

    def early(self, route: RouteRequest) -> EarlyChoice | None:
        """Where the request must go because its session moves; None: anywhere."""
        if route.session_id is None or route.target_worker is not None:
            return None
        choice = self._mover.early(route.session_id)
        if choice is None or choice.worker_id in route.excluded:
            return None
        return choice

    async def prepare(self, placed: Placed) -> None:
        """Before a request is sent: wait for what is worth it, then count its turn."""
        key, early = placed.subject.route.session_id, placed.early
        self._count(placed, key)
        if early is not None and early.choice is Early.TARGET_WAIT and key is not None:
            move = self._mover.book.moving(key)
            if move is not None:
                await self._mover.turned(move.move_id, min(early.wait_seconds, WAIT_SECONDS_MAX))
        elif early is None and placed.decision.pull is not None:
            await self._bring(placed, placed.decision.pull)
        if key is not None:
            self._mover.turn_started(key, placed.domain_id)
            placed.turn = True

    def _count(self, placed: Placed, key: str | None) -> None:
        """Heads that many share are worth copies."""
        subject, size = placed.subject, placed.worker.info.page_size
        hashes = subject.route.page_hashes.get(size)
        if hashes is not None and subject.exact and subject.token_bytes:
            now = self._clock.monotonic()
            self._heads.asked(key, size, hashes, subject.token_bytes, subject.namespace, now)

    def ended(self, placed: Placed) -> None:
        key = placed.subject.route.session_id
        if placed.turn and key is not None:
            placed.turn = False
            self._mover.turn_ended(key)
        cost = placed.decision.cost
        seconds = cost.recompute + cost.bring + cost.pull
        if seconds > 0:
            # A caller who names the worker has decided: such work is not for us to spread.
            if placed.subject.route.target_worker is not None:
                key = None
            self._meter.add(key, placed.domain_id, seconds, self._clock.monotonic())

    # Pages for a request ------------------------------------------------------------------------

    async def _bring(self, placed: Placed, offer: PullOffer) -> None:
        """Copy what the worker lacks; at most as long as computing it would take."""
        key = placed.subject.route.session_id
        wait = offer.pull_seconds + offer.saved_seconds
        wait = min(max(wait, WAIT_SECONDS_MIN), WAIT_SECONDS_MAX)
        source_id, target_id = offer.source_worker_id, placed.domain_id
        if not self._mover.can_move(source_id, target_id):
            return
        if key is not None and self._mover.place(key) == source_id:
            asked = self._mover.request(key, target_id, MoveCause.DEMAND)
            if isinstance(asked, Move) and not await self._mover.turned(asked.move_id, wait):
                # The request computes now; a record that comes after it would be older than its.
                self._mover.cancel(asked.move_id)
            return
        if not placed.subject.token_bytes or self._pulls >= PULLS_MAX:
            return
        ids = [int(token) for token in unpack_tokens(placed.subject.token_bytes)]
        self._pulls += 1
        try:
            async with asyncio.timeout(wait):
                await self._pull(placed, source_id, ids[: offer.tokens], wait)
        except (TimeoutError, UpstreamError, msgspec.DecodeError) as error:
            logger.info("pull for a request: %s", error or f"not within {wait:.3f} s")
        finally:
            self._pulls -= 1

    async def _pull(self, placed: Placed, source_id: str, ids: list[int], wait: float) -> None:
        namespace = placed.subject.namespace or NO_NAMESPACE
        body: dict[str, Any] = {
            "input_ids": ids,
            "source": peer_of(self._mover.registry, source_id),
            "target": "nvme",  # the request itself takes it from there
            "deadline_s": wait,
        }
        body |= {n: value for n, value in namespace._asdict().items() if value is not None}
        began = self._clock.monotonic()
        receipt = await self._ask(placed, "POST", "/symphony/pull", msgspec.json.encode(body))
        while receipt.get("state") not in PULL_ENDED:
            await asyncio.sleep(POLL_SECONDS)
            path = f"/symphony/pulls/{receipt.get('pull_id')}"
            receipt = await self._ask(placed, "GET", path, b"")
        if receipt.get("state") == "stored":
            seconds = self._clock.monotonic() - began
            copied = receipt.get("bytes", {}).get("peer_to_nvme", 0)
            tokens = int(copied) // max(1, placed.worker.info.token_bytes)
            self._mover.speeds.copied(placed.domain_id, tokens, seconds)
            self._mover.tell_speed(placed.domain_id)

    async def _ask(self, placed: Placed, method: str, path: str, body: bytes) -> dict[str, Any]:
        status, content = await self._health.call(placed.worker, method, path, body)
        document = msgspec.json.decode(content) if status in (200, 202) else None
        if not isinstance(document, dict):
            raise UpstreamError("protocol", f"{path} answered {status}")
        return document
