"""The router's routes, as one table."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING

from symphony_sglang.router.app import ADVISE_BYTES_MAX, Routes
from symphony_sglang.router.auth import Access
from symphony_sglang.router.fleet import Handler
from symphony_sglang.router.http import Request

if TYPE_CHECKING:
    from symphony_sglang.router.service import RouterService

# One worker answers, chosen by the policy.
FORWARDED = (
    "/generate", "/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/v1/rerank",
    "/rerank", "/v1/score", "/v1/classify", "/v1/responses", "/v1/messages", "/v1/tokenize",
    "/v1/detokenize", "/tokenize", "/detokenize", "/encode", "/classify", "/open_session",
    "/close_session", "/invocations", "/vertex_generate",
)  # fmt: skip
# All workers answer, and so does whoever asks: these stop or change the work of others.
FANNED_OUT = (
    "/start_profile", "/stop_profile", "/pause_generation", "/continue_generation",
    "/release_memory_occupation", "/resume_memory_occupation", "/freeze_gc", "/slow_down",
)  # fmt: skip


def make_routes(service: RouterService) -> Routes:
    fleet, desk, proxy, live = service.fleet, service.desk, service.proxy, service.live
    routes = Routes()
    largest = service.settings.max_payload_size
    for path in FORWARDED:
        routes.add("POST", path, proxy.forward, body_bytes_max=largest)
    # Whatever else a worker has under /v1: audio, batches, stored answers.
    routes.add("GET POST DELETE", "/v1/{rest}", _any_worker(service), body_bytes_max=largest)
    routes.add("GET", "/v1/responses/{id}", fleet.ask_owner)
    routes.add("POST", "/v1/responses/{id}/cancel", fleet.ask_owner)
    for path in FANNED_OUT:
        routes.add("GET POST", path, fleet.fan_out, Access.CONTROL)
    routes.add("POST", "/abort_request", fleet.fan_out)
    routes.add("GET POST", "/flush_cache", fleet.flush_cache, Access.CONTROL)

    for path in ("/health", "/healthz", "/liveness", "/ping"):
        routes.add("GET HEAD", path, fleet.alive, Access.OPEN)
    for path in ("/readiness", "/readyz", "/ready"):
        routes.add("GET", path, fleet.ready, Access.OPEN)
    routes.add("GET", "/health_generate", fleet.health_generate, Access.OPEN)
    routes.add("GET", "/metrics", _metrics(service), Access.OPEN)
    routes.add("GET", "/engine_metrics", fleet.engine_metrics, Access.OPEN)

    routes.add("GET", "/get_model_info", fleet.ask_one)
    routes.add("GET", "/model_info", fleet.ask_one)
    routes.add("GET", "/get_server_info", fleet.server_info)
    routes.add("GET", "/server_info", fleet.server_info)
    routes.add("GET", "/v1/models", fleet.list_models)
    routes.add("GET", "/get_loads", fleet.get_loads)
    routes.add("GET", "/v1/loads", fleet.worker_loads)

    routes.add("GET", "/workers", fleet.list_workers)
    routes.add("POST", "/workers", fleet.add_worker, Access.CONTROL)
    routes.add("GET", "/workers/{id}", fleet.get_worker)
    routes.add("PUT", "/workers/{id}", fleet.update_worker, Access.CONTROL)
    routes.add("DELETE", "/workers/{id}", fleet.remove_worker, Access.CONTROL)
    routes.add("POST", "/workers/{id}/drain", fleet.drain_worker, Access.CONTROL)
    routes.add("POST", "/add_worker", fleet.add_by_url, Access.CONTROL)
    routes.add("POST", "/remove_worker", fleet.remove_by_url, Access.CONTROL)
    routes.add("GET", "/list_workers", fleet.list_urls)

    routes.add("POST", "/symphony/advise", desk.advise, body_bytes_max=ADVISE_BYTES_MAX)
    routes.add("GET", "/symphony/advisories/{id}", desk.get_advisory)
    routes.add("DELETE", "/symphony/advisories/{id}", desk.cancel_advisory)
    routes.add("GET", "/symphony/sessions/{id}", desk.get_session)
    routes.add("DELETE", "/symphony/sessions/{id}", desk.end_session)
    routes.add("GET", "/symphony/residency", desk.residency)
    routes.add("GET", "/symphony/events", live.events)
    routes.add("GET", "/symphony/ui", live.page, Access.OPEN)
    routes.add("POST", "/symphony/migrate", desk.migrate, Access.CONTROL)
    routes.add("GET", "/symphony/moves", desk.list_moves)
    routes.add("GET", "/symphony/moves/{id}", desk.get_move)
    return routes


def metrics_routes(service: RouterService) -> Routes:
    """Of the second listener."""
    routes = Routes()
    routes.add("GET HEAD", "/metrics", _metrics(service), Access.OPEN)
    return routes


def _metrics(service: RouterService) -> Handler:
    async def metrics(request: Request) -> None:
        kind = (b"content-type", service.metrics.content_type.encode("ascii"))
        request.reply(200, service.metrics.render(), kind)

    return metrics


def _any_worker(service: RouterService) -> Callable[[Request, str], Awaitable[None]]:
    async def any_worker(request: Request, _rest: str) -> None:
        await service.proxy.forward(request)

    return any_worker
