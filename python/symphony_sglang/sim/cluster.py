"""Workers, a router and users together: one simulated run."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field

from symphony_sglang.core.levels import Hop, Level, page_floor
from symphony_sglang.core.migration_policy import PlannedMove
from symphony_sglang.sim.hardware import Speeds
from symphony_sglang.sim.loop import EventLoop
from symphony_sglang.sim.moves import PULL_WAIT_SECONDS_MAX, Copy, SessionMoves, Transfers
from symphony_sglang.sim.placement import Placement
from symphony_sglang.sim.promotion import Promotions
from symphony_sglang.sim.users import Asker, Turn, User, UserRules
from symphony_sglang.sim.worker import Features, SimRequest, SimWorker

# What is under way when the time is over may take this many times as long to end.
DRAIN_FACTOR_MAX = 20


@dataclass(frozen=True, slots=True)
class AdviceMix:
    """Which advisories are sent, when the user starts to type.

    `oracle_lead_seconds` instead sends each just so long before its turn, which nobody can know.
    """

    missing_share: float = 0.0
    false_share: float = 0.0
    oracle_lead_seconds: float | None = None
    expires_seconds: float = 60.0


@dataclass(frozen=True, slots=True)
class RunRules:
    """One run of one arm."""

    name: str
    workers: int
    speeds: Speeds
    features: Features
    users: UserRules
    policy: str
    seconds: float
    advice: AdviceMix | None = None
    migrate: bool = False
    plan_moves: bool = False  # by the router's planner; else every advisory's choice is carried out
    ramp_seconds: float | None = None  # over which users arrive; None: one mean pause
    page_size: int = 256
    protect_device: float = 0.3
    protect_host: float = 0.5
    seed: int = 0


@dataclass(slots=True)
class RunCounts:
    """What the router and the users did."""

    advisories: int = 0
    false_advisories: int = 0
    advisories_left_out: int = 0
    moves: int = 0
    pulls: int = 0
    loads: list[list[int]] = field(default_factory=list)  # requests at each worker, each second


class Cluster:
    """Builds everything from its rules; `run` gives the requests that ended."""

    def __init__(self, rules: RunRules, users: Sequence[Asker] | None = None) -> None:
        """`users` instead of those that the rules describe, e.g. recorded ones."""
        self.rules = rules
        self.loop = EventLoop()
        self.counts = RunCounts()
        self.requests: list[SimRequest] = []
        self.placement = Placement(
            self.loop,
            rules.policy,
            rules.page_size,
            workers=rules.workers,
            break_even=rules.features.break_even,
            seed=rules.seed,
            migrate=rules.migrate,
        )
        self.workers: dict[str, SimWorker] = {}
        self.transfers = Transfers(self.loop, self.placement)
        self.moves: SessionMoves | None = None
        for number in range(rules.workers):
            self._add_worker(f"worker-{number}")
        if rules.migrate and rules.plan_moves:
            self.moves = SessionMoves(
                self.loop, self.placement, self.workers, self.transfers, self._moved
            )
        closed = 0 if rules.users.session_rate else rules.users.users
        self.users: list[Asker] = (
            [User(number, rules.users, rules.seed) for number in range(closed)]
            if users is None
            else list(users)
        )
        self._draw = random.Random(f"cluster/{rules.seed}")
        self._made = 0
        self._advisories = 0
        self._user_of: dict[int, Asker] = {}
        self._prepared: dict[int, SimWorker] = {}  # where a session was last advised
        self._open = 0

    def _add_worker(self, name: str) -> None:
        rules = self.rules

        def changed(level: Level, session: int, before: int, after: int) -> None:
            self.placement.changed(name, level, session, before, after)

        worker = SimWorker(
            name,
            self.loop,
            rules.speeds,
            rules.features,
            rules.page_size,
            changed,
            self._ended,
            first_token=self.placement.first_token,
        )
        if rules.advice is not None or rules.features.protect_queued:
            worker.promotions = Promotions(
                worker,
                self.loop,
                protect_device=rules.protect_device,
                protect_host=rules.protect_host,
            )
        self.workers[name] = worker
        self.placement.add(worker)

    # Users --------------------------------------------------------------------------------------

    def run(self) -> list[SimRequest]:
        """Simulate; users stop asking when the time is over, and what is under way ends."""
        rules = self.rules.users
        ramp = self.rules.ramp_seconds
        if ramp is None:
            ramp = rules.reading_seconds + rules.typing_seconds
        for user in self.users:
            self._start(user, self._draw.uniform(0.0, ramp))
        if rules.session_rate:
            self._arrive()
        self.loop.after(1.0, self._sample)
        self.loop.run(self.rules.seconds)
        self.loop.run(DRAIN_FACTOR_MAX * self.rules.seconds, lambda: not self._open)
        return self.requests

    def _start(self, user: Asker, due_seconds: float) -> None:
        """A user's first turn; one met midway finds what was said before on a worker's levels."""
        step = user.next_turn()
        if step is None:
            return
        turn = step[0]
        if turn.turn:
            workers = list(self.workers.values())
            place = user.number
            if self.rules.users.chance_homes:
                place = random.Random(f"home/{self.rules.seed}/{user.number}").randrange(1 << 30)
            worker = workers[place % len(workers)]
            worker.remember(turn.session, turn.history_tokens, turn.turn)
            self.placement.remembered(turn.session, turn.history_tokens, worker.name)
        self._ask_at(user, turn, due_seconds if user.start_seconds is None else user.start_seconds)

    def _arrive(self) -> None:
        """Open loop: the next conversation begins after a gamma-distributed gap."""
        rules = self.rules.users
        spread = rules.arrival_variation**2
        gap = self._draw.gammavariate(1 / spread, spread / rules.session_rate)
        due = self.loop.now_seconds + gap
        if due < self.rules.seconds:
            user = User(len(self.users), rules, self.rules.seed)
            self.users.append(user)
            self._start(user, due)
            self.loop.at(due, self._arrive)

    def _sample(self) -> None:
        self.counts.loads.append(
            [
                len(worker.running) + len(worker.waiting) + len(worker.fetching)
                for worker in self.workers.values()
            ]
        )
        if self.loop.now_seconds < self.rules.seconds:
            self.loop.after(1.0, self._sample)

    def _ask_at(self, user: Asker, turn: Turn, due_seconds: float) -> None:
        self._user_of[turn.session] = user
        advice = self.rules.advice
        if advice is not None and turn.turn > 0 and turn.lead_seconds is not None:
            lead = turn.lead_seconds
            if advice.oracle_lead_seconds is not None:
                lead = min(advice.oracle_lead_seconds, turn.think_seconds)
            self.loop.at(max(self.loop.now_seconds, due_seconds - lead), self._advise, user, turn)
        self.loop.at(due_seconds, self._send, user, turn, due_seconds)

    def _send(self, user: Asker, turn: Turn, due_seconds: float) -> None:
        if due_seconds >= self.rules.seconds:
            return
        self._made += 1
        request = SimRequest(
            number=self._made,
            session=turn.session,
            turn=turn.turn,
            prompt_tokens=user.context_tokens,
            reusable_tokens=turn.history_tokens,
            answer_tokens=turn.answer_tokens,
            due_seconds=due_seconds,
        )
        self._open += 1
        early = None if self.moves is None else self.moves.early(turn.session)
        decision = self.placement.route(request, early)
        if self.moves is not None:
            self.moves.turn_started(turn.session, decision)
        worker = self.workers[decision.worker_id]
        prepared = self._prepared.pop(turn.session, None)
        if prepared is not None and prepared is not worker and prepared.promotions is not None:
            prepared.promotions.withdraw(turn.session)
        pull = decision.pull
        if pull is not None and self.rules.migrate and early is None:
            self.counts.pulls += 1
            source = self.workers[pull.source_worker_id]
            copy = self.transfers.copy(source, worker, turn.session)
            wait = min(pull.pull_seconds + pull.saved_seconds, PULL_WAIT_SECONDS_MAX)
            if copy.done_seconds - self.loop.now_seconds <= wait:
                self.loop.at(copy.done_seconds, self._arrive_copied, request, worker, copy)
            else:
                # What comes after that is of no use: the request computes.
                self.loop.after(wait, worker.submit, request)
        else:
            worker.submit(request)

    def _arrive_copied(self, request: SimRequest, worker: SimWorker, copy: Copy) -> None:
        request.peer_tokens = self.transfers.land(copy, worker, request.session)
        worker.submit(request)

    def _ended(self, request: SimRequest) -> None:
        self._open -= 1
        self.requests.append(request)
        self.placement.ended(request)
        self.placement.turn_ended(request)
        if self.moves is not None:
            self.moves.turn_ended(request.session, request.worker)
        user = self._user_of[request.session]
        user.answered(request.answer_tokens)
        step = user.next_turn()
        if step is None:
            self._forget(request.session)
            return
        turn, over = step
        if over is not None:
            self._forget(over)
        self._ask_at(user, turn, self.loop.now_seconds + turn.think_seconds)

    def _forget(self, session: int) -> None:
        self.placement.forget(session)
        if self.moves is not None:
            self.moves.forget(session)
        self._user_of.pop(session, None)
        self._prepared.pop(session, None)

    # Advisories ---------------------------------------------------------------------------------

    def _advise(self, user: Asker, turn: Turn) -> None:
        advice = self.rules.advice
        assert advice is not None
        if self._draw.random() < advice.missing_share:
            self.counts.advisories_left_out += 1
        else:
            self._advise_session(turn.session, turn.history_tokens)
        extra = advice.false_share / (1.0 - advice.false_share)
        for _ in range(int(extra) + (self._draw.random() < extra - int(extra))):
            other = self._draw.choice(self.users)
            if other is not user and other.history_tokens:
                self.counts.false_advisories += 1
                self._advise_session(other.session, other.history_tokens)

    def _advise_session(self, session: int, tokens: int) -> None:
        self.counts.advisories += 1
        tokens = page_floor(tokens, self.rules.page_size)
        if not tokens:
            return
        choice = self.placement.advise(session, tokens)
        target, source_id = self.workers[choice.worker_id], choice.source_worker_id
        if self.moves is not None:
            planned = self.moves.advise(session, tokens, choice)
            if planned is not None:
                self._expect_moved(planned)
                return
            owner = self.placement.owner(session)
            target = target if owner is None else self.workers[owner]
        elif source_id is not None and source_id != target.name:
            if self.rules.migrate:
                self._move_at_once(self.workers[source_id], target, session, tokens)
                return
            target = self.workers[source_id]
        ready = self.loop.now_seconds + choice.bring_seconds
        self.placement.promised(session, target.name, tokens, ready)
        self._promote(target, session, tokens)

    def _expect_moved(self, planned: PlannedMove) -> None:
        """Its next turn goes to the target, when the copy is through."""
        target = self.workers[planned.target_id]
        ready = max(self.loop.now_seconds, target.transfers_until_seconds)
        self.placement.promised(int(planned.session_id), target.name, planned.tokens, ready)

    def _moved(self, planned: PlannedMove) -> None:
        """A planned move has switched: what was promised there can be brought up."""
        session = int(planned.session_id)
        self.counts.moves += 1
        if self.placement.is_promised(session, planned.target_id):
            self._promote(self.workers[planned.target_id], session, planned.tokens)

    def _move_at_once(
        self, source: SimWorker, target: SimWorker, session: int, tokens: int
    ) -> None:
        """The paper's way: the choice made at the advisory is carried out, whatever it costs."""
        self.counts.moves += 1
        copy = self.transfers.copy(source, target, session)
        self.placement.promised(session, target.name, tokens, copy.done_seconds)
        self.loop.at(copy.done_seconds, self._moved_at_once, copy, target, session, tokens)

    def _moved_at_once(self, copy: Copy, target: SimWorker, session: int, tokens: int) -> None:
        self.transfers.land(copy, target, session)
        if self.placement.is_promised(session, target.name):
            self._promote(target, session, tokens)

    def _promote(self, worker: SimWorker, session: int, tokens: int) -> None:
        assert self.rules.advice is not None
        if worker.promotions is None:
            return
        self._advisories += 1
        self._prepared[session] = worker
        worker.promotions.advise(
            f"a{self._advisories}", session, tokens, self.rules.advice.expires_seconds
        )

    def _check_bytes(self) -> None:
        """What went over each hop is what requests, promotions and copies asked for there."""
        workers, size = list(self.workers.values()), self.rules.speeds.token_bytes
        under_way = [
            request for worker in workers for request in (*worker.running, *worker.waiting)
        ]
        under_way += [request for worker in workers for request in worker.fetching.values()]
        requests = [*self.requests, *under_way]
        begun = [worker.promotions.begun_bytes for worker in workers if worker.promotions]
        loaded = size * sum(request.loaded_tokens for request in requests)
        fetched = size * sum(request.fetched_tokens for request in requests)
        if not any(worker.is_busy for worker in workers):
            promoted = sum(hops[Hop.HOST_TO_DEVICE] for hops in begun)
            assert sum(worker.link.bytes for worker in workers) == loaded + promoted
        staged = sum(hops[Hop.NVME_TO_HOST] for hops in begun) + self.transfers.read_bytes
        assert sum(worker.disk.bytes for worker in workers) == fetched + staged
        sent = self.transfers.bytes
        assert sum(worker.network.bytes for worker in workers) == 2 * sent
        assert 0 <= self.transfers.landed_bytes <= sent

    def check(self) -> None:
        """Conservation: each request ended once, and every worker's books balance."""
        numbers = [request.number for request in self.requests]
        assert len(set(numbers)) == len(numbers)
        assert len(numbers) + self._open == self._made, (len(numbers), self._open, self._made)
        for request in self.requests:
            found = request.device_tokens + request.host_tokens + request.nvme_tokens
            assert found + request.computed_tokens == request.prompt_tokens, request
            assert request.produced == request.answer_tokens, request
            assert request.due_seconds <= request.first_token_seconds <= request.ended_seconds
        self._check_bytes()
        for worker in self.workers.values():
            worker.check()
            if worker.promotions is not None:
                worker.promotions.check()
        self.placement.check()
        if self.moves is not None:
            self.moves.check()
