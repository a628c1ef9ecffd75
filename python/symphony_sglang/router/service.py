"""The router as a whole: its parts put together, served, drained and stopped."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import os
import random
import signal
import socket
import ssl
import sys
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from symphony_sglang.clock import Clock, SystemClock
from symphony_sglang.core.budget import CallerLimits
from symphony_sglang.core.migration import INSTANCE_BITS
from symphony_sglang.core.migration_book import BookLimits
from symphony_sglang.core.routing_policies import make_policy
from symphony_sglang.core.routing_types import PolicySettings
from symphony_sglang.errors import ConfigError
from symphony_sglang.router.agents import ParentHints
from symphony_sglang.router.app import App
from symphony_sglang.router.arguments import RouterSettings
from symphony_sglang.router.auth import Keys
from symphony_sglang.router.background import Background
from symphony_sglang.router.breaker import BreakerSettings
from symphony_sglang.router.chat import ChatTemplate
from symphony_sglang.router.cors import Cors
from symphony_sglang.router.feeds import Feeds
from symphony_sglang.router.fleet import Fleet
from symphony_sglang.router.health import HealthMonitor, HealthSettings
from symphony_sglang.router.limits import LimitSettings, RequestGate
from symphony_sglang.router.live import LiveView
from symphony_sglang.router.moves import Mover, NoMover
from symphony_sglang.router.moves_copies import PrefixCopies
from symphony_sglang.router.moves_demand import MovingRequests
from symphony_sglang.router.moves_heads import HotHeads
from symphony_sglang.router.moves_mover import LIMITS as MOVE_LIMITS
from symphony_sglang.router.moves_mover import SessionMover
from symphony_sglang.router.moves_planner import MovePlanner
from symphony_sglang.router.moves_speed import WorkMeter
from symphony_sglang.router.placement import Placement
from symphony_sglang.router.proxy import Proxy, ProxySettings
from symphony_sglang.router.registry import WorkerRegistry
from symphony_sglang.router.retry import RetrySettings
from symphony_sglang.router.routes import make_routes, metrics_routes
from symphony_sglang.router.server import HttpServer
from symphony_sglang.router.symphony import SymphonyDesk
from symphony_sglang.router.tokens import PromptTokens
from symphony_sglang.telemetry.router import RouterMetrics

logger = logging.getLogger(__name__)

TICK_SECONDS = 1.0
THREADS = 2
# Hashing holds the interpreter's lock in small pieces; the event loop should not wait long for it.
SWITCH_SECONDS = 0.0005
LISTEN_BACKLOG = 2048
COLLECT_THRESHOLDS = (20_000, 20, 50)


class RouterService:
    """All parts of one router. `tokens` is made before, because loading a tokenizer takes time."""

    def __init__(
        self,
        settings: RouterSettings,
        *,
        tokens: PromptTokens | None = None,
        clock: Clock | None = None,
        chance: random.Random | None = None,
        move_limits: BookLimits = MOVE_LIMITS,
    ) -> None:
        self.settings = settings
        self.clock = clock or SystemClock()
        self.chance = chance or random.Random()
        self.metrics = RouterMetrics()
        self.background = Background()
        self.executor = ThreadPoolExecutor(THREADS, "tokens")
        self.keys = Keys(settings.api_key, settings.admin_keys, settings.worker_api_key)
        worker_key = settings.worker_api_key or settings.api_key
        self.registry = WorkerRegistry(
            self.clock,
            self.metrics,
            breaker_settings(settings),
            context=worker_tls(settings),
            ranks_apart=settings.dp_aware or settings.policy.startswith("symphony"),
        )
        self.health = HealthMonitor(
            self.registry,
            health_settings(settings),
            self.background,
            worker_key=worker_key,
            clock=self.clock,
            metrics=self.metrics,
        )
        self.placement = Placement(
            registry=self.registry,
            policy=make_policy(settings.policy, policy_settings(settings)),
            tokens=tokens or PromptTokens(),
            executor=self.executor,
            clock=self.clock,
            metrics=self.metrics,
            chance=self.chance,
        )
        self.feeds = Feeds(
            self.registry,
            self.placement,
            self.health,
            self.background,
            clock=self.clock,
            metrics=self.metrics,
        )
        self.gate = RequestGate(limit_settings(settings), self.clock, self.metrics)
        self.proxy = self._make_proxy()
        self.mover: Mover = NoMover()
        self.planner: MovePlanner | None = None
        if not settings.disable_migration:
            self._make_mover(move_limits)
        self.fleet = Fleet(self.registry, self.health, self.mover)
        self.desk = self._make_desk()
        self.live = LiveView(self.desk.residency_document, self.mover)
        self.parents = ParentHints(
            self.desk.advise_parent, self.placement, self.background, self.clock
        )
        self.proxy.on_sent = self.parents.sent
        self._make_face()

    def _make_desk(self) -> SymphonyDesk:
        return SymphonyDesk(
            registry=self.registry,
            placement=self.placement,
            health=self.health,
            mover=self.mover,
            metrics=self.metrics,
            clock=self.clock,
            background=self.background,
            limits=advisory_limits(self.settings),
        )

    def _make_mover(self, limits: BookLimits) -> None:
        """The one that moves sessions, told by the feeds and asked by placement."""
        mover = SessionMover(
            registry=self.registry,
            placement=self.placement,
            health=self.health,
            background=self.background,
            clock=self.clock,
            metrics=self.metrics,
            instance=self.chance.getrandbits(INSTANCE_BITS),
            drain_seconds_max=float(self.settings.drain_timeout_secs),
            limits=limits,
        )
        meter, heads = WorkMeter(), HotHeads()
        copies = PrefixCopies(
            self.registry, self.placement, self.health, self.background, heads, self.clock,
            self.metrics,
        )  # fmt: skip
        self.planner = MovePlanner(mover, self.placement, meter, copies, self.clock)
        self.placement.moving = MovingRequests(mover, self.health, meter, heads, self.clock)
        self.feeds.mover = self.mover = mover

    def _make_proxy(self) -> Proxy:
        settings = self.settings
        return Proxy(
            registry=self.registry,
            placement=self.placement,
            gate=self.gate,
            health=self.health,
            retry=retry_settings(settings),
            settings=ProxySettings(float(settings.request_timeout_secs)),
            # A caller's own key is passed on unless workers have one of theirs.
            worker_key=settings.worker_api_key,
            clock=self.clock,
            metrics=self.metrics,
            chance=self.chance,
            background=self.background,
        )

    def _make_face(self) -> None:
        """What listens: the router itself, and a second place for metrics alone."""
        settings = self.settings
        self.app = App(
            make_routes(self),
            keys=self.keys,
            cors=Cors(settings.cors_allowed_origins),
            clock=self.clock,
            metrics=self.metrics,
            audit=settings.control_plane_audit_enabled,
        )
        id_headers = tuple(name.lower().encode("ascii") for name in settings.request_id_headers)
        self.server = HttpServer(self.app, self.clock, id_headers=id_headers)
        self.metrics_server = HttpServer(
            App(
                metrics_routes(self), keys=Keys(), cors=Cors(()), clock=self.clock,
                metrics=RouterMetrics(),
            ),
            self.clock,
        )  # fmt: skip

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Everything but the listening sockets: workers watched, feeds followed, time ticking."""
        try:
            async with self.background:
                for url in self.settings.worker_urls:
                    self.registry.add(url, source="static")
                self.background.start(self._tick(), "tick")
                if isinstance(self.mover, SessionMover):
                    self.background.start(self.mover.run(), "moves")
                yield
        finally:
            for worker in self.registry:
                worker.pool.retire()
            self.executor.shutdown(wait=False, cancel_futures=True)

    async def _tick(self) -> None:
        while True:
            await asyncio.sleep(TICK_SECONDS)
            self.proxy.tick()
            self.placement.tick()
            self.desk.tick()
            self.feeds.tick()
            if self.planner is not None:
                self.planner.tick()
            connections = 0
            for worker in self.registry:
                worker.pool.trim()
                self.metrics.requests_active(worker.url, worker.active)
                connections += worker.pool.connections
            self.metrics.worker_connections(connections)

    def check(self) -> None:
        self.registry.check()
        self.gate.check()
        self.proxy.check()
        self.placement.tokens.check()
        self.placement.text_pages.check()
        self.placement.ledger.check()
        self.desk.check()
        self.live.check()
        self.parents.check()
        if isinstance(self.mover, SessionMover):
            self.mover.check()

    async def serve(self) -> None:
        """Serve until SIGTERM or SIGINT, then drain; a second signal stops at once.

        Raises:
            ConfigError: an address cannot be listened on.
        """
        settings = self.settings
        loop = asyncio.get_running_loop()
        sys.setswitchinterval(SWITCH_SECONDS)
        spare_collections()
        listener = bind(settings.host, settings.port)
        metrics_sockets = self._metrics_sockets()
        signals: asyncio.Queue[None] = asyncio.Queue()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, signals.put_nowait, None)
        async with self.running():
            await self.server.start([listener], router_tls(settings))
            await self.metrics_server.start(metrics_sockets)
            logger.info(
                "router on %s:%d, policy %s, %d workers",
                settings.host, settings.port, settings.policy, len(self.registry),
            )  # fmt: skip
            await signals.get()
            logger.info("draining %d requests", sum(worker.active for worker in self.registry))
            self.live.leave()
            stop = asyncio.ensure_future(  # noqa: TID251 - awaited right below
                self.server.stop(float(settings.shutdown_grace_period_secs))
            )
            again = asyncio.ensure_future(signals.get())  # noqa: TID251
            await asyncio.wait((stop, again), return_when=asyncio.FIRST_COMPLETED)
            if not stop.done():
                stop.cancel()
                await self.server.stop(0.0)
            again.cancel()
            await self.metrics_server.stop(0.0)

    def _metrics_sockets(self) -> list[socket.socket]:
        """A second listener for metrics alone; without it where its port is taken."""
        if self.settings.prometheus_port == 0:
            return []
        try:
            return [bind(self.settings.prometheus_host, self.settings.prometheus_port)]
        except ConfigError as error:
            logger.warning("metrics are on the main port only: %s", error)
            return []


def spare_collections() -> None:
    """What lives as long as the process need not be looked at by every garbage collection."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(*COLLECT_THRESHOLDS)


def bind(host: str, port: int) -> socket.socket:
    """A listening socket, bound before anything else starts, so that a taken port ends the start.

    Raises:
        ConfigError: it cannot be bound.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
        listener.listen(LISTEN_BACKLOG)
    except OSError as error:
        listener.close()
        raise ConfigError(f"cannot listen on {host}:{port}: {error.strerror}") from error
    listener.setblocking(False)
    return listener


def router_tls(settings: RouterSettings) -> ssl.SSLContext | None:
    """The context to listen with; None: no TLS.

    Raises:
        ConfigError: a file cannot be read.
    """
    if not settings.tls_cert_path:
        return None
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    try:
        context.load_cert_chain(settings.tls_cert_path, settings.tls_key_path)
    except (OSError, ssl.SSLError) as error:
        raise ConfigError(f"--tls-cert-path {settings.tls_cert_path}: {error}") from error
    return context


def worker_tls(settings: RouterSettings) -> ssl.SSLContext | None:
    """The context for https workers; None: the system's own authorities, and no certificate."""
    if not settings.ca_cert_paths and not settings.client_cert_path:
        return None
    context = ssl.create_default_context()
    try:
        for path in settings.ca_cert_paths:
            context.load_verify_locations(path)
        if settings.client_cert_path:
            context.load_cert_chain(settings.client_cert_path, settings.client_key_path)
    except (OSError, ssl.SSLError) as error:
        raise ConfigError(f"a certificate towards the workers cannot be read: {error}") from error
    return context


def breaker_settings(settings: RouterSettings) -> BreakerSettings:
    return BreakerSettings(
        failure_threshold=settings.cb_failure_threshold,
        success_threshold=settings.cb_success_threshold,
        timeout_seconds=float(settings.cb_timeout_duration_secs),
        window_seconds=float(settings.cb_window_duration_secs),
        enabled=not settings.disable_circuit_breaker,
    )


def health_settings(settings: RouterSettings) -> HealthSettings:
    return HealthSettings(
        enabled=not settings.disable_health_check,
        endpoint=settings.health_check_endpoint,
        interval_seconds=float(settings.health_check_interval_secs),
        timeout_seconds=float(settings.health_check_timeout_secs),
        failure_threshold=settings.health_failure_threshold,
        success_threshold=settings.health_success_threshold,
        startup_seconds_max=float(settings.worker_startup_timeout_secs),
        startup_interval_seconds=float(settings.worker_startup_check_interval),
    )


def limit_settings(settings: RouterSettings) -> LimitSettings:
    return LimitSettings(
        concurrent_max=settings.max_concurrent_requests,
        queue_max=settings.queue_size,
        queue_seconds_max=float(settings.queue_timeout_secs),
        per_second=float(settings.rate_limit_tokens_per_second),
    )


def advisory_limits(settings: RouterSettings) -> CallerLimits:
    rate = settings.advise_rate
    return CallerLimits(
        rate_per_second=rate,
        burst=max(1.0, 2 * rate),
        tokens_in_flight_max=settings.advise_tokens,
    )


def retry_settings(settings: RouterSettings) -> RetrySettings:
    return RetrySettings(
        retries_max=0 if settings.disable_retries else settings.retry_max_retries,
        initial_seconds=settings.retry_initial_backoff_ms / 1000,
        max_seconds=settings.retry_max_backoff_ms / 1000,
        multiplier=settings.retry_backoff_multiplier,
        jitter=settings.retry_jitter_factor,
    )


def policy_settings(settings: RouterSettings) -> PolicySettings:
    return PolicySettings(
        cache_threshold=settings.cache_threshold,
        balance_abs_threshold=settings.balance_abs_threshold,
        balance_rel_threshold=settings.balance_rel_threshold,
        eviction_interval_seconds=float(settings.eviction_interval_secs),
        max_tree_size=settings.max_tree_size,
        session_idle_seconds=float(settings.max_idle_secs),
    )


@contextlib.contextmanager
def torch_hidden() -> Iterator[None]:
    """A tokenizer needs no torch; transformers loads it where it finds it: 350 MB, and 3 s."""
    if "torch" in sys.modules:
        yield
        return
    # It would warn that models cannot be used.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    sys.modules["torch"] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        del sys.modules["torch"]


def load_tokens(settings: RouterSettings) -> PromptTokens:
    """The tokenizer that the settings name; without one, prompts given as ids are hashed only.

    Raises:
        ConfigError: it cannot be loaded.
    """
    path = settings.tokenizer_path or settings.model_path
    if not path:
        return PromptTokens()
    try:
        with torch_hidden():
            from transformers import AutoTokenizer

            tokenizer = AutoTokenizer.from_pretrained(
                path, trust_remote_code=settings.trust_remote_code
            )
    except (ImportError, OSError, ValueError) as error:
        raise ConfigError(f"no tokenizer can be loaded from {path}: {error}") from error
    template = None
    if settings.chat_template:
        try:
            template = Path(settings.chat_template).read_text(encoding="utf-8")
        except OSError as error:
            raise ConfigError(f"--chat-template {settings.chat_template}: {error}") from error
    return PromptTokens(tokenizer, ChatTemplate(tokenizer, template))
