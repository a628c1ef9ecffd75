"""Who moves where: the router's plan of moves and copies, made anew every round. Pure.

A round looks at the workers, the sessions, the hot shared prefixes and what is in flight, and plans
what may begin now. In this order, each within what is left of the budgets: sessions of draining
workers; sessions whose advisory chose another worker; sessions that even out load, advised and idle
ones first; the hottest shared prefixes to workers that have just joined; further copies of prefixes
that are asked for more than their holders should bear. Copies made by plan are dropped again when
they have cooled. Nothing here waits or remembers: what was planned comes back as in flight.
"""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import NamedTuple

from symphony_sglang.core.migration import MoveCause
from symphony_sglang.core.routing_types import WorkerState

Link = tuple[str, str]  # (source, target)


class MovableSession(NamedTuple):
    """A session as the plan sees it.

    `work_seconds` is the work that its turns bring to a worker, in the measure of
    `Node.load_seconds`. `busy`: a turn runs. `moved_ago_seconds` is inf for one that never moved.
    """

    session_id: str
    worker_id: str
    tokens: int
    bytes: int
    work_seconds: float
    advised: bool = False
    busy: bool = False
    idle_seconds: float = 0.0
    moved_ago_seconds: float = math.inf


class AdvisedMove(NamedTuple):
    """An advisory's choice of another worker; `gain_seconds` is what the move saves the turn."""

    session_id: str
    target_id: str
    gain_seconds: float


class Node(NamedTuple):
    """A worker: its load in seconds of work, and what it could take in.

    `room_bytes` is the host memory that copies may fill; `joined` says that it has just come up.
    """

    worker_id: str
    load_seconds: float
    room_bytes: int
    state: WorkerState = WorkerState.READY
    joined: bool = False


class HotPrefix(NamedTuple):
    """A head that several sessions share. `replicas` are holders that have it by plan."""

    page_hash: int
    tokens: int
    bytes: int
    requests_per_second: float
    holders: frozenset[str]
    replicas: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class Cluster:
    """All that a round looks at.

    Attributes:
        in_flight: Bytes of planned transfers not yet finished, by link.
        demand: Workers on which requests wait for a transfer: plans make way there.
        moving: Sessions with a move under way.
        copying: (page hash, target) of copies under way.
    """

    nodes: Sequence[Node]
    sessions: Sequence[MovableSession] = ()
    advised: Sequence[AdvisedMove] = ()
    prefixes: Sequence[HotPrefix] = ()
    in_flight: Mapping[Link, int] = field(default_factory=dict)
    demand: frozenset[str] = frozenset()
    moving: frozenset[str] = frozenset()
    copying: frozenset[tuple[int, str]] = frozenset()


@dataclass(frozen=True, slots=True)
class MigrationLimits:
    """Budgets and thresholds.

    Attributes:
        link_bytes_max: In flight on one link. One transfer may exceed it, if it is alone there.
        transfers_max: New transfers in a round; the rest comes in later rounds.
        demand_share: Part of a link's budget that drains and advisories keep beside demand; all
            else waits.
        imbalance_ratio: Load is uneven where a worker has more than this times the median
        imbalance_seconds: and is ahead of it by more than this.
        cooldown_seconds: A session that has moved stays this long, but for a drain.
        gain_seconds_min: An advisory's move must save this much.
        hot_requests_per_second: What one holder of a prefix should bear. More means more holders.
        cool_factor: A copy goes when the rate, times this, would no longer call for it.
        replica_bytes_max: Copies by plan on one worker.
        warm_bytes_max: What a worker that has just joined is given.
    """

    link_bytes_max: int = 256 * 2**20
    transfers_max: int = 64
    demand_share: float = 0.25
    imbalance_ratio: float = 1.3
    imbalance_seconds: float = 0.25
    cooldown_seconds: float = 30.0
    gain_seconds_min: float = 0.02
    hot_requests_per_second: float = 4.0
    cool_factor: float = 2.0
    replica_bytes_max: int = 2 * 2**30
    warm_bytes_max: int = 2**30

    def __post_init__(self) -> None:
        assert self.link_bytes_max > 0 < self.transfers_max, self
        assert 0 <= self.demand_share <= 1 <= self.imbalance_ratio, self
        assert self.imbalance_seconds >= 0 <= self.cooldown_seconds, self
        assert self.hot_requests_per_second > 0, self
        assert self.cool_factor >= 1, self


class PlannedMove(NamedTuple):
    """One session to another worker, as a transaction of `core.migration`."""

    cause: MoveCause
    session_id: str
    source_id: str
    target_id: str
    tokens: int
    bytes: int


class CopyCause(StrEnum):
    """Why a shared prefix gets another holder."""

    WARM = "warm"
    HOT = "hot"


class PlannedCopy(NamedTuple):
    """A shared prefix to one more worker; nobody's owner changes."""

    cause: CopyCause
    page_hash: int
    source_id: str
    target_id: str
    tokens: int
    bytes: int


class PlannedDrop(NamedTuple):
    """A copy by plan that has cooled: its protection ends there."""

    page_hash: int
    worker_id: str


class Wait(StrEnum):
    """Why something that should move does not begin in this round."""

    BUSY = "busy"
    LINK_FULL = "link_full"
    DEMAND = "demand"
    NO_ROOM = "no_room"
    NO_TARGET = "no_target"
    ROUND_FULL = "round_full"


class MigrationPlan(NamedTuple):
    """What begins now, in order of importance, and how much waits for what."""

    moves: tuple[PlannedMove, ...]
    copies: tuple[PlannedCopy, ...]
    drops: tuple[PlannedDrop, ...]
    waiting: Mapping[Wait, int]


def plan_migrations(cluster: Cluster, limits: MigrationLimits) -> MigrationPlan:
    """One round. Equal input gives an equal plan; each session is in it at most once."""
    planner = _Planner(cluster, limits)
    planner.drain()
    planner.follow_advisories()
    planner.balance()
    planner.warm()
    planner.replicate()
    return MigrationPlan(
        tuple(planner.moves), tuple(planner.copies), tuple(planner.drops), dict(planner.waiting)
    )


class _Planner:
    """One round's working state: budgets and loads as they will be."""

    def __init__(self, cluster: Cluster, limits: MigrationLimits) -> None:
        self.cluster = cluster
        self.limits = limits
        self.moves: list[PlannedMove] = []
        self.copies: list[PlannedCopy] = []
        self.drops: list[PlannedDrop] = []
        self.waiting: Counter[Wait] = Counter()
        self.nodes = {node.worker_id: node for node in cluster.nodes}
        self.ready = [n.worker_id for n in cluster.nodes if n.state is WorkerState.READY]
        self.load = {node.worker_id: node.load_seconds for node in cluster.nodes}
        self.room = {node.worker_id: node.room_bytes for node in cluster.nodes}
        self.link: Counter[Link] = Counter(cluster.in_flight)
        self.taken = set(cluster.moving)

    # Budgets -----------------------------------------------------------------------------------

    def refuse(self, source_id: str, target_id: str, size: int, *, urgent: bool) -> Wait | None:
        """What stands against a transfer now, or None."""
        limits, link = self.limits, (source_id, target_id)
        if len(self.moves) + len(self.copies) >= limits.transfers_max:
            return Wait.ROUND_FULL
        budget = limits.link_bytes_max
        if not self.cluster.demand.isdisjoint(link):
            budget = int(budget * limits.demand_share) if urgent else 0
            if budget <= self.link[link]:
                return Wait.DEMAND
        if self.link[link] and self.link[link] + size > budget:
            return Wait.LINK_FULL
        return Wait.NO_ROOM if size > self.room[target_id] else None

    def take(self, source_id: str, target_id: str, size: int) -> None:
        self.link[source_id, target_id] += size
        self.room[target_id] -= size

    def move(self, cause: MoveCause, session: MovableSession, target_id: str) -> bool:
        """Plan a move if the budgets allow it."""
        urgent = cause in (MoveCause.DRAIN, MoveCause.ADVISORY)
        wait = self.refuse(session.worker_id, target_id, session.bytes, urgent=urgent)
        if wait is not None:
            self.waiting[wait] += 1
            return False
        self.take(session.worker_id, target_id, session.bytes)
        self.taken.add(session.session_id)
        self.load[session.worker_id] -= session.work_seconds
        self.load[target_id] += session.work_seconds
        self.moves.append(
            PlannedMove(cause, session.session_id, session.worker_id, target_id,
                        session.tokens, session.bytes)
        )  # fmt: skip
        return True

    def emptiest(self, names: Iterable[str]) -> list[str]:
        """Least loaded first."""
        return sorted(names, key=lambda name: (self.load[name], name))

    # Sessions ----------------------------------------------------------------------------------

    def of(self, worker_id: str) -> list[MovableSession]:
        """Sessions that could leave a worker, those that will be back soonest first."""
        found = [
            session
            for session in self.cluster.sessions
            if session.worker_id == worker_id and session.session_id not in self.taken
        ]
        return sorted(found, key=lambda s: (not s.advised, s.idle_seconds, s.session_id))

    def drain(self) -> None:
        """All sessions leave a draining worker, busy ones once their turn has ended."""
        for node in self.cluster.nodes:
            if node.state is not WorkerState.DRAINING:
                continue
            for session in self.of(node.worker_id):
                if session.busy:
                    self.waiting[Wait.BUSY] += 1
                elif not self.ready:
                    self.waiting[Wait.NO_TARGET] += 1
                else:
                    self._drain_one(session)

    def _drain_one(self, session: MovableSession) -> None:
        """To the least loaded worker that can take it now."""
        targets = self.emptiest(self.ready)
        for target_id in targets:
            refused = self.refuse(session.worker_id, target_id, session.bytes, urgent=True)
            if refused is None:
                self.move(MoveCause.DRAIN, session, target_id)
                return
        self.move(MoveCause.DRAIN, session, targets[0])  # counts what it waits for

    def follow_advisories(self) -> None:
        """A session goes where its next turn should be served, the largest gain first."""
        known = {session.session_id: session for session in self.cluster.sessions}
        for advised in sorted(self.cluster.advised, key=lambda a: (-a.gain_seconds, a[0])):
            session = known.get(advised.session_id)
            if session is None or session.session_id in self.taken:
                continue
            if advised.target_id == session.worker_id or advised.target_id not in self.ready:
                continue
            if advised.gain_seconds < self.limits.gain_seconds_min or self._cooling(session):
                continue
            if session.busy:
                self.waiting[Wait.BUSY] += 1
                continue
            self.move(MoveCause.ADVISORY, session, advised.target_id)

    def _cooling(self, session: MovableSession) -> bool:
        return session.moved_ago_seconds < self.limits.cooldown_seconds

    def balance(self) -> None:
        """From workers far above the median to the least loaded, never past each other."""
        limits = self.limits
        if len(self.ready) < 2:
            return
        for source_id in reversed(self.emptiest(self.ready)):
            for session in self.of(source_id):
                middle = statistics.median(self.load[name] for name in self.ready)
                bound = max(middle * limits.imbalance_ratio, middle + limits.imbalance_seconds)
                if self.load[source_id] <= bound:
                    break
                if session.busy or session.work_seconds <= 0 or self._cooling(session):
                    continue
                target_id = self.emptiest(self.ready)[0]
                # What would only turn the imbalance round, or carry it elsewhere, stays.
                after = self.load[target_id] + session.work_seconds
                if after < self.load[source_id] and target_id != source_id:
                    self.move(MoveCause.BALANCE, session, target_id)

    # Shared prefixes ---------------------------------------------------------------------------

    def copy(self, cause: CopyCause, prefix: HotPrefix, target_id: str) -> bool:
        """Plan a copy from the least loaded holder that can send it."""
        key = (prefix.page_hash, target_id)
        if key in self.cluster.copying:
            return False
        sources = [name for name in prefix.holders if name in self.load]
        sources = [n for n in sources if self.nodes[n].state is not WorkerState.UNHEALTHY]
        wait: Wait | None = Wait.NO_TARGET
        for source_id in self.emptiest(sources):
            wait = self.refuse(source_id, target_id, prefix.bytes, urgent=False)
            if wait is None:
                self.take(source_id, target_id, prefix.bytes)
                self.copies.append(
                    PlannedCopy(cause, prefix.page_hash, source_id, target_id,
                                prefix.tokens, prefix.bytes)
                )  # fmt: skip
                return True
        if wait is not None:
            self.waiting[wait] += 1
        return False

    def hottest(self) -> list[HotPrefix]:
        return sorted(
            self.cluster.prefixes,
            key=lambda p: (-p.requests_per_second * p.tokens, p.page_hash),
        )

    def warm(self) -> None:
        """A worker that has just joined gets what most requests begin with."""
        for node in self.cluster.nodes:
            if not node.joined or node.state is not WorkerState.READY:
                continue
            left = self.limits.warm_bytes_max
            for prefix in self.hottest():
                held = node.worker_id in prefix.holders
                if held or prefix.bytes > left:
                    left -= prefix.bytes if held else 0
                    continue
                if self.copy(CopyCause.WARM, prefix, node.worker_id):
                    left -= prefix.bytes

    def replicate(self) -> None:
        """As many holders as the rate of requests calls for; fewer again when it falls."""
        limits = self.limits
        planned = {(c.page_hash, c.target_id) for c in self.copies} | set(self.cluster.copying)
        replica_bytes: Counter[str] = Counter()
        for prefix in self.cluster.prefixes:
            for worker_id in prefix.replicas:
                replica_bytes[worker_id] += prefix.bytes
        for prefix in self.hottest():
            coming = {worker_id for key, worker_id in planned if key == prefix.page_hash}
            holders = {name for name in prefix.holders if name in self.ready}
            per_holder = limits.hot_requests_per_second
            wanted = max(1, math.ceil(prefix.requests_per_second / per_holder))
            kept = max(1, math.ceil(prefix.requests_per_second * limits.cool_factor / per_holder))
            missing = wanted - len(holders | coming)
            for target_id in self.emptiest(set(self.ready) - holders - coming):
                if missing <= 0:
                    break
                if replica_bytes[target_id] + prefix.bytes > limits.replica_bytes_max:
                    self.waiting[Wait.NO_ROOM] += 1
                elif self.copy(CopyCause.HOT, prefix, target_id):
                    replica_bytes[target_id] += prefix.bytes
                    missing -= 1
            spare = len(holders) - kept
            for worker_id in reversed(self.emptiest(prefix.replicas & holders)):
                if spare <= 0:
                    break
                self.drops.append(PlannedDrop(prefix.page_hash, worker_id))
                spare -= 1
