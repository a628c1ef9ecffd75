"""A feed's publisher, its followers and what they were told, for tests of the feed."""

from __future__ import annotations

import asyncio
from array import array
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any

import zmq
import zmq.asyncio

from symphony_sglang.core.levels import Level
from symphony_sglang.wire import feed
from symphony_sglang.wire.feed_address import FeedAddress
from symphony_sglang.wire.feed_requests import SubscriberLimits
from symphony_sglang.wire.feed_server import FeedServer
from symphony_sglang.wire.feed_settings import DiskDrain, FeedEndpoints, FeedSettings
from symphony_sglang.wire.subscriber import FeedState, FeedSubscriber

ANY = "tcp://127.0.0.1:0"
PAGE = 16
QUICK = SubscriberLimits(
    silence_seconds=0.8,
    request_seconds=2.0,
    lost_request_seconds=0.3,
    retry_seconds=0.02,
    retry_seconds_max=0.2,
    quiet_seconds=0.1,
    behind_seconds=0.05,
)


class Seen:
    """What the handler was told, kept as a router would."""

    def __init__(self) -> None:
        self.pages: dict[Level, set[int]] = {level: set() for level in Level}
        self.sessions: dict[tuple[str, str | None, str | None], feed.SessionChange] = {}
        self.states: list[FeedState] = []
        self.load = feed.WorkerLoad()
        self.running_max = 0
        self.parents: list[int | None] = []

    def on_state(self, worker_id: str, state: FeedState) -> None:
        self.states.append(state)

    def on_snapshot(
        self,
        worker_id: str,
        pages: Mapping[Level, array[int]],
        sessions: Sequence[feed.SessionChange],
    ) -> None:
        self.pages = {level: set(pages.get(level, ())) for level in Level}
        self.sessions = {change.key: change for change in sessions}

    def on_pages_stored(
        self, worker_id: str, level: Level, hashes: Sequence[int], parent: int | None
    ) -> None:
        self.pages[level].update(hashes)
        self.parents.append(parent)

    def on_pages_removed(self, worker_id: str, level: Level, hashes: Sequence[int]) -> None:
        self.pages[level].difference_update(hashes)

    def on_cleared(self, worker_id: str) -> None:
        for pages in self.pages.values():
            pages.clear()

    def on_session(self, worker_id: str, change: feed.SessionChange) -> None:
        if change.gone:
            self.sessions.pop(change.key, None)
        else:
            self.sessions[change.key] = change

    def on_load(self, worker_id: str, load: feed.WorkerLoad) -> None:
        self.load = load
        self.running_max = max(self.running_max, load.requests_running)


class FakeDisk:
    """A page store's side of the feed; `queue` holds drains, `held` what is there."""

    def __init__(self) -> None:
        self.held: set[int] = set()
        self.queue: list[DiskDrain] = []

    def drain(self) -> DiskDrain:
        return self.queue.pop(0) if self.queue else DiskDrain(())

    def pages(self) -> Iterator[array[int]]:
        yield array("q", sorted(self.held))

    def store(self, *hashes: int) -> None:
        self.held.update(hashes)
        self.queue.append(DiskDrain([(True, list(hashes))]))


def open_server(endpoints: FeedEndpoints | None = None, **options: Any) -> FeedServer:
    settings = FeedSettings(
        page_size=PAGE,
        name=options.pop("name", ""),
        heartbeat_seconds=0.05,
        disk_poll_seconds=0.01,
        **{key: options.pop(key) for key in tuple(options) if key.endswith("_max")},
    )
    return FeedServer(endpoints or FeedEndpoints(ANY, ANY, ANY), settings, **options)


async def reopen(endpoints: FeedEndpoints, **options: Any) -> FeedServer:
    """ZMQ lets go of a closed socket's port a moment later."""
    async with asyncio.timeout(5):
        while True:
            try:
                return open_server(endpoints, **options)
            except zmq.ZMQError:
                await asyncio.sleep(0.05)


def port(endpoint: str) -> int:
    return int(endpoint.rpartition(":")[2])


def address_of(server: FeedServer, **more: Any) -> FeedAddress:
    places = server.endpoints
    return FeedAddress(
        "w",
        "127.0.0.1",
        port(places.events),
        port(places.replay),
        port(places.state),
        page_size=PAGE,
        **more,
    )


def stored(*hashes: int, medium: str = "GPU", parent: int | None = None) -> feed.BlockStored:
    return feed.BlockStored(list(hashes), parent, [0] * PAGE * len(hashes), PAGE, None, medium)


def removed(*hashes: int, medium: str = "GPU") -> feed.BlockRemoved:
    return feed.BlockRemoved(list(hashes), medium)


@asynccontextmanager
async def following(
    address: FeedAddress, *, wait: bool = True, **options: Any
) -> AsyncIterator[tuple[Seen, FeedSubscriber]]:
    seen = Seen()
    options.setdefault("limits", QUICK)
    context = zmq.asyncio.Context()
    subscriber = FeedSubscriber(address, seen, context=context, **options)
    try:
        async with asyncio.TaskGroup() as group:
            task = group.create_task(subscriber.run())
            if wait:
                await until(lambda: subscriber.state is FeedState.LIVE)
            yield seen, subscriber
            task.cancel()
    finally:
        context.destroy(linger=0)


async def until(condition: Callable[[], bool], seconds: float = 10.0) -> None:
    async with asyncio.timeout(seconds):
        while not condition():  # noqa: ASYNC110 - conditions of two threads
            await asyncio.sleep(0.002)


def truth(server: FeedServer) -> dict[Level, set[int]]:
    held = getattr(server.disk, "held", set())
    return {
        Level.DEVICE: set(server.mirror.pages(Level.DEVICE)),
        Level.HOST: set(server.mirror.pages(Level.HOST)),
        Level.NVME: set(held),
        Level.PEER: set(),
    }


async def agreed(seen: Seen, server: FeedServer) -> None:
    await until(lambda: not server._queue)
    await until(lambda: seen.pages == truth(server))
