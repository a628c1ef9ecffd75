"""Workers, a router and a bad network in virtual time, for the tests of moves.

Messages are lost, doubled, delayed (so reordered) and cut off by partitions; workers and the router
die and come back. What a worker wrote down (records, pages) outlives it; its reservations do not.
"""

from __future__ import annotations

import heapq
import random
from collections.abc import Callable
from dataclasses import dataclass, field

from symphony_sglang.core.migration import MoveCause, MoveLimits, Order, OrderKind
from symphony_sglang.core.migration_book import BookLimits, Early, MoveBook
from symphony_sglang.core.migration_log import (
    Claim,
    OwnershipEntry,
    OwnershipEvent,
    OwnershipLog,
)
from symphony_sglang.core.migration_worker import Reply, WorkerMoveLimits, WorkerMoves

PAGE = 16
REPORT_SECONDS = 0.5
LOST_SECONDS = 1.6
COPY_TOKENS_PER_SECOND = 4000.0
PREFILL_TOKENS_PER_SECOND = 2000.0
LIMITS = MoveLimits(deadline_seconds=20.0, answer_seconds=0.4, tries_max=4, renew_seconds=0.7)
BOOK_LIMITS = BookLimits(rest_seconds=0.5, move=LIMITS)
WORKER_LIMITS = WorkerMoveLimits(lease_seconds=2.5)


@dataclass
class Record:
    epoch: int
    owns: bool
    tokens: int
    turns: int


@dataclass
class World:
    """The event queue, the network and everybody on it."""

    seed: int
    loss: float = 0.1
    duplicates: float = 0.1
    delay_max: float = 0.3
    turn_seconds: float | None = None  # None: a random short time
    now: float = 0.0
    log: OwnershipLog = field(default_factory=OwnershipLog)
    served: list[tuple[str, str, str]] = field(default_factory=list)  # request, worker, how
    asked: int = 0
    moves_ended: int = 0
    outcomes: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.random = random.Random(self.seed)
        self._queue: list[tuple[float, int, Callable[[], None]]] = []
        self._numbers = 0
        self.cut: set[str] = set()  # workers that the router cannot reach
        self.workers = {name: Worker(self, name) for name in ("w0", "w1", "w2")}
        self.router = Router(self)

    def after(self, seconds: float, do: Callable[[], None]) -> None:
        self._numbers += 1
        heapq.heappush(self._queue, (self.now + seconds, self._numbers, do))

    def run(self, until: float) -> None:
        while self._queue and self._queue[0][0] <= until:
            self.now, _, do = heapq.heappop(self._queue)
            do()
        self.now = until

    def send(self, worker_id: str, do: Callable[[], None]) -> None:
        """Between the router and a worker, either way."""
        copies = 1 + (self.random.random() < self.duplicates)
        for _ in range(copies):
            if self.random.random() < self.loss:
                continue
            delay = 0.001 + self.random.random() ** 3 * self.delay_max
            self.after(delay, lambda: None if worker_id in self.cut else do())

    def note(self, event: OwnershipEvent, session_id: str, worker: Worker) -> None:
        record = worker.records.get(session_id)
        epoch, turns = (record.epoch, record.turns) if record else (0, 0)
        self.log.add(OwnershipEntry(self.now, event, session_id, worker.name, epoch, turns))

    def heal(self) -> None:
        """No more faults: everybody comes back, every message arrives."""
        self.loss = self.duplicates = 0.0
        self.cut.clear()
        for worker in self.workers.values():
            worker.restart()
        self.router.restart()

    def check(self) -> None:
        for worker in self.workers.values():
            if worker.moves is not None:
                worker.moves.check()
        if self.router.book is not None:
            self.router.book.check()


class Worker:
    """Carries out orders with the product's own worker-side code over modelled pages."""

    def __init__(self, world: World, name: str) -> None:
        self.world, self.name = world, name
        self.records: dict[str, Record] = {}  # on disk
        self.pages: dict[str, int] = {}  # session -> tokens here, on disk
        self.moves: WorkerMoves | None = WorkerMoves(name, WORKER_LIMITS)
        self.life = 0
        self.refuses = False
        self.corrupts = 0.0  # chance that a copy fails
        self._report()

    @property
    def up(self) -> bool:
        return self.moves is not None

    def crash(self) -> None:
        if self.up:
            self.moves = None
            self.life += 1
            for session_id in self.records:
                self.world.note(OwnershipEvent.GONE, session_id, self)

    def restart(self) -> None:
        if not self.up:
            self.moves = WorkerMoves(self.name, WORKER_LIMITS)
            for session_id in self.records:
                self._announce(session_id)
            self._report()

    def _announce(self, session_id: str) -> None:
        record = self.records[session_id]
        if record.owns:
            self.world.note(OwnershipEvent.OWNS, session_id, self)
        elif record.epoch > 0:
            self.world.note(OwnershipEvent.RELEASED, session_id, self)
        else:
            self.world.note(OwnershipEvent.KNOWS, session_id, self)

    def _report(self) -> None:
        if not self.up:
            return
        life = self.life
        claims = [
            (key, Claim(one.owns, one.epoch, one.turns, self.name))
            for key, one in self.records.items()
        ]
        router = self.world.router if hasattr(self.world, "router") else None
        if router is not None:
            self.world.send(self.name, lambda: router.reported(self.name, claims))
        self.world.after(REPORT_SECONDS, lambda: self._report() if life == self.life else None)

    def order(self, order: Order, life_of_router: int) -> None:
        if not self.up:
            return
        reply = self._carry_out(order)
        router = self.world.router
        self.world.send(self.name, lambda: router.answered(reply, life_of_router))

    def _carry_out(self, order: Order) -> Reply:  # noqa: C901
        moves, now = self.moves, self.world.now
        assert moves is not None
        moves.expire(now, order.move_id)
        record = self.records.get(order.session_id)
        match order.kind:
            case OrderKind.RESERVE:
                if self.refuses:
                    return Reply(order.move_id, order.step, self.name, False, reason="refused")
                return moves.reserve(order, now)
            case OrderKind.COPY:
                reply, start = moves.copy(order, now)
                if start:
                    self._start_copy(order)
                return reply
            case OrderKind.VERIFY:
                here = self.pages.get(order.session_id, 0)
                return moves.verify(order, record is not None and here >= record.tokens, now)
            case OrderKind.SWITCH:
                epoch = record.epoch if record else -1
                reply = moves.may_switch(order, epoch, record is not None)
                if reply.ok and record is not None and record.epoch < order.epoch:
                    moves.switched(order)
                    self._own(order)
                return reply
            case OrderKind.ABORT:
                return moves.abort(order)
            case OrderKind.RECLAIM:
                if record is None or record.epoch > order.epoch:
                    return Reply(order.move_id, order.step, self.name, False, reason="newer_epoch")
                self._own(order)
                return Reply(order.move_id, order.step, self.name, True)
            case OrderKind.RELEASE:
                if record is not None and record.epoch < order.epoch:
                    self.records[order.session_id] = Record(
                        order.epoch, False, record.tokens, record.turns
                    )
                    self._announce(order.session_id)
                return Reply(order.move_id, order.step, self.name, True)

    def _own(self, order: Order) -> None:
        record = self.records[order.session_id]
        self.records[order.session_id] = Record(order.epoch, True, record.tokens, record.turns)
        self._announce(order.session_id)

    def _start_copy(self, order: Order) -> None:
        source, life = self.world.workers[order.source_id], self.life
        source_life = source.life
        wanted = source.records.get(order.session_id)
        missing = (wanted.tokens if wanted else 0) - self.pages.get(order.session_id, 0)
        seconds = max(0.01, missing / COPY_TOKENS_PER_SECOND)

        def arrive() -> None:
            if life != self.life or self.moves is None:
                return
            ok = source.up and source_life == source.life and wanted is not None
            ok = ok and self.world.random.random() >= self.corrupts
            if ok and wanted is not None:
                session_id = order.session_id
                self.pages[session_id] = max(self.pages.get(session_id, 0), wanted.tokens)
                known = self.records.get(session_id)
                if known is None or known.turns < wanted.turns:
                    epoch = known.epoch if known else 0
                    owns = known.owns if known else False
                    self.records[session_id] = Record(epoch, owns, wanted.tokens, wanted.turns)
                    self._announce(session_id)
            self.moves.copied(order.move_id, order.step, ok, "" if ok else "lost", 1)

        self.world.after(seconds, arrive)

    def serve(self, session_id: str, done: Callable[[bool], None]) -> None:
        """One turn: takes time, makes the session longer."""
        life = self.life
        seconds = self.world.turn_seconds or 0.1 + self.world.random.random() * 0.4

        def end() -> None:
            if life != self.life or not self.up:
                done(False)
                return
            record = self.records.get(session_id)
            tokens = (record.tokens if record else 0) + PAGE * 4
            turns = (record.turns if record else 0) + 1
            epoch, owns = (record.epoch, record.owns) if record else (0, True)
            if record is not None and epoch == 0:
                owns = True
            self.records[session_id] = Record(epoch, owns, tokens, turns)
            self.pages[session_id] = tokens
            self._announce(session_id)
            done(True)

        self.world.after(seconds, end)


class Router:
    """Drives the product's ``MoveBook`` and routes requests by it."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.book: MoveBook | None = None
        self.life = 0
        self.restart()

    def restart(self) -> None:
        if self.book is None:
            self.life += 1
            self.book = MoveBook(self.world.random.getrandbits(16), BOOK_LIMITS)
            self.heard: dict[str, float] = {}
            self._tick(self.life)

    def crash(self) -> None:
        if self.book is not None:
            self._count_ended()
            self.book = None

    def _count_ended(self) -> None:
        assert self.book is not None
        for (_, state, reason), count in self.book.outcomes.items():
            name = f"{state.value}:{reason}"
            self.world.outcomes[name] = self.world.outcomes.get(name, 0) + count
            self.world.moves_ended += count

    def _send(self, orders: list[Order]) -> None:
        life = self.life
        for order in orders:
            worker = self.world.workers[order.worker_id]
            self.world.send(
                worker.name, lambda worker=worker, order=order: worker.order(order, life)
            )

    def _tick(self, life: int) -> None:
        if self.book is None or life != self.life:
            return
        now = self.world.now
        for name, heard in list(self.heard.items()):
            if now - heard > LOST_SECONDS:
                del self.heard[name]
                self._send(self.book.worker_lost(name, now))
        self._send(self.book.tick(now))
        self.world.after(0.05, lambda: self._tick(life))

    def reported(self, worker_id: str, claims: list[tuple[str, Claim]]) -> None:
        if self.book is None:
            return
        self.heard[worker_id] = self.world.now
        for session_id, claim in claims:
            self._send(self.book.claimed(session_id, claim))

    def answered(self, reply: Reply, life: int) -> None:
        if self.book is not None and life == self.life:
            self._send(self.book.answered(reply, self.world.now))

    def move(self, session_id: str, target: str, cause: MoveCause = MoveCause.REQUEST):
        if self.book is None:
            return None
        return self.book.request(
            session_id, target, cause, self.world.now, tokens=100, size_bytes=1000
        )

    def request(self, session_id: str, tries: int = 0) -> None:
        """A client's turn, tried again after a failure by the router or the client."""
        if tries == 0:
            self.world.asked += 1
        again = lambda: self.request(session_id, tries + 1)  # noqa: E731
        if self.book is None:
            self.world.after(0.3, again)
            return
        worker_id, how, wait = self._place(session_id)
        if worker_id is None:
            self.world.after(0.3, again)
            return
        life, book = self.life, self.book
        book.turn_started(session_id, worker_id)

        def done(ok: bool) -> None:
            if self.book is book and self.life == life:
                self._send(book.turn_ended(session_id, self.world.now))
            if ok:
                self.world.served.append((session_id, worker_id, how))
            else:
                self.world.after(0.1, again)

        def arrive() -> None:
            worker = self.world.workers[worker_id]
            if worker.up and worker_id not in self.world.cut:
                worker.serve(session_id, done)
            else:
                done(False)

        self.world.after(wait + 0.001, arrive)

    def _place(self, session_id: str) -> tuple[str | None, str, float]:
        assert self.book is not None
        move = self.book.moving(session_id)
        if move is not None:
            early = self.book.early(
                session_id,
                source_usable=move.source_id in self.heard,
                copy_seconds_left=0.1,
                recompute_seconds=0.2,
            )
            assert early is not None
            if early.worker_id in self.heard:
                assert early.choice is not Early.TARGET_WAIT or early.wait_seconds <= 0.2
                return early.worker_id, early.choice.value, early.wait_seconds
        owner = self.book.owner(session_id)
        if owner is not None and owner.worker_id in self.heard:
            return owner.worker_id, "owner", 0.0
        live = sorted(self.heard)
        return (self.world.random.choice(live), "anybody", 0.0) if live else (None, "", 0.0)
