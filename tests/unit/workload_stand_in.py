"""A small HTTP server that speaks SGLang's /generate, for the client logic of the workloads.

Its cache is a real one, if simple: pages of 16 tokens keyed by all before them, an LRU device
level, and a host level that takes what leaves it. Its answers are a hash of the whole prompt.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import threading
from collections import OrderedDict
from dataclasses import dataclass, field
from typing import Any

from aiohttp import web

PAGE_TOKENS = 16
VOCAB = 1000


@dataclass
class StandIn:
    """Runs in a thread of its own; `requests` holds every /generate body that came in."""

    device_pages: int = 10_000
    context_tokens: int = 4096
    model_path: str = ""
    incremental: bool = False
    fail_from: int | None = None
    drop_from: int | None = None
    corrupt_host: bool = False
    delay_seconds: float = 0.0
    requests: list[dict[str, Any]] = field(default_factory=list)
    hints: list[dict[str, Any]] = field(default_factory=list)
    in_flight: int = 0
    in_flight_max: int = 0
    gone: bool = False
    url: str = ""

    def __enter__(self) -> StandIn:
        self.device: OrderedDict[bytes, None] = OrderedDict()
        self.host: set[bytes] = set()
        self.loop = asyncio.new_event_loop()
        ready = threading.Event()
        self.thread = threading.Thread(target=self._serve, args=(ready,))
        self.thread.start()
        assert ready.wait(10)
        return self

    def __exit__(self, *_exc: object) -> None:
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join(10)
        assert not self.thread.is_alive()

    def _serve(self, ready: threading.Event) -> None:
        asyncio.set_event_loop(self.loop)
        app = web.Application(client_max_size=1 << 28)
        app.add_routes(
            [
                web.get("/health", self.health),
                web.get("/model_info", self.model_info),
                web.get("/server_info", self.server_info),
                web.get("/v1/models", self.models),
                web.post("/tokenize", self.tokenize),
                web.post("/generate", self.generate),
                web.post("/symphony/advise", self.advise),
                *self.more_routes(),
            ]
        )
        runner = web.AppRunner(app, shutdown_timeout=0.5)
        self.loop.run_until_complete(runner.setup())
        site = web.TCPSite(runner, "127.0.0.1", 0)
        self.loop.run_until_complete(site.start())
        self.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
        ready.set()
        self.loop.run_forever()
        self.loop.run_until_complete(runner.cleanup())
        self.loop.close()

    def more_routes(self) -> list[web.RouteDef]:
        return []

    def worker_of(self, _request: web.Request, _body: dict[str, Any]) -> str:
        """Which worker a router would have sent the request to; each has a cache of its own."""
        return ""

    async def health(self, _request: web.Request) -> web.Response:
        return web.Response(status=503 if self.gone else 200)

    async def model_info(self, _request: web.Request) -> web.Response:
        return web.json_response({"model_path": self.model_path})

    async def server_info(self, _request: web.Request) -> web.Response:
        return web.json_response({"max_req_input_len": self.context_tokens - 6})

    async def models(self, _request: web.Request) -> web.Response:
        return web.json_response({"data": [{"max_model_len": self.context_tokens}]})

    async def tokenize(self, request: web.Request) -> web.Response:
        text = (await request.json())["prompt"]
        return web.json_response({"count": len(self.ids_of(text))})

    @staticmethod
    def ids_of(text: str) -> list[int]:
        """Four bytes a token."""
        data = text.encode()
        return [sum(data[i : i + 4]) % VOCAB for i in range(0, len(data), 4)]

    def look_up(self, ids: list[int], salt: str) -> tuple[int, int]:
        """Tokens found on device and host; afterwards the whole prompt is on the device."""
        device = host = 0
        whole = True
        digest = hashlib.sha256(salt.encode())
        for start in range(0, len(ids) - len(ids) % PAGE_TOKENS, PAGE_TOKENS):
            digest.update(str(ids[start : start + PAGE_TOKENS]).encode())
            page = digest.digest()
            whole = whole and start + PAGE_TOKENS < len(ids)
            if whole and page in self.device and not host:
                device += PAGE_TOKENS
            elif whole and (page in self.host or page in self.device):
                host += PAGE_TOKENS
            else:
                whole = False
            self.device[page] = None
            self.device.move_to_end(page)
        while len(self.device) > self.device_pages:
            self.host.add(self.device.popitem(last=False)[0])
        return device, host

    async def advise(self, request: web.Request) -> web.Response:
        """Accepts what names a session that has been here; remembers when it came."""
        body = await request.json()
        seen = {sent.get("session_id") for sent in self.requests}
        self.hints.append({**body, "after": len(self.requests)})
        status = "accepted" if body["session_id"] in seen else "missing"
        return web.json_response({"receipts": [{"status": status}]}, status=202)

    async def generate(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        self.requests.append(body)
        number = len(self.requests)
        if self.drop_from is not None and number >= self.drop_from:
            self.gone = True
            request.transport.close()
            return web.Response(status=500)
        if self.fail_from is not None and number >= self.fail_from:
            return web.json_response({"error": {"message": "no room"}}, status=400)
        self.in_flight += 1
        self.in_flight_max = max(self.in_flight_max, self.in_flight)
        try:
            return await self.answer(request, body)
        finally:
            self.in_flight -= 1

    async def answer(self, request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
        ids = body.get("input_ids") or self.ids_of(body["text"])
        worker = self.worker_of(request, body)
        device, host = self.look_up(ids, worker + body.get("cache_salt", ""))
        count = body["sampling_params"]["max_new_tokens"]
        seed = str(ids) + ("corrupt" if self.corrupt_host and host else "")
        output = [
            int.from_bytes(hashlib.sha256(f"{seed}/{i}".encode()).digest()[:4], "big") % VOCAB
            for i in range(count)
        ]
        await asyncio.sleep(self.delay_seconds)
        events = []
        for end in range(1, count + 1):
            info: dict[str, Any] = {
                "prompt_tokens": len(ids),
                "completion_tokens": end,
                "cached_tokens": device + host,
                "cached_tokens_details": {"device": device, "host": host}
                if device + host
                else None,
                "finish_reason": {"type": "length", "length": count} if end == count else None,
            }
            shown = output[end - 1 : end] if self.incremental else output[:end]
            events.append({"text": "", "output_ids": shown, "meta_info": info})
        if not body.get("stream"):
            return web.json_response({**events[-1], "output_ids": output})
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        if worker:
            response.headers["X-Symphony-Worker"] = worker
        await response.prepare(request)
        for event in events:
            await response.write(b"data: " + json.dumps(event).encode() + b"\n\n")
        await response.write(b"data: [DONE]\n\n")
        return response
