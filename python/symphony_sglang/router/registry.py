"""The workers that the router knows: identity, health, breaker, load, connections.

A worker is one server. It holds one or more cache domains (`WorkerView`): one for each
data-parallel rank where ranks are told apart, otherwise one.
"""

from __future__ import annotations

import ssl
import uuid
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Any

from symphony_sglang.clock import Clock
from symphony_sglang.core.routing_types import WorkerState, WorkerView
from symphony_sglang.router.breaker import BreakerSettings, CircuitBreaker
from symphony_sglang.router.errors import ApiError
from symphony_sglang.router.upstream import ConnectionPool, parse_origin
from symphony_sglang.telemetry.router import BreakerState, RouterMetrics

WORKERS_MAX = 1024
PRIORITY_DEFAULT = 50
# Ids come from the URL, so that two routers, and one that restarts, agree on them.
ID_SPACE = uuid.UUID("6f0cbbd0-3d0f-5c39-9c0c-3f7c1f7c5a10")


class Health(StrEnum):
    """What the health checks say."""

    STARTING = "starting"  # never answered yet
    HEALTHY = "healthy"
    UNHEALTHY = "unhealthy"
    GONE = "gone"  # did not come up in time; asked no more


@dataclass(slots=True)
class WorkerInfo:
    """What a worker says about itself; defaults until it was asked."""

    model_id: str | None = None
    model_path: str | None = None
    page_size: int = 0
    dp_size: int = 1
    tp_size: int = 1
    # Of GET /symphony/residency and /server_info: where the feeds are. Empty: it has no such route.
    residency: Mapping[str, Any] = field(default_factory=dict)
    server_info: Mapping[str, Any] = field(default_factory=dict)
    # Where each rank serves its pages, "" where it does not; bytes of a token's KV on all ranks;
    # what copies from peers may fill.
    peers: tuple[str, ...] = ()
    token_bytes: int = 0
    room_bytes: int = 0


@dataclass(slots=True, eq=False)
class Worker:
    """One server. Only the event loop touches it."""

    worker_id: str
    url: str
    pool: ConnectionPool
    breaker: CircuitBreaker
    source: str = "static"
    priority: int = PRIORITY_DEFAULT
    cost: float = 1.0
    labels: dict[str, str] = field(default_factory=dict)
    api_key: str | None = None
    check_health: bool = True
    model_given: str | None = None
    info: WorkerInfo = field(default_factory=WorkerInfo)
    health: Health = Health.STARTING
    draining: bool = False
    leaving: bool = False  # it said that it will end
    active: int = 0
    failures: int = 0  # health checks in a row
    successes: int = 0
    last_error: str = ""
    ranks_apart: bool = False

    @property
    def model_id(self) -> str | None:
        return self.model_given or self.info.model_id

    @property
    def healthy(self) -> bool:
        return self.health is Health.HEALTHY

    @property
    def domain_ids(self) -> tuple[str, ...]:
        """Ids of its cache domains."""
        if self.ranks_apart and self.info.dp_size > 1:
            return tuple(f"{self.worker_id}@{rank}" for rank in range(self.info.dp_size))
        return (self.worker_id,)

    def state(self, now_seconds: float) -> WorkerState:
        if not self.healthy or not self.breaker.allows(now_seconds):
            return WorkerState.UNHEALTHY
        return WorkerState.DRAINING if self.draining else WorkerState.READY

    def views(self, now_seconds: float) -> list[WorkerView]:
        """Its cache domains, without load and rates."""
        ranks = self.domain_ids
        # An order or a pull cannot name a data-parallel rank.
        peer = len(ranks) == 1 and self.info.dp_size == 1 and any(self.info.peers)
        return [
            WorkerView(
                worker_id=domain_id,
                state=self.state(now_seconds),
                page_size=self.info.page_size,
                model_id=self.model_id,
                server_id=self.worker_id,
                dp_rank=rank if len(ranks) > 1 else None,
                serves_pages=peer,
                pulls_pages=peer,
            )
            for rank, domain_id in enumerate(ranks)
        ]

    def document(self) -> dict[str, Any]:
        """As sglang-router's ``/workers`` shows it, with what is ours beside."""
        metadata = {**self.labels, "dp_size": str(self.info.dp_size)}
        metadata["tp_size"] = str(self.info.tp_size)
        if self.info.model_path:
            metadata["model_path"] = self.info.model_path
        if self.info.model_id:
            metadata["served_model_name"] = self.info.model_id
        return {
            "id": self.worker_id,
            "url": self.url,
            "model_id": self.model_id or "unknown",
            "priority": self.priority,
            "cost": self.cost,
            "worker_type": "regular",
            "is_healthy": self.healthy,
            "load": self.active,
            "connection_mode": "HTTP",
            "metadata": metadata,
            "disable_health_check": not self.check_health,
            "health": self.health.value,
            "draining": self.draining,
            "circuit_breaker": BreakerState(self.breaker.state(self.pool.clock.monotonic())).name,
            "last_error": self.last_error,
        }


@dataclass(slots=True)
class RegistryEvents:
    """Who wants to know."""

    added: list[Callable[[Worker], None]] = field(default_factory=list)
    removed: list[Callable[[Worker], None]] = field(default_factory=list)
    changed: list[Callable[[Worker], None]] = field(default_factory=list)


class WorkerRegistry:
    """All workers by id; bounded, ids stable across restarts."""

    def __init__(
        self,
        clock: Clock,
        metrics: RouterMetrics,
        breaker_settings: BreakerSettings,
        *,
        context: ssl.SSLContext | None = None,
        ranks_apart: bool = False,
    ) -> None:
        self.events = RegistryEvents()
        self.generation = 0  # moves on with every change that a view shows
        self._workers: dict[str, Worker] = {}
        self._by_domain: dict[str, tuple[Worker, int]] = {}
        self._clock = clock
        self._metrics = metrics
        self._breaker_settings = breaker_settings
        self._context = context
        self._ranks_apart = ranks_apart

    def __iter__(self) -> Iterator[Worker]:
        return iter(list(self._workers.values()))

    def __len__(self) -> int:
        return len(self._workers)

    def get(self, worker_id: str) -> Worker | None:
        return self._workers.get(worker_id)

    def domain(self, domain_id: str) -> tuple[Worker, int] | None:
        """The worker of a cache domain, and its rank."""
        return self._by_domain.get(domain_id)

    def find(self, name: str) -> Worker | None:
        """By id, by URL, or by its place in the list (as ``X-SMG-Target-Worker`` names it)."""
        if name in self._workers:
            return self._workers[name]
        if name.isdecimal() and len(name) < 9:
            workers = list(self._workers.values())
            return workers[int(name)] if int(name) < len(workers) else None
        try:
            return self._workers.get(worker_id_of(name))
        except ValueError:
            return None

    def healthy(self) -> list[Worker]:
        now = self._clock.monotonic()
        return [w for w in self._workers.values() if w.state(now) is WorkerState.READY]

    def add(self, url: str, *, source: str, **options: Any) -> Worker:
        """A new worker, not asked anything yet; one that is known already is given as it is.

        Raises:
            ApiError: 400, `url` cannot be a worker's; 503, the table is full.
        """
        try:
            origin = parse_origin(url)
            worker_id = worker_id_of(url)
        except ValueError as error:
            raise ApiError(400, "invalid_worker_url", f"url: {error}") from None
        known = self._workers.get(worker_id)
        if known is not None:
            self._metrics.worker_added(known.url, source, "duplicate")
            return known
        if len(self._workers) >= WORKERS_MAX:
            self._metrics.worker_added(url, source, "failed")
            message = f"{len(self._workers)} workers are known; expected at most {WORKERS_MAX}"
            raise ApiError(503, "too_many_workers", message)
        context = self._context if origin.secure else None
        if origin.secure and context is None:
            context = ssl.create_default_context()
        breaker = CircuitBreaker(self._breaker_settings)
        pool = ConnectionPool(origin, self._clock, context)
        worker = Worker(worker_id, url.rstrip("/"), pool, breaker, source, **options)
        worker.ranks_apart = self._ranks_apart
        breaker.on_change = lambda old, new: self._breaker_changed(worker, old, new)
        self._workers[worker_id] = worker
        self._metrics.worker_added(worker.url, source)
        self.changed(worker)
        for listener in self.events.added:
            listener(worker)
        return worker

    def remove(self, worker: Worker, reason: str) -> None:
        """Forget it; requests that it has now go on."""
        if self._workers.pop(worker.worker_id, None) is None:
            return
        worker.health = Health.GONE
        self.changed(worker)
        worker.pool.retire()
        self._metrics.worker_removed(worker.url, worker.source, reason)
        for listener in self.events.removed:
            listener(worker)

    def changed(self, worker: Worker) -> None:
        """Something that a view shows is different now."""
        self.generation += 1
        self._by_domain = {
            domain_id: (known, rank)
            for known in self._workers.values()
            for rank, domain_id in enumerate(known.domain_ids)
        }
        if worker.worker_id in self._workers:
            self._metrics.health(worker.url, healthy=worker.healthy)
            for listener in self.events.changed:
                listener(worker)
        models: dict[str, int] = {}
        for known in self._workers.values():
            models[known.model_id or "unknown"] = models.get(known.model_id or "unknown", 0) + 1
        for model, count in models.items():
            self._metrics.pool(model, count)

    def learn(self, worker: Worker, info: WorkerInfo) -> None:
        """The worker told about itself."""
        if info != worker.info:
            worker.info = info
            self.changed(worker)

    def mark(self, worker: Worker, health: Health, error: str = "") -> None:
        worker.last_error = error[:500]
        if worker.health is not health:
            worker.health = health
            self.changed(worker)

    def update(self, worker: Worker, **values: Any) -> None:
        for name, value in values.items():
            setattr(worker, name, value)
        self.changed(worker)

    def began(self, worker: Worker) -> None:
        worker.active += 1

    def ended(self, worker: Worker) -> None:
        worker.active -= 1

    def outcome(self, worker: Worker, *, success: bool) -> None:
        """Count a request's outcome in the worker's breaker."""
        now = self._clock.monotonic()
        breaker = worker.breaker
        quiet = success and breaker.failures == 0 and breaker.successes > 0
        if success:
            breaker.succeeded(now)
        else:
            breaker.failed(now)
        self._metrics.breaker_outcome(worker.url, success=success)
        if not quiet:
            state = breaker.state(now)
            self._metrics.breaker(worker.url, state, breaker.failures, breaker.successes)

    def _breaker_changed(self, worker: Worker, old: BreakerState, new: BreakerState) -> None:
        self._metrics.breaker_changed(worker.url, old, new)
        self._metrics.breaker(worker.url, new, worker.breaker.failures, worker.breaker.successes)
        self.generation += 1

    def check(self) -> None:
        assert len(self._workers) <= WORKERS_MAX
        for worker_id, worker in self._workers.items():
            assert worker.worker_id == worker_id
            assert worker.active >= 0, (worker.url, worker.active)
            worker.pool.check()
        domains = {d for worker in self._workers.values() for d in worker.domain_ids}
        assert domains == set(self._by_domain)


def worker_id_of(url: str) -> str:
    """The id of the worker at `url`: the same for every spelling of the same place.

    Raises:
        ValueError: not a worker's URL.
    """
    origin = parse_origin(url)
    scheme = "https" if origin.secure else "http"
    place = f"{scheme}://{origin.host}:{origin.port}{origin.base_path}"
    return str(uuid.uuid5(ID_SPACE, place))


def with_state(view: WorkerView, state: WorkerState) -> WorkerView:
    return view if view.state is state else replace(view, state=state)
