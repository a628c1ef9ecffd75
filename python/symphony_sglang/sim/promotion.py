"""The product's promoter inside a simulated worker: its plans move simulated bytes.

It counts in pages here, a page for a token: nothing that it decides is finer, and a prefix of some
hundred bytes is compared faster than one of fifty thousand.
"""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from typing import NamedTuple

from symphony_sglang.core.gate import OPEN_GATE, Rate
from symphony_sglang.core.levels import Hop, Level, Target
from symphony_sglang.core.lifecycle import AdviseRequest, BookLimits, Receipt, State
from symphony_sglang.core.moves import Move, MoveResult
from symphony_sglang.core.prefix import TOKEN_BYTES, Namespace, Prefix
from symphony_sglang.core.promoter import Promoter, StepInputs
from symphony_sglang.core.promotion import Demand, PlannerLimits
from symphony_sglang.sim.loop import EventLoop
from symphony_sglang.sim.worker import SimRequest, SimWorker

QUEUE_HOLD_SECONDS = 30.0
RETRY_SECONDS = 1.0
EXPIRY_SECONDS = 5.0  # nobody notices sooner that an advisory has expired
LOAD_HOLDER = "load"


@lru_cache(maxsize=4096)
def page_bytes(pages: int) -> bytes:
    return bytes(TOKEN_BYTES * pages)


def session_prefix(session: int, pages: int) -> Prefix:
    """Equal sessions have equal heads, others none: the namespace says so, not the content."""
    return Prefix(Namespace(str(session)), page_bytes(pages))


def in_pages(rate: Rate | None, page_size: int) -> Rate | None:
    """A rate in pages a second."""
    return rate and Rate(rate.tokens_per_second / page_size, rate.latency_seconds)


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
        self._page = page = worker.page_size
        self.promoter = Promoter(
            device_cap_tokens=int(protect_device * worker.device.capacity_tokens) // page,
            host_cap_tokens=int(protect_host * worker.host.capacity_tokens) // page,
            planner=PlannerLimits(page_size=1),
            book=BookLimits(),
        )
        gate = worker.gate if worker.features.gate else OPEN_GATE
        self._gate = replace(
            gate,
            nvme_to_host=in_pages(gate.nvme_to_host, page),
            host_to_device=in_pages(gate.host_to_device, page),
            prefill=in_pages(gate.prefill, page),
        )
        self._by_session: dict[tuple[Level, int], dict[str, int]] = {}
        self._sessions: dict[str, int] = {}  # advisory -> session
        self._held_requests: set[str] = set()
        self._flights: dict[int, LoadFlight] = {}
        self._step_due = False
        self._watching = False
        self._behind = False  # the last plan left something to do when a slot or a request goes
        self.begun_bytes = {Hop.NVME_TO_HOST: 0, Hop.HOST_TO_DEVICE: 0}

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
            session_prefix(session, tokens // self._page),
            self._loop.now_seconds,
        )
        # Looked up at once: the step that follows would ask for that first, at the same instant.
        self._observe(receipt.advisory_id)
        self.step_soon()
        return receipt

    def withdraw(self, session: int) -> None:
        """The session's next turn went to another worker."""
        self.promoter.cancel_session(str(session), self._loop.now_seconds)
        self._apply_locks()

    def request_arrived(self, request: SimRequest, device: int, host: int) -> None:
        """A request's first look-up, as the engine reports it."""
        now, page = self._loop.now_seconds, self._page
        prefix = session_prefix(request.session, request.prompt_tokens // page)
        device, host = device // page, host // page
        if self._worker.features.protect_queued and (device or host):
            name = str(request.number)
            self._sessions[f"request:{name}"] = request.session
            self._held_requests.add(name)
            self.promoter.hold_request(name, prefix, device, host, now + QUEUE_HOLD_SECONDS, now)
        receipts = self.promoter.arrived(
            str(request.session), prefix.namespace, prefix.token_bytes, device, host, now
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
        pages = -(-tokens // self._page)
        self.promoter.give_way(Level.DEVICE, pages, self._loop.now_seconds)
        self._apply_locks()
        return before - self._worker.device.floor_tokens

    # The step -----------------------------------------------------------------------------------

    def step_soon(self) -> None:
        """One step after all that happens at this instant."""
        if not self._step_due and len(self.promoter.book):
            self._step_due = True
            self._loop.after(0.0, self.step)

    def requests_admitted(self) -> None:
        """No request waits any more: what was put off for them may go on."""
        if self._behind:
            self.step_soon()

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
        moved = bool(plan.stages or plan.loads)
        self._behind = bool(plan.deferrals) or (moved and not self._is_all_under_way())
        if not self._watching and len(self.promoter.book):
            self._watching = True
            self._loop.after(RETRY_SECONDS if self._behind else EXPIRY_SECONDS, self._watch)

    def _is_all_under_way(self) -> bool:
        """Whether every advisory is ready, or has a move in flight."""
        return all(
            view.state is State.READY or view.loading or view.staging
            for view in self.promoter.book.views()
        )

    def _watch(self) -> None:
        """Come back while something may expire or be tried again."""
        self._watching = False
        self.step()

    def _inputs(self) -> StepInputs:
        worker, page = self._worker, self._page
        room = worker.device.capacity_tokens - worker.running_tokens - worker.device.floor_tokens
        return StepInputs(
            now_seconds=self._loop.now_seconds,
            device_room_tokens=room // page - len(worker.running),
            host_room_tokens=(worker.host.capacity_tokens - worker.host.floor_tokens) // page,
            demand=Demand(
                requests_waiting=len(worker.waiting),
                stages_pending=len(worker.fetching),
            ),
            gate=self._gate,
        )

    def _observe(self, advisory_id: str) -> None:
        advisory = self.promoter.book.get(advisory_id)
        if advisory is None or advisory.prefix is None:
            return
        session = self._sessions[advisory_id]
        worker, page = self._worker, self._page
        device = worker.device.tokens(session) // page
        host = max(0, worker.host.tokens(session) // page - device)
        stored = max(worker.nvme.tokens(session) // page, device + host)
        for level in (worker.device, worker.host):
            level.touch(session)
        self.promoter.observed(advisory_id, device, host, self._loop.now_seconds, stored)
        self._apply_locks()

    def _stage(self, move: Move) -> None:
        size = move.tokens * self._page * self._worker.speeds.token_bytes
        self.begun_bytes[Hop.NVME_TO_HOST] += size
        done = self._worker.disk.reserve(size)
        self._loop.at(done, self._staged, move, size)

    def _staged(self, move: Move, size: int) -> None:
        session = self._sessions[move.advisory_id]
        worker, page = self._worker, self._page
        stored = max(worker.nvme.tokens(session), worker.host.tokens(session)) // page
        wanted = min(move.stop_tokens, stored)
        reached = worker.host.grow(session, wanted * page) // page
        arrived = max(0, min(reached, move.stop_tokens) - move.start_tokens)
        result = MoveResult.DONE if reached >= move.stop_tokens else MoveResult.SHORT
        if reached < wanted:
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
        page_bytes = self._page * worker.speeds.token_bytes
        size = sum(pages for _, pages in landed) * page_bytes
        self.begun_bytes[Hop.HOST_TO_DEVICE] += size
        last = worker.link.reserve(size) if merged else 0.0
        first = start + (last - start) / worker.speeds.layers
        for move, pages in landed:
            if not merged:
                first = last = worker.link.reserve(pages * page_bytes)
            session = self._sessions[move.advisory_id]
            flight = LoadFlight(move.start_tokens * self._page, first, last)
            self._flights[session] = flight
            self._hold(Level.DEVICE, session, LOAD_HOLDER, move.start_tokens + pages)
            self._loop.at(last, self._loaded, move, pages, flight)

    def _publish(self, move: Move) -> int:
        """Take device memory for what is to be loaded; gives how many pages."""
        session = self._sessions[move.advisory_id]
        worker, page = self._worker, self._page
        below = max(worker.host.tokens(session), worker.device.tokens(session))
        room = worker.device.capacity_tokens - worker.running_tokens
        reached = worker.device.grow(session, min(move.stop_tokens * page, below), room=room)
        return max(0, min(reached // page, move.stop_tokens) - move.start_tokens)

    def _loaded(self, move: Move, pages: int, flight: LoadFlight) -> None:
        session = self._sessions[move.advisory_id]
        if self._flights.get(session) is flight:
            del self._flights[session]
            self._hold(Level.DEVICE, session, LOAD_HOLDER, 0)
        result = MoveResult.DONE if pages >= move.tokens else MoveResult.DECLINED
        size = pages * self._page * self._worker.speeds.token_bytes
        self._finished(move, result, pages, size)

    def flight(self, session: int) -> LoadFlight | None:
        """The load of this session that is under way."""
        return self._flights.get(session)

    def _finished(self, move: Move, result: MoveResult, pages: int, size: int) -> None:
        self.promoter.finished(
            move.advisory_id, move.hop, result, pages, size, self._loop.now_seconds
        )
        self._observe(move.advisory_id)
        advisory = self.promoter.book.get(move.advisory_id)
        # A step costs the same whether or not it finds anything to do.
        if self._behind or (
            advisory is not None and advisory.live and advisory.state is not State.READY
        ):
            self.step_soon()
        self._worker.wake()

    # Locks --------------------------------------------------------------------------------------

    def _apply_locks(self) -> None:
        for level, holder, pages in self.promoter.take_lock_changes():
            self._hold(level, self._sessions[holder], holder, pages)

    def _hold(self, level: Level, session: int, holder: str, pages: int) -> None:
        """A holder protects this much of a session; the level keeps what any of them needs."""
        mine = self._by_session.setdefault((level, session), {})
        if pages:
            mine[holder] = pages
        else:
            mine.pop(holder, None)
        store = self._worker.device if level is Level.DEVICE else self._worker.host
        store.keep(session, self._page * max(mine.values(), default=0))
        if not mine:
            del self._by_session[level, session]

    def check(self) -> None:
        self.promoter.check()
