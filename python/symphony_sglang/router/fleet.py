"""Routes about the fleet: workers by HTTP, and calls that many workers answer together."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any, NamedTuple

import msgspec

from symphony_sglang.router.errors import ApiError
from symphony_sglang.router.health import HealthMonitor
from symphony_sglang.router.http import JSON_TYPE, TEXT_TYPE, Request
from symphony_sglang.router.moves import Mover
from symphony_sglang.router.registry import PRIORITY_DEFAULT, Worker, WorkerRegistry
from symphony_sglang.router.upstream import UpstreamError

FAN_OUT_SECONDS_MAX = 60.0
LABELS_MAX = 64


class Reply(NamedTuple):
    """What one worker of many answered; status 0: nothing, and `error` says why."""

    worker: Worker
    status: int
    body: bytes
    error: str = ""

    @property
    def ok(self) -> bool:
        return 200 <= self.status < 300

    def document(self) -> Any:
        """The body as JSON, or as text where it is not."""
        try:
            return msgspec.json.decode(self.body)
        except (msgspec.DecodeError, UnicodeDecodeError):
            return self.body.decode("utf-8", "replace")


class Fleet:
    """Handlers; each answers its request."""

    def __init__(
        self,
        registry: WorkerRegistry,
        health: HealthMonitor,
        mover: Mover,
    ) -> None:
        self.registry = registry
        self.health = health
        self.mover = mover

    # Workers ----------------------------------------------------------------------------------

    async def list_workers(self, request: Request) -> None:
        workers = [worker.document() for worker in self.registry]
        stats = {"prefill_count": 0, "decode_count": 0, "regular_count": len(workers)}
        request.reply_json(200, {"workers": workers, "total": len(workers), "stats": stats})

    async def list_urls(self, request: Request) -> None:
        request.reply_json(200, {"urls": [worker.url for worker in self.registry]})

    async def add_worker(self, request: Request) -> None:
        body = self._object(request)
        url = body.pop("url", None)
        if not isinstance(url, str):
            raise ApiError(400, "invalid_request", "url: missing; expected http://host:port")
        options = worker_options(body, adding=True)
        worker = self.registry.add(url, source="manual", **options)
        location = f"/workers/{worker.worker_id}"
        document = {
            "status": "accepted",
            "worker_id": worker.worker_id,
            "url": worker.url,
            "location": location,
            "message": "Worker addition queued for background processing",
        }
        request.reply_json(202, document, (b"location", location.encode("ascii")))

    async def get_worker(self, request: Request, worker_id: str) -> None:
        request.reply_json(200, self._known(worker_id).document())

    async def update_worker(self, request: Request, worker_id: str) -> None:
        worker = self._known(worker_id)
        self.registry.update(worker, **worker_options(self._object(request), adding=False))
        self._accepted(request, worker, "Worker update queued for background processing")

    async def remove_worker(self, request: Request, worker_id: str) -> None:
        worker = self._known(worker_id)
        self.registry.remove(worker, "requested")
        self._accepted(request, worker, "Worker removal queued for background processing")

    async def drain_worker(self, request: Request, worker_id: str) -> None:
        request.reply_json(202, await self.mover.drain(self._known(worker_id)))

    async def add_by_url(self, request: Request) -> None:
        """The older form: answers once the worker is up, as its callers expect."""
        worker = self.registry.add(self._url(request), source="manual")
        deadline = FAN_OUT_SECONDS_MAX
        try:
            async with asyncio.timeout(deadline):
                while not worker.healthy:
                    if self.registry.get(worker.worker_id) is not worker:
                        raise ApiError(502, "worker_unreachable", f"{worker.url} did not come up")
                    await asyncio.sleep(0.05)
        except TimeoutError:
            raise ApiError(
                504,
                "worker_starting",
                f"{worker.url} is added, but not up after {deadline:g} s: {worker.last_error}",
            ) from None
        request.reply_text(200, f"Successfully added worker: {worker.url}")

    async def remove_by_url(self, request: Request) -> None:
        url = self._url(request)
        worker = self.registry.find(url)
        if worker is None:
            raise ApiError(404, "worker_not_found", f"worker {url[:256]!r} is not known")
        self.registry.remove(worker, "requested")
        request.reply_text(200, f"Successfully removed worker: {worker.url}")

    def _url(self, request: Request) -> str:
        url = request.query.get("url")
        if not url:
            raise ApiError(400, "invalid_request", "url: missing; expected ?url=http://host:port")
        return url

    def _known(self, worker_id: str) -> Worker:
        worker = self.registry.find(worker_id)
        if worker is None:
            raise ApiError(404, "worker_not_found", f"worker {worker_id[:256]!r} is not known")
        return worker

    def _object(self, request: Request) -> dict[str, Any]:
        body = request.json()
        if not isinstance(body, dict):
            raise ApiError(400, "invalid_request", "body: expected a JSON object")
        return body

    def _accepted(self, request: Request, worker: Worker, message: str) -> None:
        document = {"status": "accepted", "worker_id": worker.worker_id, "message": message}
        request.reply_json(202, document)

    # Health of the router itself --------------------------------------------------------------

    async def alive(self, request: Request) -> None:
        request.reply_text(200, "OK")

    async def ready(self, request: Request) -> None:
        healthy = len(self.registry.healthy())
        counts = {"healthy_workers": healthy, "total_workers": len(self.registry)}
        if healthy:
            request.reply_json(200, {"status": "ready", **counts})
        else:
            reason = "insufficient healthy workers"
            request.reply_json(503, {"status": "not ready", "reason": reason, **counts})

    async def health_generate(self, request: Request) -> None:
        """Whether a token can be made somewhere: the first worker that says so answers for all."""
        for worker in self.registry.healthy():
            reply = await self._ask(worker, "GET", "/health_generate", b"")
            if reply.ok:
                request.reply_text(200, "At least one router has healthy workers")
                return
        raise ApiError(503, "no_available_workers", "No healthy workers available")

    # One answers for all ----------------------------------------------------------------------

    async def ask_one(self, request: Request) -> None:
        """The first healthy worker's answer, as it is."""
        reply = await self.first_reply(request.method, request.target.decode("latin-1"), b"")
        kind = b"application/json" if reply.body[:1] in (b"{", b"[") else TEXT_TYPE[1]
        request.reply(reply.status, reply.body, (b"content-type", kind))

    async def first_reply(self, method: str, target: str, body: bytes) -> Reply:
        """Of the first healthy worker that answers at all.

        Raises:
            ApiError: 503, none does.
        """
        problem = "No healthy workers available"
        for worker in self.registry.healthy():
            reply = await self._ask(worker, method, target, body)
            if reply.status:
                return reply
            problem = f"{worker.url}: {reply.error}"
        raise ApiError(503, "no_available_workers", problem)

    async def ask_owner(self, request: Request, _rest: str) -> None:
        """Of something that one worker keeps, nobody knows which: the first that has it answers."""
        target = request.target.decode("latin-1")
        replies = await self.ask_all(request.method, target, request.body)
        answered = [reply for reply in replies if reply.status]
        if not answered:
            raise ApiError(503, "no_available_workers", "No healthy workers available")
        reply = next((reply for reply in answered if reply.ok), answered[0])
        request.reply(reply.status, reply.body, JSON_TYPE)

    async def server_info(self, request: Request) -> None:
        """A worker's, so that clients find what they look for, with the router's own beside it."""
        reply = await self.first_reply("GET", "/server_info", b"")
        document = reply.document() if reply.ok else {}
        if not isinstance(document, dict):
            document = {}
        document |= {
            "router_manager": True,
            "routers_count": 1,
            "workers_count": len(self.registry),
        }
        request.reply_json(200, document)

    async def list_models(self, request: Request) -> None:
        """Every model once, as the first worker that serves it describes it."""
        models: dict[str, Any] = {}
        asked: dict[str, Worker] = {}
        for worker in self.registry.healthy():
            asked.setdefault(worker.model_id or worker.worker_id, worker)
        if not asked:
            raise ApiError(503, "no_available_workers", "No models available")
        for reply in await self._gather(list(asked.values()), "GET", "/v1/models", b""):
            document = reply.document() if reply.ok else {}
            entries = document.get("data") if isinstance(document, dict) else None
            for entry in entries if isinstance(entries, list) else []:
                if isinstance(entry, dict) and isinstance(entry.get("id"), str):
                    models.setdefault(entry["id"], entry)
        request.reply_json(200, {"object": "list", "data": list(models.values())})

    # All answer -------------------------------------------------------------------------------

    async def ask_all(self, method: str, target: str, body: bytes) -> list[Reply]:
        """Every worker that is up, at the same time."""
        workers = [w for w in self.registry if w.healthy]
        return await self._gather(workers, method, target, body)

    async def _gather(
        self, workers: list[Worker], method: str, target: str, body: bytes
    ) -> list[Reply]:
        return list(await asyncio.gather(*(self._ask(w, method, target, body) for w in workers)))

    async def _ask(self, worker: Worker, method: str, target: str, body: bytes) -> Reply:
        try:
            async with asyncio.timeout(FAN_OUT_SECONDS_MAX):
                status, answer = await self.health.call(worker, method, target, body)
            return Reply(worker, status, answer)
        except UpstreamError as error:
            return Reply(worker, 0, b"", str(error))
        except TimeoutError:
            return Reply(worker, 0, b"", f"no answer within {FAN_OUT_SECONDS_MAX:g} s")

    async def fan_out(self, request: Request) -> None:
        """The same call to all; 200 if all took it, else 207 with what each said."""
        target = request.target.decode("latin-1")
        replies = await self.ask_all(request.method, target, request.body)
        if not replies:
            raise ApiError(503, "no_available_workers", "No healthy workers available")
        good = sum(reply.ok for reply in replies)
        document = {
            "status": "success" if good == len(replies) else "partial" if good else "failed",
            "message": f"{good} of {len(replies)} workers took it",
            "workers": [
                {
                    "worker": reply.worker.url,
                    "status": reply.status,
                    "answer": reply.document() if reply.status else reply.error,
                }
                for reply in replies
            ],
        }
        request.reply_json(200 if good == len(replies) else 207 if good else 502, document)

    async def flush_cache(self, request: Request) -> None:
        replies = await self.ask_all("POST", "/flush_cache", b"")
        good = [reply for reply in replies if reply.ok]
        total = len(self.registry)
        done = len(good) == len(replies)
        message = (
            f"Successfully flushed cache on all {len(good)} HTTP workers"
            if done
            else f"Cache flush: {len(good)} succeeded, {len(replies) - len(good)} failed"
        )
        document: dict[str, Any] = {
            "status": "success" if done else "partial_success",
            "message": message,
            "workers_flushed": len(good),
            "total_http_workers": len(replies),
            "total_workers": total,
        }
        if not done:
            document["failed"] = [
                [reply.worker.url, reply.error or f"HTTP status {reply.status}"]
                for reply in replies
                if not reply.ok
            ]
        request.reply_json(200 if done else 206, document)

    async def get_loads(self, request: Request) -> None:
        """sglang-router's form: one number a worker, -1 where it does not answer."""
        loads = []
        for reply in await self.ask_all("GET", "/v1/loads?include=core", b""):
            document = reply.document() if reply.ok else None
            entries = document.get("loads") if isinstance(document, dict) else None
            load = -1
            if isinstance(entries, list):
                load = sum(int(e.get("num_used_tokens", 0)) for e in entries if isinstance(e, dict))
            loads.append({"worker": reply.worker.url, "load": load})
        request.reply_json(200, {"workers": loads})

    async def worker_loads(self, request: Request) -> None:
        """SGLang's ``/v1/loads`` of all workers, each entry with its worker's URL."""
        target = request.target.decode("latin-1")
        merged: dict[str, Any] = {"loads": [], "dp_rank_count": 0}
        for reply in await self.ask_all("GET", target, b""):
            document = reply.document() if reply.ok else None
            if not isinstance(document, dict) or not isinstance(document.get("loads"), list):
                continue
            for name in ("timestamp", "version"):
                merged.setdefault(name, document.get(name))
            merged["dp_rank_count"] += document.get("dp_rank_count", 1)
            merged["loads"] += [
                {"worker": reply.worker.url, **entry} for entry in document["loads"]
            ]
        request.reply_json(200, merged)

    async def engine_metrics(self, request: Request) -> None:
        """All workers' metrics as one text, each sample with its worker's address."""
        replies = await self.ask_all("GET", "/metrics", b"")
        text = merge_metrics(
            [(r.worker.url, r.body.decode("utf-8", "replace")) for r in replies if r.ok]
        )
        request.reply_text(200, text)


Handler = Callable[[Request], Awaitable[None]]


def worker_options(body: dict[str, Any], *, adding: bool) -> dict[str, Any]:
    """What a body of ``POST /workers`` or ``PUT /workers/{id}`` sets, by `Worker`'s field names.

    Raises:
        ApiError: 400, a field is unknown, of the wrong type, or asks for what is not supported.
    """
    checks: dict[str, tuple[str, type | tuple[type, ...]]] = {
        "priority": ("priority", int),
        "cost": ("cost", (int, float)),
        "labels": ("labels", dict),
        "api_key": ("api_key", str),
        "disable_health_check": ("check_health", bool),
    }
    if adding:
        checks["model_id"] = ("model_given", str)
    options: dict[str, Any] = {}
    for name, value in body.items():
        if value is None:
            continue
        if name == "worker_type" and value == "regular":
            continue
        if name not in checks:
            known = ", ".join(sorted(checks))
            raise ApiError(400, "invalid_request", f"{name[:80]}: not supported; expected {known}")
        attribute, kind = checks[name]
        if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
            raise ApiError(400, "invalid_request", f"{name}: {str(value)[:80]!r} has a wrong type")
        options[attribute] = not value if name == "disable_health_check" else value
    priority = options.get("priority", PRIORITY_DEFAULT)
    if not 0 <= priority <= 100:
        raise ApiError(400, "invalid_request", f"priority: {priority}; expected 0 to 100")
    labels = options.get("labels", {})
    if len(labels) > LABELS_MAX or not all(isinstance(v, str) for v in labels.values()):
        raise ApiError(400, "invalid_request", f"labels: expected at most {LABELS_MAX} texts")
    return options


def merge_metrics(texts: list[tuple[str, str]]) -> str:
    """Prometheus texts of several workers as one: help and type once, samples labelled."""
    seen: set[str] = set()
    families: dict[str, list[str]] = {}
    family = ""
    for url, text in texts:
        for line in text.splitlines():
            if line.startswith("# "):
                words = line.split(" ", 3)
                family = words[2] if len(words) > 2 else ""
                lines = families.setdefault(family, [])
                if line not in seen and len(words) > 1 and words[1] in ("HELP", "TYPE"):
                    kind = " ".join(words[:3])
                    if kind not in seen:
                        seen.add(kind)
                        lines.append(line)
            elif line.strip():
                families.setdefault(family, []).append(with_label(line, url))
    return "".join(f"{line}\n" for lines in families.values() for line in lines)


def with_label(line: str, url: str) -> str:
    label = f'worker_addr="{url}"'
    name, brace, rest = line.partition("{")
    if brace and " " not in name:
        return f"{name}{{{label}{'' if rest.startswith('}') else ','}{rest}"
    name, _space, value = line.partition(" ")
    return f"{name}{{{label}}} {value}"
