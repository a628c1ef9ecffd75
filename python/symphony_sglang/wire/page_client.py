"""A connection to a peer's page server, for one thread; `abort` may come from any.

Requests are answered in the order they were made, except that the two answers of the local way
(where the pages are, whether they stayed) may have another request's between them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import msgspec
import xxhash

from symphony_sglang.clock import Clock, SystemClock
from symphony_sglang.errors import ConfigError, PeerLostError, PeerProtocolError
from symphony_sglang.wire.channel import STEP_BYTES, Channel, SocketChannel, connect_socket
from symphony_sglang.wire.frames import receive_content, receive_header, refusal, send_frame
from symphony_sglang.wire.handshake import greet_server
from symphony_sglang.wire.local_copy import LocalReader
from symphony_sglang.wire.pages import (
    KV_POOL,
    PageOutcome,
    PeerIdentity,
    RemoteEngine,
    RemoteReader,
)
from symphony_sglang.wire.secure_channel import TransferKey
from symphony_sglang.wire.transfer_protocol import (
    FETCH_BYTES_MAX,
    FETCHES_MAX,
    HASHES_MAX,
    LENGTH_BYTES,
    PAGES_PER_FETCH_MAX,
    SUM_BYTES,
    Checked,
    Copied,
    Fetch,
    Found,
    FrameHeader,
    GetRecord,
    Kind,
    Lookup,
    Placed,
    Record,
    Refused,
    unpack_body,
    unpack_lengths,
    unpack_sums,
)


@dataclass(frozen=True, slots=True)
class ClientSettings:
    """Seconds. `local` lets a connection to this host copy from the server's memory."""

    connect_seconds: float = 3.0
    transfer_seconds: float = 15.0  # a peer that sends no byte for so long is gone
    local: bool = True


Result = tuple[PageOutcome, int]


_Placed = list[tuple[int, int]]  # (address, bytes) of a page's pieces


@dataclass(slots=True)
class _Fetch:
    buffers: Sequence[memoryview]
    local: bool
    placed: Placed | None = None
    checked: Checked | None = None
    results: list[Result] | None = None
    copied: bool | None = None  # out of the server's memory: None until it was tried
    sums: list[int] = field(default_factory=list)


Answer = TypeVar("Answer", bound=msgspec.Struct)
_ANSWERS: dict[Kind, type[msgspec.Struct]] = {Kind.FOUND: Found, Kind.RECORD: Record}


def split_address(address: str) -> tuple[str, int]:
    """``host:port`` or ``[v6]:port``; raises ConfigError for anything else."""
    host, colon, port = address.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    if not colon or not host or not port.isascii() or not port.isdigit() or int(port) > 65535:
        raise ConfigError(f"page server address {address[:256]!r}; expected host:port")
    return host, int(port)


class PageClient:
    """A ``PageTransport`` over the framed protocol, with look-ups and records beside pages."""

    def __init__(
        self,
        address: str,
        identity: PeerIdentity,
        *,
        key: TransferKey | None = None,
        pool: str = KV_POOL,
        settings: ClientSettings | None = None,
        engine: tuple[str, RemoteEngine] | None = None,
        clock: Clock | None = None,
        deadline: float | None = None,
    ) -> None:
        """Connect and shake hands.

        Args:
            engine: a one-sided engine with its name; where the server has none of that name, pages
                take the ways that are always there.
            deadline: time of `clock` past which no call waits.

        Raises:
            PeerRefusedError: other keys, or pages that differ; the message names both values.
            PeerLostError: no connection, or none in time.
            PeerProtocolError: what answers is no page server.
            ConfigError: `address` is not host:port.
        """
        self.address = address
        self.settings = settings or ClientSettings()
        self._pool = pool
        self._page_bytes = identity.page_bytes
        self._clock = clock or SystemClock()
        self._deadline = deadline
        self._requests = 0
        self._fetches: dict[int, _Fetch] = {}
        self._answers: dict[int, msgspec.Struct] = {}
        base = self._connect(deadline)
        self._channel: Channel = base
        start = self._clock.monotonic()
        greeting_ends = start + self.settings.connect_seconds
        try:
            base.expire_at(greeting_ends if deadline is None else min(deadline, greeting_ends))
            name = "" if engine is None else engine[0]
            greeting = greet_server(base, address, identity, key, name)
            base.expire_at(deadline)
            base.limit(self.settings.transfer_seconds)
        except BaseException:
            base.close()
            raise
        self._channel = greeting.channel
        self.peer = greeting.peer
        self._reader: RemoteReader | None = None
        if engine is not None and greeting.metadata:
            self._reader = engine[1].connect(greeting.metadata)
        if self._reader is None and greeting.local is not None and self.settings.local:
            self._reader = LocalReader(greeting.local.process)

    def _connect(self, deadline: float | None) -> SocketChannel:
        seconds = self.settings.connect_seconds
        if deadline is not None:
            seconds = min(seconds, deadline - self._clock.monotonic())
        if seconds <= 0:
            raise PeerLostError(f"{self.address}: the deadline passed")
        try:
            sock = connect_socket(*split_address(self.address), seconds)
        except (OSError, UnicodeError) as error:
            raise PeerLostError(
                f"{self.address}: no connection: {getattr(error, 'strerror', None) or error}"
            ) from error
        return SocketChannel(sock, self.address, self._clock, seconds)

    @property
    def way(self) -> str:
        """``stream``, or the way in which pages are copied from the server's memory."""
        return "stream" if self._reader is None else self._reader.way

    # Questions ----------------------------------------------------------------------------------

    def lookup(self, hashes: Sequence[bytes], wait_seconds: float = 0.0) -> list[bool]:
        """Which pages the peer has; it waits up to `wait_seconds` until it has them all.

        Only the first ``HASHES_MAX`` may be asked in one call.
        """
        assert 0 < len(hashes) <= HASHES_MAX, len(hashes)
        body = Lookup(b"".join(hashes), self._pool, wait_seconds)
        found = self._ask(Kind.LOOKUP, body, Found, wait_seconds).found
        if len(found) != len(hashes):
            raise PeerProtocolError(f"{self.address}: {len(found)} answers for {len(hashes)}")
        return [flag == 1 for flag in found]

    def record(self, kind: str, name: str, wait_seconds: float = 0.0) -> bytes | None:
        """A small record of the peer, None where it has none (yet)."""
        body = GetRecord(kind, name, wait_seconds)
        return self._ask(Kind.GET_RECORD, body, Record, wait_seconds).body

    def _ask(
        self, kind: Kind, body: msgspec.Struct, answer_type: type[Answer], wait_seconds: float
    ) -> Answer:
        request = self._next_request()
        self._channel.limit(self.settings.transfer_seconds + max(0.0, wait_seconds))
        send_frame(self._channel, kind, request, body)
        while request not in self._answers:
            self._receive()
        self._channel.limit(self.settings.transfer_seconds)
        answer = self._answers.pop(request)
        if not isinstance(answer, answer_type):
            raise PeerProtocolError(f"{self.address}: {type(answer).__name__} as an answer")
        return answer

    def _next_request(self) -> int:
        self._requests = (self._requests + 1) & 0xFFFF_FFFF
        return self._requests

    # Pages --------------------------------------------------------------------------------------

    def begin(self, hashes: Sequence[bytes], buffers: Sequence[memoryview]) -> int:
        """Ask for pages, into buffers of ``page_bytes`` each; see ``fetch_limit``."""
        assert 0 < len(hashes) == len(buffers) <= PAGES_PER_FETCH_MAX, (len(hashes), len(buffers))
        assert len(self._fetches) < FETCHES_MAX, f"{len(self._fetches)} fetches are under way"
        request = self._next_request()
        reader = self._reader
        local, summed = reader is not None, reader is None or reader.summed
        self._fetches[request] = _Fetch(buffers, local)
        fetch = Fetch(b"".join(hashes), self._pool, local, summed)
        send_frame(self._channel, Kind.FETCH, request, fetch)
        return request

    def finish(self, request: int) -> list[Result]:
        """See ``PageTransport.finish``."""
        fetch = self._fetches[request]
        while fetch.results is None:
            if fetch.placed is not None and fetch.copied is None:
                self._copy(request, fetch, fetch.placed)
            elif fetch.placed is not None and fetch.checked is not None:
                fetch.results = self._check(fetch, fetch.placed, fetch.checked)
            else:
                self._receive()
        del self._fetches[request]
        return fetch.results

    def _receive(self) -> None:
        """Take the next frame to whom it belongs."""
        header = receive_header(self._channel)
        fetch = self._fetches.get(header.request)
        if header.kind is Kind.PAGES and fetch is not None and fetch.results is None:
            fetch.results = self._receive_pages(header, fetch.buffers)
            return
        content = receive_content(self._channel, header)
        if header.kind is Kind.REFUSED:
            raise refusal(unpack_body(content, Refused))
        if header.kind is Kind.PLACED and fetch is not None and fetch.local:
            fetch.placed = unpack_body(content, Placed)
        elif header.kind is Kind.CHECKED and fetch is not None and fetch.local:
            fetch.checked = unpack_body(content, Checked)
        elif header.kind in _ANSWERS and fetch is None and not self._answers:
            self._answers[header.request] = unpack_body(content, _ANSWERS[header.kind])
        else:
            raise PeerProtocolError(
                f"{self.address}: {header.kind.name} frame for request {header.request}"
            )

    def _receive_pages(self, header: FrameHeader, buffers: Sequence[memoryview]) -> list[Result]:
        count = len(buffers)
        if header.size < count * (LENGTH_BYTES + SUM_BYTES + 1):
            raise PeerProtocolError(f"{self.address}: PAGES frame of {header.size} bytes")
        raw = bytearray(LENGTH_BYTES * count)
        self._channel.receive_into([memoryview(raw)])
        lengths = unpack_lengths(raw, count, header.size, self._page_bytes)
        pages = [
            None if length is None else buffer[:length]
            for buffer, length in zip(buffers, lengths, strict=True)
        ]
        sums = receive_hashed(self._channel, pages)
        trailer = bytearray((SUM_BYTES + 1) * count)
        self._channel.receive_into([memoryview(trailer)])
        theirs = unpack_sums(memoryview(trailer)[: SUM_BYTES * count], count)
        return judge(lengths, sums, theirs, bytes(trailer[SUM_BYTES * count :]))

    # Out of the server's memory -----------------------------------------------------------------

    def _copy(self, request: int, fetch: _Fetch, placed: Placed) -> None:
        if len(placed.pages) != len(fetch.buffers):
            raise PeerProtocolError(f"{self.address}: {len(placed.pages)} pages placed")
        for page in placed.pages:
            size = 0 if page is None else sum(part for _, part in page)
            if page is None:
                continue
            if not 0 < size <= self._page_bytes or min(part for _, part in page) <= 0:
                raise PeerProtocolError(f"{self.address}: a page of {size} bytes placed")
        reader = self._reader
        until = self._clock.monotonic() + self.settings.transfer_seconds
        if self._deadline is not None:
            until = min(until, self._deadline)
        fetch.copied = reader is not None and copy_hashed(reader, placed.pages, fetch, until)
        if reader is not None and not fetch.copied:
            # Whatever forbids it will not go away: pages take the socket.
            self._reader = None
            reader.close()
        send_frame(self._channel, Kind.COPIED, request, Copied())

    def _check(self, fetch: _Fetch, placed: Placed, checked: Checked) -> list[Result]:
        lengths = [None if page is None else sum(size for _, size in page) for page in placed.pages]
        theirs = unpack_sums(checked.sums, len(lengths))
        if not fetch.copied:
            return [
                (PageOutcome.MISSING if length is None else PageOutcome.CHANGED, 0)
                for length in lengths
            ]
        return judge(lengths, fetch.sums, theirs, checked.unchanged)

    # --------------------------------------------------------------------------------------------

    def abort(self) -> None:
        """See ``PageTransport.abort``."""
        reader = self._reader
        if reader is not None:
            reader.abort()
        self._channel.abort()

    def close(self) -> None:
        """End the connection; the server notices at its next read or write. Idempotent."""
        reader, self._reader = self._reader, None
        if reader is not None:
            reader.close()
        self._channel.close()

    def __enter__(self) -> PageClient:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def fetch_limit(page_bytes: int) -> int:
    """Pages of this size that one request may name."""
    return max(1, min(PAGES_PER_FETCH_MAX, FETCH_BYTES_MAX // page_bytes))


def judge(
    lengths: Sequence[int | None], sums: Sequence[int], theirs: Sequence[int], unchanged: bytes
) -> list[Result]:
    """How each page of an answer ended."""
    if len(unchanged) != len(lengths):
        raise PeerProtocolError(f"{len(unchanged)} flags for {len(lengths)} pages")
    results: list[Result] = []
    for length, ours, sent, same in zip(lengths, sums, theirs, unchanged, strict=True):
        if length is None:
            results.append((PageOutcome.MISSING, 0))
        elif not same:
            results.append((PageOutcome.CHANGED, 0))
        elif ours != sent:
            results.append((PageOutcome.CORRUPT, 0))
        else:
            results.append((PageOutcome.ARRIVED, length))
    return results


def receive_hashed(channel: Channel, pages: Sequence[memoryview | None]) -> list[int]:
    """Fill `pages` in order, hashing each step's bytes while the cache still holds them."""
    sums = [0] * len(pages)
    group: list[tuple[int, memoryview]] = []
    size = 0

    def take() -> None:
        channel.receive_into([page for _, page in group])
        for at, page in group:
            sums[at] = xxhash.xxh3_64_intdigest(page)
        group.clear()

    for at, page in enumerate(pages):
        if page is None:
            continue
        if len(page) <= STEP_BYTES:
            if size + len(page) > STEP_BYTES and group:
                take()
                size = 0
            group.append((at, page))
            size += len(page)
            continue
        if group:
            take()
            size = 0
        digest = xxhash.xxh3_64()
        for start in range(0, len(page), STEP_BYTES):
            part = page[start : start + STEP_BYTES]
            channel.receive_into([part])
            digest.update(part)
        sums[at] = digest.intdigest()
    if group:
        take()
    return sums


def copy_hashed(
    reader: RemoteReader, pages: Sequence[_Placed | None], fetch: _Fetch, until: float
) -> bool:
    """Copy pages out of a peer's memory, hashing each step's bytes after it where that is asked."""
    fetch.sums = [0] * len(pages)
    group: list[tuple[int, memoryview]] = []
    remote: list[tuple[int, int]] = []
    size = 0

    def take() -> bool:
        if not reader.copy(remote, [page for _, page in group], until):
            return False
        if reader.summed:
            for at, page in group:
                fetch.sums[at] = xxhash.xxh3_64_intdigest(page)
        return True

    for at, (page, buffer) in enumerate(zip(pages, fetch.buffers, strict=True)):
        if page is None:
            continue
        length = sum(part for _, part in page)
        if size + length > reader.step_bytes and group:
            if not take():
                return False
            group, remote, size = [], [], 0
        group.append((at, buffer[:length]))
        remote.extend(page)
        size += length
    return not group or take()
