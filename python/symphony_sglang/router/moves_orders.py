"""Orders of a move on their way to workers: who a session is there, where pages come from."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable
from typing import Any

import msgspec

from symphony_sglang.core.migration import Order, OrderKind
from symphony_sglang.core.migration_worker import Reply
from symphony_sglang.core.prefix import NO_NAMESPACE, Namespace
from symphony_sglang.core.sessions import SessionKey
from symphony_sglang.router.background import Background
from symphony_sglang.router.health import HealthMonitor
from symphony_sglang.router.registry import Worker, WorkerRegistry
from symphony_sglang.router.sessions import session_key
from symphony_sglang.router.upstream import UpstreamError

logger = logging.getLogger(__name__)

# Longer than a scheduler's longest step; the book repeats an order much earlier.
ANSWER_SECONDS_MAX = 30.0
ORDERS_MAX = 512
PATH = "/symphony/moves"


class ReplyBody(msgspec.Struct):
    """What a worker answers to an order; unknown fields are of no interest."""

    ok: bool
    pending: bool = False
    reason: str = ""
    bytes_copied: int = 0


DECODER = msgspec.json.Decoder(ReplyBody)


def session_parts(key: str) -> SessionKey:
    """The session that `router.sessions.session_key` made one name of."""
    if "\x00" in key:
        parts: list[str | None] = []
        rest = key
        while rest and len(parts) < 3:
            if rest[0] == "-":
                parts.append(None)
                rest = rest[2:]
                continue
            size, colon, rest = rest.partition(":")
            if not colon or not size.isdecimal():
                break
            parts.append(rest[: int(size)])
            rest = rest[int(size) + 1 :]
        if len(parts) == 3 and parts[0] is not None:
            found = SessionKey(parts[0], Namespace(parts[1], parts[2]))
            if session_key(*found) == key:
                return found
    return SessionKey(key, NO_NAMESPACE)


class OrderSender:
    """Sends orders; what comes back goes to `deliver`. An order without an answer is forgotten:
    whoever gave it repeats it."""

    def __init__(
        self,
        registry: WorkerRegistry,
        health: HealthMonitor,
        background: Background,
        deliver: Callable[[Order, Reply], None],
        target_of: Callable[[Order], str],
    ) -> None:
        """`target_of`: the level to which a session is brought after its switch."""
        self._registry = registry
        self._health = health
        self._background = background
        self._deliver = deliver
        self._target_of = target_of
        self._under_way = 0

    def send(self, orders: Iterable[Order]) -> None:
        for order in orders:
            if self._under_way >= ORDERS_MAX:
                logger.warning("order %s of %s waits: too many", order.kind, order.move_id)
                continue
            self._under_way += 1
            if self._background.start(self._send(order), f"{order.kind} {order.move_id}") is None:
                self._under_way -= 1

    async def _send(self, order: Order) -> None:
        try:
            reply = await self._ask(order)
        finally:
            self._under_way -= 1
        if reply is not None:
            self._deliver(order, reply)

    async def _ask(self, order: Order) -> Reply | None:
        found = self._registry.domain(order.worker_id)
        if found is None:
            return None
        body = self._body(order)
        if body is None:
            return Reply(order.move_id, order.step, order.worker_id, False, reason="no_source")
        try:
            async with asyncio.timeout(ANSWER_SECONDS_MAX):
                status, content = await self._health.call(found[0], "POST", PATH, body)
            if status == 200:
                told = DECODER.decode(content)
                return Reply(
                    order.move_id, order.step, order.worker_id,
                    told.ok, told.pending, told.reason, told.bytes_copied,
                )  # fmt: skip
        except (UpstreamError, TimeoutError, msgspec.DecodeError, msgspec.ValidationError) as error:
            logger.info("%s of %s to %s: %s", order.kind, order.move_id, found[0].url, error)
            return None
        if status >= 500 or status == 429:
            return None
        # It cannot take orders at all: asking again would not help.
        reason = f"worker answered {status}"
        return Reply(order.move_id, order.step, order.worker_id, False, reason=reason)

    def _body(self, order: Order) -> bytes | None:
        """None for a copy whose source serves no pages (any more)."""
        session = session_parts(order.session_id)
        body: dict[str, Any] = {
            "kind": order.kind.value,
            "move_id": order.move_id,
            "session_id": session.session_id,
            "epoch": order.epoch,
            "step": order.step,
            "tokens": order.tokens,
            "bytes": order.bytes,
        }
        body |= {n: value for n, value in session.namespace._asdict().items() if value is not None}
        if order.kind is OrderKind.SWITCH:
            body["target"] = self._target_of(order)
        if order.kind is OrderKind.COPY:
            body["source"] = peer_of(self._registry, order.source_id)
            if not body["source"]:
                return None
        return msgspec.json.encode(body)

    def check(self) -> None:
        assert 0 <= self._under_way <= ORDERS_MAX


def peer_of(registry: WorkerRegistry, domain_id: str) -> str:
    """The page server of a domain; "" where it has none, or its server cannot take orders.

    A server with data-parallel ranks has no way to name the rank that an order means.
    """
    found = registry.domain(domain_id)
    if found is None:
        return ""
    worker: Worker = found[0]
    peers = worker.info.peers
    return peers[0] if len(peers) == 1 and worker.info.dp_size == 1 else ""


def obstacle(registry: WorkerRegistry, source_id: str, target_id: str) -> str:
    """Why pages cannot be copied from one domain to another, for whoever asked for it."""
    urls = []
    for domain_id in (source_id, target_id):
        found = registry.domain(domain_id)
        if found is None:
            return f"worker {domain_id} is gone"
        worker = found[0]
        if worker.info.dp_size > 1:
            return (
                f"{worker.url} runs with --dp-size {worker.info.dp_size}: sessions of "
                "data-parallel servers do not move, for an order cannot name a rank"
            )
        if not peer_of(registry, domain_id):
            return f"{worker.url} serves no pages (no NVMe level, or --no-symphony-peer)"
        urls.append(worker.url)
    return f"{urls[1]} cannot copy pages from {urls[0]}: another model or page size"
