"""HTTP/1.1 towards the workers: kept-alive connections, answers as they arrive.

A general client spends more time on one exchange than the whole router may (benchmark/router.py);
this one parses with httptools, hands each piece on as it is read, and knows exactly what has been
received when something fails, which decides whether a request may be tried again.
"""

from __future__ import annotations

import asyncio
import contextlib
import ssl
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple, cast
from urllib.parse import urlsplit

import httptools

from symphony_sglang.clock import Clock
from symphony_sglang.errors import SymphonyError

Headers = list[tuple[bytes, bytes]]

# Reading pauses while the caller is this far behind, and goes on when it has caught up.
BUFFER_BYTES_MAX = 256 << 10
HEADER_BYTES_MAX = 64 << 10
CONNECT_SECONDS_MAX = 5.0
# SGLang closes a connection that was idle for 5 s; one that we take must not close under us.
IDLE_SECONDS_MAX = 4.0
IDLE_CONNECTIONS_MAX = 512


class UpstreamError(SymphonyError):
    """A worker could not be reached, or its answer broke off.

    `kind` is ``connect`` (nothing was sent), ``closed`` (the connection ended before the answer
    did), ``protocol`` (not HTTP), ``timeout`` or ``oversize``.
    """

    code = "upstream"

    def __init__(self, kind: str, message: str, *, fresh: bool = True) -> None:
        super().__init__(message)
        self.kind = kind
        # False: the connection had served before, so the worker may just have closed it as idle.
        self.fresh = fresh


class Origin(NamedTuple):
    """Where a worker listens."""

    host: str
    port: int
    secure: bool
    base_path: str

    @property
    def authority(self) -> bytes:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{host}:{self.port}".encode("ascii")


def parse_origin(url: str) -> Origin:
    """The parts of a worker's URL.

    Raises:
        ValueError: not an http or https URL of a host.
    """
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError(f"{url!r} is not a URL like http://host:port")
    if parts.query or parts.fragment or parts.username or parts.password:
        raise ValueError(f"{url!r} holds more than a host, a port and a path")
    host = parts.hostname.encode("idna").decode("ascii") if ":" not in parts.hostname else (
        parts.hostname
    )  # fmt: skip
    secure = parts.scheme == "https"
    port = parts.port or (443 if secure else 80)
    return Origin(host, port, secure, parts.path.rstrip("/"))


class UpstreamConnection(asyncio.Protocol):
    """One connection, one exchange at a time."""

    def __init__(self) -> None:
        self.served = 0
        self.idle_since = 0.0
        self.closed = False
        self._transport: asyncio.Transport
        self._parser = httptools.HttpResponseParser(self)
        self._waiter: asyncio.Future[None] | None = None
        self._reset()

    def _reset(self) -> None:
        self.status = 0
        self.headers: Headers = []
        self.head_done = False
        self.complete = False
        self.chunks: deque[bytes] = deque()
        self.error: UpstreamError | None = None
        self._push: Callable[[bytes], bool] | None = None
        self._buffered = 0
        self._paused = False
        self._header_bytes = 0
        self._delimited = False
        self._keep_alive = True

    # From the transport -----------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)

    def data_received(self, data: bytes) -> None:
        try:
            self._parser.feed_data(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade) as error:
            self._fail(UpstreamError("protocol", f"the worker's answer is not HTTP: {error}"))
            self._transport.abort()
        if self._push is not None and self.chunks and not self.complete:
            self._pass_on(self._push)
        elif self._buffered > BUFFER_BYTES_MAX and not self._paused:
            self._paused = True
            self._transport.pause_reading()
        self._wake()

    def connection_lost(self, error: Exception | None) -> None:
        self.closed = True
        if self.head_done and not self.complete and not self._delimited and error is None:
            # An answer without a length ends with its connection.
            self.complete = True
        elif not self.complete:
            why = f": {error}" if error else ""
            self._fail(
                UpstreamError(
                    "closed", f"the worker closed the connection{why}", fresh=self.served == 0
                )
            )
        self._wake()

    # From the parser --------------------------------------------------------------------------

    def on_header(self, name: bytes, value: bytes) -> None:
        self._header_bytes += len(name) + len(value)
        if self._header_bytes > HEADER_BYTES_MAX:
            raise httptools.HttpParserError(f"over {HEADER_BYTES_MAX} bytes of headers")
        self.headers.append((name.lower(), value))

    def on_headers_complete(self) -> None:
        status = self._parser.get_status_code()
        if 100 <= status < 200:
            self.headers = []
            return
        self.status = status
        self.head_done = True
        self._keep_alive = self._parser.should_keep_alive()
        self._delimited = any(
            name in (b"content-length", b"transfer-encoding") for name, _value in self.headers
        )

    def on_body(self, body: bytes) -> None:
        self.chunks.append(body)
        self._buffered += len(body)

    def on_message_complete(self) -> None:
        if self.head_done:
            self.complete = True

    # From the exchange ------------------------------------------------------------------------

    def start(self, request: bytes, body: bytes) -> None:
        """Send a request; one write, so that small ones leave in one packet."""
        self._reset()
        if len(body) < BUFFER_BYTES_MAX:
            self._transport.write(request + body)
        else:
            self._transport.writelines((request, body))

    async def wait(self) -> None:
        """Until there is something to take, or nothing will come any more.

        Raises:
            UpstreamError: the exchange failed; what arrived before stays in `chunks`.
        """
        while not (self.chunks or self.complete):
            if self.error is not None:
                raise self.error
            self._waiter = asyncio.get_running_loop().create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None

    async def pipe(self, push: Callable[[bytes], bool]) -> None:
        """Hand each piece to `push` as it comes, without waking anybody, until the answer is
        complete (its last piece is left to `take`) or `push` says False: not now.

        Raises:
            UpstreamError: the exchange failed.
        """
        if self.chunks and not self.complete and not push(self.take()):
            return
        self._push = push
        try:
            while not self.complete and self._push is not None:
                if self.error is not None:
                    raise self.error
                self._waiter = asyncio.get_running_loop().create_future()
                try:
                    await self._waiter
                finally:
                    self._waiter = None
        finally:
            self._push = None

    def _pass_on(self, push: Callable[[bytes], bool]) -> None:
        if not push(self.take()):
            self._push = None
            if self._waiter is not None and not self._waiter.done():
                self._waiter.set_result(None)

    def take(self) -> bytes:
        """All that has arrived and was not taken yet, as one piece; empty if there is nothing."""
        if not self.chunks:
            return b""
        data = self.chunks[0] if len(self.chunks) == 1 else b"".join(self.chunks)
        self.chunks.clear()
        self._buffered = 0
        if self._paused:
            self._paused = False
            self._transport.resume_reading()
        return data

    @property
    def reusable(self) -> bool:
        return self.complete and self._keep_alive and not self.closed and not self.chunks

    def abort(self) -> None:
        """Close now; a worker takes it as its caller having gone, and stops the work."""
        self.closed = True
        self._transport.abort()

    def _fail(self, error: UpstreamError) -> None:
        if self.error is None:
            self.error = error

    def _wake(self) -> None:
        waiter = self._waiter
        if (
            waiter is not None
            and not waiter.done()
            and (self.chunks or self.complete or self.error is not None)
        ):
            waiter.set_result(None)


class UpstreamResponse:
    """An answer whose head has come. Read it to its end, or `close` it."""

    __slots__ = ("_connection", "_pool", "headers", "status")

    def __init__(self, connection: UpstreamConnection, pool: ConnectionPool) -> None:
        self._connection = connection
        self._pool = pool
        self.status = connection.status
        self.headers = connection.headers

    def header(self, name: bytes) -> bytes | None:
        for known, value in self.headers:
            if known == name:
                return value
        return None

    @property
    def complete(self) -> bool:
        """All of it has arrived; what `chunk` has not given yet is at hand."""
        return self._connection.complete

    async def chunk(self) -> bytes:
        """What has arrived since; waits for the first of it. Empty at the end.

        Raises:
            UpstreamError: the answer broke off.
        """
        await self._connection.wait()
        return self._connection.take()

    async def pipe(self, push: Callable[[bytes], bool]) -> bytes:
        """Hand pieces to `push` as they come. Gives the last piece when the answer is `complete`;
        before that, nothing, because `push` said False.

        Raises:
            UpstreamError: the answer broke off.
        """
        await self._connection.pipe(push)
        return self._connection.take() if self._connection.complete else b""

    async def read(self, bytes_max: int) -> bytes:
        """The whole rest.

        Raises:
            UpstreamError: it broke off, or is larger than `bytes_max`.
        """
        pieces: list[bytes] = []
        size = 0
        while True:
            piece = await self.chunk()
            if not piece:
                return pieces[0] if len(pieces) == 1 else b"".join(pieces)
            pieces.append(piece)
            size += len(piece)
            if size > bytes_max:
                raise UpstreamError("oversize", f"an answer of over {bytes_max} bytes")

    def close(self) -> None:
        """Done with it: the connection goes back to the pool, or is cut if more would come."""
        self._pool.release(self._connection)


@dataclass(slots=True)
class ConnectionPool:
    """The connections to one worker; the last used is the first taken, so that spares age."""

    origin: Origin
    clock: Clock
    context: ssl.SSLContext | None = None
    busy: int = 0
    _idle: deque[UpstreamConnection] = field(default_factory=deque)
    _retired: bool = False

    async def request(
        self,
        method: bytes,
        target: bytes,
        headers: Headers,
        body: bytes,
        *,
        reuse: bool = True,
        sent: Callable[[], None] | None = None,
    ) -> UpstreamResponse:
        """Send, and wait for the head of the answer and its first bytes.

        So long as this has not returned, the caller may try again elsewhere. A connection that
        turns out to have been closed while it was idle is replaced once. `reuse` False takes a
        fresh connection. `sent` is called once, as soon as the request is on its way, or waits for
        its connection.

        Raises:
            UpstreamError: no connection, or none of the answer came.
        """
        head = request_head(method, self.origin, target, headers, len(body))
        connection = self._take() if reuse else None
        fresh = connection is None
        if connection is None:
            if sent is not None:
                sent()
                sent = None
            connection = await self._connect()
        try:
            return await self._exchange(connection, head, body, sent)
        except UpstreamError as error:
            if fresh or error.kind != "closed" or connection.status:
                raise
        connection = await self._connect()
        return await self._exchange(connection, head, body)

    async def _exchange(
        self,
        connection: UpstreamConnection,
        head: bytes,
        body: bytes,
        sent: Callable[[], None] | None = None,
    ) -> UpstreamResponse:
        self.busy += 1
        connection.start(head, body)
        try:
            if sent is not None:
                sent()
            await connection.wait()
        except BaseException:
            self.release(connection)
            raise
        return UpstreamResponse(connection, self)

    def _take(self) -> UpstreamConnection | None:
        oldest = self.clock.monotonic() - IDLE_SECONDS_MAX
        while self._idle:
            connection = self._idle.pop()
            if connection.closed:
                continue
            if connection.idle_since >= oldest:
                return connection
            connection.abort()
        return None

    async def _connect(self) -> UpstreamConnection:
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(CONNECT_SECONDS_MAX):
                _transport, protocol = await loop.create_connection(
                    UpstreamConnection, self.origin.host, self.origin.port, ssl=self.context
                )
        except (OSError, TimeoutError, ssl.SSLError) as error:
            where = self.origin.authority.decode()
            why = str(error) or "timed out"
            raise UpstreamError("connect", f"cannot connect to {where}: {why}") from error
        return protocol

    def release(self, connection: UpstreamConnection) -> None:
        self.busy -= 1
        connection.served += 1
        if connection.reusable and not self._retired and len(self._idle) < IDLE_CONNECTIONS_MAX:
            connection.idle_since = self.clock.monotonic()
            self._idle.append(connection)
        else:
            connection.abort()

    def trim(self) -> None:
        """Close what was idle too long; the oldest stand first."""
        oldest = self.clock.monotonic() - IDLE_SECONDS_MAX
        while self._idle and (self._idle[0].closed or self._idle[0].idle_since < oldest):
            self._idle.popleft().abort()

    def retire(self) -> None:
        """No more use: close what is idle now, and the others when they come back."""
        self._retired = True
        while self._idle:
            with contextlib.suppress(OSError):
                self._idle.pop().abort()

    @property
    def connections(self) -> int:
        return self.busy + len(self._idle)

    def check(self) -> None:
        assert self.busy >= 0, self.busy
        assert len(self._idle) <= IDLE_CONNECTIONS_MAX, len(self._idle)


def request_head(
    method: bytes, origin: Origin, target: bytes, headers: Headers, body_bytes: int
) -> bytes:
    """The bytes before the body. `headers` holds neither host nor length nor hop-by-hop names."""
    parts = [
        method, b" ", origin.base_path.encode("ascii"), target, b" HTTP/1.1\r\nhost: ",
        origin.authority, b"\r\n",
    ]  # fmt: skip
    if body_bytes or method in (b"POST", b"PUT", b"PATCH"):
        parts.append(b"content-length: %d\r\n" % body_bytes)
    for name, value in headers:
        parts += (name, b": ", value, b"\r\n")
    parts.append(b"\r\n")
    return b"".join(parts)
