"""The feed over real sockets: a subscriber ends up with what the publisher holds, come what may."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
import zmq
import zmq.asyncio

from feed_world import (
    ANY,
    PAGE,
    FakeDisk,
    Seen,
    address_of,
    agreed,
    following,
    open_server,
    port,
    removed,
    reopen,
    stored,
    until,
)
from symphony_sglang.core.levels import Level
from symphony_sglang.wire import feed
from symphony_sglang.wire.feed_address import FeedAddress
from symphony_sglang.wire.feed_auth import server_keys
from symphony_sglang.wire.feed_requests import SubscriberLimits
from symphony_sglang.wire.feed_server import FeedServer
from symphony_sglang.wire.feed_settings import DiskDrain
from symphony_sglang.wire.subscriber import FeedState, FeedSubscriber


@pytest.fixture
def server() -> Iterator[FeedServer]:
    found = open_server(disk=FakeDisk())
    yield found
    found.close()


def test_a_late_subscriber_gets_a_snapshot_and_then_every_event(server: FeedServer) -> None:
    async def run() -> None:
        server.publish_events([stored(1, 2), stored(2, medium="CPU_PINNED")], 1.0)
        server.publish_session(feed.SessionChange("s", 32, 1))
        server.disk.store(7)  # type: ignore[attr-defined]
        await asyncio.sleep(0.05)
        async with following(address_of(server)) as (seen, subscriber):
            assert seen.pages[Level.DEVICE] == {1, 2}
            assert seen.pages[Level.HOST] == {2}
            assert seen.pages[Level.NVME] == {7}
            assert set(seen.sessions) == {("s", None, None)}
            server.publish_events([removed(1), stored(3, 4, parent=2)], 2.0)
            server.publish_session(feed.SessionChange("t", 16, 1))
            server.publish_session(feed.SessionChange("s", gone=True))
            server.publish_load(feed.WorkerLoad(requests_running=5))
            server.disk.store(8)  # type: ignore[attr-defined]
            await agreed(seen, server)
            await until(lambda: seen.load.requests_running == 5)
            await until(lambda: set(seen.sessions) == {("t", None, None)})
            assert 2 in seen.parents
            assert seen.states == [FeedState.SYNCING, FeedState.LIVE]
            assert subscriber.counters.snapshots == 1
            assert subscriber.counters.gaps == 0

    asyncio.run(run())


def test_what_is_on_disk_is_told_again_after_a_flush(server: FeedServer) -> None:
    async def run() -> None:
        async with following(address_of(server)) as (seen, subscriber):
            server.disk.store(*range(100, 110))  # type: ignore[attr-defined]
            server.publish_events([stored(1)], 1.0)
            await agreed(seen, server)
            server.publish_events([feed.AllBlocksCleared()], 1.0)
            await until(lambda: not seen.pages[Level.DEVICE])
            await agreed(seen, server)
            assert len(seen.pages[Level.NVME]) == 10
            assert subscriber.counters.snapshots == 1

    asyncio.run(run())


def test_a_disk_that_lost_its_events_makes_subscribers_take_a_snapshot(
    server: FeedServer,
) -> None:
    async def run() -> None:
        disk: Any = server.disk
        disk.store(1, 2, 3)
        async with following(address_of(server)) as (seen, subscriber):
            await agreed(seen, server)
            disk.held = {3, 4}
            disk.queue.append(DiskDrain((), resync=True))
            await agreed(seen, server)
            assert subscriber.counters.snapshots == 2

    asyncio.run(run())


class Proxy:
    """Stands between publisher and subscriber, and does to frames what networks do."""

    def __init__(self, server: FeedServer, *, hurt: Callable[[list[bytes]], list[list[bytes]]]):
        self._hurt = hurt
        self._context = zmq.asyncio.Context()
        self._source = self._context.socket(zmq.SUB)
        self._source.subscribe(b"")
        self._source.connect(server.endpoints.events)
        self._sink = self._context.socket(zmq.PUB)
        self._sink.bind(ANY)
        self.port = port(self._sink.getsockopt_string(zmq.LAST_ENDPOINT))

    async def run(self) -> None:
        while True:
            for frames in self._hurt(await self._source.recv_multipart()):
                await self._sink.send_multipart(frames)

    def close(self) -> None:
        self._context.destroy(linger=0)


@asynccontextmanager
async def following_through(
    server: FeedServer, hurt: Callable[[list[bytes]], list[list[bytes]]]
) -> AsyncIterator[tuple[Seen, FeedSubscriber]]:
    proxy = Proxy(server, hurt=hurt)
    straight = address_of(server)
    bent = FeedAddress(
        "w", "127.0.0.1", proxy.port, straight.replay_port, straight.state_port, page_size=PAGE
    )
    try:
        async with asyncio.TaskGroup() as group:
            task = group.create_task(proxy.run())
            async with following(bent) as found:
                yield found
            task.cancel()
    finally:
        proxy.close()


def traffic(server: FeedServer, chance: random.Random, steps: int) -> None:
    """Some residency changes, mostly small, now and then a flush."""
    for _ in range(steps):
        hashes = [chance.randrange(60) for _ in range(chance.randrange(1, 6))]
        medium = chance.choice(("GPU", "CPU_PINNED"))
        if chance.random() < 0.02:
            server.publish_events([feed.AllBlocksCleared()], 1.0)
        elif chance.random() < 0.6:
            server.publish_events([stored(*hashes, medium=medium)], 1.0)
        else:
            server.publish_events([removed(*hashes, medium=medium)], 1.0)


def lose(chance: random.Random, frames: list[bytes]) -> list[list[bytes]]:
    return [] if chance.random() < 0.2 else [frames]


def duplicate(chance: random.Random, frames: list[bytes]) -> list[list[bytes]]:
    return [frames, frames] if chance.random() < 0.3 else [frames]


def damage(chance: random.Random, frames: list[bytes]) -> list[list[bytes]]:
    if chance.random() > 0.1:
        return [frames]
    kind = chance.randrange(4)
    if kind == 0:
        return [frames[:2]]
    if kind == 1:
        return [[frames[0], b"short", frames[2]]]
    if kind == 2:
        return [[*frames[:2], b"\xc1" + frames[2]]]
    return [[*frames[:2], frames[2][: len(frames[2]) // 2]]]


def reorder(chance: random.Random) -> Callable[[list[bytes]], list[list[bytes]]]:
    held: list[list[bytes]] = []

    def hurt(frames: list[bytes]) -> list[list[bytes]]:
        held.append(frames)
        if len(held) < 4:
            return []
        out = list(held)
        held.clear()
        chance.shuffle(out)
        return out

    return hurt


@pytest.mark.parametrize("kind", ["lose", "duplicate", "damage", "reorder"])
@pytest.mark.parametrize("seed", [1, 2])
def test_a_bad_network_leaves_the_subscriber_right(kind: str, seed: int) -> None:
    chance = random.Random(seed)
    hurts: dict[str, Callable[[list[bytes]], list[list[bytes]]]] = {
        "lose": lambda frames: lose(chance, frames),
        "duplicate": lambda frames: duplicate(chance, frames),
        "damage": lambda frames: damage(chance, frames),
        "reorder": reorder(chance),
    }

    async def run() -> None:
        server = open_server(disk=FakeDisk(), replay_batches_max=8)
        try:
            async with following_through(server, hurts[kind]) as (seen, subscriber):
                for _ in range(15):
                    traffic(server, chance, 10)
                    await asyncio.sleep(0.01)
                await agreed(seen, server)
                assert subscriber.state is FeedState.LIVE
                counters = subscriber.counters
                assert counters.batches > 0
                if kind == "duplicate":
                    assert counters.duplicates > 0
                elif kind == "damage":
                    assert counters.malformed > 0
                else:
                    assert counters.gaps > 0
        finally:
            server.close()

    asyncio.run(run())


def test_gaps_are_replayed_where_the_worker_still_has_them(server: FeedServer) -> None:
    drop = iter([False, True, False, False])

    async def run() -> None:
        hurt = lambda frames: [] if next(drop, False) else [frames]  # noqa: E731
        async with following_through(server, hurt) as (seen, subscriber):
            for page in range(4):
                server.publish_events([stored(page)], 1.0)
            await agreed(seen, server)
            assert subscriber.counters.replays >= 1
            assert subscriber.counters.snapshots == 1

    asyncio.run(run())


def test_a_lost_tail_is_noticed_by_the_heartbeat(server: FeedServer) -> None:
    async def run() -> None:
        async with following_through(server, lambda _frames: []) as (seen, subscriber):
            server.publish_events([stored(1)], 1.0)
            await agreed(seen, server)
            assert subscriber.counters.gaps >= 1

    asyncio.run(run())


def test_a_restarted_worker_replaces_what_was_known() -> None:
    async def run() -> None:
        first = open_server()
        places = first.endpoints
        first.publish_events([stored(1, 2, 3)], 1.0)
        first.publish_session(feed.SessionChange("old", 16, 1))
        async with following(address_of(first)) as (seen, subscriber):
            await until(lambda: seen.pages[Level.DEVICE] == {1, 2, 3})
            first.close()
            second = await reopen(places)
            try:
                assert second.epoch > first.epoch
                second.publish_events([stored(9)], 1.0)
                await until(lambda: seen.pages[Level.DEVICE] == {9})
                assert seen.sessions == {}
                await until(lambda: subscriber.state is FeedState.LIVE)
            finally:
                second.close()

    asyncio.run(run())


def test_silence_is_a_lost_worker_and_it_is_found_on_its_new_ports() -> None:
    async def run() -> None:
        first = open_server()
        found: list[FeedAddress] = []

        async def rediscover() -> FeedAddress | None:
            return found[0] if found else None

        async with following(address_of(first), rediscover=rediscover) as (seen, subscriber):
            first.publish_events([stored(1)], 1.0)
            await until(lambda: seen.pages[Level.DEVICE] == {1})
            first.close()
            await until(lambda: subscriber.state is FeedState.LOST)
            assert seen.pages[Level.DEVICE] == {1}, "the handler decides what to forget"
            second = open_server()
            try:
                second.publish_events([stored(2)], 1.0)
                found.append(address_of(second))
                await until(lambda: subscriber.state is FeedState.LIVE)
                assert seen.pages[Level.DEVICE] == {2}
                assert subscriber.address == found[0]
            finally:
                second.close()

    asyncio.run(run())


def test_another_workers_feed_on_the_same_ports_is_not_taken_for_ours() -> None:
    async def run() -> None:
        first = open_server(name="one")
        places = first.endpoints
        found: list[FeedAddress] = []

        async def rediscover() -> FeedAddress | None:
            return found[0] if found else None

        address = address_of(first, name="one")
        async with following(address, rediscover=rediscover) as (seen, subscriber):
            first.publish_events([stored(1)], 1.0)
            await until(lambda: seen.pages[Level.DEVICE] == {1})
            first.close()
            other = await reopen(places, name="two")
            other.publish_events([stored(66)], 1.0)
            try:
                await until(lambda: subscriber.state is FeedState.LOST)
                await until(lambda: subscriber.counters.failed_requests > 2)
                assert 66 not in seen.pages[Level.DEVICE]
                again = open_server(name="one")
                again.publish_events([stored(2)], 1.0)
                found.append(address_of(again, name="one"))
                await until(lambda: seen.pages[Level.DEVICE] == {2})
                again.close()
            finally:
                other.close()

    asyncio.run(run())


def test_a_slow_subscriber_costs_the_publisher_nothing_and_catches_up() -> None:
    async def run() -> None:
        server = open_server(send_frames_max=20, replay_batches_max=20, replay_bytes_max=1 << 16)
        limits = SubscriberLimits(
            receive_frames_max=5, retry_seconds=0.02, behind_seconds=0.05, silence_seconds=30.0
        )
        try:
            async with following(address_of(server), limits=limits) as (seen, subscriber):
                for round_number in range(30):
                    for page in range(100):
                        server.publish_events([stored(*range(page, page + 300))], 1.0)
                        server.publish_events([removed(round_number)], 1.0)
                    await asyncio.sleep(0)
                await agreed(seen, server)
                assert subscriber.counters.gaps > 0
                assert len(server._replay) <= 20
        finally:
            server.close()

    asyncio.run(run())


def test_a_full_queue_breaks_the_sequence_but_not_the_truth() -> None:
    async def run() -> None:
        server = open_server(queue_max=8)
        try:
            async with following(address_of(server)) as (seen, _subscriber):
                with server._lock:  # the thread cannot take anything
                    for page in range(8):
                        server._queue.append(server_item(page))
                server.publish_events([stored(50)], 1.0)
                for page in range(100, 400):
                    server.publish_events([stored(page)], 1.0)
                server.publish_session(feed.SessionChange("s", 16, 1))
                await agreed(seen, server)
                await until(lambda: ("s", None, None) in seen.sessions)
                assert {50, 399, *range(8)} <= seen.pages[Level.DEVICE]
        finally:
            server.close()

    def server_item(page: int) -> Any:
        from symphony_sglang.wire.feed_server import _Events

        return _Events([stored(page)], 1.0)

    asyncio.run(run())


def test_overflow_is_counted_and_ends_in_a_snapshot() -> None:
    async def run() -> None:
        server = open_server(queue_max=2)
        try:
            async with following(address_of(server)) as (seen, subscriber):
                for page in range(3000):
                    server.publish_events([stored(page)], 1.0)
                await agreed(seen, server)
                assert server.counters.breaks > 0
                assert subscriber.counters.snapshots > 1
        finally:
            server.close()

    asyncio.run(run())


def test_an_item_that_cannot_be_encoded_is_left_out_and_resynced(server: FeedServer) -> None:
    async def run() -> None:
        async with following(address_of(server)) as (seen, subscriber):
            bad = stored(1)
            bad.token_ids = [object()]
            server.publish_events([bad], 1.0)
            server.publish_events([stored(2)], 1.0)
            await agreed(seen, server)
            assert seen.pages[Level.DEVICE] == {1, 2}
            assert server.counters.faults == 1
            assert subscriber.counters.snapshots == 2

    asyncio.run(run())


def test_malformed_requests_are_counted_and_answered_by_nothing(server: FeedServer) -> None:
    async def run() -> None:
        context = zmq.asyncio.Context()
        try:
            dealer = context.socket(zmq.DEALER)
            dealer.connect(server.endpoints.replay)
            for frames in ([b"", b"x" * 7], [b"x" * 8], [b"", b"", b""], [b"", b"y" * 4000]):
                await dealer.send_multipart(frames)
            await until(lambda: server.counters.malformed_requests == 4)
            assert not await dealer.poll(50)
            # One that is too long ends its connection, and nothing else.
            await dealer.send_multipart([b"", b"z" * 10_000])
            async with following(address_of(server)) as (seen, _subscriber):
                server.publish_events([stored(4)], 1.0)
                await agreed(seen, server)
        finally:
            context.destroy(linger=0)

    asyncio.run(run())


def test_only_who_knows_the_key_can_listen() -> None:
    async def run() -> None:
        server = open_server(keys=server_keys("secret"))
        try:
            async with following(address_of(server, api_key="secret")) as (seen, _subscriber):
                server.publish_events([stored(1)], 1.0)
                await until(lambda: seen.pages[Level.DEVICE] == {1})
            for key in ("wrong", None):
                bad = address_of(server, api_key=key)
                async with following(bad, wait=False) as (seen, subscriber):
                    await until(lambda states=seen.states: FeedState.LOST in states)
                    assert seen.pages[Level.DEVICE] == set()
                    assert subscriber.counters.snapshots == 0
        finally:
            server.close()

    asyncio.run(run())


def test_cancelling_leaves_nothing_behind(server: FeedServer) -> None:
    async def run() -> None:
        async with following(address_of(server)):
            pass
        assert [task for task in asyncio.all_tasks() if task is not asyncio.current_task()] == []

    asyncio.run(run())
