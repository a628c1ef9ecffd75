"""The router's HTTP/1.1 server: parses with httptools, answers in as few writes as there can be.

A general ASGI server was measured beside it (benchmark/router.py): it writes an answer's head and
body apart and wakes a task for every piece, which together cost more than the rest of the router.
What is here is what a gateway needs: bodies read whole and bounded before work begins, a caller's
hanging up cancels that work, slow callers hold back their worker, and a drain lets answers finish.
"""

from __future__ import annotations

import asyncio
import logging
import ssl
from collections import deque
from typing import Any, Protocol, cast
from urllib.parse import unquote

import httptools

from symphony_sglang.clock import Clock
from symphony_sglang.router.errors import ApiError
from symphony_sglang.router.http import Request

logger = logging.getLogger(__name__)

CONNECTIONS_MAX = 20_000
HEADER_BYTES_MAX = 64 << 10
PIPELINED_MAX = 16
IDLE_SECONDS_MAX = 75.0
HEAD_SECONDS_MAX = 30.0
STALLED_SECONDS_MAX = 120.0
SWEEP_SECONDS = 1.0
# A caller that is still sending reads no answer: this much more is swallowed after giving one.
SWALLOW_BYTES_MAX = 64 << 20
# One slow caller may have this much waiting for it.
WRITE_HIGH_BYTES = 256 << 10
CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"


class Application(Protocol):
    """What answers requests."""

    def admit(self, request: Request) -> int:
        """Called when the head is there: how large the body may be, in bytes.

        Raises:
            ApiError: the request is refused without its body.
        """
        ...

    async def answer(self, request: Request) -> None:
        """Answer a whole request; cancelled when the caller hangs up."""
        ...

    def refused(self, request: Request, error: ApiError) -> None:
        """Answer a request that `admit` or its body's size refused."""
        ...


class CallerConnection(asyncio.Protocol):
    """One connection of a caller: requests one after the other."""

    def __init__(self, server: HttpServer) -> None:
        self._server = server
        self._parser = httptools.HttpRequestParser(self)
        self._transport: asyncio.Transport
        self._task: asyncio.Task[None] | None = None
        self._incoming: Request | None = None
        self._queue: deque[Request] = deque()
        self._drained: asyncio.Future[None] | None = None
        self._header_bytes = 0
        self._swallow = False
        self._swallowed = 0
        self._closing = False
        self.current: Request | None = None
        self.gone = False
        self.blocked = False
        self.waiting_since = server.clock.monotonic()
        self._begin()

    def _begin(self) -> None:
        self._url = b""
        self._headers: list[tuple[bytes, bytes]] = []
        self._header_bytes = 0
        self._pieces: list[bytes] = []
        self._size = 0
        self._size_max = 0
        self._in_head = False

    # From the transport -----------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)
        self._transport.set_write_buffer_limits(high=WRITE_HIGH_BYTES)
        if len(self._server.connections) >= CONNECTIONS_MAX:
            self._transport.abort()
            return
        self._server.connections.add(self)

    def data_received(self, data: bytes) -> None:
        if self._swallow:
            self._swallowed += len(data)
            if self._swallowed > SWALLOW_BYTES_MAX:
                self._transport.abort()
            return
        self.waiting_since = self._server.clock.monotonic()
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserUpgrade:
            # Offers of other protocols are not taken up; nothing may follow on this connection.
            self._closing = True
        except httptools.HttpParserError as error:
            self._malformed(error)

    def connection_lost(self, error: Exception | None) -> None:
        self.gone = True
        self._server.connections.discard(self)
        self._release()
        if self._task is not None:
            self._task.cancel()

    def pause_writing(self) -> None:
        self.blocked = True

    def resume_writing(self) -> None:
        self.blocked = False
        self._release()

    def _release(self) -> None:
        if self._drained is not None and not self._drained.done():
            self._drained.set_result(None)

    # From the parser --------------------------------------------------------------------------

    def on_message_begin(self) -> None:
        self._begin()
        self._in_head = True

    def on_url(self, url: bytes) -> None:
        self._count(len(url))
        self._url += url

    def on_header(self, name: bytes, value: bytes) -> None:
        self._count(len(name) + len(value))
        self._headers.append((name.lower(), value))

    def _count(self, size: int) -> None:
        self._header_bytes += size
        if self._header_bytes > HEADER_BYTES_MAX:
            raise ApiError(
                431,
                "headers_too_large",
                f"over {HEADER_BYTES_MAX} bytes of request line and headers",
            )

    def on_headers_complete(self) -> None:
        self._in_head = False
        parser = self._parser
        parts = httptools.parse_url(self._url)
        raw_path: bytes = parts.path or b"/"
        path = raw_path.decode("latin-1")
        request = Request(
            method=parser.get_method().decode("ascii"),
            path=unquote(path) if "%" in path else path,
            raw_path=raw_path,
            query_string=parts.query or b"",
            headers=self._headers,
            peer=self._transport.get_extra_info("peername"),
            began_seconds=self.waiting_since,
            channel=self,
            id_headers=self._server.id_headers,
        )
        modern = parser.get_http_version() != "1.0"
        request.keep_alive = parser.should_keep_alive() and not parser.should_upgrade()
        request.may_chunk = modern
        self._incoming = request
        try:
            self._size_max = self._server.application.admit(request)
            declared = request.headers.get(b"content-length", b"0")
            if int(declared) > self._size_max:
                raise oversize(self._size_max)
        except ApiError as error:
            if has_body(request):
                self._refuse(request, error)
            else:
                request.refusal = error
            return
        expects = request.headers.get(b"expect")
        if expects is not None and expects.lower() == b"100-continue" and modern:
            self._transport.write(CONTINUE)

    def on_body(self, body: bytes) -> None:
        if self._swallow:
            return
        self._size += len(body)
        self._pieces.append(body)
        if self._size > self._size_max and self._incoming is not None:
            self._refuse(self._incoming, oversize(self._size_max))

    def on_message_complete(self) -> None:
        request, self._incoming = self._incoming, None
        if request is None or self._swallow:
            return
        pieces = self._pieces
        request.body = pieces[0] if len(pieces) == 1 else b"".join(pieces)
        self._pieces = []
        if self._task is None:
            self._start(request)
            return
        self._queue.append(request)
        if len(self._queue) >= PIPELINED_MAX:
            self._transport.pause_reading()

    # Answering --------------------------------------------------------------------------------

    def _start(self, request: Request) -> None:
        self.current = request
        self._task = self._server.loop.create_task(self._answer(request))
        self._server.tasks.add(self._task)
        self._task.add_done_callback(self._finished)

    async def _answer(self, request: Request) -> None:
        if request.refusal is not None:
            self._server.application.refused(request, request.refusal)
            return
        try:
            await self._server.application.answer(request)
        except Exception:
            logger.exception("%s %s", request.method, request.path)

    def _finished(self, task: asyncio.Task[None]) -> None:
        self._server.tasks.discard(task)
        request, self.current, self._task = self.current, None, None
        if self.gone:
            return
        if request is None or not request.finished:
            # Torn on purpose, or failed: the caller must not take it for whole.
            self._transport.abort()
        elif not request.keep_alive or self._closing:
            self._transport.close()
        else:
            self.waiting_since = self._server.clock.monotonic()
            if self._queue:
                next_request = self._queue.popleft()
                if len(self._queue) == PIPELINED_MAX - 1:
                    self._transport.resume_reading()
                self._start(next_request)

    def _refuse(self, request: Request, error: ApiError) -> None:
        """Answer before the body is there; what still comes of it is thrown away."""
        self._swallow = True
        self._pieces = []
        request.keep_alive = False
        if self._task is not None or self._queue:
            # An earlier answer is still on its way, and this one may not overtake it.
            self._closing = True
            return
        self._server.application.refused(request, error)
        if self._transport.can_write_eof():
            # Half closed: a caller in the middle of its body reads the answer, not a reset.
            self._transport.write_eof()
        else:
            self._transport.close()

    def _malformed(self, error: httptools.HttpParserError) -> None:
        cause = error.__context__
        refusal = cause if isinstance(cause, ApiError) else None
        if refusal is None:
            refusal = ApiError(400, "bad_request", f"not an HTTP request: {error}")
        if self._task is not None:
            self._closing = True
            return
        request = self._incoming or Request(
            method="GET", path="/", raw_path=b"/", query_string=b"", headers=[], peer=None,
            began_seconds=self.waiting_since, channel=self, id_headers=(),
        )  # fmt: skip
        request.keep_alive = False
        self._server.application.refused(request, refusal)
        self._transport.close()

    # From the request -------------------------------------------------------------------------

    def write(self, data: bytes) -> None:
        if not self.gone:
            self._transport.write(data)

    async def drained(self) -> None:
        """Until the caller has taken enough of what was written, or is gone."""
        while self.blocked and not self.gone:
            self._drained = asyncio.get_running_loop().create_future()
            try:
                await self._drained
            finally:
                self._drained = None

    # From the server --------------------------------------------------------------------------

    def sweep(self, now_seconds: float) -> None:
        """Close what waits too long for its caller."""
        if self._task is not None:
            return
        if self._in_head:
            seconds_max = HEAD_SECONDS_MAX
        elif self._incoming is not None or self._swallow:
            seconds_max = STALLED_SECONDS_MAX
        else:
            seconds_max = IDLE_SECONDS_MAX
        if now_seconds - self.waiting_since > seconds_max:
            self._transport.abort()

    def retire(self) -> None:
        """No request after the one under way."""
        self._closing = True
        if self.current is not None:
            self.current.keep_alive = False
        elif self._incoming is None and not self._queue:
            self._transport.close()

    def abort(self) -> None:
        self._transport.abort()


def has_body(request: Request) -> bool:
    declared = request.headers.get(b"content-length", b"0")
    return b"transfer-encoding" in request.headers or declared != b"0"


def oversize(bytes_max: int) -> ApiError:
    return ApiError(413, "payload_too_large", f"body of over {bytes_max} bytes; expected less")


class HttpServer:
    """Listens on sockets that are bound already, and hands requests to an application."""

    def __init__(
        self, application: Application, clock: Clock, *, id_headers: tuple[bytes, ...] = ()
    ) -> None:
        self.application = application
        self.clock = clock
        self.id_headers = id_headers
        self.connections: set[CallerConnection] = set()
        self.tasks: set[asyncio.Task[None]] = set()
        self.loop: asyncio.AbstractEventLoop
        self._servers: list[asyncio.Server] = []
        self._sweeper: asyncio.TimerHandle | None = None

    async def start(self, sockets: list[Any], context: ssl.SSLContext | None = None) -> None:
        self.loop = asyncio.get_running_loop()
        for listener in sockets:
            server = await self.loop.create_server(
                lambda: CallerConnection(self), sock=listener, ssl=context
            )
            self._servers.append(server)
        self._sweep()

    def _sweep(self) -> None:
        now = self.clock.monotonic()
        for connection in list(self.connections):
            connection.sweep(now)
        self._sweeper = self.loop.call_later(SWEEP_SECONDS, self._sweep)

    async def stop(self, grace_seconds: float) -> None:
        """Take nothing new, let what is under way finish, and cut what does not in time."""
        for server in self._servers:
            server.close()
        for connection in list(self.connections):
            connection.retire()
        deadline = self.loop.time() + grace_seconds
        while self.tasks and (left := deadline - self.loop.time()) > 0:
            # An answer that ends may let a pipelined request begin, which finishes too.
            await asyncio.wait(set(self.tasks), timeout=left)
        if self._sweeper is not None:
            self._sweeper.cancel()
        for connection in list(self.connections):
            connection.abort()
        tasks = list(self.tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def check(self) -> None:
        assert len(self.connections) <= CONNECTIONS_MAX
        assert all(not connection.gone for connection in self.connections)
