"""The feed inside a scheduler: SGLang's publisher seam, and what a step hands over.

SGLang makes the publisher (``EventPublisherFactory``) and gives it the tree's events; this adds the
NVMe level, sessions and load, and asks for the events at every step, for SGLang itself publishes
them every 40 decode steps only (metrics_reporter.py:933). One rank of each KV cache publishes.
"""

from __future__ import annotations

import atexit
import logging
from typing import TYPE_CHECKING, Any

import msgspec
import zmq
from sglang.srt.disaggregation.kv_events import (
    EventPublisher,
    ZmqEventPublisher,
    uses_dynamo_format,
)
from sglang.srt.runtime_context import get_observability, get_parallel, get_schedule, get_serving

from symphony_sglang.clock import Clock, SystemClock
from symphony_sglang.core.sessions import SessionKey, SessionRecord
from symphony_sglang.engine.feed_disk import DiskEvents, EventNames, StorePages
from symphony_sglang.engine.feed_load import LoadGauge
from symphony_sglang.engine.feed_sessions import SessionChains
from symphony_sglang.errors import UnsupportedError
from symphony_sglang.wire.feed import SessionChange
from symphony_sglang.wire.feed_auth import server_keys
from symphony_sglang.wire.feed_server import FeedServer
from symphony_sglang.wire.feed_settings import FeedEndpoints, FeedSettings

if TYPE_CHECKING:
    from symphony_sglang.engine.cache import SymphonyCache

logger = logging.getLogger(__name__)


class FeedPublisher(EventPublisher):
    """``--kv-events-config '{"publisher": "symphony", ...}'``."""

    def __init__(
        self,
        attn_dp_rank: int,
        endpoint: str = "tcp://*:5557",
        replay_endpoint: str | None = None,
        buffer_steps: int = 10_000,
        hwm: int = 2_000,
        max_queue_size: int = 10_000,
        topic: str = "",
        bind: bool | None = None,
    ) -> None:
        """SGLang passes its whole ``KVEventsConfig``. `bind` makes no difference: this one binds.

        Raises:
            UnsupportedError: an endpoint that is not tcp, or that is taken.
        """
        ranks = int(get_parallel().num_dp_ranks)
        replay_endpoint = replay_endpoint or shifted(endpoint, ranks)
        bases = FeedEndpoints(endpoint, replay_endpoint, shifted(replay_endpoint, ranks))
        endpoints = FeedEndpoints(
            shifted(bases.events, attn_dp_rank),
            shifted(bases.replay, attn_dp_rank),
            shifted(bases.state, attn_dp_rank),
        )
        page_size = int(get_schedule().page_size)
        settings = FeedSettings(
            page_size=page_size,
            rank=attn_dp_rank,
            topic=topic,
            name=f"{get_serving().host}:{get_serving().port}",
            queue_max=max_queue_size,
            replay_batches_max=buffer_steps,
            send_frames_max=hwm,
        )
        self.names = EventNames(page_size)
        # Handed over by the scheduler, and what that took of its time.
        self.batches = 0
        self.scheduler_seconds = 0.0
        self._chains = SessionChains(page_size)
        api_key = get_serving().api_key
        try:
            self.server = FeedServer(
                endpoints,
                settings,
                keys=server_keys(api_key) if api_key else None,
                disk=StorePages(self.names),
                translate=self._learn,
            )
        except zmq.ZMQError as error:
            raise UnsupportedError(
                f"feed: cannot bind {endpoints}: {error}; choose other ports with "
                "--symphony-feed-port, or turn it off with --no-symphony-feed"
            ) from error
        self.encrypted = bool(api_key)
        # SGLang has no hook for a scheduler's end (its own publisher does the same).
        atexit.register(self.shutdown)
        logger.info("feed: rank %d publishes on %s", attn_dp_rank, self.server.endpoints)

    def publish(self, events: Any) -> None:
        """Hand a batch of SGLang's to the feed's thread; never waits."""
        self.batches += 1
        self.server.publish_events(events.events, events.ts)

    def shutdown(self) -> None:
        self.server.close()

    def _learn(self, events: list[Any]) -> list[Any]:
        """Feed's thread: salted pages have another name on disk."""
        self.names.learn_events(events)
        return events

    def publish_session(self, key: SessionKey, record: SessionRecord | None) -> None:
        """A listener of the session table; the hashing is left to the feed's thread."""
        change = SessionChange(
            session_id=key.session_id,
            total_tokens=record.total_tokens if record else 0,
            turns=record.turns if record else 0,
            last_page_hash=record.last_page_hash if record else "",
            extra_key=key.namespace.extra_key,
            cache_salt=key.namespace.cache_salt,
            owner_epoch=record.owner_epoch if record else 0,
            gone=record is None,
        )
        self.server.publish_session(change, lambda change: self._complete(change, key, record))

    def _complete(
        self, change: SessionChange, key: SessionKey, record: SessionRecord | None
    ) -> SessionChange:
        """Feed's thread: the hash of the session's last whole page."""
        if record is None:
            self._chains.forget(key)
            return change
        self.names.learn_session(key.namespace, record.token_bytes)
        if change.last_page_hash:
            return change
        last_page = self._chains.last_page(key, record.token_bytes)
        return msgspec.structs.replace(change, last_page_hash=last_page.hex())

    def describe(self) -> dict[str, Any]:
        """For ``GET /symphony/residency``: what a subscriber needs to find this rank's feed."""
        server = self.server
        return {
            "rank": server.settings.rank,
            "events_port": port_of(server.endpoints.events),
            "replay_port": port_of(server.endpoints.replay),
            "state_port": port_of(server.endpoints.state),
            "topic": server.settings.topic,
            "name": server.settings.name,
            "page_size": server.settings.page_size,
            "epoch": server.epoch,
            "encrypted": self.encrypted,
            "heartbeat_s": server.settings.heartbeat_seconds,
            "counters": {
                **msgspec.to_builtins(server.counters),
                "scheduler_batches": self.batches,
                "scheduler_seconds": self.scheduler_seconds,
            },
        }


class FeedDriver:
    """The scheduler's side, on the rank that publishes. `step` runs once a scheduler step."""

    def __init__(self, scheduler: Any, publisher: FeedPublisher, cache: SymphonyCache) -> None:
        self.publisher = publisher
        self._events = scheduler.kv_events_publisher
        self._load = LoadGauge(scheduler, cache)
        self._clock: Clock = SystemClock()
        # With metrics on, SGLang also pushes figures for a consumer outside of it, over a socket
        # that queues without bound while there is none (kv_events_publisher.py:89). Nobody asked.
        metrics = self._events.send_metrics_from_scheduler
        if metrics is not None:
            metrics.close(linger=0)

    def step(self) -> None:
        """Hand over what happened since the last step: a few microseconds where nothing did."""
        publisher = self.publisher
        started, batches = self._clock.monotonic(), publisher.batches
        self._events.publish_kv_events()
        now_seconds = self._clock.monotonic()
        if publisher.batches != batches:
            publisher.scheduler_seconds += now_seconds - started
        load = self._load.read(now_seconds)
        if load is not None:
            publisher.server.publish_load(load)


def attach_feed(scheduler: Any, cache: SymphonyCache) -> None:
    """Give the cache its feed, where this rank publishes one; the user may have chosen another."""
    publisher = scheduler.kv_events_publisher.kv_event_publisher
    if not isinstance(publisher, FeedPublisher):
        config = get_observability().kv_events_config
        # Dynamo's format hashes pages once more, by what the store does not know.
        if publisher is not None and not uses_dynamo_format(config):
            cache.disk_events = DiskEvents(int(cache.page_size))
        return
    cache.feed = FeedDriver(scheduler, publisher, cache)
    if cache.advisories is not None:
        cache.advisories.keeper.listeners.append(publisher.publish_session)


def shifted(endpoint: str, offset: int) -> str:
    """An endpoint `offset` ports further on, as SGLang counts ranks (kv_events.py:653).

    Raises:
        UnsupportedError: the endpoint has no port.
    """
    if not endpoint.startswith("tcp://"):
        raise UnsupportedError(f"feed: endpoint {endpoint[:128]!r}; expected tcp://ADDRESS:PORT")
    moved: str = ZmqEventPublisher.offset_endpoint_port(endpoint, offset) or endpoint
    return moved


def port_of(endpoint: str) -> int:
    return int(endpoint.rpartition(":")[2])
