"""A stock SGLang worker over real sockets: page events, a replay, and nothing else."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

import zmq
import zmq.asyncio

from feed_world import (
    ANY,
    QUICK,
    Seen,
    following,
    port,
    removed,
    stored,
    until,
)
from symphony_sglang.core.levels import Level
from symphony_sglang.wire import feed
from symphony_sglang.wire.feed_address import FeedAddress
from symphony_sglang.wire.subscriber import FeedState, FeedSubscriber


class StockPublisher:
    """SGLang's own frames and replay protocol, sequence from 0, no state and no snapshot."""

    def __init__(self, events: str = ANY, replay: str = ANY, keep: int = 100) -> None:
        self.context = zmq.asyncio.Context()
        self.pub = self.context.socket(zmq.PUB)
        self.pub.bind(events)
        self.router = self.context.socket(zmq.ROUTER)
        self.router.bind(replay)
        self.events = self.pub.getsockopt_string(zmq.LAST_ENDPOINT)
        self.replay = self.router.getsockopt_string(zmq.LAST_ENDPOINT)
        self.sent: list[tuple[int, bytes]] = []
        self.keep = keep
        self.next = 0

    async def send(self, *events: Any, deliver: bool = True) -> None:
        payload = feed.encode(feed.EventBatch(1.0, list(events), 0))
        self.sent = [*self.sent, (self.next, payload)][-self.keep :]
        if deliver:
            await self.pub.send_multipart([b"", self.next.to_bytes(8, "big"), payload])
        self.next += 1

    async def serve(self) -> None:
        while True:
            client, _empty, first = await self.router.recv_multipart()
            for sequence, payload in self.sent:
                if sequence >= int.from_bytes(first, "big"):
                    frames = (client, b"", b"", sequence.to_bytes(8, "big"), payload)
                    await self.router.send_multipart(frames)
            await self.router.send_multipart((client, b"", b"", feed.END_SEQUENCE, b""))

    def address(self, *, replay: bool = True) -> FeedAddress:
        return FeedAddress(
            "w", "127.0.0.1", port(self.events), port(self.replay) if replay else None
        )

    def close(self) -> None:
        self.context.destroy(linger=0)


@asynccontextmanager
async def following_stock(
    *, replay: bool = True, keep: int = 100, before: Sequence[Any] = ()
) -> AsyncIterator[tuple[StockPublisher, Seen, FeedSubscriber]]:
    publisher = StockPublisher(keep=keep)
    try:
        async with asyncio.TaskGroup() as group:
            task = group.create_task(publisher.serve())
            for event in before:
                await publisher.send(event)
            async with following(publisher.address(replay=replay)) as (seen, subscriber):
                await asyncio.sleep(0.2)  # SUB sockets join late, and a stock worker cannot say so
                yield publisher, seen, subscriber
            task.cancel()
    finally:
        publisher.close()


def test_a_stock_worker_is_followed_from_its_first_batch() -> None:
    async def run() -> None:
        before = [stored(1, 2), removed(1)]
        async with following_stock(before=before) as (publisher, seen, subscriber):
            assert seen.pages[Level.DEVICE] == {2}
            await publisher.send(stored(3))
            await until(lambda: seen.pages[Level.DEVICE] == {2, 3})
            await publisher.send(stored(4), deliver=False)
            await publisher.send(stored(5))
            await until(lambda: seen.pages[Level.DEVICE] == {2, 3, 4, 5})
            assert subscriber.counters.replays == 1
            await asyncio.sleep(QUICK.silence_seconds * 1.5)
            assert subscriber.state is FeedState.LIVE, "it has no heartbeat to miss"

    asyncio.run(run())


def test_a_stock_worker_that_starts_again_is_known_by_its_sequence() -> None:
    async def run() -> None:
        async with following_stock(before=[stored(1)] * 5) as (publisher, seen, subscriber):
            publisher.next, publisher.sent = 0, []
            await publisher.send(stored(8))
            await until(lambda: seen.pages[Level.DEVICE] == {8})
            assert subscriber.counters.restarts == 1

    asyncio.run(run())


def test_a_stock_worker_without_replay_is_emptied_by_a_gap() -> None:
    async def run() -> None:
        async with following_stock(replay=False) as (publisher, seen, subscriber):
            await publisher.send(stored(1))
            await until(lambda: seen.pages[Level.DEVICE] == {1})
            await publisher.send(removed(1), deliver=False)
            await publisher.send(stored(2))
            await until(lambda: seen.pages[Level.DEVICE] == {2})
            assert subscriber.counters.gaps == 1
            await publisher.pub.send_multipart([b"", b"12345678", b"\xc1"])
            await until(lambda: subscriber.counters.malformed == 1)
            await until(lambda: subscriber.state is FeedState.LIVE)

    asyncio.run(run())


def test_a_stock_worker_whose_replay_is_too_short_is_known_from_there_on() -> None:
    async def run() -> None:
        async with following_stock(keep=2, before=[stored(n) for n in range(5)]) as found:
            publisher, seen, _subscriber = found
            assert seen.pages[Level.DEVICE] == {3, 4}
            for page in range(10, 14):
                await publisher.send(stored(page), deliver=page == 13)
            await until(lambda: 13 in seen.pages[Level.DEVICE])
            await until(lambda: seen.pages[Level.DEVICE] == {12, 13})

    asyncio.run(run())
