"""The subscriber's sockets, and its two questions to a worker: a replay and a snapshot."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import Self

import zmq
import zmq.asyncio

from symphony_sglang.errors import FeedError
from symphony_sglang.wire import feed
from symphony_sglang.wire.feed_address import FeedAddress
from symphony_sglang.wire.feed_auth import FeedKeys, guard_client, server_keys


@dataclass(frozen=True, slots=True)
class SubscriberLimits:
    """Bounds and patience of a subscriber."""

    silence_seconds: float = 5.0  # without a heartbeat the worker is lost
    request_seconds: float = 10.0  # for a replay or a snapshot, whole
    lost_request_seconds: float = 1.0  # for a snapshot of a worker that is lost
    # Between two resyncs; doubled each time, back at the start after `quiet_seconds` without one.
    retry_seconds: float = 0.25
    retry_seconds_max: float = 5.0
    quiet_seconds: float = 30.0
    # How long the events socket may stay behind what a heartbeat named before a replay is asked.
    behind_seconds: float = 0.25
    receive_frames_max: int = 10_000  # ZMQ's queue; beyond it the worker's side drops
    frame_bytes_max: int = 64 << 20
    snapshot_pages_max: int = 1 << 26
    snapshot_sessions_max: int = 1 << 20
    replay_batches_max: int = 20_000
    # Messages of one socket handled before the other one, and the event loop, get a turn.
    burst: int = 64


def open_socket(
    context: zmq.asyncio.Context,
    kind: int,
    endpoint: str,
    keys: FeedKeys | None,
    limits: SubscriberLimits,
) -> zmq.asyncio.Socket:
    socket = context.socket(kind)
    try:
        socket.linger = 0
        socket.set_hwm(limits.receive_frames_max)
        socket.setsockopt(zmq.MAXMSGSIZE, limits.frame_bytes_max)
        socket.setsockopt(zmq.RECONNECT_IVL, 100)
        socket.setsockopt(zmq.RECONNECT_IVL_MAX, 2000)
        socket.setsockopt(zmq.IPV6, int("[" in endpoint))
        guard_client(socket, keys)
        socket.connect(endpoint)
    except zmq.ZMQError as error:
        socket.close()
        raise FeedError(f"cannot connect to {endpoint}: {error}") from error
    return socket


async def address_keys(address: FeedAddress) -> FeedKeys | None:
    """The worker's keys; deriving them is slow on purpose, so it leaves the event loop."""
    if address.api_key is None:
        return None
    return await asyncio.to_thread(server_keys, address.api_key)


class Sockets:
    """The two subscriptions to one address, closed on exit."""

    def __init__(
        self,
        context: zmq.asyncio.Context,
        address: FeedAddress,
        keys: FeedKeys | None,
        limits: SubscriberLimits,
    ) -> None:
        """Raises FeedError for an address that ZMQ does not take."""
        self.events = open_socket(
            context, zmq.SUB, address.endpoint(address.events_port), keys, limits
        )
        self.events.subscribe(address.topic)
        self.state: zmq.asyncio.Socket | None = None
        self._poller = zmq.asyncio.Poller()
        self._poller.register(self.events, zmq.POLLIN)
        if address.state_port is not None:
            self.state = open_socket(
                context, zmq.SUB, address.endpoint(address.state_port), keys, limits
            )
            self.state.subscribe(b"")
            self._poller.register(self.state, zmq.POLLIN)

    async def poll(self, seconds: float) -> list[zmq.asyncio.Socket]:
        """Those with messages, events first: what a heartbeat names should have been read."""
        ready = dict(await self._poller.poll(max(1, int(seconds * 1000))))
        return [
            socket for socket in (self.events, self.state) if socket is not None and socket in ready
        ]

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        _kind: type[BaseException] | None,
        _error: BaseException | None,
        _trace: TracebackType | None,
    ) -> None:
        self.events.close(linger=0)
        if self.state is not None:
            self.state.close(linger=0)


async def receive(socket: zmq.asyncio.Socket) -> list[bytes] | None:
    """A message that is there already, or None."""
    try:
        frames: list[bytes] = await socket.recv_multipart(zmq.NOBLOCK)
    except zmq.Again:
        return None
    return frames


async def request_replay(
    context: zmq.asyncio.Context,
    address: FeedAddress,
    keys: FeedKeys | None,
    first: int,
    limits: SubscriberLimits,
) -> list[tuple[int, bytes]]:
    """The batches that the worker still has from sequence `first` on.

    Raises:
        FeedError: no answer in time, or a malformed or too long one.
    """
    batches: list[tuple[int, bytes]] = []
    with question(context, address, keys, limits) as socket:
        try:
            async with asyncio.timeout(limits.request_seconds):
                await socket.send_multipart([b"", feed.sequence_frame(first)])
                while True:
                    _topic, sequence, payload = answer(await socket.recv_multipart())
                    if sequence == feed.END_SEQUENCE:
                        if payload == feed.BUSY:
                            raise FeedError("the worker is busy with other replies")
                        return batches
                    batches.append((feed.read_sequence(sequence), payload))
                    if len(batches) > limits.replay_batches_max:
                        raise FeedError(f"a replay of over {limits.replay_batches_max} batches")
        except TimeoutError as error:
            raise FeedError(f"no replay within {limits.request_seconds} s") from error


async def request_snapshot(
    context: zmq.asyncio.Context,
    address: FeedAddress,
    keys: FeedKeys | None,
    limits: SubscriberLimits,
) -> feed.Snapshot:
    """All that the worker holds now.

    Raises:
        FeedError: no answer in time, the worker is busy, or the answer is malformed or incomplete.
    """
    reader = feed.SnapshotReader(limits.snapshot_pages_max, limits.snapshot_sessions_max)
    with question(context, address, keys, limits) as socket:
        try:
            async with asyncio.timeout(limits.request_seconds):
                await socket.send_multipart([b"", feed.SNAPSHOT_REQUEST])
                while True:
                    found = reader.add(*answer(await socket.recv_multipart()))
                    if found is not None:
                        return found
        except TimeoutError as error:
            raise FeedError(f"no snapshot within {limits.request_seconds} s") from error


@contextmanager
def question(
    context: zmq.asyncio.Context,
    address: FeedAddress,
    keys: FeedKeys | None,
    limits: SubscriberLimits,
) -> Iterator[zmq.asyncio.Socket]:
    """A socket for one question: an answer that comes too late meets no later question."""
    if address.replay_port is None:
        raise FeedError(f"worker {address.worker_id!r} has no replay port")
    endpoint = address.endpoint(address.replay_port)
    socket = open_socket(context, zmq.DEALER, endpoint, keys, limits)
    try:
        yield socket
    finally:
        socket.close(linger=0)


def answer(frames: list[bytes]) -> tuple[bytes, bytes, bytes]:
    """Topic, sequence and payload of a reply. Raises FeedError."""
    if len(frames) != 4 or frames[0]:
        raise FeedError(f"a reply of {len(frames)} frames; expected 4, the first one empty")
    return frames[1], frames[2], frames[3]
