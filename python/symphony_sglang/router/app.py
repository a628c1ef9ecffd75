"""The router's HTTP face: which route goes where, who may use it, what is counted."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

from symphony_sglang.clock import Clock
from symphony_sglang.router.auth import Access, Keys
from symphony_sglang.router.cors import Cors
from symphony_sglang.router.errors import ApiError
from symphony_sglang.router.http import Request
from symphony_sglang.telemetry.router import RouterMetrics

logger = logging.getLogger(__name__)

# Bodies of control and advisory routes are small.
CONTROL_BYTES_MAX = 1 << 20
ADVISE_BYTES_MAX = 16 << 20
CLIENT_CLOSED_REQUEST = 499


@dataclass(frozen=True, slots=True)
class Route:
    """`handler` takes the request, and the rest of the path where `name` has a parameter."""

    name: str
    handler: Callable[..., Awaitable[None]]
    access: Access = Access.CALLER
    body_bytes_max: int = CONTROL_BYTES_MAX


class Routes:
    """Exact paths first, then the longest prefix that fits."""

    def __init__(self) -> None:
        self._exact: dict[str, dict[str, Route]] = {}
        self._prefixes: list[tuple[str, str, dict[str, Route]]] = []

    def add(
        self,
        methods: str,
        path: str,
        handler: Callable[..., Awaitable[None]],
        access: Access = Access.CALLER,
        *,
        body_bytes_max: int = CONTROL_BYTES_MAX,
    ) -> None:
        """`path` may hold one ``{parameter}``, which takes everything between its neighbours."""
        route = Route(path, handler, access, body_bytes_max)
        head, brace, rest = path.partition("{")
        if not brace:
            table = self._exact.setdefault(path, {})
        else:
            tail = rest.partition("}")[2]
            for known_head, known_tail, known in self._prefixes:
                if (known_head, known_tail) == (head, tail):
                    table = known
                    break
            else:
                table = {}
                self._prefixes.append((head, tail, table))
                self._prefixes.sort(key=lambda entry: (-len(entry[0]), -len(entry[1])))
        for method in methods.split():
            table[method] = route

    def find(self, method: str, path: str) -> tuple[Route, str | None]:
        """The route and its parameter.

        Raises:
            ApiError: 404, no such path; 405, not with this method.
        """
        table = self._exact.get(path)
        if table is not None:
            return self._pick(table, method, path), None
        for head, tail, table in self._prefixes:
            if path.startswith(head) and path.endswith(tail):
                parameter = path[len(head) : len(path) - len(tail)]
                if parameter and ("*" in table or method in table):
                    return self._pick(table, method, path), parameter
        raise ApiError(404, "not_found", f"no route {method} {path[:256]}")

    @staticmethod
    def _pick(table: dict[str, Route], method: str, path: str) -> Route:
        route = table.get(method)
        if route is None:
            allowed = ", ".join(sorted(table))
            raise ApiError(
                405,
                "method_not_allowed",
                f"{method} {path[:256]}: expected {allowed}",
                ((b"allow", allowed.encode("ascii")),),
            )
        return route

    def __iter__(self) -> Any:
        tables = [*self._exact.values(), *(table for _head, _tail, table in self._prefixes)]
        return iter([(method, route) for table in tables for method, route in table.items()])


class App:
    """Answers requests: the server's `Application`."""

    def __init__(
        self,
        routes: Routes,
        *,
        keys: Keys,
        cors: Cors,
        clock: Clock,
        metrics: RouterMetrics,
        audit: bool = False,
    ) -> None:
        self._routes = routes
        self._keys = keys
        self._cors = cors
        self._clock = clock
        self._metrics = metrics
        self._audit = audit

    def admit(self, request: Request) -> int:
        """Find the route and check the key; the largest body that the route takes.

        Raises:
            ApiError: no such route, or not with this key.
        """
        request.note = (PREFLIGHT, None)
        if b"origin" in request.headers:
            self._cors.mark(request)
            if request.method == "OPTIONS":
                return 0
        request.note = (UNKNOWN, None)
        found = self._routes.find(request.method, request.path)
        request.note = found
        route = found[0]
        self._keys.check(request, route.access)
        if self._audit and route.access is Access.CONTROL:
            logger.info("audit: %s %s from %s", request.method, request.path, request.caller)
        return route.body_bytes_max

    async def answer(self, request: Request) -> None:
        route, parameter = request.note
        try:
            if route is PREFLIGHT:
                request.reply(204, b"", *self._cors.preflight(request))
            elif parameter is None:
                await route.handler(request)
            else:
                await route.handler(request, parameter)
        except ApiError as error:
            if not request.status:
                request.reply_error(error)
        except asyncio.CancelledError:
            request.error_code = "caller_gone" if request.gone else "stopped"
            raise
        except Exception:  # the server's other requests go on
            logger.exception("%s %s failed", request.method, request.path)
            if not request.status:
                request.reply_error(ApiError(500, "internal_error", "the router failed"))
        finally:
            self._count(request, route.name)

    def refused(self, request: Request, error: ApiError) -> None:
        route = (request.note or (UNKNOWN, None))[0]
        request.reply_error(error)
        self._count(request, route.name)

    def _count(self, request: Request, name: str) -> None:
        self._metrics.http_arrived(request.method, name)
        self._metrics.http_answered(
            request.method,
            name,
            CLIENT_CLOSED_REQUEST if request.gone else request.status or 500,
            self._clock.monotonic() - request.began_seconds,
            request.error_code,
        )


async def _nothing(_request: Request) -> None:
    """The handler of routes that are none."""


UNKNOWN = Route("other", _nothing)
PREFLIGHT = Route("preflight", _nothing, Access.OPEN)
