"""Answers to subscribers' questions, a burst of frames at a time."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import zmq

from symphony_sglang.wire import feed
from symphony_sglang.wire.feed_settings import FeedCounters, FeedSettings

# Frames of one reply before the others, and live events, get a turn.
REPLY_BURST = 64
REPLY_RETRY_MILLISECONDS = 5


class Frame(NamedTuple):
    topic: bytes
    sequence: bytes
    payload: bytes


@dataclass(slots=True)
class _Reply:
    """An answer under way: frames made as the client takes them."""

    client: bytes
    frames: Iterator[Frame]
    give_up_seconds: float
    # Made, but not taken by ZMQ yet.
    pending: Frame | None = None


# What ends a replay, as SGLang ends it.
END = Frame(b"", feed.END_SEQUENCE, b"")


class Replies:
    """The answers under way on a ROUTER socket; at most ``replies_max``.

    A client that reads slowly holds up nobody: its next frame waits until ZMQ takes it.
    """

    def __init__(
        self, router: zmq.Socket[bytes], settings: FeedSettings, counters: FeedCounters
    ) -> None:
        self._router = router
        self._settings = settings
        self._counters = counters
        self._replies: deque[_Reply] = deque()
        # A send to a full client fails then, instead of losing the frame.
        router.setsockopt(zmq.ROUTER_MANDATORY, 1)

    def __len__(self) -> int:
        return len(self._replies)

    @property
    def wait_milliseconds(self) -> int:
        """How long nothing can be done for them."""
        blocked = all(reply.pending is not None for reply in self._replies)
        return REPLY_RETRY_MILLISECONDS if blocked else 0

    def begin(self, client: bytes, frames: Iterator[Frame], now_seconds: float) -> None:
        """Answer `client` with `frames`, or "busy" where too many answers are under way."""
        give_up = now_seconds + self._settings.reply_seconds
        reply = _Reply(client, frames, give_up)
        if len(self._replies) >= self._settings.replies_max:
            self._counters.replies_refused += 1
            reply.frames = iter([Frame(b"", feed.END_SEQUENCE, feed.BUSY)])
            self._send(reply, 1)
            return
        self._replies.append(reply)

    def go_on(self, now_seconds: float) -> None:
        """A burst of each: live events go out in between, and no client holds up another."""
        for _ in range(len(self._replies)):
            reply = self._replies.popleft()
            if now_seconds > reply.give_up_seconds:
                self._counters.replies_given_up += 1
            elif not self._send(reply, REPLY_BURST):
                self._replies.append(reply)

    def _send(self, reply: _Reply, count: int) -> bool:
        """Up to `count` frames; True once all are sent, or there is nobody to send them to."""
        for _ in range(count):
            frame = reply.pending or next(reply.frames, None)
            if frame is None:
                return True
            try:
                self._router.send_multipart((reply.client, b"", *frame), zmq.NOBLOCK)
            except zmq.Again:
                reply.pending = frame
                return False
            except zmq.ZMQError as error:
                if error.errno != zmq.EHOSTUNREACH:
                    raise
                self._counters.replies_given_up += 1
                return True
            reply.pending = None
        return False


def numbered(frames: Iterable[tuple[bytes, bytes]]) -> Iterator[Frame]:
    """Frames with their number, and an end that says how many there were."""
    count = 0
    for topic, payload in frames:
        yield Frame(topic, feed.sequence_frame(count), payload)
        count += 1
    yield Frame(b"", feed.END_SEQUENCE, feed.sequence_frame(count))
