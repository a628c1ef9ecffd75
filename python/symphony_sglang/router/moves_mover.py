"""Moves sessions between workers: the book of ``core.migration_book``, driven over HTTP.

What workers say of their sessions (the feed) tells who owns what; orders go to workers and their
replies come back; the book decides. Everything here is on the event loop and does not block it.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import OrderedDict, deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from symphony_sglang.clock import Clock
from symphony_sglang.core.migration import (
    Move,
    MoveCause,
    MoveLimits,
    MoveState,
    Order,
    OrderKind,
)
from symphony_sglang.core.migration_book import (
    ADOPTION,
    BookLimits,
    EarlyChoice,
    MoveBook,
    Refusal,
)
from symphony_sglang.core.migration_log import Claim, OwnershipEntry, OwnershipEvent
from symphony_sglang.core.migration_worker import Reply
from symphony_sglang.core.prefix import Namespace
from symphony_sglang.core.routing_types import (
    AdvisoryChoice,
    PolicySettings,
    WorkerState,
    WorkerView,
)
from symphony_sglang.router.background import Background
from symphony_sglang.router.errors import ApiError
from symphony_sglang.router.health import HealthMonitor
from symphony_sglang.router.moves_drain import Drains
from symphony_sglang.router.moves_log import OwnershipJournal
from symphony_sglang.router.moves_orders import OrderSender, obstacle, peer_of, session_parts
from symphony_sglang.router.moves_records import durations, migrate_fields, record
from symphony_sglang.router.moves_settled import tell_placement
from symphony_sglang.router.moves_speed import CopySpeeds
from symphony_sglang.router.placement import Placement
from symphony_sglang.router.registry import Worker, WorkerRegistry
from symphony_sglang.router.sessions import session_key
from symphony_sglang.telemetry.router import RouterMetrics
from symphony_sglang.wire.feed import SessionChange

logger = logging.getLogger(__name__)

# Copies of a few thousand tokens take tens of milliseconds: so does waiting for the next question.
LIMITS = BookLimits(move=MoveLimits(poll_seconds=0.01))
TICK_SECONDS = 0.05
IDLE_SECONDS = 0.5
PAUSE_SECONDS_MIN = 0.002
RECENT_MAX = 64
CHANGES_MAX = 1024
SERVED_MAX = 65_536
# A session costs about ten microseconds: the event loop is held this long at a time.
SLICE_SESSIONS = 512
BACKLOG_MAX = 50_000
GAIN_SECONDS_MIN = 0.02
SOON = (MoveCause.REQUEST, MoveCause.DEMAND, MoveCause.ADVISORY)
SWITCHED = (MoveState.RELEASING, MoveState.DONE)


@dataclass(slots=True)
class Watch:
    """A move that has not ended, as last seen; `turned` is set when it has switched, or ended."""

    move: Move
    seen: MoveState | None = None
    turned: asyncio.Event = field(default_factory=asyncio.Event)


class SessionMover:
    """Owns the book of moves. `run` keeps it going."""

    def __init__(
        self,
        *,
        registry: WorkerRegistry,
        placement: Placement,
        health: HealthMonitor,
        background: Background,
        clock: Clock,
        metrics: RouterMetrics,
        instance: int,
        drain_seconds_max: float = 300.0,
        limits: BookLimits = LIMITS,
    ) -> None:
        """`instance`: a number under 65,536 that no other life of a router uses; a random one."""
        self.book = MoveBook(instance, limits)
        self.journal = OwnershipJournal()
        self.speeds = CopySpeeds()
        self.sender = OrderSender(registry, health, background, self.answered, self._target)
        self.drains = Drains(registry, self.book, self.open_moves, clock, drain_seconds_max)
        self.registry = registry
        self.placement = placement
        self._clock = clock
        self._metrics = metrics
        self._background = background
        self._open: dict[str, Watch] = {}
        # Changes that wait behind a large snapshot of their worker.
        self._backlogs: dict[str, deque[SessionChange]] = {}
        self._changes: deque[tuple[int, str]] = deque(maxlen=CHANGES_MAX)
        self._change_number = 0
        self._served: OrderedDict[str, str] = OrderedDict()  # session -> worker of its last turn
        self._wake = asyncio.Event()
        registry.events.removed.append(self._on_removed)

    # Time -------------------------------------------------------------------------------------

    async def run(self) -> None:
        while True:
            self.step()
            self._wake.clear()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._pause()):
                    await self._wake.wait()

    def _pause(self) -> float:
        """Until the next order is due."""
        if not self._open:
            return IDLE_SECONDS
        now = self._clock.monotonic()
        due = min(watch.move.repeat_at_seconds for watch in self._open.values())
        return max(PAUSE_SECONDS_MIN, min(TICK_SECONDS, due - now))

    def step(self) -> None:
        """Repeat what is due, and start what has room."""
        if self._open:
            self._send(self.book.tick(self._clock.monotonic(), self._busy()))

    def _busy(self) -> list[str]:
        """Workers on which requests wait: their disks and links are for those."""
        if all(watch.move.state is not MoveState.QUEUED for watch in self._open.values()):
            return []
        return [v.worker_id for v in self.placement.views() if v.load.requests_waiting > 0]

    def _send(self, orders: Iterable[Order]) -> None:
        self._settle()
        self.sender.send(orders)

    def _settle(self) -> None:
        """Note which moves are in another state than they were."""
        for watch in list(self._open.values()):
            move = watch.move
            if move.state is watch.seen:
                continue
            watch.seen = move.state
            self._change_number += 1
            self._changes.append((self._change_number, move.move_id))
            if move.state in SWITCHED or move.ended:
                watch.turned.set()
            if move.state is MoveState.RELEASING:
                tell_placement(
                    self.placement, move, self.view(move.target_id), self._clock.monotonic()
                )
            if move.ended:
                del self._open[move.move_id]
                self._end(move)
        self._metrics.moves_active(len(self._open))

    def _end(self, move: Move) -> None:
        now = self._clock.monotonic()
        seconds = now - move.created_seconds
        self._metrics.move_ended(
            move.cause.value, move.state.value, moved_bytes=move.bytes_copied, seconds=seconds
        )
        level = logging.INFO if move.state is MoveState.DONE else logging.WARNING
        logger.log(
            level, "%s of %s for %s: %s %s in %.3f s",
            move.move_id, move.session_id[:64], move.cause, move.state, move.reason, seconds,
        )  # fmt: skip
        if move.state is MoveState.DONE:
            self._learn_speed(move)
        self.drains.move_ended(move)

    def _learn_speed(self, move: Move) -> None:
        found = self.registry.domain(move.target_id)
        if found is None:
            return
        spent = durations(move)
        copying = spent.get(MoveState.COPYING, 0.0)
        beside = (MoveState.RESERVING, MoveState.VERIFYING, MoveState.SWITCHING)
        tokens = move.bytes_copied // max(1, found[0].info.token_bytes)
        self.speeds.copied(move.target_id, tokens, copying)
        self.speeds.overhead(move.target_id, sum(spent.get(state, 0.0) for state in beside))
        self.tell_speed(move.target_id)

    def tell_speed(self, worker_id: str) -> None:
        """Let placement reckon with what was measured."""
        known = self.placement.rates.get(worker_id)
        rate = self.speeds.to_host(worker_id, None if known is None else known.nvme_to_host)
        self.placement.learn_peer_rate(worker_id, rate)

    # What workers say -------------------------------------------------------------------------

    def session_changed(self, worker_id: str, change: SessionChange) -> None:
        """A session's turn ended at a worker, or it took the session, or forgot it."""
        backlog = self._backlogs.get(worker_id)
        if backlog is not None and len(backlog) < BACKLOG_MAX:
            backlog.append(change)
        else:
            self._take(worker_id, change, live=True)

    def _take(self, worker_id: str, change: SessionChange, *, live: bool) -> None:
        key = session_key(change.session_id, Namespace(change.extra_key, change.cache_salt))
        now = self._clock.monotonic()
        if change.gone:
            self.book.forgotten(key, worker_id)
            self._note(OwnershipEvent.GONE, key, worker_id, 0)
            return
        claim = Claim(True, change.owner_epoch, change.turns, worker_id)
        self._note(OwnershipEvent.OWNS, key, worker_id, change.owner_epoch, change.turns)
        owner = self.book.owner(key)
        orders = self.book.claimed(key, claim)
        served = live and self._served.get(key) == worker_id
        if served and owner is not None and claim.epoch <= owner.epoch:
            # A turn that ended here has the newest KV here: what it says is not overruled.
            adopted = self.book.adopt(key, worker_id, now)
            orders = orders if adopted is None else [adopted]
        if orders:
            self._send(orders)

    def snapshot(self, worker_id: str, sessions: Sequence[SessionChange]) -> None:
        """All sessions that a worker knows; a large snapshot is taken in slices, and what is heard
        meanwhile after it."""
        self._backlogs.pop(worker_id, None)
        if len(sessions) > SLICE_SESSIONS:
            backlog = self._backlogs[worker_id] = deque()
            work = self._take_all(worker_id, sessions, backlog)
            if self._background.start(work, f"sessions of {worker_id}") is not None:
                return
            del self._backlogs[worker_id]
        # Without a backlog it does not wait for anything.
        with contextlib.suppress(StopIteration):
            self._take_all(worker_id, sessions, None).send(None)

    async def _take_all(
        self,
        worker_id: str,
        sessions: Sequence[SessionChange],
        backlog: deque[SessionChange] | None,
    ) -> None:
        gone = set(self.book.known_by(worker_id))
        for number, change in enumerate(sessions):
            if backlog is not None and number % SLICE_SESSIONS == 0:
                await asyncio.sleep(0)
                if self._backlogs.get(worker_id) is not backlog:
                    return  # a newer snapshot, or the worker is lost
            self._take(worker_id, change, live=False)
            key = session_key(change.session_id, Namespace(change.extra_key, change.cache_salt))
            gone.discard(key)
        for key in gone:
            self.book.forgotten(key, worker_id)
            self._note(OwnershipEvent.GONE, key, worker_id, 0)
        if backlog is not None:
            del self._backlogs[worker_id]
            for change in backlog:
                self._take(worker_id, change, live=True)

    def worker_lost(self, worker_id: str) -> None:
        """A worker is silent: its claims are void until it speaks again."""
        self._backlogs.pop(worker_id, None)
        for key in self.book.known_by(worker_id)[-SLICE_SESSIONS:]:
            self._note(OwnershipEvent.GONE, key, worker_id, 0)
        self._send(self.book.worker_lost(worker_id, self._clock.monotonic()))

    def worker_told(self, worker_id: str, *, draining: bool) -> None:
        """A worker says that it is about to end, or that it is not."""
        found = self.registry.domain(worker_id)
        if found is not None and found[0].leaving != draining:
            if draining:
                self.drains.begin(found[0], leaving=True)
            else:
                self.drains.came_back(found[0])

    def _on_removed(self, worker: Worker) -> None:
        for domain_id in worker.domain_ids:
            self.worker_lost(domain_id)
            self.speeds.forget(domain_id)

    def answered(self, order: Order, reply: Reply) -> None:
        """A worker's reply to an order."""
        if reply.ok and not reply.pending:
            self._note_done(order)
        now = self._clock.monotonic()
        if order.move_id.startswith(ADOPTION):
            self._send(self.book.adopted(order) if reply.ok else [])
            return
        self._send(self.book.answered(reply, now))
        self._wake.set()

    def _note_done(self, order: Order) -> None:
        if order.kind in (OrderKind.SWITCH, OrderKind.RECLAIM):
            self._note(OwnershipEvent.OWNS, order.session_id, order.worker_id, order.epoch)
        elif order.kind is OrderKind.RELEASE:
            self._note(OwnershipEvent.RELEASED, order.session_id, order.worker_id, order.epoch)

    def _note(
        self, event: OwnershipEvent, key: str, worker_id: str, epoch: int, turns: int = 0
    ) -> None:
        now = self._clock.monotonic()
        self.journal.write(OwnershipEntry(now, event, key, worker_id, epoch, turns))

    def _target(self, order: Order) -> str:
        """Only what will be needed soon has a claim to the device."""
        move = self.book.get(order.move_id)
        return "device" if move is None or move.cause in SOON else "host"

    # Turns ------------------------------------------------------------------------------------

    def turn_started(self, key: str, worker_id: str) -> None:
        self.book.turn_started(key, worker_id)
        self._served[key] = worker_id
        self._served.move_to_end(key)
        if len(self._served) > SERVED_MAX:
            self._served.popitem(last=False)

    def turn_ended(self, key: str) -> None:
        self._send(self.book.turn_ended(key, self._clock.monotonic()))

    def early(self, key: str) -> EarlyChoice | None:
        """Where a request goes whose session moves now; None: wherever it is best."""
        move = self.book.moving(key)
        if move is None:
            return None
        elapsed = self._clock.monotonic() - move.created_seconds
        target = self.view(move.target_id)
        if target is None:
            return None
        tokens = max(1, move.tokens)
        default = PolicySettings().default_rates
        prefill = target.rates.prefill or default.prefill
        peer = target.rates.peer_to_host or default.peer_to_host
        assert prefill is not None
        assert peer is not None
        return self.book.early(
            key,
            source_usable=self._usable(move.source_id),
            copy_seconds_left=max(peer.latency_seconds, peer.seconds(tokens) - elapsed),
            recompute_seconds=prefill.seconds(tokens),
        )

    def view(self, worker_id: str) -> WorkerView | None:
        return next((v for v in self.placement.views() if v.worker_id == worker_id), None)

    def _usable(self, worker_id: str) -> bool:
        """A draining worker serves the sessions that it still has, unless it is about to end."""
        view, found = self.view(worker_id), self.registry.domain(worker_id)
        if view is None or found is None or found[0].leaving:
            return False
        return view.state in (WorkerState.READY, WorkerState.DRAINING)

    async def turned(self, move_id: str, seconds_max: float) -> bool:
        """Wait until a move has switched; False where it has not in time, or was given up."""
        watch = self._open.get(move_id)
        if watch is not None:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(seconds_max):
                    await watch.turned.wait()
        move = self.book.get(move_id)
        return move is not None and move.state in SWITCHED

    # Asking for moves -------------------------------------------------------------------------

    def can_move(self, source_id: str, target_id: str) -> bool:
        """Whether pages can go from one to the other at all."""
        source, target = self.registry.domain(source_id), self.registry.domain(target_id)
        if source is None or target is None or source_id == target_id:
            return False
        if not (peer_of(self.registry, source_id) and peer_of(self.registry, target_id)):
            return False
        ours, theirs = source[0], target[0]
        alike = ours.model_id == theirs.model_id or None in (ours.model_id, theirs.model_id)
        return alike and ours.info.page_size == theirs.info.page_size

    def request(self, key: str, target_id: str, cause: MoveCause) -> Move | Refusal:
        """Ask for a move; it begins as soon as there is room."""
        now = self._clock.monotonic()
        place, owner = self.placement.index.session(key), self.book.owner(key)
        tokens = 0 if place is None else place.total_tokens
        found = None if owner is None else self.registry.domain(owner.worker_id)
        size = 0 if found is None else tokens * found[0].info.token_bytes
        asked = self.book.request(key, target_id, cause, now, tokens=tokens, size_bytes=size)
        if isinstance(asked, Move):
            self._open[asked.move_id] = Watch(asked)
            self._settle()
            self.step()
            self._wake.set()
        return asked

    def cancel(self, move_id: str) -> None:
        self._send(self.book.cancel(move_id, self._clock.monotonic()))

    async def drain(self, worker: Worker) -> dict[str, Any]:
        return self.drains.begin(worker)

    def open_moves(self) -> list[Move]:
        return [watch.move for watch in self._open.values()]

    # What the routes ask for ------------------------------------------------------------------

    async def migrate(self, body: Any) -> dict[str, Any]:
        """``{"session_id", "to"}``, with ``extra_key`` and ``cache_salt`` where used.

        Raises:
            ApiError: 400, a field is missing or wrong; 404, nobody owns the session, or no such
                worker; 409, it cannot move there, or not now.
        """
        key, name = migrate_fields(body)
        target = self.registry.find(name)
        if target is None:
            raise ApiError(404, "worker_not_found", f"to: worker {name[:256]!r} is not known")
        owner = self.book.owner(key)
        if owner is None:
            message = f"session {session_parts(key).session_id[:256]!r} is known to no worker"
            raise ApiError(404, "unknown_session", message)
        target_id = target.domain_ids[0]
        if target.state(self._clock.monotonic()) is not WorkerState.READY:
            raise ApiError(409, "worker_not_ready", f"to: {target.url} takes no sessions now")
        if owner.worker_id != target_id and not self.can_move(owner.worker_id, target_id):
            message = obstacle(self.registry, owner.worker_id, target_id)
            raise ApiError(409, "no_peer_level", f"to: {message}")
        asked = self.request(key, target_id, MoveCause.REQUEST)
        if isinstance(asked, Refusal):
            raise ApiError(409, asked.value, f"session_id: {asked.value.replace('_', ' ')}")
        return record(asked)

    def move(self, move_id: str) -> dict[str, Any] | None:
        found = self.book.get(move_id)
        return None if found is None else record(found)

    def recent(self) -> list[dict[str, Any]]:
        return [record(move) for move in self.book.moves()[-RECENT_MAX:]]

    def of_session(self, session_id: str) -> list[dict[str, Any]]:
        return [record(move) for move in self.book.moves(session_id)[-RECENT_MAX:]]

    def ownership(self) -> list[dict[str, Any]]:
        return self.journal.as_json()

    def changed(self, after: int) -> tuple[list[dict[str, Any]], int]:
        moves = dict.fromkeys(move_id for number, move_id in self._changes if number > after)
        found = [self.move(move_id) for move_id in moves]
        return [one for one in found if one is not None], self._change_number

    def advise(self, session_key: str, choice: AdvisoryChoice) -> dict[str, Any] | None:
        owner = self.book.owner(session_key)
        if owner is None or owner.worker_id == choice.worker_id:
            return None
        moving = self.book.moving(session_key)
        if moving is not None:
            return record(moving) if moving.target_id == choice.worker_id else None
        # Where a third worker has more of it than its owner, the owner's copy is not what to move.
        if choice.source_worker_id not in (None, owner.worker_id):
            return None
        for other in choice.alternatives:
            gain = other.cost.total - choice.cost.total
            if other.worker_id == owner.worker_id and gain < GAIN_SECONDS_MIN:
                return None
        if not self.can_move(owner.worker_id, choice.worker_id):
            return None
        asked = self.request(session_key, choice.worker_id, MoveCause.ADVISORY)
        return record(asked) if isinstance(asked, Move) else None

    def place(self, session_key: str) -> str | None:
        owner = self.book.owner(session_key)
        return None if owner is None else owner.worker_id

    def session_over(self, session_key: str) -> None:
        move = self.book.moving(session_key)
        if move is not None:
            self.cancel(move.move_id)

    def check(self) -> None:
        self.book.check()
        self.sender.check()
        assert len(self._served) <= SERVED_MAX
        live = {move.move_id for move in self.book.moves() if not move.ended}
        assert live == self._open.keys(), (live, list(self._open))
