"""Publishes one rank's feed: a thread with its sockets, fed by a producer that never waits.

The producer (a scheduler thread) appends to a bounded queue and wakes the thread; applying to the
mirror, encoding and sending are the thread's. Overflow: the producer brings the mirror up to date
itself and breaks the sequence, so that every subscriber finds a gap that no replay fills, and takes
a snapshot. Nothing is ever lost silently, and nothing grows.
"""

from __future__ import annotations

import logging
import os
import threading
from array import array
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from itertools import chain
from typing import Any, NamedTuple

import msgspec
import zmq

from symphony_sglang.clock import Clock, SystemClock
from symphony_sglang.core.levels import Level
from symphony_sglang.wire import feed
from symphony_sglang.wire.feed_auth import FeedKeys, guard_server
from symphony_sglang.wire.feed_log import ReplayBuffer, ResidencyMirror, SessionMirror, chunks
from symphony_sglang.wire.feed_replies import END, Frame, Replies, numbered
from symphony_sglang.wire.feed_settings import (
    DiskPages,
    FeedCounters,
    FeedEndpoints,
    FeedSettings,
    NoDisk,
)

# What a malformed item of the producer can cause.
FAULTS = (
    zmq.ZMQError,
    msgspec.MsgspecError,
    AttributeError,
    LookupError,
    OverflowError,
    TypeError,
    ValueError,
)

logger = logging.getLogger(__name__)


class _Events(NamedTuple):
    events: list[Any]
    ts: float


class _Session(NamedTuple):
    change: feed.SessionChange
    # Fills in what is costly to know, such as the last page's hash.
    complete: Callable[[feed.SessionChange], feed.SessionChange] | None


class FeedServer:
    """One rank's feed. `publish_*` are the producer's, from any one thread; all else is inside."""

    def __init__(
        self,
        endpoints: FeedEndpoints,
        settings: FeedSettings,
        *,
        keys: FeedKeys | None = None,
        disk: DiskPages | None = None,
        translate: Callable[[list[Any]], list[Any]] | None = None,
        clock: Clock | None = None,
        context: zmq.Context[zmq.Socket[bytes]] | None = None,
    ) -> None:
        """Bind and start.

        Args:
            translate: Applied to each batch's events on the feed's thread, before anything else.

        Raises:
            zmq.ZMQError: an address is taken or not of this machine.
        """
        self.settings = settings
        self.counters = FeedCounters()
        self.disk: DiskPages = disk or NoDisk()
        self._clock = clock or SystemClock()
        self._translate = translate
        self.epoch = feed.epoch_of(self._clock.unix())
        # Guards what the producer touches in an overflow: queue, mirrors and sequences.
        self._lock = threading.Lock()
        self._queue: deque[_Events | _Session] = deque()
        self._load = feed.WorkerLoad()
        self._load_changed = False
        self.mirror = ResidencyMirror()
        self.sessions = SessionMirror()
        self._events_sequence = self.epoch - 1
        self._sessions_sequence = self.epoch - 1
        self._replay = ReplayBuffer(settings.replay_batches_max, settings.replay_bytes_max)
        self._next_heartbeat = self._next_disk = 0.0
        self._topic = settings.topic.encode()
        self._closing = False
        self._wake = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._awake = False
        context = context or zmq.Context.instance()
        self._pub, self._router, self._state = (
            context.socket(zmq.PUB),
            context.socket(zmq.ROUTER),
            context.socket(zmq.PUB),
        )
        self._replies = Replies(self._router, settings, self.counters)
        try:
            self.endpoints = FeedEndpoints(
                self._bind(self._pub, endpoints.events, keys),
                self._bind(self._router, endpoints.replay, keys),
                self._bind(self._state, endpoints.state, keys),
            )
        except zmq.ZMQError:
            self._close_sockets()
            raise
        self._thread = threading.Thread(target=self._run, name="symphony-feed", daemon=True)
        self._thread.start()

    def _bind(self, socket: zmq.Socket[bytes], endpoint: str, keys: FeedKeys | None) -> str:
        socket.set_hwm(self.settings.send_frames_max)
        socket.linger = 0
        socket.setsockopt(zmq.IPV6, int("[" in endpoint))
        # Requests are small; a longer one ends the connection before it takes memory.
        socket.setsockopt(zmq.MAXMSGSIZE, 4096)
        guard_server(socket, keys)
        socket.bind(endpoint)
        bound: str = socket.getsockopt_string(zmq.LAST_ENDPOINT)
        return bound

    # The producer's side ------------------------------------------------------------------------

    def publish_events(self, events: list[Any], ts: float) -> None:
        """SGLang's events of one step, or ours of the same shape. Takes the list over."""
        self._append(_Events(events, ts))

    def publish_session(
        self,
        change: feed.SessionChange,
        complete: Callable[[feed.SessionChange], feed.SessionChange] | None = None,
    ) -> None:
        self._append(_Session(change, complete))

    def publish_load(self, load: feed.WorkerLoad) -> None:
        """A gauge: only the newest is sent."""
        self._load = load
        self._load_changed = True
        self._ring()

    def _append(self, item: _Events | _Session) -> None:
        if len(self._queue) >= self.settings.queue_max:
            self._overflow()
        self._queue.append(item)
        self._ring()

    def _ring(self) -> None:
        if not self._awake:
            self._awake = True
            os.eventfd_write(self._wake, 1)

    def _overflow(self) -> None:
        """The thread does not keep up: the producer pays, once for the whole queue."""
        with self._lock:
            while self._queue:
                item = self._queue.popleft()
                if isinstance(item, _Events):
                    self._apply(item)
                else:
                    self.sessions.apply(item.change)
            self._break_sequence()
            self._sessions_sequence += 1
        logger.warning("feed: the queue of %d is full; subscribers resync", self.settings.queue_max)

    def close(self) -> None:
        """Send what is queued, stop the thread, close the sockets. Idempotent."""
        if self._closing:
            return
        self._closing = True
        os.eventfd_write(self._wake, 1)
        self._thread.join(timeout=2.0)
        if not self._thread.is_alive():
            os.close(self._wake)

    # The thread ---------------------------------------------------------------------------------

    def _run(self) -> None:
        poller = zmq.Poller()
        poller.register(self._wake, zmq.POLLIN)
        poller.register(self._router, zmq.POLLIN)
        self._next_heartbeat = self._next_disk = self._clock.monotonic()
        try:
            while not self._closing:
                ready = dict(poller.poll(self._wait_milliseconds()))
                if self._wake in ready:
                    os.eventfd_read(self._wake)
                self._awake = False
                # One bad item must not end the feed: it is counted, and subscribers resync.
                try:
                    self._turn(self._router in ready)
                except FAULTS as error:
                    self._fault(error)
            self._send_queued()
        finally:
            self._close_sockets()

    def _turn(self, requests: bool) -> None:
        self._send_queued()
        now_seconds = self._clock.monotonic()
        if now_seconds >= self._next_disk:
            self._next_disk = now_seconds + self.settings.disk_poll_seconds
            self._send_disk()
        if requests:
            self._take_request()
        self._replies.go_on(now_seconds)
        if self._load_changed or now_seconds >= self._next_heartbeat:
            self._next_heartbeat = now_seconds + self.settings.heartbeat_seconds
            self._send_load()

    def _wait_milliseconds(self) -> int:
        if self._queue or self._load_changed:
            return 0
        if self._replies:
            return self._replies.wait_milliseconds
        until = min(self._next_heartbeat, self._next_disk) - self._clock.monotonic()
        return max(1, int(until * 1000))

    def _fault(self, error: Exception) -> None:
        self.counters.faults += 1
        with self._lock:
            self._break_sequence()
        logger.error("feed: a message is left out, subscribers resync: %s", error)

    def _close_sockets(self) -> None:
        for socket in (self._pub, self._router, self._state):
            socket.close(linger=200)

    # Events -------------------------------------------------------------------------------------

    def _send_queued(self) -> None:
        while True:
            with self._lock:
                if not self._queue:
                    return
                item = self._queue.popleft()
                if isinstance(item, _Events):
                    self._events_sequence += 1
                    sequence = self._events_sequence
                    item = self._apply(item)
                else:
                    self._sessions_sequence += 1
                    sequence = self._sessions_sequence
            if isinstance(item, _Events):
                self._send_batch(sequence, item)
            else:
                self._send_session(sequence, item)

    def _apply(self, item: _Events) -> _Events:
        """Translate and mirror one batch; the lock is held."""
        events = item.events if self._translate is None else self._translate(item.events)
        mirror = self.mirror
        for event in events:
            kind = type(event).__name__
            if kind == "AllBlocksCleared":
                mirror.cleared()
                continue
            level = mirror.level_of(event.medium)
            if level is None:
                continue
            change = mirror.stored if kind == "BlockStored" else mirror.removed
            change(level, event.block_hashes)
        return _Events(events, item.ts)

    def _send_batch(self, sequence: int, item: _Events) -> None:
        """Encode, keep for replays, and send."""
        payload = feed.encode(feed.EventBatch(item.ts, item.events, self.settings.rank))
        self._replay.append(sequence, payload)
        frames = (self._topic, feed.sequence_frame(sequence), payload)
        self._pub.send_multipart(frames, zmq.NOBLOCK)
        self.counters.batches += 1
        cleared = False
        for event in item.events:
            if type(event).__name__ == "AllBlocksCleared":
                cleared = True
            else:
                self.counters.pages += len(event.block_hashes)
        if cleared:
            self._announce_disk()

    def _break_sequence(self) -> None:
        """Leave a gap that no replay fills; the lock is held."""
        self._events_sequence += 1
        self._replay.clear()
        self.counters.breaks += 1

    def _send_now(self, events: list[Any]) -> None:
        """A batch of the thread's own, after what the producer queued before."""
        with self._lock:
            self._events_sequence += 1
            sequence = self._events_sequence
        self._send_batch(sequence, _Events(events, self._clock.unix()))

    def _send_disk(self) -> None:
        drain = self.disk.drain()
        if drain.resync:
            # Which pages went is not known, so no event can say it: a snapshot must.
            with self._lock:
                self._break_sequence()
        if drain.opened or drain.resync:
            self._announce_disk()
        events: list[Any] = [
            self._disk_stored(hashes)
            if stored
            else feed.BlockRemoved(hashes, medium=feed.Medium.DISK)
            for stored, hashes in drain.runs
        ]
        if events:
            self._send_now(events)

    def _disk_stored(self, hashes: list[int]) -> feed.BlockStored:
        return feed.BlockStored(
            hashes, None, [], self.settings.page_size, None, medium=feed.Medium.DISK
        )

    def _announce_disk(self) -> None:
        for chunk in self.disk.pages():
            for part in chunks(chunk, 4096):
                self._send_now([self._disk_stored(part.tolist())])

    # State --------------------------------------------------------------------------------------

    def _send_session(self, sequence: int, item: _Session) -> None:
        change = item.change if item.complete is None else item.complete(item.change)
        with self._lock:
            self.sessions.apply(change)
        batch = feed.SessionBatch(self._clock.unix(), [change])
        self._state.send_multipart(
            (feed.TOPIC_SESSION, feed.sequence_frame(sequence), feed.encode(batch)), zmq.NOBLOCK
        )

    def _send_load(self) -> None:
        self._load_changed = False
        report = feed.LoadReport(
            epoch=self.epoch,
            ts=self._clock.unix(),
            events_sequence=self._events_sequence,
            sessions_sequence=self._sessions_sequence,
            load=self._load,
        )
        frames = (feed.TOPIC_LOAD, feed.sequence_frame(self._events_sequence), feed.encode(report))
        self._state.send_multipart(frames, zmq.NOBLOCK)

    # Requests -----------------------------------------------------------------------------------

    def _take_request(self) -> None:
        frames = self._router.recv_multipart(zmq.NOBLOCK)
        if len(frames) == 3 and len(frames[2]) == feed.SEQUENCE_BYTES:
            self._answer_replay(frames[0], feed.read_sequence(frames[2]))
        elif len(frames) == 3 and frames[2] == feed.SNAPSHOT_REQUEST:
            self._begin_snapshot(frames[0])
        else:
            self.counters.malformed_requests += 1

    def _answer_replay(self, client: bytes, first: int) -> None:
        self.counters.replays += 1
        frames = (
            Frame(self._topic, feed.sequence_frame(sequence), payload)
            for sequence, payload in self._replay.since(first)
        )
        self._replies.begin(client, chain(frames, [END]), self._clock.monotonic())

    def _begin_snapshot(self, client: bytes) -> None:
        self.counters.snapshots += 1
        with self._lock:
            header = feed.SnapshotHeader(
                epoch=self.epoch,
                events_sequence=self._events_sequence,
                sessions_sequence=self._sessions_sequence,
                page_size=self.settings.page_size,
                rank=self.settings.rank,
                name=self.settings.name,
            )
            pages = {level: self.mirror.pages(level) for level in (Level.DEVICE, Level.HOST)}
            sessions = self.sessions.sessions()
        frames = numbered(self._snapshot_frames(header, pages, sessions))
        self._replies.begin(client, frames, self._clock.monotonic())

    def _snapshot_frames(
        self,
        header: feed.SnapshotHeader,
        pages: dict[Level, array[int]],
        sessions: list[feed.SessionChange],
    ) -> Iterator[tuple[bytes, bytes]]:
        """Frames made one at a time: live events go out in between."""
        yield feed.TOPIC_HEADER, feed.encode(header)
        for level, hashes in pages.items():
            yield from self._page_frames(feed.MEDIUM_OF_LEVEL[level], [hashes])
        yield from self._page_frames(feed.Medium.DISK, self.disk.pages())
        for start in range(0, len(sessions), feed.SESSIONS_PER_CHUNK):
            part = sessions[start : start + feed.SESSIONS_PER_CHUNK]
            yield feed.TOPIC_SESSIONS, feed.encode(feed.SessionsChunk(part))

    def _page_frames(
        self, medium: feed.Medium, source: Iterable[array[int]]
    ) -> Iterator[tuple[bytes, bytes]]:
        for hashes in source:
            for part in chunks(hashes, feed.HASHES_PER_CHUNK):
                chunk = feed.PagesChunk(medium.value, feed.pack_hashes(part))
                yield feed.TOPIC_PAGES, feed.encode(chunk)
