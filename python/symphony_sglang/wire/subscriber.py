"""Follows one worker's feed: a snapshot, then every event once, in order, or a new snapshot.

One loop for one rank, no task of its own: cancel `run` to end it. What it buffers is ZMQ's, and
bounded (`SubscriberLimits`); what is lost there shows as a gap, and gaps are replayed or resynced.

============  =====================================================================
in step       every batch has the sequence that follows the last one's
gap           ask for a replay; where the worker no longer has it, fall behind
fall behind   ignore events until a snapshot came, which says where to go on
silence       no heartbeat for ``silence_seconds``: lost, look for the worker again
============  =====================================================================

A stock SGLang worker has no snapshot and no heartbeat: its replay from 0 is the start, a backward
sequence is a restart, and a gap that it cannot replay empties what is known of it.
"""

from __future__ import annotations

import asyncio
import logging
from array import array
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Protocol

import zmq.asyncio

from symphony_sglang.clock import Clock, SystemClock
from symphony_sglang.core.levels import Level
from symphony_sglang.errors import FeedError
from symphony_sglang.wire import feed
from symphony_sglang.wire.feed_address import FeedAddress
from symphony_sglang.wire.feed_auth import FeedKeys
from symphony_sglang.wire.feed_requests import (
    Sockets,
    SubscriberLimits,
    address_keys,
    receive,
    request_replay,
    request_snapshot,
)

# A stock worker's next sequence before its first batch.
ANY_SEQUENCE = -1

logger = logging.getLogger(__name__)


class FeedState(StrEnum):
    """How far what the handler was told can be trusted."""

    SYNCING = "syncing"  # a snapshot is on its way; what is known may be old
    LIVE = "live"
    LOST = "lost"  # silent or unreachable


class FeedHandler(Protocol):
    """What follows a feed; called on the event loop, in order, and must not block."""

    def on_state(self, worker_id: str, state: FeedState) -> None: ...

    def on_snapshot(
        self,
        worker_id: str,
        pages: Mapping[Level, array[int]],
        sessions: Sequence[feed.SessionChange],
    ) -> None:
        """All that the worker holds, as event hashes: forget what was known of it before."""
        ...

    def on_pages_stored(
        self, worker_id: str, level: Level, hashes: Sequence[int], parent: int | None
    ) -> None:
        """Pages that are on `level` now; on NVMe in no order, without a parent."""
        ...

    def on_pages_removed(self, worker_id: str, level: Level, hashes: Sequence[int]) -> None: ...

    def on_cleared(self, worker_id: str) -> None:
        """Every level is empty."""
        ...

    def on_session(self, worker_id: str, change: feed.SessionChange) -> None: ...

    def on_load(self, worker_id: str, load: feed.WorkerLoad) -> None: ...


@dataclass(slots=True)
class SubscriberCounters:
    """What happened since the start; `lag_seconds` is the last batch's age on arrival."""

    batches: int = 0
    pages: int = 0
    duplicates: int = 0
    gaps: int = 0
    replays: int = 0
    snapshots: int = 0
    restarts: int = 0
    malformed: int = 0
    unknown_events: int = 0
    failed_requests: int = 0
    lag_seconds: float = 0.0


class FeedSubscriber:
    """Keeps a handler in step with one worker rank. `run` ends only by cancellation."""

    def __init__(
        self,
        address: FeedAddress,
        handler: FeedHandler,
        *,
        rediscover: Callable[[], Awaitable[FeedAddress | None]] | None = None,
        limits: SubscriberLimits | None = None,
        clock: Clock | None = None,
        context: zmq.asyncio.Context | None = None,
    ) -> None:
        """
        Args:
            rediscover: Asked for the address while the worker is lost, for it may have come back on
                other ports. None, or an answer of None, keeps the address.
        """
        self.address = address
        self.limits = limits or SubscriberLimits()
        self.counters = SubscriberCounters()
        self.state = FeedState.SYNCING
        self._handler = handler
        self._rediscover = rediscover
        self._clock = clock or SystemClock()
        self._context = context or zmq.asyncio.Context.instance()
        self._keys: FeedKeys | None = None
        self._in_step = False
        self._epoch = 0
        self._next = ANY_SEQUENCE
        self._next_session = 0
        # The newest sequence that a heartbeat named while the events socket was behind, and when.
        self._named, self._named_at = 0, 0.0
        self._heard_at = 0.0
        self._retry_seconds = self.limits.retry_seconds
        self._retry_at = 0.0
        self._resynced_at = float("-inf")

    # The loop -----------------------------------------------------------------------------------

    async def run(self) -> None:
        """Follow the worker until cancelled, through silence, restarts and new ports.

        Raises:
            FeedError: an address that ZMQ does not take; a worker that does not answer is no error.
        """
        self._handler.on_state(self.address.worker_id, self.state)
        while True:
            address = self.address
            self._keys = await address_keys(address)
            with Sockets(self._context, address, self._keys, self.limits) as sockets:
                self._heard_at = self._clock.monotonic()
                while self.address == address:
                    await self._turn(sockets)

    async def _turn(self, sockets: Sockets) -> None:
        if not self._in_step and self._clock.monotonic() >= self._retry_at:
            await self._try_resync()
        ready = await sockets.poll(self._wait_seconds())
        for socket in ready:
            for _ in range(self.limits.burst):
                frames = await receive(socket)
                if frames is None:
                    break
                self._heard_at = self._clock.monotonic()
                await self._take(frames, from_state=socket is sockets.state)
        if ready:
            await asyncio.sleep(0)
        elif self._silent():
            self._lose()

    def _wait_seconds(self) -> float:
        until = self._heard_at + self.limits.silence_seconds
        if not self._in_step:
            until = min(until, self._retry_at)
        return min(max(0.001, until - self._clock.monotonic()), self.limits.silence_seconds)

    def _silent(self) -> bool:
        """A stock worker says nothing while it has nothing to say."""
        if self.address.stock:
            return False
        return self._clock.monotonic() - self._heard_at >= self.limits.silence_seconds

    def _lose(self) -> None:
        self._heard_at = self._clock.monotonic()
        self._fall_behind("no heartbeat")
        self._enter(FeedState.LOST)

    def _enter(self, state: FeedState) -> None:
        if state is not self.state:
            self.state = state
            self._handler.on_state(self.address.worker_id, state)

    # Messages -----------------------------------------------------------------------------------

    async def _take(self, frames: list[bytes], *, from_state: bool) -> None:
        """One message; what is wrong with it is counted, and answered by a resync."""
        try:
            if len(frames) != 3:
                raise FeedError(f"{len(frames)} frames; expected 3")
            topic, sequence, payload = frames
            # Out of step, nothing says whose it is: the port may be another worker's by now.
            if not self._in_step:
                return
            if not from_state:
                await self._take_events(feed.read_sequence(sequence), payload)
            elif topic == feed.TOPIC_LOAD:
                await self._take_load(feed.decode_load(payload))
            elif topic == feed.TOPIC_SESSION:
                self._take_sessions(feed.read_sequence(sequence), payload)
        except FeedError as error:
            self.counters.malformed += 1
            self._fall_behind(f"malformed: {error}")

    def _fall_behind(self, why: str) -> None:
        """What is known is not complete any more; resync at once, unless one was just made."""
        if not self._in_step:
            return
        logger.info("feed of %s: resync: %s", self.address.worker_id, why)
        self._in_step = False
        now_seconds = self._clock.monotonic()
        self._retry_at = max(now_seconds, self._resynced_at + self._retry_seconds)
        self._enter(FeedState.SYNCING)

    async def _take_events(self, sequence: int, payload: bytes) -> None:
        if self._next == ANY_SEQUENCE:
            self._next = sequence
        if sequence < self._next:
            if self.address.stock:
                self.counters.restarts += 1
                self._fall_behind("the worker started again")
            else:
                self.counters.duplicates += 1
            return
        if sequence > self._next:
            self.counters.gaps += 1
            if self.address.replay_port is None:
                self._handler.on_cleared(self.address.worker_id)
                self._next = sequence
            else:
                await self._replay()
        if self._in_step and sequence == self._next:
            self._apply(sequence, payload)
        elif self._in_step and sequence > self._next:
            self._fall_behind("batches are gone")

    async def _replay(self) -> None:
        """Ask for what is missing, and apply it as far as it goes on where we are."""
        self.counters.replays += 1
        try:
            batches = await request_replay(
                self._context, self.address, self._keys, self._next, self.limits
            )
        except FeedError as error:
            self.counters.failed_requests += 1
            self._fall_behind(str(error))
            return
        for sequence, payload in batches:
            if sequence == self._next:
                self._apply(sequence, payload)

    def _apply(self, sequence: int, payload: bytes) -> None:
        batch, unknown = feed.decode_pages(payload)
        self._next = sequence + 1
        counters, handler, worker_id = self.counters, self._handler, self.address.worker_id
        counters.batches += 1
        counters.unknown_events += unknown
        counters.lag_seconds = max(0.0, self._clock.unix() - batch.ts)
        for event in batch.events:
            if isinstance(event, feed.ClearedPages):
                handler.on_cleared(worker_id)
                continue
            level = feed.LEVEL_OF_MEDIUM.get(event.medium or feed.Medium.GPU)
            if level is None:
                counters.unknown_events += 1
                continue
            counters.pages += len(event.block_hashes)
            if isinstance(event, feed.StoredPages):
                handler.on_pages_stored(
                    worker_id, level, event.block_hashes, event.parent_block_hash
                )
            else:
                handler.on_pages_removed(worker_id, level, event.block_hashes)

    async def _take_load(self, report: feed.LoadReport) -> None:
        if report.epoch != self._epoch:
            self.counters.restarts += 1
            self._fall_behind("the worker started again")
            return
        if report.sessions_sequence >= self._next_session:
            # Sent before this on the same socket: they are lost.
            self.counters.gaps += 1
            self._fall_behind("session changes are gone")
        else:
            await self._check_events(report.events_sequence)
        self._handler.on_load(self.address.worker_id, report.load)

    async def _check_events(self, newest: int) -> None:
        """Notice a lost tail. The events come on another socket, so give them a moment."""
        now_seconds = self._clock.monotonic()
        if self._named < self._next:
            self._named, self._named_at = newest, now_seconds
        elif now_seconds - self._named_at >= self.limits.behind_seconds:
            self.counters.gaps += 1
            await self._replay()
            if self._in_step and self._named >= self._next:
                self._fall_behind("batches are gone")

    def _take_sessions(self, sequence: int, payload: bytes) -> None:
        if sequence < self._next_session:
            self.counters.duplicates += 1
        elif sequence > self._next_session:
            self.counters.gaps += 1
            self._fall_behind("session changes are gone")
        else:
            changes = feed.decode_sessions(payload).changes
            self._next_session = sequence + 1
            for change in changes:
                self._handler.on_session(self.address.worker_id, change)

    # Resync -------------------------------------------------------------------------------------

    async def _try_resync(self) -> None:
        if self.state is FeedState.LOST and self._rediscover is not None:
            found = await self._rediscover()
            if found is not None and found != self.address:
                self.address = found
                self._retry_at = 0.0
                return
        limits = self.limits
        longer = min(2 * self._retry_seconds, limits.retry_seconds_max)
        try:
            await (self._resync_stock() if self.address.stock else self._resync())
        except FeedError as error:
            self.counters.failed_requests += 1
            logger.info("feed of %s: %s", self.address.worker_id, error)
            self._retry_at = self._clock.monotonic() + self._retry_seconds
            self._retry_seconds = longer
            return
        now_seconds = self._clock.monotonic()
        quiet = now_seconds - self._resynced_at > limits.quiet_seconds
        self._retry_seconds = limits.retry_seconds if quiet else longer
        self._resynced_at = now_seconds

    async def _resync(self) -> None:
        limits = self.limits
        if self.state is FeedState.LOST:
            # Most likely nobody answers: look for the worker elsewhere again soon.
            limits = replace(limits, request_seconds=limits.lost_request_seconds)
        snapshot = await request_snapshot(self._context, self.address, self._keys, limits)
        header = snapshot.header
        address = self.address
        if address.name and (address.name, address.rank) != (header.name, header.rank):
            # The worker is gone, and another one has its port: look for it elsewhere.
            self._enter(FeedState.LOST)
            raise FeedError(f"it is the feed of {header.name[:64]!r} rank {header.rank} by now")
        self.counters.snapshots += 1
        self._epoch = header.epoch
        self._named = header.events_sequence
        self._next = header.events_sequence + 1
        self._next_session = header.sessions_sequence + 1
        self._heard_at = self._clock.monotonic()
        self._in_step = True
        self._handler.on_snapshot(self.address.worker_id, snapshot.pages, snapshot.sessions)
        self._enter(FeedState.LIVE)

    async def _resync_stock(self) -> None:
        """All that a stock worker can still tell: the batches that it has buffered."""
        batches: list[tuple[int, bytes]] = []
        if self.address.replay_port is not None:
            batches = await request_replay(self._context, self.address, None, 0, self.limits)
        self._in_step = True
        self._next = batches[0][0] if batches else ANY_SEQUENCE
        self._handler.on_cleared(self.address.worker_id)
        try:
            for sequence, payload in batches:
                if sequence == self._next:
                    self._apply(sequence, payload)
        except FeedError:
            self._in_step = False
            raise
        self._enter(FeedState.LIVE)
