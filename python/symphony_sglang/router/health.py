"""Whether workers live: a check every interval, at once when a request met trouble, and while a
worker starts; and what a worker says of itself when it comes up."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

import msgspec

from symphony_sglang.clock import Clock
from symphony_sglang.router.background import Background
from symphony_sglang.router.peers import peer_address
from symphony_sglang.router.registry import Health, Worker, WorkerInfo, WorkerRegistry
from symphony_sglang.router.upstream import Headers, UpstreamError
from symphony_sglang.telemetry.router import RouterMetrics

logger = logging.getLogger(__name__)

# While it is not healthy a worker is asked more often than the interval says, slower and slower.
SOON_SECONDS = 0.1
SLOWDOWN = 1.5
UNHEALTHY_SECONDS_MAX = 5.0
ANSWER_BYTES_MAX = 8 << 20


@dataclass(frozen=True, slots=True)
class HealthSettings:
    enabled: bool = True
    endpoint: str = "/health"
    interval_seconds: float = 60.0
    timeout_seconds: float = 5.0
    failure_threshold: int = 3
    success_threshold: int = 2
    startup_seconds_max: float = 1800.0
    startup_interval_seconds: float = 30.0


class HealthMonitor:
    """One task a worker."""

    def __init__(
        self,
        registry: WorkerRegistry,
        settings: HealthSettings,
        background: Background,
        *,
        worker_key: str,
        clock: Clock,
        metrics: RouterMetrics,
    ) -> None:
        self._registry = registry
        self._settings = settings
        self._background = background
        self._worker_key = worker_key
        self._clock = clock
        self._metrics = metrics
        self._alarms: dict[str, asyncio.Event] = {}
        self.on_up: Callable[[Worker], Awaitable[None]] | None = None
        registry.events.added.append(self._on_added)
        registry.events.removed.append(self._on_removed)

    def _on_added(self, worker: Worker) -> None:
        self._alarms[worker.worker_id] = asyncio.Event()
        self._background.start(self._watch(worker), f"health of {worker.url}")

    def _on_removed(self, worker: Worker) -> None:
        alarm = self._alarms.pop(worker.worker_id, None)
        if alarm is not None:
            alarm.set()

    def suspect(self, worker: Worker, error: str) -> None:
        """A request met trouble there: check now rather than at the next interval."""
        worker.last_error = error[:500]
        alarm = self._alarms.get(worker.worker_id)
        if alarm is not None:
            alarm.set()

    async def _watch(self, worker: Worker) -> None:
        if not await self._start(worker):
            return
        while True:
            await self._pause(worker, self._pause_seconds(worker))
            if worker.worker_id not in self._alarms:
                return
            if worker.check_health and self._settings.enabled:
                await self._check(worker)

    async def _start(self, worker: Worker) -> bool:
        """Ask until it answers; False where it never did."""
        began = self._clock.monotonic()
        pause = SOON_SECONDS
        while worker.health is Health.STARTING:
            if await self.ask(worker):
                await self._came_up(worker)
                return True
            if self._clock.monotonic() - began > self._settings.startup_seconds_max:
                logger.error("%s did not come up: %s", worker.url, worker.last_error)
                self._registry.remove(worker, "startup_timeout")
                return False
            await self._pause(worker, pause)
            pause = min(pause * SLOWDOWN, self._settings.startup_interval_seconds, 2.0)
        return worker.health is not Health.GONE

    def _pause_seconds(self, worker: Worker) -> float:
        if worker.healthy and worker.failures == 0:
            return self._settings.interval_seconds
        soon = SOON_SECONDS * SLOWDOWN ** min(worker.failures, 20)
        return min(soon, UNHEALTHY_SECONDS_MAX, self._settings.interval_seconds)

    async def _pause(self, worker: Worker, seconds: float) -> None:
        alarm = self._alarms.get(worker.worker_id)
        if alarm is None:
            return
        try:
            async with asyncio.timeout(seconds):
                await alarm.wait()
            # Many requests fail at once: one check answers for all of them.
            await asyncio.sleep(SOON_SECONDS / 2)
        except TimeoutError:
            pass
        alarm.clear()

    async def _check(self, worker: Worker) -> None:
        worker.pool.trim()
        if await self.ask(worker):
            worker.failures = 0
            worker.successes += 1
            due = worker.successes >= self._settings.success_threshold
            if worker.health is Health.UNHEALTHY and due:
                logger.info("%s is healthy again", worker.url)
                await self._came_up(worker)
            return
        worker.successes = 0
        worker.failures += 1
        if worker.healthy and worker.failures >= self._settings.failure_threshold:
            logger.warning("%s is unhealthy: %s", worker.url, worker.last_error)
            self._registry.mark(worker, Health.UNHEALTHY, worker.last_error)

    async def ask(self, worker: Worker) -> bool:
        """One check; a failure is in `last_error`."""
        try:
            async with asyncio.timeout(self._settings.timeout_seconds):
                status, _body = await self.call(worker, "GET", self._settings.endpoint)
        except TimeoutError:
            worker.last_error = f"no answer within {self._settings.timeout_seconds:g} s"
        except UpstreamError as error:
            worker.last_error = str(error)
        else:
            if status == 200:
                self._metrics.health_checked(success=True)
                return True
            worker.last_error = f"{self._settings.endpoint} answered {status}"
        self._metrics.health_checked(success=False)
        return False

    async def _came_up(self, worker: Worker) -> None:
        worker.failures = 0
        self._registry.learn(worker, await self.describe(worker))
        if worker.health is Health.GONE:
            return
        self._registry.mark(worker, Health.HEALTHY)
        if self.on_up is not None:
            await self.on_up(worker)

    async def describe(self, worker: Worker) -> WorkerInfo:
        """What the worker says about itself; what it does not say stays at its default."""
        info = WorkerInfo()
        server = await self._document(worker, "/server_info", "/get_server_info")
        model = await self._document(worker, "/model_info", "/get_model_info")
        residency = await self._document(worker, "/symphony/residency")
        path = model.get("model_path") or server.get("model_path")
        info.model_path = path if isinstance(path, str) else None
        name = server.get("served_model_name") or path
        info.model_id = name if isinstance(name, str) else None
        info.page_size = positive(server.get("page_size"), 0)
        info.dp_size = positive(server.get("dp_size"), 1)
        info.tp_size = positive(server.get("tp_size"), 1)
        info.server_info = {"kv_events": server.get("kv_events")}
        ranks = residency.get("ranks") or [residency]
        feeds = [{"feed": rank.get("feed")} for rank in ranks if isinstance(rank, dict)]
        info.residency = {"ranks": feeds} if residency else {}
        take_levels(info, ranks, worker.url)
        return info

    async def _document(self, worker: Worker, *paths: str) -> dict[str, Any]:
        """The JSON object at the first of `paths` that has one; empty where none has."""
        for path in paths:
            try:
                async with asyncio.timeout(self._settings.timeout_seconds):
                    status, body = await self.call(worker, "GET", path)
                document = msgspec.json.decode(body) if status == 200 else None
            except (UpstreamError, TimeoutError, msgspec.DecodeError, UnicodeDecodeError):
                continue
            if isinstance(document, dict):
                return document
        return {}

    def key(self, worker: Worker) -> str:
        return worker.api_key or self._worker_key

    async def call(
        self,
        worker: Worker,
        method: str,
        target: str,
        body: bytes = b"",
        headers: Headers | None = None,
        *,
        bytes_max: int = ANSWER_BYTES_MAX,
    ) -> tuple[int, bytes]:
        """One request of the router's own; status and body.

        Raises:
            UpstreamError: there was no whole answer.
        """
        sent = list(headers or ())
        if body:
            sent.append((b"content-type", b"application/json"))
        key = self.key(worker)
        if key:
            sent.append((b"authorization", b"Bearer " + key.encode()))
        answer = await worker.pool.request(
            method.encode("ascii"), target.encode("ascii"), sent, body
        )
        try:
            return answer.status, await answer.read(bytes_max)
        finally:
            answer.close()


def take_levels(info: WorkerInfo, ranks: list[Any], url: str) -> None:
    """What moves need to know, from the residency of each rank."""
    described = [rank for rank in ranks if isinstance(rank, dict)]
    info.peers = tuple(peer_address(rank.get("peer"), url) for rank in described)
    levels = described[0].get("levels") if described else None
    device = levels.get("device") if isinstance(levels, dict) else None
    nvme = levels.get("nvme") if isinstance(levels, dict) else None
    if isinstance(device, dict):
        info.token_bytes = info.tp_size * positive(device.get("token_bytes"), 0)
    if isinstance(nvme, dict):
        # The store lets the coldest pages go for new ones: half of it may be copies.
        info.room_bytes = info.tp_size * positive(nvme.get("total_bytes"), 0) // 2


def positive(value: object, default: int) -> int:
    """`value` if it is a whole number of at least 1."""
    if isinstance(value, int) and not isinstance(value, bool) and value >= 1:
        return value
    return default
