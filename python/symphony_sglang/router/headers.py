"""Which headers pass the router, in each direction."""

from __future__ import annotations

from symphony_sglang.router.http import Request
from symphony_sglang.router.upstream import Headers, UpstreamResponse

# RFC 9110 §7.6.1: of one connection, not of the message.
HOP_BY_HOP = frozenset(
    {
        b"connection", b"keep-alive", b"proxy-authenticate", b"proxy-authorization",
        b"proxy-connection", b"te", b"trailer", b"transfer-encoding", b"upgrade",
    }
)  # fmt: skip
# The router writes these itself.
NOT_FORWARDED = HOP_BY_HOP | {b"host", b"content-length", b"expect", b"x-smg-target-worker"}
CREDENTIALS = frozenset({b"authorization", b"x-api-key"})
NOT_RETURNED = HOP_BY_HOP | {b"date", b"x-request-id", b"x-symphony-worker"}


def worker_headers(request: Request, worker_key: str) -> Headers:
    """What the worker is sent. With a key of our own for it, the caller's is not passed on."""
    dropped = NOT_FORWARDED | CREDENTIALS if worker_key else NOT_FORWARDED
    headers = [pair for pair in request.header_list if pair[0] not in dropped]
    if b"x-request-id" not in request.headers:
        headers.append((b"x-request-id", request.request_id))
    if worker_key:
        headers.append((b"authorization", b"Bearer " + worker_key.encode()))
    return headers


def caller_headers(response: UpstreamResponse, worker_id: bytes) -> Headers:
    """What the caller is sent of the worker's head."""
    headers = [pair for pair in response.headers if pair[0] not in NOT_RETURNED]
    headers.append((b"x-symphony-worker", worker_id))
    return headers
