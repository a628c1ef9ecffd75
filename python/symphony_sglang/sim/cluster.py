"""Workers, a router and users together: one simulated run."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field

from symphony_sglang.core.levels import Level, page_floor
from symphony_sglang.sim.hardware import Speeds
from symphony_sglang.sim.loop import EventLoop
from symphony_sglang.sim.placement import Placement
from symphony_sglang.sim.promotion import Promotions
from symphony_sglang.sim.users import Asker, Turn, User, UserRules
from symphony_sglang.sim.worker import Features, SimRequest, SimWorker


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
    moved_bytes: int = 0
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
            self.loop, rules.policy, rules.page_size, seed=rules.seed, migrate=rules.migrate
        )
        self.workers: dict[str, SimWorker] = {}
        for number in range(rules.workers):
            self._add_worker(f"worker-{number}")
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
        if rules.session_rate:
            self._arrive()
        for user in self.users:
            self._start(user, self._draw.uniform(0.0, ramp))
        self.loop.after(1.0, self._sample)
        self.loop.run(self.rules.seconds)
        horizon = self.rules.seconds
        while self._open and horizon < 20 * self.rules.seconds:
            horizon += self.rules.seconds / 4
            self.loop.run(horizon)
        return self.requests

    def _start(self, user: Asker, due_seconds: float) -> None:
        """A user's first turn; one met midway finds what was said before on a worker's levels."""
        step = user.next_turn()
        if step is None:
            return
        turn = step[0]
        if turn.turn:
            workers = list(self.workers.values())
            worker = workers[user.number % len(workers)]
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
        decision = self.placement.route(request)
        worker = self.workers[decision.worker_id]
        prepared = self._prepared.pop(turn.session, None)
        if prepared is not None and prepared is not worker and prepared.promotions is not None:
            prepared.promotions.withdraw(turn.session)
        if decision.pull is not None and self.rules.migrate:
            self.counts.pulls += 1
            source = self.workers[decision.pull.source_worker_id]
            done = self._copy(source, worker, turn.session)
            self.loop.at(done, self._arrive_copied, request, worker, source)
        else:
            worker.submit(request)

    def _arrive_copied(self, request: SimRequest, worker: SimWorker, source: SimWorker) -> None:
        request.peer_tokens = self._land(source, worker, request.session)
        worker.submit(request)

    def _ended(self, request: SimRequest) -> None:
        self._open -= 1
        self.requests.append(request)
        self.placement.ended(request)
        self.placement.turn_ended(request)
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
        target = self.workers[choice.worker_id]
        source_id = choice.source_worker_id
        if source_id is not None and source_id != choice.worker_id and not self.rules.migrate:
            target = self.workers[source_id]
        if source_id in (None, target.name):
            ready = self.loop.now_seconds + choice.cost.bring
            self.placement.promised(session, target.name, tokens, ready)
            self._promote(target, session, tokens)
            return
        assert source_id is not None
        source = self.workers[source_id]
        self.counts.moves += 1
        done = self._copy(source, target, session)
        self.placement.promised(session, target.name, tokens, done)
        self.loop.at(done, self._moved, source, target, session, tokens)

    def _copy(self, source: SimWorker, target: SimWorker, session: int) -> float:
        """Queue the copy on both ends' networks; from NVMe it is read first."""
        held = max(source.host.tokens(session), source.nvme.tokens(session))
        have = max(target.host.tokens(session), target.nvme.tokens(session))
        missing = max(0, held - have)
        size = missing * source.speeds.token_bytes
        self.counts.moved_bytes += size
        ready = 0.0
        on_disk = max(0, held - source.host.tokens(session))
        if on_disk:
            ready = source.disk.reserve(on_disk * source.speeds.token_bytes)
        sent = source.network.reserve(size, not_before_seconds=ready)
        done = max(sent, target.network.reserve(size, not_before_seconds=ready))
        for worker in (source, target):
            worker.transfers_until_seconds = max(worker.transfers_until_seconds, done)
        return done

    def _land(self, source: SimWorker, target: SimWorker, session: int) -> int:
        """The copied pages are in the target's host memory, and on their way to its disk."""
        held = max(source.host.tokens(session), source.nvme.tokens(session))
        before = target.host.tokens(session)
        after = target.host.grow(session, held)
        target.nvme.grow(session, held)
        return max(0, after - before)

    def _moved(self, source: SimWorker, target: SimWorker, session: int, tokens: int) -> None:
        self._land(source, target, session)
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
        for worker in self.workers.values():
            worker.check()
            if worker.promotions is not None:
                worker.promotions.check()
        self.placement.check()
