"""One request of a caller, and the way to answer it."""

from __future__ import annotations

import http
import secrets
from typing import Any, Protocol
from urllib.parse import parse_qs

import msgspec

from symphony_sglang.router.errors import ApiError, error_document
from symphony_sglang.router.upstream import Headers

JSON_TYPE = (b"content-type", b"application/json")
TEXT_TYPE = (b"content-type", b"text/plain; charset=utf-8")
# Where a caller's own id for a request may stand; sglang-router's list.
REQUEST_ID_HEADERS = (b"x-request-id", b"x-correlation-id", b"x-trace-id", b"request-id")
REQUEST_ID_CHARACTERS_MAX = 256
ID_BYTES = 12
# sglang-router marks the ids that it gives out by route.
ID_PREFIXES = {
    "/v1/chat/completions": "chatcmpl-",
    "/v1/completions": "cmpl-",
    "/generate": "gnt-",
    "/v1/responses": "resp-",
}
STATUS_LINES = {
    status.value: f"HTTP/1.1 {status.value} {status.phrase}\r\n".encode("ascii")
    for status in http.HTTPStatus
}
# Answers that have no body, and no length either.
BODILESS = (204, 304)


class RandomIds:
    """Ids that nobody can guess; the system is asked for randomness once for many."""

    def __init__(self) -> None:
        self._bytes = b""
        self._place = 0

    def next(self) -> str:
        if self._place >= len(self._bytes):
            self._bytes, self._place = secrets.token_bytes(ID_BYTES * 256), 0
        piece = self._bytes[self._place : self._place + ID_BYTES]
        self._place += ID_BYTES
        return piece.hex()


IDS = RandomIds()


class Channel(Protocol):
    """The connection that a request came on."""

    gone: bool
    blocked: bool

    def write(self, data: bytes) -> None: ...

    async def drained(self) -> None: ...


class Request:
    """What came in, and the way to answer it: `start`, then `send` until `more` is False.

    `start` writes nothing: the head leaves with the first piece of the body.
    """

    __slots__ = (
        "_channel", "_chunked", "_head", "began_seconds", "body", "error_code", "extra_headers",
        "finished", "header_list", "headers", "keep_alive", "may_chunk", "method", "note", "path",
        "peer", "query_string", "raw_path", "refusal", "request_id", "status",
    )  # fmt: skip

    def __init__(
        self,
        *,
        method: str,
        path: str,
        raw_path: bytes,
        query_string: bytes,
        headers: Headers,
        peer: Any,
        began_seconds: float,
        channel: Channel,
        id_headers: tuple[bytes, ...] = REQUEST_ID_HEADERS,
    ) -> None:
        self.method = method
        self.path = path
        self.raw_path = raw_path
        self.query_string = query_string
        self.header_list = headers
        # The last of several wins, which only matters for headers that come once.
        self.headers: dict[bytes, bytes] = dict(headers)
        self.peer = peer
        self.body = b""
        self.began_seconds = began_seconds
        self.keep_alive = True
        self.may_chunk = True
        self.status = 0
        self.error_code = ""
        self.finished = False
        self.refusal: ApiError | None = None  # answered once the request is whole
        self.note: Any = None  # of the application, from `admit` to `answer`
        self._channel = channel
        self._head = b""
        self._chunked = False
        self.request_id = self._find_request_id(id_headers)
        self.extra_headers: Headers = [(b"x-request-id", self.request_id)]

    def _find_request_id(self, names: tuple[bytes, ...]) -> bytes:
        for name in names:
            value = self.headers.get(name)
            if value and len(value) <= REQUEST_ID_CHARACTERS_MAX:
                return value
        prefix = ID_PREFIXES.get(self.path, "req-")
        return (prefix + IDS.next()).encode("ascii")

    def header(self, name: bytes) -> str | None:
        value = self.headers.get(name)
        return None if value is None else value.decode("latin-1")

    @property
    def query(self) -> dict[str, str]:
        """The query's names, each with its first value."""
        text = self.query_string.decode("latin-1")
        return {name: values[0] for name, values in parse_qs(text, keep_blank_values=True).items()}

    @property
    def target(self) -> bytes:
        """Path and query as they were sent."""
        return self.raw_path + b"?" + self.query_string if self.query_string else self.raw_path

    @property
    def caller(self) -> str:
        return str(self.peer[0]) if isinstance(self.peer, tuple) and self.peer else ""

    def json(self) -> Any:
        """The body as JSON.

        Raises:
            ApiError: 400, it is not.
        """
        try:
            return msgspec.json.decode(self.body)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise ApiError(400, "json_parse_error", f"body: not JSON: {error}") from None

    # Answering --------------------------------------------------------------------------------

    @property
    def gone(self) -> bool:
        """Whether the caller has hung up."""
        return self._channel.gone

    def start(self, status: int, headers: Headers) -> None:
        """Begin the answer. Without a content-length it is chunked, or ends with the connection."""
        self.status = status
        known = any(name == b"content-length" for name, _value in headers)
        parts = [STATUS_LINES.get(status) or b"HTTP/1.1 %d \r\n" % status]
        for name, value in headers:
            parts += (name, b": ", value, b"\r\n")
        for name, value in self.extra_headers:
            parts += (name, b": ", value, b"\r\n")
        if not known and status not in BODILESS:
            if self.may_chunk:
                self._chunked = True
                parts.append(b"transfer-encoding: chunked\r\n")
            else:
                self.keep_alive = False
        if not self.keep_alive:
            parts.append(b"connection: close\r\n")
        parts.append(b"\r\n")
        self._head = b"".join(parts)

    def send(self, body: bytes, *, more: bool) -> None:
        """A piece of the answer, written at once. Await `drained` after it where more comes."""
        if self.method == "HEAD":
            data = b""
        elif not self._chunked:
            data = body
        elif more:
            data = b"%x\r\n%b\r\n" % (len(body), body) if body else b""
        elif body:
            data = b"%x\r\n%b\r\n0\r\n\r\n" % (len(body), body)
        else:
            data = b"0\r\n\r\n"
        if self._head:
            data = self._head + data
            self._head = b""
        self.finished = not more
        if data:
            self._channel.write(data)

    @property
    def blocked(self) -> bool:
        """Whether the caller is behind; then `drained` waits for it."""
        return self._channel.blocked

    async def drained(self) -> None:
        await self._channel.drained()

    def reply(self, status: int, body: bytes, *headers: tuple[bytes, bytes]) -> None:
        """A whole answer."""
        if status in BODILESS:
            self.start(status, list(headers))
        else:
            self.start(status, [*headers, (b"content-length", b"%d" % len(body))])
        self.send(body, more=False)

    def reply_json(self, status: int, document: Any, *headers: tuple[bytes, bytes]) -> None:
        self.reply(status, msgspec.json.encode(document), JSON_TYPE, *headers)

    def reply_text(self, status: int, text: str) -> None:
        self.reply(status, text.encode(), TEXT_TYPE)

    def reply_error(self, error: ApiError) -> None:
        self.error_code = error.error_code
        code = (b"x-smg-error-code", error.error_code.encode("ascii"))
        document = error_document(error.status, error.error_code, str(error))
        self.reply_json(error.status, document, code, *error.headers)
