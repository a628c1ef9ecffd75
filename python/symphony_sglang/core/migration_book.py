"""The router's moves: at most one a session, within budgets, and what an early request gets."""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import StrEnum
from typing import NamedTuple

from symphony_sglang.core.migration import (
    ENDED,
    INSTANCE_BITS,
    Move,
    MoveCause,
    MoveEvent,
    MoveLimits,
    MoveState,
    Order,
    OrderKind,
    next_epoch,
)
from symphony_sglang.core.migration_log import Claim, owner_of
from symphony_sglang.core.migration_worker import Reply


@dataclass(frozen=True, slots=True)
class BookLimits:
    """Bounds of all moves together; beyond them a move waits, or is refused with the reason."""

    moves_max: int = 256  # queued or under way; beyond: refused
    under_way_max: int = 32  # beyond: queued
    link_bytes_max: int = 2 << 30  # under way from one worker to another; one move always may
    worker_moves_max: int = 8  # to or from one worker
    rest_seconds: float = 5.0  # before a session moves again, unless drained or asked for
    yield_seconds_max: float = 5.0  # that a move waits for workers with demand
    history_max: int = 512  # moves that ended
    sessions_max: int = 65_536  # whose claims are known; the least recently heard of is forgotten
    move: MoveLimits = field(default_factory=MoveLimits)


class Refusal(StrEnum):
    """Why no move was made."""

    SAME_WORKER = "source_is_target"
    UNKNOWN_OWNER = "no_worker_owns_the_session"
    MOVING = "session_is_moving"
    RESTING = "session_moved_just_now"
    BOOK_FULL = "too_many_moves"


class Early(StrEnum):
    """Where a request goes whose session is moving."""

    SOURCE = "source"
    TARGET = "target"  # the copy is whole there
    TARGET_WAIT = "target_wait"  # for the rest of the copy
    TARGET_RECOMPUTE = "target_recompute"


class EarlyChoice(NamedTuple):
    """`wait_seconds` is the most that the request should wait before it is sent to `worker_id`."""

    choice: Early
    worker_id: str
    wait_seconds: float


# What the ids of orders outside of any move begin with.
ADOPTION = "adopt-"
_URGENCY = {cause: at for at, cause in enumerate(MoveCause)}
_UNRESTED = (MoveCause.DRAIN, MoveCause.DEMAND, MoveCause.REQUEST)
_UNYIELDING = (MoveCause.DRAIN, MoveCause.DEMAND)


class MoveBook:
    """Every move of this router, and what is known of who owns which session.

    All methods that return orders return what must be sent now.
    """

    def __init__(self, instance: int, limits: BookLimits | None = None) -> None:
        """`instance`: a number under 65,536 that no other life of a router uses; a random one."""
        self.instance = instance
        self.limits = limits or BookLimits()
        self._live: dict[str, Move] = {}
        self._by_session: dict[str, str] = {}
        self._ended: OrderedDict[str, Move] = OrderedDict()
        self._claims: OrderedDict[str, dict[str, Claim]] = OrderedDict()
        self._moved_at: OrderedDict[str, float] = OrderedDict()
        self._running: Counter[str] = Counter()  # turns under way, by session
        self._numbers = 0
        self._epochs = 0  # the highest counter that a move of this book uses
        self.outcomes: Counter[tuple[MoveCause, MoveState, str]] = Counter()

    # Ownership ----------------------------------------------------------------------------------

    def owner(self, session_id: str) -> Claim | None:
        """Who owns a session as far as this router knows; None for an unknown one."""
        return owner_of(self._claims.get(session_id, {}).values())

    def claimed(self, session_id: str, claim: Claim) -> list[Order]:
        """A worker said what it knows of a session (at a turn's end, or in a snapshot).

        Workers that still think they own what another owns under a higher epoch are told.
        """
        claims = self._claims.setdefault(session_id, {})
        known = claims.get(claim.worker_id)
        # What was sent before a switch may arrive after it.
        if known is None or claim.epoch >= known.epoch:
            claims[claim.worker_id] = claim
        self._claims.move_to_end(session_id)
        while len(self._claims) > self.limits.sessions_max:
            self._claims.popitem(last=False)
        owner = self.owner(session_id)
        assert owner is not None
        if session_id in self._by_session or not owner.owns:
            return []
        return self._overrule(session_id, owner.epoch)

    def _overrule(self, session_id: str, epoch: int) -> list[Order]:
        return [
            Order(OrderKind.RELEASE, worker_id, "", session_id, epoch, 0)
            for worker_id, claim in self._claims[session_id].items()
            if claim.owns and claim.epoch < epoch
        ]

    def owned_by(self, worker_id: str) -> list[str]:
        """The sessions of a worker, least recently heard of first: what a drain hands off."""
        return [
            session_id
            for session_id, claims in self._claims.items()
            if worker_id in claims and owner_of(claims.values()) == claims[worker_id]
        ]

    def known_by(self, worker_id: str) -> list[str]:
        """The sessions of which a worker has a record, its own or not."""
        return [session_id for session_id, known in self._claims.items() if worker_id in known]

    def adopt(self, session_id: str, worker_id: str, now_seconds: float) -> Order | None:
        """A turn was served by a worker that does not own the session: its KV is the newest now.

        The order that makes it the owner, to be answered to `adopted`. None where it owns it, where
        nobody does, and while the session moves.
        """
        owner = self.owner(session_id)
        if owner is None or owner.worker_id == worker_id or session_id in self._by_session:
            return None
        self._rest(session_id, now_seconds)
        self._numbers += 1
        name = f"{ADOPTION}{self.instance:04x}-{self._numbers}"
        epoch = self._new_epoch(owner.epoch)
        return Order(OrderKind.RECLAIM, worker_id, name, session_id, epoch, 0)

    def adopted(self, order: Order) -> list[Order]:
        """The order of `adopt` was carried out: those that owned the session are to give way."""
        session_id = order.session_id
        if session_id in self._by_session:
            return []
        self._own(session_id, order.worker_id, order.epoch)
        return self._overrule(session_id, order.epoch)

    def forgotten(self, session_id: str, worker_id: str) -> None:
        """A worker does not know the session any more."""
        claims = self._claims.get(session_id, {})
        claims.pop(worker_id, None)
        if not claims:
            self._claims.pop(session_id, None)

    # Planning -----------------------------------------------------------------------------------

    def request(
        self,
        session_id: str,
        target_id: str,
        cause: MoveCause,
        now_seconds: float,
        *,
        tokens: int = 0,
        size_bytes: int = 0,
    ) -> Move | Refusal:
        """Ask for a move; it starts at the next `tick` that has room for it."""
        owner = self.owner(session_id)
        if owner is None:
            return Refusal.UNKNOWN_OWNER
        if owner.worker_id == target_id:
            return Refusal.SAME_WORKER
        if session_id in self._by_session:
            return Refusal.MOVING
        moved_at = self._moved_at.get(session_id, -float("inf"))
        if cause not in _UNRESTED and now_seconds - moved_at < self.limits.rest_seconds:
            return Refusal.RESTING
        if len(self._live) >= self.limits.moves_max:
            return Refusal.BOOK_FULL
        self._numbers += 1
        move = Move(
            move_id=f"move-{self.instance:04x}-{self._numbers}",
            session_id=session_id,
            source_id=owner.worker_id,
            target_id=target_id,
            cause=cause,
            epoch=self._new_epoch(owner.epoch),
            tokens=tokens,
            bytes=size_bytes,
            created_seconds=now_seconds,
            limits=self.limits.move,
            turn_running=self._running[session_id] > 0,
        )
        self._live[move.move_id] = move
        self._by_session[session_id] = move.move_id
        return move

    def _new_epoch(self, owner_epoch: int) -> int:
        """An epoch above the owner's that no move had before, though it may have been aborted.

        A target can take a switch of which the router never learns. The counter after it is left
        for the move's own RECLAIM.
        """
        counter = max(self._epochs, owner_epoch >> INSTANCE_BITS)
        self._epochs = counter + 2
        return next_epoch(counter << INSTANCE_BITS, self.instance)

    def running(self, session_id: str) -> int:
        """Turns of a session that are under way."""
        return self._running.get(session_id, 0)

    def moved_at(self, session_id: str) -> float:
        """When the session last got another owner; -inf: not that this book knows."""
        return self._moved_at.get(session_id, -float("inf"))

    def get(self, move_id: str) -> Move | None:
        return self._live.get(move_id) or self._ended.get(move_id)

    def moving(self, session_id: str) -> Move | None:
        """The live move of a session."""
        move_id = self._by_session.get(session_id)
        return None if move_id is None else self._live[move_id]

    def moves(self, session_id: str | None = None) -> list[Move]:
        """Moves that are remembered, oldest first, of one session or of all."""
        every = sorted((*self._ended.values(), *self._live.values()), key=_created)
        return [move for move in every if session_id in (None, move.session_id)]

    # What happens -------------------------------------------------------------------------------

    def tick(self, now_seconds: float, busy: Iterable[str] = ()) -> list[Order]:
        """Orders to repeat, deadlines, and queued moves that now have room.

        Args:
            busy: workers whose demand traffic a new move would slow. Drains start there all the
                same, and so does what a request waits for; the others after `yield_seconds_max`.
        """
        orders: list[Order] = []
        for move in list(self._live.values()):
            event = move.due(now_seconds)
            if event is not None:
                orders += self._step(move, event, now_seconds)
            elif now_seconds >= move.repeat_at_seconds:
                order = move.repeat(now_seconds)
                orders += [] if order is None else [order]
        orders += self._start_queued(now_seconds, frozenset(busy))
        return orders

    def _start_queued(self, now_seconds: float, busy: frozenset[str]) -> list[Order]:
        queued = [move for move in self._live.values() if move.state is MoveState.QUEUED]
        if not queued:
            return []
        queued.sort(key=lambda move: (_URGENCY[move.cause], move.created_seconds))
        under_way = [move for move in self._live.values() if move.state is not MoveState.QUEUED]
        bytes_on: Counter[tuple[str, str]] = Counter()
        moves_at: Counter[str] = Counter()
        for move in under_way:
            bytes_on[move.link] += move.bytes
            moves_at.update(move.link)
        room = self.limits.under_way_max - len(under_way)
        orders: list[Order] = []
        for move in queued:
            if room <= 0:
                break
            yields = now_seconds - move.created_seconds < self.limits.yield_seconds_max
            yields = yields and move.cause not in _UNYIELDING
            held = yields and not busy.isdisjoint(move.link)
            crowded = max(moves_at[end] for end in move.link) >= self.limits.worker_moves_max
            on_link = bytes_on[move.link]
            full = on_link > 0 and on_link + move.bytes > self.limits.link_bytes_max
            if held or crowded or full:
                continue
            room -= 1
            bytes_on[move.link] += move.bytes
            moves_at.update(move.link)
            orders += self._step(move, MoveEvent.START, now_seconds)
        return orders

    def answered(self, reply: Reply, now_seconds: float) -> list[Order]:
        """A worker answered an order."""
        move = self._live.get(reply.move_id)
        if move is None or reply.step != move.steps:
            return []
        if reply.pending:
            # It lives and works: ask again later, for as long as the deadline allows.
            move.tries = 1
            move.repeat_at_seconds = now_seconds + move.poll_after(now_seconds)
            return []
        if not reply.ok:
            return self._step(move, MoveEvent.FAILED, now_seconds, reply.reason)
        move.bytes_copied += reply.bytes_copied
        event = MoveEvent.OK
        if move.state is MoveState.VERIFYING and move.grew:
            event = MoveEvent.STALE_RUNNING if move.turn_running else MoveEvent.STALE
        return self._step(move, event, now_seconds)

    def _step(
        self, move: Move, event: MoveEvent, now_seconds: float, reason: str = ""
    ) -> list[Order]:
        before, epoch = move.state, move.epoch
        order = move.step(event, now_seconds, reason)
        if event is MoveEvent.OK and before is MoveState.SWITCHING:
            self._own(move.session_id, move.target_id, epoch)
            self._rest(move.session_id, now_seconds)
        elif event is MoveEvent.OK and before is MoveState.RELEASING:
            self._disown(move.session_id, move.source_id)
        elif event is MoveEvent.OK and before is MoveState.RECLAIMING:
            self._own(move.session_id, move.source_id, epoch)
        if move.state in ENDED and move.move_id in self._live:
            self._end(move)
        return [] if order is None else [order]

    def _own(self, session_id: str, worker_id: str, epoch: int) -> None:
        claims = self._claims.setdefault(session_id, {})
        turns = max((claim.turns for claim in claims.values()), default=0)
        claims[worker_id] = Claim(True, epoch, turns, worker_id)

    def _disown(self, session_id: str, worker_id: str) -> None:
        claims = self._claims.get(session_id, {})
        claim = claims.get(worker_id)
        if claim is not None:
            claims[worker_id] = claim._replace(owns=False)

    def _rest(self, session_id: str, now_seconds: float) -> None:
        self._moved_at[session_id] = now_seconds
        self._moved_at.move_to_end(session_id)
        while len(self._moved_at) > self.limits.sessions_max:
            self._moved_at.popitem(last=False)

    def _end(self, move: Move) -> None:
        del self._live[move.move_id]
        del self._by_session[move.session_id]
        self._ended[move.move_id] = move
        self.outcomes[move.cause, move.state, move.reason] += 1
        if len(self.outcomes) > self.limits.history_max:
            self.outcomes[MoveCause.REQUEST, move.state, "other"] += self.outcomes.pop(
                next(iter(self.outcomes))
            )
        while len(self._ended) > self.limits.history_max:
            self._ended.popitem(last=False)

    def cancel(self, move_id: str, now_seconds: float) -> list[Order]:
        """Give a move up, where it is not too late for that."""
        move = self._live.get(move_id)
        return [] if move is None else self._step(move, MoveEvent.CANCEL, now_seconds)

    def worker_lost(self, worker_id: str, now_seconds: float) -> list[Order]:
        """A worker died or cannot be reached: its claims are void until it speaks again."""
        for session_id in [key for key, claims in self._claims.items() if worker_id in claims]:
            self.forgotten(session_id, worker_id)
        orders: list[Order] = []
        for move in list(self._live.values()):
            if worker_id == move.target_id:
                orders += self._step(move, MoveEvent.TARGET_LOST, now_seconds)
            elif worker_id == move.source_id:
                orders += self._step(move, MoveEvent.SOURCE_LOST, now_seconds)
        return orders

    # Requests -----------------------------------------------------------------------------------

    def turn_started(self, session_id: str, worker_id: str) -> None:
        """A request of the session was sent to a worker."""
        self._running[session_id] += 1
        move = self.moving(session_id)
        if move is not None and worker_id == move.source_id:
            move.turn_running = move.grew = True
            move.early_requests += 1

    def turn_ended(self, session_id: str, now_seconds: float) -> list[Order]:
        """The request was answered, or failed."""
        if self._running[session_id] > 1:
            self._running[session_id] -= 1
            return []
        del self._running[session_id]
        move = self.moving(session_id)
        if move is None:
            return []
        move.turn_running = False
        return self._step(move, MoveEvent.TURN_ENDED, now_seconds)

    def early(
        self,
        session_id: str,
        *,
        source_usable: bool,
        copy_seconds_left: float,
        recompute_seconds: float,
    ) -> EarlyChoice | None:
        """Where a request goes whose session is moving; None for one that is not.

        The source serves it as long as it owns the session and can. Else the target does, after the
        shorter of the rest of the copy and the recomputation of what is not there.
        """
        move = self.moving(session_id)
        if move is None:
            return None
        if move.state in (MoveState.SWITCHING, MoveState.RELEASING):
            return EarlyChoice(Early.TARGET, move.target_id, 0.0)
        if source_usable:
            return EarlyChoice(Early.SOURCE, move.source_id, 0.0)
        if move.state in (MoveState.VERIFYING, MoveState.HELD):
            return EarlyChoice(Early.TARGET, move.target_id, 0.0)
        coming = move.state in (MoveState.RESERVING, MoveState.COPYING)
        if coming and copy_seconds_left < recompute_seconds:
            return EarlyChoice(Early.TARGET_WAIT, move.target_id, copy_seconds_left)
        return EarlyChoice(Early.TARGET_RECOMPUTE, move.target_id, 0.0)

    # --------------------------------------------------------------------------------------------

    def stats(self) -> dict[str, int]:
        states = Counter(move.state.value for move in self._live.values())
        return {"live": len(self._live), "ended": len(self._ended), **states}

    def check(self) -> None:
        """Bounds hold; one live move a session; every move is a walk through the table."""
        limits = self.limits
        assert len(self._live) <= limits.moves_max
        assert len(self._ended) <= limits.history_max
        assert len(self._claims) <= limits.sessions_max
        assert len(self.outcomes) <= limits.history_max + 1
        assert {move.session_id: key for key, move in self._live.items()} == self._by_session
        for move in self._live.values():
            assert not move.ended
            move.check()
        for move in self._ended.values():
            assert move.ended
            move.check()
        assert all(count > 0 for count in self._running.values())


def _created(move: Move) -> float:
    return move.created_seconds
