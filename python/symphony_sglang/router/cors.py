"""Cross-origin calls from browsers, as sglang-router allows them."""

from __future__ import annotations

from symphony_sglang.router.http import Request
from symphony_sglang.router.upstream import Headers

PREFLIGHT_SECONDS = b"3600"
VARY = (b"vary", b"origin, access-control-request-method, access-control-request-headers")


class Cors:
    """With no origins named, all may call."""

    def __init__(self, origins: tuple[str, ...]) -> None:
        self._origins = frozenset(origin.encode("latin-1") for origin in origins)

    def mark(self, request: Request) -> None:
        """Put the headers on the answer that let a page of an allowed origin read it."""
        origin = request.headers[b"origin"]
        if not self._origins:
            request.extra_headers.append((b"access-control-allow-origin", b"*"))
        elif origin in self._origins:
            request.extra_headers.append((b"access-control-allow-origin", origin))
        else:
            return
        request.extra_headers.append((b"access-control-expose-headers", b"*"))
        request.extra_headers.append(VARY)

    def preflight(self, request: Request) -> Headers:
        wanted = request.headers.get(b"access-control-request-headers", b"*")
        return [
            (b"access-control-allow-methods", b"GET, POST, PUT, DELETE, OPTIONS"),
            (b"access-control-allow-headers", wanted),
            (b"access-control-max-age", PREFLIGHT_SECONDS),
        ]
