"""Copies of shared prefixes: to workers that have just come up, and of what is asked for a lot."""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from typing import Any

import msgspec

from symphony_sglang.clock import Clock
from symphony_sglang.core.hints import PROTOCOL_VERSION
from symphony_sglang.core.migration_policy import (
    HotPrefix,
    MigrationPlan,
    PlannedCopy,
    PlannedDrop,
)
from symphony_sglang.core.prefix import unpack_tokens
from symphony_sglang.core.routing_types import WorkerState
from symphony_sglang.router.background import Background
from symphony_sglang.router.health import HealthMonitor
from symphony_sglang.router.moves_heads import HotHead, HotHeads
from symphony_sglang.router.moves_orders import peer_of
from symphony_sglang.router.placement import Placement
from symphony_sglang.router.registry import Worker, WorkerRegistry
from symphony_sglang.router.upstream import UpstreamError
from symphony_sglang.telemetry.router import RouterMetrics

logger = logging.getLogger(__name__)

JOINED_SECONDS = 60.0
COPY_SECONDS_MAX = 60.0
POLL_SECONDS = 0.1
PULL_ENDED = ("stored", "failed", "cancelled")
# A copy that ended is not tried again for so long: the feed has yet to tell of it, or it failed.
RETRY_SECONDS = 30.0
ENDED_MAX = 4096

Link = tuple[str, str]


class PrefixCopies:
    """Carries out planned copies, and knows which are there by plan."""

    def __init__(
        self,
        registry: WorkerRegistry,
        placement: Placement,
        health: HealthMonitor,
        background: Background,
        heads: HotHeads,
        clock: Clock,
        metrics: RouterMetrics,
    ) -> None:
        self._registry = registry
        self._placement = placement
        self._health = health
        self._background = background
        self._heads = heads
        self._clock = clock
        self._metrics = metrics
        self._by_hash: dict[int, HotHead] = {}
        self._replicas: dict[int, set[str]] = {}  # head -> workers that have it by plan
        self._under_way: dict[tuple[int, str], PlannedCopy] = {}
        self._ended: dict[tuple[int, str], float] = {}
        self._joined: dict[str, float] = {}
        registry.events.changed.append(self._on_changed)
        registry.events.removed.append(self._on_removed)

    def _on_changed(self, worker: Worker) -> None:
        """One that takes requests for the first time has joined."""
        now = self._clock.monotonic()
        if worker.state(now) is WorkerState.READY:
            for domain_id in worker.domain_ids:
                self._joined.setdefault(domain_id, now)

    def _on_removed(self, worker: Worker) -> None:
        for domain_id in worker.domain_ids:
            self._joined.pop(domain_id, None)
            for holders in self._replicas.values():
                holders.discard(domain_id)

    # For the plan -----------------------------------------------------------------------------

    def joined(self, domain_id: str) -> bool:
        at = self._joined.get(domain_id)
        return at is not None and self._clock.monotonic() - at < JOINED_SECONDS

    @property
    def copying(self) -> frozenset[tuple[int, str]]:
        """Under way, or ended a moment ago."""
        now = self._clock.monotonic()
        self._ended = {key: at for key, at in self._ended.items() if now - at < RETRY_SECONDS}
        return frozenset({*self._under_way, *self._ended})

    def in_flight(self) -> Counter[Link]:
        """Bytes on each link."""
        found: Counter[Link] = Counter()
        for copy in self._under_way.values():
            found[copy.source_id, copy.target_id] += copy.bytes
        return found

    def prefixes(self) -> list[HotPrefix]:
        """The hottest heads, with who has them now."""
        now = self._clock.monotonic()
        self._heads.expire(now)
        heads = self._heads.hottest(now)
        self._by_hash = {head.key[1]: head for head in heads}
        self._replicas = {h: w for h, w in self._replicas.items() if w and h in self._by_hash}
        found = []
        for head in heads:
            pages = self._placement.index.find(head.hashes, now).pages
            holders = frozenset(name for name, held in pages.items() if held >= len(head.hashes))
            sizes = [d[0].info.token_bytes for n in holders if (d := self._registry.domain(n))]
            if not sizes:
                continue
            replicas = frozenset(self._replicas.get(head.key[1], ())) & holders
            found.append(
                HotPrefix(
                    head.key[1], head.tokens, head.tokens * max(sizes),
                    head.requests_per_second, holders, replicas,
                )
            )  # fmt: skip
        return found

    # Carrying out -----------------------------------------------------------------------------

    def carry_out(self, plan: MigrationPlan) -> None:
        for copy in plan.copies:
            self._under_way[copy.page_hash, copy.target_id] = copy
            if self._background.start(self._copy(copy), f"{copy.cause} copy") is None:
                del self._under_way[copy.page_hash, copy.target_id]
        for drop in plan.drops:
            self._replicas.get(drop.page_hash, set()).discard(drop.worker_id)
            self._background.start(self._drop(drop), "drop of a copy")

    async def _copy(self, copy: PlannedCopy) -> None:
        key, began, moved = (copy.page_hash, copy.target_id), self._clock.monotonic(), 0
        outcome = "failed"
        try:
            async with asyncio.timeout(COPY_SECONDS_MAX):
                receipt = await self._pull(copy)
            outcome = str(receipt.get("state"))
            moved = int(receipt.get("bytes", {}).get("peer_to_nvme", 0))
        except (UpstreamError, TimeoutError, msgspec.DecodeError) as error:
            logger.info("copy of a shared prefix to %s: %s", copy.target_id, error)
        finally:
            self._under_way.pop(key, None)
        if outcome == "stored":
            self._replicas.setdefault(copy.page_hash, set()).add(copy.target_id)
        if len(self._ended) < ENDED_MAX:
            self._ended[key] = self._clock.monotonic()
        seconds = self._clock.monotonic() - began
        self._metrics.move_ended(copy.cause.value, outcome, moved_bytes=moved, seconds=seconds)

    async def _pull(self, copy: PlannedCopy) -> dict[str, Any]:
        head, found = self._by_hash.get(copy.page_hash), self._registry.domain(copy.target_id)
        source = peer_of(self._registry, copy.source_id)
        if head is None or found is None or not source:
            return {"state": "failed"}
        body = {**named(head), "source": source, "target": "host", "deadline_s": COPY_SECONDS_MAX}
        receipt = await self._ask(found[0], "POST", "/symphony/pull", body)
        while receipt.get("state") not in PULL_ENDED:
            await asyncio.sleep(POLL_SECONDS)
            path = f"/symphony/pulls/{receipt.get('pull_id')}"
            receipt = await self._ask(found[0], "GET", path, None)
        return receipt

    async def _drop(self, drop: PlannedDrop) -> None:
        """It stays on disk; host memory and the device are for what is asked for."""
        head, found = self._by_hash.get(drop.page_hash), self._registry.domain(drop.worker_id)
        if head is None or found is None:
            return
        action = {
            "action_id": "cooled", "action_type": "demote", "action_version": "1",
            "payload": named(head),
        }  # fmt: skip
        body = {"protocol_version": PROTOCOL_VERSION, "message_id": "cooled", "actions": [action]}
        try:
            async with asyncio.timeout(COPY_SECONDS_MAX):
                await self._ask(found[0], "POST", "/symphony/advise", body)
        except (UpstreamError, TimeoutError, msgspec.DecodeError) as error:
            logger.info("drop of a copy at %s: %s", drop.worker_id, error)

    async def _ask(self, worker: Worker, method: str, path: str, body: Any) -> dict[str, Any]:
        raw = b"" if body is None else msgspec.json.encode(body)
        status, content = await self._health.call(worker, method, path, raw)
        document = msgspec.json.decode(content) if status in (200, 202) else None
        if not isinstance(document, dict):
            raise UpstreamError("protocol", f"{path} answered {status}")
        return document


def named(head: HotHead) -> dict[str, Any]:
    """A head as hints and pulls name it."""
    body: dict[str, Any] = {"input_ids": [int(t) for t in unpack_tokens(head.token_bytes)]}
    return body | {n: value for n, value in head.namespace._asdict().items() if value is not None}
