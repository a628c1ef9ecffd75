"""Once a second: what should move, by ``core.migration_policy``."""

from __future__ import annotations

import statistics

from symphony_sglang.clock import Clock
from symphony_sglang.core.migration_policy import (
    Cluster,
    HotPrefix,
    MigrationLimits,
    MovableSession,
    Node,
    plan_migrations,
)
from symphony_sglang.core.routing_types import WorkerState, WorkerView
from symphony_sglang.router.moves_copies import PrefixCopies
from symphony_sglang.router.moves_mover import SessionMover
from symphony_sglang.router.moves_orders import peer_of
from symphony_sglang.router.moves_speed import WorkMeter
from symphony_sglang.router.placement import Placement

# Work is summed over the last half minute: less than this is chance.
LIMITS = MigrationLimits(imbalance_seconds=2.0)
SESSIONS_MAX = 1024
# Idle sessions count for a little, so that a drain spreads them.
WORK_SECONDS_MIN = 0.001


class MovePlanner:
    """Looks at the workers and their sessions, and asks the mover for what the plan says."""

    def __init__(
        self,
        mover: SessionMover,
        placement: Placement,
        meter: WorkMeter,
        copies: PrefixCopies,
        clock: Clock,
        limits: MigrationLimits = LIMITS,
    ) -> None:
        self._mover = mover
        self._placement = placement
        self._meter = meter
        self._copies = copies
        self._clock = clock
        self._limits = limits

    def tick(self) -> None:
        self._mover.drains.tick()
        views = [v for v in self._placement.views() if peer_of(self._mover.registry, v.worker_id)]
        draining = any(view.state is WorkerState.DRAINING for view in views)
        if len(views) < 2:
            return
        prefixes = self._copies.prefixes()
        if not (draining or prefixes or self._uneven(views)):
            return
        plan = plan_migrations(self._cluster(views, prefixes), self._limits)
        self._copies.carry_out(plan)
        for planned in plan.moves:
            if self._mover.can_move(planned.source_id, planned.target_id):
                self._mover.request(planned.session_id, planned.target_id, planned.cause)

    def _loads(self, views: list[WorkerView]) -> dict[str, float]:
        """Seconds of work at each worker, lately, and what waits there now."""
        now = self._clock.monotonic()
        loads = {
            view.worker_id: self._meter.of_worker(view.worker_id, now) + waiting_seconds(view)
            for view in views
        }
        for work in self._meter.sessions(now):
            owner = self._mover.place(work.session_key)
            if owner in loads:
                loads[owner] += work.seconds
        return loads

    def _uneven(self, views: list[WorkerView]) -> bool:
        ready = {view.worker_id for view in views if view.state is WorkerState.READY}
        loads = [load for name, load in self._loads(views).items() if name in ready]
        if len(loads) < 2:
            return False
        middle, limits = statistics.median(loads), self._limits
        bound = max(middle * limits.imbalance_ratio, middle + limits.imbalance_seconds)
        return max(loads) > bound

    def _cluster(self, views: list[WorkerView], prefixes: list[HotPrefix]) -> Cluster:
        mover = self._mover
        loads = self._loads(views)
        nodes = [
            Node(
                view.worker_id,
                loads[view.worker_id],
                self._room(view),
                view.state,
                self._copies.joined(view.worker_id),
            )
            for view in views
        ]
        in_flight = self._copies.in_flight()
        for move in mover.open_moves():
            in_flight[move.link] += move.bytes
        return Cluster(
            nodes=nodes,
            sessions=self._sessions(views),
            prefixes=prefixes,
            in_flight=in_flight,
            copying=self._copies.copying,
            demand=frozenset(v.worker_id for v in views if v.load.requests_waiting),
            moving=frozenset(move.session_id for move in mover.open_moves()),
        )

    def _room(self, view: WorkerView) -> int:
        found = self._mover.registry.domain(view.worker_id)
        return 0 if found is None else found[0].info.room_bytes

    def _sessions(self, views: list[WorkerView]) -> list[MovableSession]:
        """Those of draining workers, and of the others those that were active lately."""
        mover, now = self._mover, self._clock.monotonic()
        work = {one.session_key: one for one in self._meter.sessions(now)}
        wanted = list(work)[-SESSIONS_MAX:]
        for view in views:
            found = mover.registry.domain(view.worker_id)
            if view.state is WorkerState.DRAINING and found is not None:
                wanted += mover.drains.sessions(found[0])[:SESSIONS_MAX]
        sessions = []
        for key in dict.fromkeys(wanted):
            owner = mover.place(key)
            found = None if owner is None else mover.registry.domain(owner)
            place = self._placement.index.session(key)
            if owner is None or found is None or place is None:
                continue
            one = work.get(key)
            sessions.append(
                MovableSession(
                    session_id=key,
                    worker_id=owner,
                    tokens=place.total_tokens,
                    bytes=place.total_tokens * found[0].info.token_bytes,
                    work_seconds=WORK_SECONDS_MIN if one is None else one.seconds,
                    advised=bool(self._placement.advised_places and
                                 self._placement.advised_places(key)),
                    busy=mover.book.running(key) > 0,
                    idle_seconds=0.0 if one is None else one.idle_seconds,
                    moved_ago_seconds=now - mover.book.moved_at(key),
                )
            )  # fmt: skip
        return sessions


def waiting_seconds(view: WorkerView) -> float:
    """Work that waits at a worker now."""
    prefill = view.rates.prefill
    return 0.0 if prefill is None else view.load.tokens_waiting_uncached / prefill.tokens_per_second
