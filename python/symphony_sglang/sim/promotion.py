"""The product's promoter inside a simulated worker: its plans move simulated bytes."""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

from symphony_sglang.core.gate import OPEN_GATE
from symphony_sglang.core.levels import Level, Target, page_floor
from symphony_sglang.core.lifecycle import AdviseRequest, BookLimits, Receipt
from symphony_sglang.core.moves import Move, MoveResult
from symphony_sglang.core.prefix import NO_NAMESPACE, Prefix
from symphony_sglang.core.promoter import Promoter, StepInputs
from symphony_sglang.core.promotion import Demand, PlannerLimits
from symphony_sglang.sim.loop import EventLoop
from symphony_sglang.sim.worker import SimRequest, SimWorker

QUEUE_HOLD_SECONDS = 30.0
RETRY_SECONDS = 1.0
LOAD_HOLDER = "load"


@lru_cache(maxsize=4096)
def session_tokens(session: int, tokens: int) -> bytes:
    """Token ids that are the session's own: equal sessions have equal heads, others none."""
    return (session + 1).to_bytes(4, "little") * tokens


def session_prefix(session: int, tokens: int) -> Prefix:
    return Prefix(NO_NAMESPACE, session_tokens(session, tokens))


class LoadFlight(NamedTuple):
    """A load under way: when its first layer, and its last, will have arrived."""

    start_tokens: int
    first_seconds: float
    last_seconds: float


class Promotions:
    """Advisories of one worker. Every call may be followed by one step, at the same instant."""

    def __init__(
        self, worker: SimWorker, loop: EventLoop, *, protect_device: float, protect_host: float
    ) -> None:
        self._worker = worker
        self._loop = loop
        page = worker.page_size
        self.promoter = Promoter(
            device_cap_tokens=page_floor(int(protect_device * worker.device.capacity_tokens), page),
            host_cap_tokens=page_floor(int(protect_host * worker.host.capacity_tokens), page),
            planner=PlannerLimits(page_size=page),
            book=BookLimits(),
        )
        self._by_session: dict[tuple[Level, int], dict[str, int]] = {}
        self._sessions: dict[str, int] = {}  # advisory -> session
        self._held_requests: set[str] = set()
        self._flights: dict[int, LoadFlight] = {}
        self._step_due = False
        self._watching = False
        self.bytes_promoted = 0

    # Messages -----------------------------------------------------------------------------------

    def advise(
        self, advisory_id: str, session: int, tokens: int, expires_seconds: float
    ) -> Receipt:
        """A hint for the first `tokens` of a session."""
        self._sessions[advisory_id] = session
        receipt = self.promoter.advise(
            AdviseRequest(
                advisory_id=advisory_id,
                identity=f"session:{session}",
                session_id=str(session),
                target=Target.DEVICE,
                expires_in_seconds=expires_seconds,
            ),
            session_prefix(session, tokens),
            self._loop.now_seconds,
        )
        self._apply_locks()
        self.step_soon()
        return receipt

    def withdraw(self, session: int) -> None:
        """The session's next turn went to another worker."""
        self.promoter.cancel_session(str(session), self._loop.now_seconds)
        self._apply_locks()

    def request_arrived(self, request: SimRequest, device: int, host: int) -> None:
        """A request's first look-up, as the engine reports it."""
        now = self._loop.now_seconds
        prefix = session_prefix(request.session, request.prompt_tokens)
        if self._worker.features.protect_queued and (device or host):
            name = str(request.number)
            self._sessions[f"request:{name}"] = request.session
            self._held_requests.add(name)
            self.promoter.hold_request(name, prefix, device, host, now + QUEUE_HOLD_SECONDS, now)
        receipts = self.promoter.arrived(
            str(request.session), NO_NAMESPACE, prefix.token_bytes, device, host, now
        )
        request.advised = bool(receipts)
        self._apply_locks()

    def request_admitted(self, request: SimRequest) -> None:
        name = str(request.number)
        if name in self._held_requests:
            self._held_requests.discard(name)
            self.promoter.release_request(name, self._loop.now_seconds)
            self._apply_locks()

    def give_way(self, tokens: int) -> int:
        """Running work needs memory; gives how many device tokens are free to take now."""
        before = self._worker.device.floor_tokens
        self.promoter.give_way(Level.DEVICE, tokens, self._loop.now_seconds)
        self._apply_locks()
        return before - self._worker.device.floor_tokens

    # The step -----------------------------------------------------------------------------------

    def step_soon(self) -> None:
        """One step after all that happens at this instant."""
        if not self._step_due and len(self.promoter.book):
            self._step_due = True
            self._loop.after(0.0, self.step)

    def step(self) -> None:
        """Plan and start, until there is nothing left to start at this instant."""
        self._step_due = False
        for _ in range(8):
            plan = self.promoter.step(self._inputs())
            for advisory_id in plan.probes:
                self._observe(advisory_id)
            for move in plan.stages:
                self._stage(move)
            if plan.loads:
                self._load(plan.loads)
            self._apply_locks()
            if not (plan.probes or plan.drops or plan.clips):
                break
        if not self._watching and len(self.promoter.book):
            self._watching = True
            self._loop.after(RETRY_SECONDS, self._watch)

    def _watch(self) -> None:
        """Come back while something may expire or be tried again."""
        self._watching = False
        self.step()

    def _inputs(self) -> StepInputs:
        worker = self._worker
        room = worker.device.capacity_tokens - worker.running_tokens - worker.device.floor_tokens
        return StepInputs(
            now_seconds=self._loop.now_seconds,
            device_room_tokens=room - len(worker.running) * worker.page_size,
            host_room_tokens=worker.host.capacity_tokens - worker.host.floor_tokens,
            demand=Demand(
                requests_waiting=len(worker.waiting),
                stages_pending=len(worker.fetching),
            ),
            gate=worker.gate if worker.features.gate else OPEN_GATE,
        )

    def _observe(self, advisory_id: str) -> None:
        advisory = self.promoter.book.get(advisory_id)
        if advisory is None or advisory.prefix is None:
            return
        session = self._sessions[advisory_id]
        worker = self._worker
        device = worker.device.tokens(session)
        host = max(0, worker.host.tokens(session) - device)
        stored = max(worker.nvme.tokens(session), device + host)
        for level in (worker.device, worker.host):
            level.touch(session)
        self.promoter.observed(advisory_id, device, host, self._loop.now_seconds, stored)
        self._apply_locks()

    def _stage(self, move: Move) -> None:
        size = move.tokens * self._worker.speeds.token_bytes
        self.bytes_promoted += size
        done = self._worker.disk.reserve(size)
        self._loop.at(done, self._staged, move, size)

    def _staged(self, move: Move, size: int) -> None:
        session = self._sessions[move.advisory_id]
        worker = self._worker
        stored = max(worker.nvme.tokens(session), worker.host.tokens(session))
        reached = worker.host.grow(session, min(move.stop_tokens, stored))
        arrived = max(0, min(reached, move.stop_tokens) - move.start_tokens)
        result = MoveResult.DONE if reached >= move.stop_tokens else MoveResult.SHORT
        if reached < min(move.stop_tokens, stored):
            result = MoveResult.DECLINED
        self._finished(move, result, arrived, size)

    def _load(self, moves: tuple[Move, ...]) -> None:
        """One group. Its pages can be matched at once, as SGLang publishes slots when it queues
        the copy; whoever matches them waits for the copy (`flight`).

        Layer-major: the lower layers of all come first, so each can be computed on while the rest
        arrives. Session-major: each waits for its own whole part.
        """
        worker = self._worker
        merged = worker.features.layer_order
        landed = [(move, self._publish(move)) for move in moves]
        start = max(self._loop.now_seconds, worker.link.busy_until_seconds)
        size = sum(tokens for _, tokens in landed) * worker.speeds.token_bytes
        self.bytes_promoted += size
        last = worker.link.reserve(size) if merged else 0.0
        first = start + (last - start) / worker.speeds.layers
        for move, tokens in landed:
            if not merged:
                first = last = worker.link.reserve(tokens * worker.speeds.token_bytes)
            session = self._sessions[move.advisory_id]
            flight = LoadFlight(move.start_tokens, first, last)
            self._flights[session] = flight
            self._hold(Level.DEVICE, session, LOAD_HOLDER, move.start_tokens + tokens)
            self._loop.at(last, self._loaded, move, tokens, flight)

    def _publish(self, move: Move) -> int:
        """Take device memory for what is to be loaded; gives how many tokens."""
        session = self._sessions[move.advisory_id]
        worker = self._worker
        below = max(worker.host.tokens(session), worker.device.tokens(session))
        room = worker.device.capacity_tokens - worker.running_tokens
        reached = worker.device.grow(session, min(move.stop_tokens, below), room=room)
        return max(0, min(reached, move.stop_tokens) - move.start_tokens)

    def _loaded(self, move: Move, tokens: int, flight: LoadFlight) -> None:
        session = self._sessions[move.advisory_id]
        if self._flights.get(session) is flight:
            del self._flights[session]
            self._hold(Level.DEVICE, session, LOAD_HOLDER, 0)
        result = MoveResult.DONE if tokens >= move.tokens else MoveResult.DECLINED
        self._finished(move, result, tokens, tokens * self._worker.speeds.token_bytes)

    def flight(self, session: int) -> LoadFlight | None:
        """The load of this session that is under way."""
        return self._flights.get(session)

    def _finished(self, move: Move, result: MoveResult, tokens: int, size: int) -> None:
        self.promoter.finished(
            move.advisory_id, move.hop, result, tokens, size, self._loop.now_seconds
        )
        self._observe(move.advisory_id)
        self.step_soon()
        self._worker.wake()

    # Locks --------------------------------------------------------------------------------------

    def _apply_locks(self) -> None:
        for level, holder, tokens in self.promoter.take_lock_changes():
            self._hold(level, self._sessions[holder], holder, tokens)

    def _hold(self, level: Level, session: int, holder: str, tokens: int) -> None:
        """A holder protects this much of a session; the level keeps what any of them needs."""
        mine = self._by_session.setdefault((level, session), {})
        if tokens:
            mine[holder] = tokens
        else:
            mine.pop(holder, None)
        store = self._worker.device if level is Level.DEVICE else self._worker.host
        store.keep(session, max(mine.values(), default=0))
        if not mine:
            del self._by_session[level, session]

    def check(self) -> None:
        self.promoter.check()
