"""A router in this process in front of fake workers that own sessions and carry out orders with the
product's own worker-side code. They fail on command, at a chosen order."""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import socket
from collections import Counter
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

import aiohttp
from aiohttp import web

from router_world import FakeWorker, World
from symphony_sglang.clock import SystemClock
from symphony_sglang.core.migration import MoveLimits, Order, OrderKind
from symphony_sglang.core.migration_book import BookLimits
from symphony_sglang.core.migration_log import OwnershipLog
from symphony_sglang.core.migration_worker import Reply, WorkerMoves
from symphony_sglang.router.arguments import RouterSettings
from symphony_sglang.router.service import RouterService
from symphony_sglang.wire.feed import SessionChange

PAGE = 16
LIMITS = BookLimits(
    rest_seconds=0.0,
    yield_seconds_max=0.1,
    move=MoveLimits(deadline_seconds=3.0, answer_seconds=0.1, tries_max=3, poll_seconds=0.005),
)
clock = SystemClock()


@dataclass
class Session:
    """A record at a worker."""

    epoch: int = 0
    turns: int = 1
    tokens: int = 160


@dataclass
class MovingWorker(FakeWorker):
    """`faults` names an order kind and what befalls it: ``refuse``, ``silent`` (never answers),
    ``lost`` (carried out, the answer is lost), ``die`` (the server ends) or ``slow``."""

    moves: WorkerMoves = field(default_factory=lambda: WorkerMoves(""))
    sessions: dict[str, Session] = field(default_factory=dict)
    copies: dict[str, Session] = field(default_factory=dict)
    faults: dict[OrderKind, str] = field(default_factory=dict)
    orders: list[OrderKind] = field(default_factory=list)
    pulls: Counter[str] = field(default_factory=Counter)
    copy_seconds: float = 0.01
    peerless: bool = False
    alive: bool = True
    world: MovesWorld | None = None

    @property
    def worker_id(self) -> str:
        assert self.world is not None
        [found] = [w.worker_id for w in self.world.service.registry if w.url == self.url]
        return found

    def residency(self) -> dict[str, Any]:
        peer = None if self.peerless else {"address": f"{self.name}:1", "port": 1}
        device = {"token_bytes": 1024, "total_tokens": 10_000}
        nvme = {"total_bytes": 1 << 30}
        return {"peer": peer, "levels": {"device": device, "host": None, "nvme": nvme}}

    async def _handle(self, request: web.Request) -> web.StreamResponse:
        if request.path == "/symphony/residency":
            return web.json_response(self.residency())
        if request.path == "/symphony/moves":
            return await self._take(await request.json())
        if request.path.startswith("/symphony/pull"):
            self.pulls[request.method] += 1
            state = "queued" if request.method == "POST" else "stored"
            body = {"pull_id": "p", "state": state, "bytes": {"peer_to_nvme": 160 * 1024}}
            return web.json_response(body, status=202 if request.method == "POST" else 200)
        return await super()._handle(request)

    async def _take(self, body: dict[str, Any]) -> web.StreamResponse:
        kind = OrderKind(body["kind"])
        self.orders.append(kind)
        fault = self.faults.get(kind, "")
        if fault == "refuse":
            return web.json_response({"ok": False, "reason": "refused"})
        if fault == "silent":
            return web.json_response({}, status=503)
        if fault == "die":
            self.alive = False
            asyncio.get_running_loop().create_task(self.die())
            return web.json_response({}, status=503)
        if fault == "slow":
            await asyncio.sleep(0.15)
        order = Order(
            kind, self.worker_id, body["move_id"], body["session_id"], body["epoch"], body["step"],
            body.get("source", ""), body["tokens"], body["bytes"],
        )  # fmt: skip
        reply = self._carry_out(order)
        if fault == "lost":
            return web.json_response({}, status=503)
        return web.json_response(reply._asdict())

    def _carry_out(self, order: Order) -> Reply:
        now, known = clock.monotonic(), self.sessions.get(order.session_id)
        match order.kind:
            case OrderKind.RESERVE:
                return self.moves.reserve(order, now)
            case OrderKind.COPY:
                reply, start = self.moves.copy(order, now)
                if start:
                    asyncio.get_running_loop().create_task(self._copy(order))
                return reply
            case OrderKind.VERIFY:
                return self.moves.verify(order, order.move_id in self.copies, now)
            case OrderKind.SWITCH:
                epoch = -1 if known is None else known.epoch
                copied = self.copies.get(order.move_id)
                reply = self.moves.may_switch(order, epoch, (known or copied) is not None)
                if reply.ok and epoch < order.epoch:
                    source = copied or known
                    assert source is not None
                    self.moves.switched(order)
                    self.own(order.session_id, order.epoch, source.turns, source.tokens)
                return reply
            case OrderKind.ABORT:
                self.copies.pop(order.move_id, None)
                return self.moves.abort(order)
            case OrderKind.RECLAIM:
                if known is not None and known.epoch < order.epoch:
                    self.own(order.session_id, order.epoch, known.turns, known.tokens)
                ok = known is not None and self.sessions[order.session_id].epoch == order.epoch
                return Reply(order.move_id, order.step, "", ok)
            case OrderKind.RELEASE:
                if known is not None and known.epoch < order.epoch:
                    del self.sessions[order.session_id]
                    self.tell(order.session_id, None)
                return Reply(order.move_id, order.step, "", True)

    async def _copy(self, order: Order) -> None:
        """From the worker that the order's source address names."""
        await asyncio.sleep(self.copy_seconds)
        assert self.world is not None
        source = self.world.by_name(order.source_id.partition(":")[0])
        found = source.sessions.get(order.session_id) if source.alive else None
        if found is not None:
            self.copies[order.move_id] = Session(found.epoch, found.turns, found.tokens)
        reason = "" if found is not None else "unknown_session"
        self.moves.copied(order.move_id, order.step, found is not None, reason, 160 * 1024)

    # What its feed would say ------------------------------------------------------------------

    def own(self, session_id: str, epoch: int = 0, turns: int = 1, tokens: int = 160) -> None:
        self.sessions[session_id] = Session(epoch, turns, tokens)
        self.tell(session_id, self.sessions[session_id])

    def tell(self, session_id: str, session: Session | None) -> None:
        assert self.world is not None
        if self.alive:
            self.world.heard(self, change_of(session_id, session))

    async def die(self) -> None:
        """As a killed process: nothing is answered any more, and its feed is silent."""
        self.alive = False
        await self.stop()
        assert self.world is not None
        self.world.lost(self)

    async def come_back(self) -> None:
        """With what it had on disk; reservations are gone."""
        self.moves, self.alive, self.faults = WorkerMoves(""), True, {}
        self.copies.clear()
        await self.start()
        assert self.world is not None
        self.world.snapshot(self)


def change_of(session_id: str, session: Session | None) -> SessionChange:
    if session is None:
        return SessionChange(session_id, gone=True)
    return SessionChange(
        session_id, total_tokens=session.tokens, turns=session.turns, owner_epoch=session.epoch
    )


@dataclass
class MovesWorld(World):
    """`log` replays what the router saw of ownership, and raises where two own a session."""

    log: OwnershipLog = field(default_factory=OwnershipLog)

    @property
    def mover(self) -> Any:
        return self.service.mover

    def by_name(self, name: str) -> MovingWorker:
        [found] = [worker for worker in self.workers if worker.name == name]
        assert isinstance(found, MovingWorker)
        return found

    def heard(self, worker: MovingWorker, change: SessionChange) -> None:
        """Later, as everything that comes by a feed."""
        asyncio.get_running_loop().call_later(0.002, self._apply, worker, change)

    def _apply(self, worker: MovingWorker, change: SessionChange) -> None:
        if not worker.alive or self.service.registry.get(worker.worker_id) is None:
            return
        # As router/feeds.py does.
        self.service.feeds._apply_session(worker.worker_id, change)
        self.mover.session_changed(worker.worker_id, change)

    def snapshot(self, worker: MovingWorker) -> None:
        changes = [change_of(name, session) for name, session in worker.sessions.items()]
        for change in changes:
            self.service.feeds._apply_session(worker.worker_id, change)
        self.mover.snapshot(worker.worker_id, changes)

    def lost(self, worker: MovingWorker) -> None:
        ids = [w.worker_id for w in self.service.registry if w.url == worker.url]
        for worker_id in ids:
            self.mover.worker_lost(worker_id)

    async def owned(self, name: str, session_id: str, **extra: Any) -> MovingWorker:
        """A session at a worker, known to the router."""
        worker = self.by_name(name)
        worker.own(session_id, **extra)
        await self.until(lambda: self.mover.place(session_id) is not None)
        return worker

    async def migrate(self, session_id: str, name: str) -> dict[str, Any]:
        """Ask for a move, and wait for its end; the record."""
        body = {"session_id": session_id, "to": self.by_name(name).worker_id}
        status, answer, _headers = await self.call("POST", "/symphony/migrate", body)
        assert status == 202, answer
        return await self.ended(answer["move_id"])

    async def ended(self, move_id: str) -> dict[str, Any]:
        await self.until(lambda: self.mover.move(move_id)["state"] in ("done", "aborted"), 10)
        status, record, _headers = await self.call("GET", f"/symphony/moves/{move_id}")
        assert status == 200
        return dict(record)

    async def settle(self) -> None:
        """Until no move is open and everything said was heard."""
        await self.until(lambda: not self.mover.open_moves(), 10)
        await asyncio.sleep(0.02)

    def owners(self, session_id: str) -> list[str]:
        """Workers that own a session by the highest epoch, by what they have themselves."""
        live = [w for w in self.workers if isinstance(w, MovingWorker) and w.alive]
        known = [w for w in live if session_id in w.sessions]
        top = max((w.sessions[session_id].epoch for w in known), default=-1)
        return [w.name for w in known if w.sessions[session_id].epoch == top]

    def check_quiet(self, session_id: str = "s") -> None:
        """One owner, which the router knows; nothing reserved."""
        [owner] = self.owners(session_id)
        assert self.mover.place(session_id) == self.by_name(owner).worker_id
        for worker in self.workers:
            assert isinstance(worker, MovingWorker)
            worker.moves.check()
            if worker.alive:
                assert len(worker.moves) == 0, f"{worker.name} keeps a reservation"


def listening() -> socket.socket:
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    listener.listen(256)
    listener.setblocking(False)
    return listener


@contextlib.asynccontextmanager
async def moves_world(
    count: int = 2, *, seed: int = 1, limits: BookLimits = LIMITS, **settings: Any
) -> AsyncIterator[MovesWorld]:
    workers = [MovingWorker(name=f"w{number}") for number in range(count)]
    for worker in workers:
        await worker.start()
    urls = tuple(worker.url for worker in workers)
    options: dict[str, Any] = {"prometheus_port": 0, "retry_initial_backoff_ms": 1}
    merged = RouterSettings(**{"worker_urls": urls, **options, **settings})
    service = RouterService(merged, chance=random.Random(seed), move_limits=limits)
    listener = listening()
    url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    try:
        async with service.running(), aiohttp.ClientSession() as client:
            await service.server.start([listener])
            made = MovesWorld(service, list(workers), url, client)
            for worker in workers:
                worker.world = made
            if hasattr(service.mover, "journal"):
                service.mover.journal.listeners.append(made.log.add)
            await made.until(lambda: made.healthy() == count)
            yield made
            await client.close()
            await service.server.stop(2.0)
            service.check()
    finally:
        for worker in workers:
            await worker.stop()


def body_of(raw: bytes) -> dict[str, Any]:
    return dict(json.loads(raw))
