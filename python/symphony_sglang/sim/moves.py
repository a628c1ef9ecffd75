"""KV between simulated workers: copies over the network, and the product's own plan of moves.

What moves is decided by `core.migration_policy`, as in the router: at an advisory that chose
another worker, and once a second where load is uneven. A session that moves stays its source's
until the copy is through and no turn runs; a request that comes meanwhile is served by the source.
Sessions share no pages here, so copies of hot prefixes are never called for.
"""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from symphony_sglang.core.migration_policy import (
    AdvisedMove,
    Link,
    MigrationLimits,
    MovableSession,
    Node,
    PlannedMove,
    plan_migrations,
)
from symphony_sglang.core.migration_policy import Cluster as Fleet
from symphony_sglang.core.routing_types import AdvisoryChoice, Decision
from symphony_sglang.sim.loop import EventLoop
from symphony_sglang.sim.placement import Placement
from symphony_sglang.sim.worker import SimWorker

# The router's: work is summed over the last half minute, of which less than two seconds is chance.
LIMITS = MigrationLimits(imbalance_seconds=2.0)
WORK_HALF_LIFE_SECONDS = 30.0
# Reserving, verifying and switching take the router and the workers about this long.
OVERHEAD_SECONDS = 0.02
ROUND_SECONDS = 1.0
# A request waits for a pull no longer than this, as the router's does.
PULL_WAIT_SECONDS_MAX = 10.0


class Copy(NamedTuple):
    """Tokens `start_tokens:stop_tokens` of a session, at the target from `done_seconds` on."""

    done_seconds: float
    start_tokens: int
    stop_tokens: int


class Transfers:
    """Copies of a session's pages from one worker to another."""

    def __init__(self, loop: EventLoop, placement: Placement) -> None:
        self._loop = loop
        self._placement = placement
        self.bytes = 0  # that left a source
        self.read_bytes = 0  # of those, that had to be read from the source's NVMe
        self.landed_bytes = 0  # that a target had no copy of when they came

    def copy(self, source: SimWorker, target: SimWorker, session: int) -> Copy:
        """Queue the copy on both ends' networks; from NVMe it is read first."""
        held = max(source.host.tokens(session), source.nvme.tokens(session))
        have = max(target.host.tokens(session), target.nvme.tokens(session))
        size = max(0, held - have) * source.speeds.token_bytes
        self.bytes += size
        ready = 0.0
        on_disk = max(0, held - source.host.tokens(session))
        if on_disk:
            read = on_disk * source.speeds.token_bytes
            self.read_bytes += read
            ready = source.disk.reserve(read)
        sent = source.network.reserve(size, not_before_seconds=ready)
        done = max(sent, target.network.reserve(size, not_before_seconds=ready))
        for worker in (source, target):
            worker.transfers_until_seconds = max(worker.transfers_until_seconds, done)
        self._placement.transferring(source.name, target.name)
        return Copy(done, min(have, held), held)

    def land(self, copy: Copy, target: SimWorker, session: int) -> int:
        """The copied pages are on the target's disk, and in its host memory if what precedes them
        is there; gives how many tokens that added there."""
        on_host = target.host.tokens(session)
        before = max(on_host, target.nvme.tokens(session))
        if before < copy.start_tokens:
            return 0  # what they follow is gone
        target.nvme.grow(session, copy.stop_tokens)
        after = on_host
        if on_host >= copy.start_tokens:
            after = target.host.grow(session, copy.stop_tokens)
        self.landed_bytes += max(0, copy.stop_tokens - before) * target.speeds.token_bytes
        return max(0, after - on_host)


@dataclass(slots=True)
class MovingSession:
    """A planned move under way; `held` is one whose copy is through while a turn runs."""

    planned: PlannedMove
    held: bool = False


class SessionMoves:
    """Asks the product's planner, and carries out what it plans."""

    def __init__(
        self,
        loop: EventLoop,
        placement: Placement,
        workers: Mapping[str, SimWorker],
        transfers: Transfers,
        arrived: Callable[[PlannedMove], None],
        limits: MigrationLimits = LIMITS,
    ) -> None:
        """`arrived` hears of every move that has switched its session to the target."""
        self._loop = loop
        self._placement = placement
        self._workers = workers
        self._transfers = transfers
        self._arrived = arrived
        self._limits = limits
        self._moving: dict[int, MovingSession] = {}
        self._moved_at: dict[int, float] = {}
        self._turns: Counter[int] = Counter()  # that run, by session
        self._in_flight: Counter[Link] = Counter()
        self._work = WorkShares()
        self.by_cause: Counter[str] = Counter()
        loop.after(ROUND_SECONDS, self._round)

    # What happens -------------------------------------------------------------------------------

    def early(self, session: int) -> str | None:
        """The worker that must serve a request now because its session moves; None: any may."""
        moving = self._moving.get(session)
        return None if moving is None else moving.planned.source_id

    def turn_started(self, session: int, decision: Decision) -> None:
        self._turns[session] += 1
        cost = decision.cost
        seconds = cost.recompute + cost.bring + cost.pull
        self._work.add(session, decision.worker_id, seconds, self._loop.now_seconds)

    def turn_ended(self, session: int, worker_id: str) -> None:
        self._turns[session] -= 1
        if not self._turns[session]:
            del self._turns[session]
        self._work.now_at(session, worker_id)
        moving = self._moving.get(session)
        if moving is not None and moving.held:
            moving.held = False
            self._copy(moving)  # what the turn added follows

    def forget(self, session: int) -> None:
        """The session is over: what of it is under way is of no use."""
        self._work.forget(session)
        self._moved_at.pop(session, None)
        moving = self._moving.pop(session, None)
        if moving is not None:
            self._settle(moving.planned)

    # Plans --------------------------------------------------------------------------------------

    def advise(self, session: int, tokens: int, choice: AdvisoryChoice) -> PlannedMove | None:
        """Begin the move that an advisory's choice calls for; None: the session stays."""
        owner = self._placement.owner(session)
        if owner is None or owner == choice.worker_id:
            return None
        moving = self._moving.get(session)
        if moving is not None:
            return moving.planned if moving.planned.target_id == choice.worker_id else None
        # Where a third worker has more of it than its owner, the owner's copy is not what to move.
        if choice.source_worker_id not in (None, owner):
            return None
        gain = math.inf
        for other in choice.alternatives:
            if other.worker_id == owner:
                gain = other.cost.total - choice.cost.total
        plan = plan_migrations(
            Fleet(
                nodes=[Node(name, 0.0, self._room(name)) for name in self._workers],
                sessions=[self._session(session, owner, tokens, 0.0)],
                advised=[AdvisedMove(str(session), choice.worker_id, gain)],
                in_flight=self._in_flight,
                demand=self._demand(),
            ),
            self._limits,
        )
        for planned in plan.moves:
            self._begin(planned)
            return planned
        return None

    def _round(self) -> None:
        """Once a second: sessions leave workers that have far more to do than the median."""
        loads = self._loads()
        middle, limits = statistics.median(loads.values()), self._limits
        bound = max(middle * limits.imbalance_ratio, middle + limits.imbalance_seconds)
        if len(loads) > 1 and max(loads.values()) > bound:
            plan = plan_migrations(
                Fleet(
                    nodes=[Node(name, load, self._room(name)) for name, load in loads.items()],
                    sessions=self._sessions({name for name in loads if loads[name] > middle}),
                    in_flight=self._in_flight,
                    demand=self._demand(),
                    moving=frozenset(str(session) for session in self._moving),
                ),
                limits,
            )
            for planned in plan.moves:
                self._begin(planned)
        self._loop.after(ROUND_SECONDS, self._round)

    def _loads(self) -> dict[str, float]:
        """Seconds of work at each worker, lately, and what waits there now."""
        now = self._loop.now_seconds
        loads = {}
        for view in self._placement.views():
            prefill = view.rates.prefill
            assert prefill is not None
            waiting = view.load.tokens_waiting_uncached / prefill.tokens_per_second
            loads[view.worker_id] = waiting + self._work.of_worker(view.worker_id, now)
        return loads

    def _sessions(self, owners: set[str]) -> list[MovableSession]:
        """The sessions of workers that may have too much to do."""
        now = self._loop.now_seconds
        found = []
        for session, work_seconds in self._work.sessions(owners, now):
            place = self._placement.index.session(str(session))
            if place is not None:
                found.append(
                    self._session(session, place.worker_id, place.total_tokens, work_seconds)
                )
        return found

    def _session(
        self, session: int, owner: str, tokens: int, work_seconds: float
    ) -> MovableSession:
        now = self._loop.now_seconds
        moved_at = self._moved_at.get(session, -math.inf)
        return MovableSession(
            session_id=str(session),
            worker_id=owner,
            tokens=tokens,
            bytes=tokens * self._workers[owner].speeds.token_bytes,
            work_seconds=work_seconds,
            advised=self._placement.is_advised(session),
            busy=self._turns[session] > 0,
            idle_seconds=self._work.idle_seconds(session, now),
            moved_ago_seconds=now - moved_at,
        )

    def _room(self, name: str) -> int:
        """What copies may fill: half of the lowest level, as the router has it."""
        worker = self._workers[name]
        lowest = worker.nvme.capacity_tokens or worker.host.capacity_tokens
        return lowest * worker.speeds.token_bytes // 2

    def _demand(self) -> frozenset[str]:
        """Workers on which requests wait."""
        return frozenset(
            name for name, worker in self._workers.items() if worker.waiting or worker.fetching
        )

    # Carrying out -------------------------------------------------------------------------------

    def _begin(self, planned: PlannedMove) -> None:
        moving = MovingSession(planned)
        self._moving[int(planned.session_id)] = moving
        self._in_flight[planned.source_id, planned.target_id] += planned.bytes
        self.by_cause[planned.cause.value] += 1
        self._copy(moving)

    def _copy(self, moving: MovingSession) -> None:
        planned = moving.planned
        source, target = self._workers[planned.source_id], self._workers[planned.target_id]
        copy = self._transfers.copy(source, target, int(planned.session_id))
        self._loop.at(copy.done_seconds + OVERHEAD_SECONDS, self._copied, moving, copy)

    def _copied(self, moving: MovingSession, copy: Copy) -> None:
        planned = moving.planned
        session = int(planned.session_id)
        if self._moving.get(session) is not moving:
            return  # the session is over
        self._transfers.land(copy, self._workers[planned.target_id], session)
        if self._turns[session]:
            moving.held = True
            return
        del self._moving[session]
        self._settle(planned)
        self._moved_at[session] = self._loop.now_seconds
        self._work.now_at(session, planned.target_id)
        self._placement.moved(session, planned.target_id, planned.tokens)
        self._arrived(planned)

    def _settle(self, planned: PlannedMove) -> None:
        link = (planned.source_id, planned.target_id)
        self._in_flight[link] -= planned.bytes
        if not self._in_flight[link]:
            del self._in_flight[link]

    def check(self) -> None:
        """What is in flight is what moves; nobody has less than no work."""
        counted: Counter[Link] = Counter()
        for moving in self._moving.values():
            planned = moving.planned
            counted[planned.source_id, planned.target_id] += planned.bytes
        assert counted == self._in_flight, (counted, self._in_flight)
        assert sum(self.by_cause.values()) >= len(self._moved_at)
        self._work.check()


class WorkShares:
    """Seconds of work that sessions brought lately, by session and by worker; it halves with time.

    Kept in the money of time zero, so that nothing has to be aged: a second of work at time t
    counts 2^(t / half-life), and the sums are divided by what a second counts now.
    """

    def __init__(self) -> None:
        self._sessions: dict[int, tuple[float, str, float]] = {}  # work, worker, last seen
        self._workers: dict[str, float] = {}
        self._largest = 0.0  # that any worker had: sums are as exact as that
        self._zero_seconds = 0.0

    def _worth(self, now_seconds: float) -> float:
        """What a second counts now; the zero moves on before numbers become too large."""
        exponent = (now_seconds - self._zero_seconds) / WORK_HALF_LIFE_SECONDS
        if exponent > 100:
            scale = math.exp2(-exponent)
            for session, (work, worker_id, seen) in self._sessions.items():
                self._sessions[session] = (work * scale, worker_id, seen)
            for worker_id in self._workers:
                self._workers[worker_id] *= scale
            self._largest *= scale
            self._zero_seconds, exponent = now_seconds, 0.0
        return math.exp2(exponent)

    def add(self, session: int, worker_id: str, seconds: float, now_seconds: float) -> None:
        self.now_at(session, worker_id)
        more = seconds * self._worth(now_seconds)
        work = self._sessions[session][0] if session in self._sessions else 0.0
        self._sessions[session] = (work + more, worker_id, now_seconds)
        self._give(worker_id, more)

    def _give(self, worker_id: str, work: float) -> None:
        total = self._workers.get(worker_id, 0.0) + work
        self._workers[worker_id] = total
        self._largest = max(self._largest, total)

    def now_at(self, session: int, worker_id: str) -> None:
        """The session's work is this worker's from now on."""
        known = self._sessions.get(session)
        if known is not None and known[1] != worker_id:
            work, old, seen = known
            self._give(old, -work)
            self._give(worker_id, work)
            self._sessions[session] = (work, worker_id, seen)

    def forget(self, session: int) -> None:
        work, worker_id, _ = self._sessions.pop(session, (0.0, "", 0.0))
        if worker_id:
            self._give(worker_id, -work)

    def of_worker(self, worker_id: str, now_seconds: float) -> float:
        return self._workers.get(worker_id, 0.0) / self._worth(now_seconds)

    def sessions(self, worker_ids: set[str], now_seconds: float) -> list[tuple[int, float]]:
        worth = self._worth(now_seconds)
        return [
            (session, work / worth)
            for session, (work, worker_id, _) in self._sessions.items()
            if worker_id in worker_ids
        ]

    def idle_seconds(self, session: int, now_seconds: float) -> float:
        known = self._sessions.get(session)
        return 0.0 if known is None else now_seconds - known[2]

    def check(self) -> None:
        sums: dict[str, float] = {}
        for work, worker_id, _ in self._sessions.values():
            assert work >= 0.0
            sums[worker_id] = sums.get(worker_id, 0.0) + work
        for worker_id, work in self._workers.items():
            assert math.isclose(work, sums.get(worker_id, 0.0), abs_tol=1e-6 * self._largest)
