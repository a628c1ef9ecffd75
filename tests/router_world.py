"""A router in this process, on real sockets, in front of small fake workers that misbehave on
command. Used by tests/unit/test_router_*.py."""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

import aiohttp
from aiohttp import web

from symphony_sglang.router.arguments import RouterSettings
from symphony_sglang.router.service import RouterService

Behaviour = Callable[["FakeWorker", web.Request], Awaitable[web.StreamResponse]]


@dataclass
class FakeWorker:
    """An HTTP server with the routes that the router asks for. `behaviour` answers the others."""

    name: str = "w"
    model: str = "tiny"
    healthy: bool = True
    behaviour: Behaviour | None = None
    ranks: int = 1
    events_port: int | None = None  # of stock SGLang's KV events
    url: str = ""
    port: int = 0
    requests: list[tuple[str, str, dict[str, str], bytes]] = field(default_factory=list)
    running: int = 0
    aborted: int = 0

    async def start(self) -> None:
        app = web.Application(client_max_size=1 << 28)
        app.router.add_route("*", "/{rest:.*}", self._handle)
        # Handlers are cancelled when their caller hangs up, as SGLang notices it too.
        self._runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=0.2)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", self.port, reuse_address=True)
        await site.start()
        self.port = self._runner.addresses[0][1]
        self.url = f"http://127.0.0.1:{self.port}"

    async def stop(self) -> None:
        await self._runner.cleanup()

    def served(self, path: str = "/generate") -> int:
        """How many requests for `path` came in."""
        return sum(1 for _method, known, _headers, _body in self.requests if known == path)

    async def _handle(self, request: web.Request) -> web.StreamResponse:
        body = await request.read()
        if request.path == "/health":
            return web.Response(status=200 if self.healthy else 503)
        if request.path == "/server_info":
            info: dict[str, Any] = {"served_model_name": self.model, "page_size": 16}
            info["dp_size"] = self.ranks
            if self.events_port is not None:
                info["kv_events"] = {"endpoint_port_base": self.events_port, "block_size": 16}
            return web.json_response(info)
        if request.path == "/model_info":
            return web.json_response({"model_path": f"/{self.model}"})
        if request.path == "/symphony/residency":
            return web.json_response({}, status=404)
        headers = {name.lower(): value for name, value in request.headers.items()}
        self.requests.append((request.method, request.path, headers, body))
        self.running += 1
        try:
            if self.behaviour is not None:
                return await self.behaviour(self, request)
            return web.json_response({"worker": self.name, "text": "hello"})
        except asyncio.CancelledError:
            self.aborted += 1
            raise
        finally:
            self.running -= 1


async def stream(
    request: web.Request, events: int, *, pause: float = 0.0, die_after: int | None = None
) -> web.StreamResponse:
    """Server-sent events; the connection is cut after `die_after` of them."""
    response = web.StreamResponse(headers={"content-type": "text/event-stream"})
    await response.prepare(request)
    for number in range(events):
        if number == die_after:
            assert request.transport is not None
            request.transport.abort()
            await asyncio.sleep(0.05)
            return response
        event = {"text": "x" * number, "meta_info": {"completion_tokens": number + 1}}
        await response.write(b"data: " + json.dumps(event).encode() + b"\n\n")
        if pause:
            await asyncio.sleep(pause)
    await response.write(b"data: [DONE]\n\n")
    return response


@dataclass
class World:
    """A running router, its workers, and a client."""

    service: RouterService
    workers: list[FakeWorker]
    url: str
    client: aiohttp.ClientSession

    async def generate(self, body: dict[str, Any] | None = None, **options: Any) -> tuple[int, Any]:
        """Status and JSON of one request."""
        status, answer, _headers = await self.call(
            "POST", "/generate", body or {"text": "hi"}, **options
        )
        return status, answer

    async def call(
        self, method: str, path: str, body: Any = None, **options: Any
    ) -> tuple[int, Any, dict[str, str]]:
        async with self.client.request(method, self.url + path, json=body, **options) as answer:
            content = await answer.read()
            headers = {name.lower(): value for name, value in answer.headers.items()}
            try:
                return answer.status, json.loads(content), headers
            except ValueError:
                return answer.status, content.decode(errors="replace"), headers

    async def until(self, condition: Callable[[], bool], seconds: float = 5.0) -> None:
        """Wait for something to become true."""
        async with asyncio.timeout(seconds):
            while not condition():  # noqa: ASYNC110 - conditions of others have no event
                await asyncio.sleep(0.01)

    def healthy(self) -> int:
        return len(self.service.registry.healthy())


@contextlib.asynccontextmanager
async def world(
    count: int = 2,
    *,
    behaviour: Behaviour | None = None,
    events_port: int | None = None,
    ranks: int = 1,
    wait: bool = True,
    **settings: Any,
) -> AsyncIterator[World]:
    """`count` fake workers behind a router; invariants are checked at the end."""
    workers = [
        FakeWorker(name=f"w{number}", behaviour=behaviour, ranks=ranks) for number in range(count)
    ]
    if workers:
        workers[0].events_port = events_port
    for worker in workers:
        await worker.start()
    options = {"policy": "round_robin", "prometheus_port": 0, "retry_initial_backoff_ms": 1}
    urls = tuple(worker.url for worker in workers)
    merged = RouterSettings(**{"worker_urls": urls, **options, **settings})
    service = RouterService(merged, chance=random.Random(1))
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    listener.listen(256)
    listener.setblocking(False)
    url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    try:
        async with service.running(), aiohttp.ClientSession() as client:
            await service.server.start([listener])
            made = World(service, workers, url, client)
            if wait:
                await made.until(lambda: made.healthy() == count)
            yield made
            await client.close()
            await service.server.stop(2.0)
            service.check()
            service.server.check()
            assert service.gate.active == 0
            assert all(worker.active == 0 for worker in service.registry)
    finally:
        for worker in workers:
            await worker.stop()
