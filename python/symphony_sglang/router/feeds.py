"""Workers' feeds into the index: one subscriber for each cache domain, snapshots in slices."""

from __future__ import annotations

import asyncio
import logging
from array import array
from collections import deque
from collections.abc import Awaitable, Callable, Mapping, Sequence

from symphony_sglang.clock import Clock
from symphony_sglang.core.gate import Rate
from symphony_sglang.core.levels import Level
from symphony_sglang.core.prefix import Namespace
from symphony_sglang.core.routing_types import LoadView, WorkerRates
from symphony_sglang.errors import FeedError
from symphony_sglang.router.background import Background
from symphony_sglang.router.health import HealthMonitor
from symphony_sglang.router.moves_mover import SessionMover
from symphony_sglang.router.placement import Placement
from symphony_sglang.router.registry import Worker, WorkerRegistry
from symphony_sglang.router.sessions import session_key
from symphony_sglang.telemetry.router import RouterMetrics
from symphony_sglang.wire.feed import SessionChange, Speed, WorkerLoad
from symphony_sglang.wire.feed_address import FeedAddress, feed_addresses
from symphony_sglang.wire.subscriber import FeedState, FeedSubscriber

logger = logging.getLogger(__name__)

# A page costs the index about a microsecond: the event loop is held this long at a time.
SLICE_PAGES = 4096
# Changes that wait behind a snapshot; beyond them all that waits is applied at once.
BACKLOG_MAX = 50_000


class Follower:
    """Applies one domain's feed to the index, in order."""

    def __init__(self, placement: Placement, background: Background, domain_id: str) -> None:
        self._index = placement.index
        self._background = background
        self._domain_id = domain_id
        self._backlog: deque[Callable[[], None]] = deque()
        self._working = False

    def apply(self, change: Callable[[], None]) -> None:
        """Now, or behind what waits already."""
        if not self._working:
            change()
            return
        self._backlog.append(change)
        if len(self._backlog) > BACKLOG_MAX:
            self.finish()

    def snapshot(self, pages: Mapping[Level, array[int]]) -> None:
        """Replace what is known, a slice at a time."""
        self._backlog.clear()
        index, domain_id = self._index, self._domain_id
        index.cleared(domain_id)
        slices = [
            (level, hashes[start : start + SLICE_PAGES])
            for level, hashes in pages.items()
            for start in range(0, len(hashes), SLICE_PAGES)
        ]
        for level, part in slices:
            self._backlog.append(
                lambda level=level, part=part: index.stored(  # type: ignore[misc]
                    domain_id, level, part, linked=False
                )
            )
        if len(slices) <= 1:
            self.finish()
        elif not self._working:
            self._working = True
            if self._background.start(self._work(), f"snapshot of {domain_id}") is None:
                self.finish()

    async def _work(self) -> None:
        while self._backlog:
            self._backlog.popleft()()
            await asyncio.sleep(0)
        self._working = False

    def finish(self) -> None:
        """All that waits, at once."""
        while self._backlog:
            self._backlog.popleft()()
        self._working = False


class Feeds:
    """Starts and ends subscribers with their workers, and is their handler."""

    def __init__(
        self,
        registry: WorkerRegistry,
        placement: Placement,
        health: HealthMonitor,
        background: Background,
        *,
        clock: Clock,
        metrics: RouterMetrics,
    ) -> None:
        self._registry = registry
        self._placement = placement
        self._health = health
        self._background = background
        self._clock = clock
        self._metrics = metrics
        self.mover: SessionMover | None = None
        self._subscribers: dict[str, FeedSubscriber] = {}
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._followers: dict[str, Follower] = {}
        self._gaps: dict[str, int] = {}
        health.on_up = self.follow
        registry.events.removed.append(self._on_removed)

    async def follow(self, worker: Worker) -> None:
        """Subscribe to what the worker publishes; what is followed already goes on."""
        for address in self._addresses(worker):
            domain_id = address.worker_id
            if domain_id in self._subscribers or self._registry.domain(domain_id) is None:
                continue
            self._followers[domain_id] = Follower(self._placement, self._background, domain_id)
            subscriber = FeedSubscriber(
                address, self, rediscover=self._rediscoverer(worker, domain_id), clock=self._clock
            )
            task = self._background.start(self._run(subscriber), f"feed of {domain_id}")
            if task is not None:
                self._subscribers[domain_id] = subscriber
                self._tasks[domain_id] = task

    async def _run(self, subscriber: FeedSubscriber) -> None:
        domain_id = subscriber.address.worker_id
        try:
            await subscriber.run()
        except FeedError as error:
            logger.warning("feed of %s: %s", domain_id, error)
        finally:
            if self._subscribers.get(domain_id) is subscriber:
                del self._subscribers[domain_id]

    def _addresses(self, worker: Worker) -> list[FeedAddress]:
        try:
            return feed_addresses(
                worker.worker_id,
                worker.url,
                residency=worker.info.residency or None,
                server_info=worker.info.server_info,
                api_key=self._health.key(worker) or None,
            )
        except FeedError as error:
            logger.warning("%s: %s", worker.url, error)
            return []

    def _rediscoverer(
        self, worker: Worker, domain_id: str
    ) -> Callable[[], Awaitable[FeedAddress | None]]:
        async def rediscover() -> FeedAddress | None:
            self._health.suspect(worker, "its feed is silent")
            info = await self._health.describe(worker)
            if not info.residency:
                return None
            self._registry.learn(worker, info)
            found = [a for a in self._addresses(worker) if a.worker_id == domain_id]
            return found[0] if found else None

        return rediscover

    def _on_removed(self, worker: Worker) -> None:
        for domain_id in worker.domain_ids:
            task = self._tasks.pop(domain_id, None)
            if task is not None:
                task.cancel()
            self._subscribers.pop(domain_id, None)
            self._followers.pop(domain_id, None)
            self._gaps.pop(domain_id, None)
            self._metrics.forget(domain_id)

    def state(self, domain_id: str) -> str:
        """The feed's state; ``none`` where there is no feed."""
        subscriber = self._subscribers.get(domain_id)
        return "none" if subscriber is None else subscriber.state.value

    def tick(self) -> None:
        """About once a second: bookkeeping, and figures."""
        index = self._placement.index
        index.expire(self._clock.monotonic())
        index.reclaim()
        stats = index.stats()
        self._metrics.index_size(index_bytes=stats.table_bytes, sessions=stats.sessions)
        for domain_id, subscriber in self._subscribers.items():
            counters = subscriber.counters
            self._metrics.index_lag(domain_id, counters.lag_seconds)
            pages = {level.value: count for level, count in index.pages(domain_id).items()}
            self._metrics.index_pages(domain_id, pages)
            missed = counters.gaps - self._gaps.get(domain_id, 0)
            if missed > 0:
                self._metrics.feed_gap(domain_id, missed)
            self._gaps[domain_id] = counters.gaps

    # What subscribers tell --------------------------------------------------------------------

    def on_state(self, worker_id: str, state: FeedState) -> None:
        self._metrics.feed_live(worker_id, live=state is FeedState.LIVE)
        if state is FeedState.LOST and self.mover is not None:
            self.mover.worker_lost(worker_id)

    def on_snapshot(
        self,
        worker_id: str,
        pages: Mapping[Level, array[int]],
        sessions: Sequence[SessionChange],
    ) -> None:
        follower = self._followers.get(worker_id)
        if follower is None:
            return
        self._metrics.feed_snapshot(worker_id, success=True)
        self._placement.text_pages.cleared(worker_id)
        follower.snapshot(pages)
        for change in sessions:
            self._apply_session(worker_id, change)
        if self.mover is not None:
            self.mover.snapshot(worker_id, sessions)

    def on_pages_stored(
        self, worker_id: str, level: Level, hashes: Sequence[int], parent: int | None
    ) -> None:
        follower = self._followers.get(worker_id)
        if follower is not None:
            self._metrics.feed_message(worker_id, "stored")
            linked = level is not Level.NVME
            index = self._placement.index
            follower.apply(lambda: index.stored(worker_id, level, hashes, parent, linked=linked))

    def on_pages_removed(self, worker_id: str, level: Level, hashes: Sequence[int]) -> None:
        follower = self._followers.get(worker_id)
        if follower is not None:
            self._metrics.feed_message(worker_id, "removed")
            index = self._placement.index
            follower.apply(lambda: index.removed(worker_id, level, hashes))

    def on_cleared(self, worker_id: str) -> None:
        follower = self._followers.get(worker_id)
        if follower is not None:
            self._metrics.feed_message(worker_id, "cleared")
            self._placement.text_pages.cleared(worker_id)
            follower.apply(lambda: self._placement.index.cleared(worker_id))

    def on_session(self, worker_id: str, change: SessionChange) -> None:
        if worker_id in self._followers:
            self._metrics.feed_message(worker_id, "session")
            self._apply_session(worker_id, change)
            if self.mover is not None:
                self.mover.session_changed(worker_id, change)

    def _apply_session(self, worker_id: str, change: SessionChange) -> None:
        key = session_key(change.session_id, Namespace(change.extra_key, change.cache_salt))
        index = self._placement.index
        if change.gone:
            index.session_gone(worker_id, key)
            return
        last = int(change.last_page_hash[:16], 16) if change.last_page_hash else None
        index.session_turn(
            worker_id, key, change.total_tokens, last, change.turns, change.owner_epoch
        )

    def on_load(self, worker_id: str, load: WorkerLoad) -> None:
        if worker_id not in self._followers:
            return
        self._metrics.feed_message(worker_id, "load")
        if self.mover is not None:
            self.mover.worker_told(worker_id, draining=load.draining)
        self._placement.ledger.reported(worker_id, load_view(load), self._clock.monotonic())
        self._placement.reported(worker_id)
        below = rate_of(load.speeds.nvme_to_host)
        rates = WorkerRates(
            prefill=rate_of(load.speeds.prefill),
            host_to_device=rate_of(load.speeds.host_to_device),
            nvme_to_host=below,
            peer_to_host=None
            if self.mover is None
            else self.mover.speeds.to_host(worker_id, below),
        )
        if self._placement.rates.get(worker_id) != rates:
            self._placement.rates[worker_id] = rates
            self._placement.reported(worker_id)


def load_view(load: WorkerLoad) -> LoadView:
    return LoadView(
        requests_running=load.requests_running,
        requests_waiting=load.requests_waiting,
        tokens_waiting_uncached=load.tokens_waiting_uncached,
        tokens_running=load.tokens_running,
        device_used_tokens=load.device_used_tokens,
        device_total_tokens=load.device_total_tokens,
        requests_max=load.requests_max,
        decode_step_seconds=load.decode_step_seconds,
    )


def rate_of(speed: Speed | None) -> Rate | None:
    return None if speed is None else Rate(speed.tokens_per_second, speed.latency_seconds)
