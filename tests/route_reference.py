"""The page of all routes, written from the route tables of worker and router.

Paths, methods, who serves them and which key they want come from the tables; what they are for is
said here, and a route that nothing is said about, or words about no route, fail the rendering.
"""

from __future__ import annotations

import re
from typing import NamedTuple

from symphony_sglang.errors import ConfigError

INTRODUCTION = """# Routes

Written from the route tables; do not edit. A client talks to a router as to a worker. Bodies and
answers are JSON unless said otherwise; `?` marks what may be left out.

| key | asked for |
|---|---|
| none | never |
| caller | where `--api-key` is set, as `Authorization: Bearer KEY`; by the router `x-api-key` too |
| control | by the router: `--admin-api-key`, or without one the caller's key |

An error names the field that is wrong. The router's is `{"error": {"message", "type", "code"}}`,
its code in the header `x-smg-error-code` too; a worker's is SGLang's: `object`, `message`, `code`.
400: malformed; 401, 403: key missing or wrong; 404: not known; 409: not possible with this
server's settings; 413: too large; 429: over a budget, with `Retry-After`; 503: nobody can answer,
or the server is ending.

A worker serves all of SGLang's own routes beside those listed for it here, unchanged.
"""


class Words(NamedTuple):
    """What a route is for, what it takes, and what it answers."""

    methods: str
    path: str
    purpose: str
    body: str = ""
    answer: str = ""


class Section(NamedTuple):
    title: str
    words: tuple[Words, ...]


RECEIPT = "a receipt: `advisory_id`, `status`, `state`, `reason`, `tokens`, `bytes`, `timeline`"
MOVE = (
    "move: `move_id`, `session_id`, `from`, `to`, `state`, `reason`, `tokens`, `bytes`, `timeline`"
)
AS_SENT = "passed on as it is"
OF_WORKER = "the worker's"
OF_ALL = "200 if all took it, else 207: `status`, `message`, `workers`"

SYMPHONY = Section(
    "Advisories, sessions and moves",
    (
        Words(
            "POST", "/symphony/advise", "say what will be needed soon",
            "one of `session_id`, `input_ids`, `text`, `messages`; `extra_key?`, `cache_salt?`, "
            "`expected_in_s?`, `expires_in_s?`, `priority?`, `target?`; or an envelope with "
            "`actions`",
            "202: `message_id`, `receipts`",
        ),
        Words("GET", "/symphony/advisories/{id}", "what became of an advisory", "", RECEIPT),
        Words("DELETE", "/symphony/advisories/{id}", "cancel an advisory", "", "its receipt"),
        Words(
            "GET", "/symphony/sessions/{id}", "where a session's tokens are", "",
            "`session_id`, `worker`, `tokens` by level, `turns`, `idle_s`, `advisories`, `moves`",
        ),
        Words("DELETE", "/symphony/sessions/{id}", "it is over: forget it", "", "a receipt"),
        Words(
            "GET", "/symphony/residency", "how full every level is, and counters", "",
            "worker: `levels`, `counters`, `rates`, `hot_prefixes`, `feed`, `peer`; router: "
            "`workers`, each with these, and `moves`",
        ),
        Words(
            "GET", "/symphony/events", "the same again and again", "`?interval_s=` 0.2 to 60",
            "server-sent events `residency` and, from the router, `move`; at most 10 minutes",
        ),
        Words("GET", "/symphony/ui", "the live page", "", "HTML"),
        Words(
            "GET", "/symphony/snapshot", "all pages and sessions, for who cannot follow the feed",
            "`Accept: application/msgpack` for MessagePack",
            "`ranks`: `pages` by level, `sessions`, sequences",
        ),
        Words(
            "POST", "/symphony/pull", "copy pages from another worker",
            "`source`; one of `session_id`, `input_ids`; `extra_key?`, `cache_salt?`, `target?`, "
            "`deadline_s?`",
            "202: `pull_id`, `advisory_id`, `state`, `tokens`, `bytes`",
        ),
        Words("GET", "/symphony/pulls/{id}", "how far a pull is", "", "as `POST /symphony/pull`"),
        Words("DELETE", "/symphony/pulls/{id}", "stop a pull", "", "as `POST /symphony/pull`"),
        Words(
            "POST", "/symphony/moves", "a router's order for one step of a move",
            "`kind`, `move_id`, `session_id`, `epoch`, `step?`, `source?`, `tokens?`, `bytes?`, "
            "`target?`, `extra_key?`, `cache_salt?`, `deadline_s?`",
            "`ok`, `pending`, `reason`, `step`, `bytes_copied`",
        ),
        Words(
            "POST", "/symphony/migrate", "move a session to another worker",
            "`session_id`, `to`; `extra_key?`, `cache_salt?`", "202: a move",
        ),
        Words("GET", "/symphony/moves", "the newest moves", "", "`moves`, `ownership`"),
        Words("GET", "/symphony/moves/{id}", "how far a move is", "", MOVE),
    ),
)  # fmt: skip

ONE_WORKER = {
    "/generate": "generate, SGLang's own form",
    "/v1/chat/completions": "chat, OpenAI's form",
    "/v1/completions": "completion, OpenAI's form",
    "/v1/messages": "chat, Anthropic's form",
    "/v1/responses": "responses, OpenAI's form",
    "/v1/embeddings": "embeddings, OpenAI's form",
    "/encode": "embeddings, SGLang's form",
    "/v1/rerank": "rerank documents",
    "/rerank": "the same",
    "/v1/score": "score texts",
    "/v1/classify": "classify",
    "/classify": "the same",
    "/v1/tokenize": "tokens of a text",
    "/tokenize": "the same",
    "/v1/detokenize": "text of tokens",
    "/detokenize": "the same",
    "/open_session": "open a session of SGLang's own kind",
    "/close_session": "close one",
    "/invocations": "SageMaker's form",
    "/vertex_generate": "Vertex AI's form",
}
REQUESTS = Section(
    "Requests",
    (
        *(Words("POST", path, purpose, AS_SENT, OF_WORKER) for path, purpose in ONE_WORKER.items()),
        Words("GET", "/v1/responses/{id}", "a stored answer, from who has it", "", OF_WORKER),
        Words("POST", "/v1/responses/{id}/cancel", "cancel it", "", OF_WORKER),
        Words("DELETE GET POST", "/v1/{rest}", "whatever else a worker has", AS_SENT, OF_WORKER),
        Words("GET", "/v1/models", "every model that is served", "", "`object`, `data`"),
        Words("POST", "/abort_request", "abort a request, wherever it runs", "`rid`", OF_ALL),
    ),
)

FLEET = Section(
    "Workers of a router",
    (
        Words("GET", "/workers", "all workers", "", "`workers`, `total`, `stats`"),
        Words(
            "POST", "/workers", "add a worker", "`url`, options", "202: `worker_id`, `location`"
        ),
        Words("GET", "/workers/{id}", "one worker: health, load, model", "", "its entry"),
        Words("PUT", "/workers/{id}", "change its options", "options", "202"),
        Words("DELETE", "/workers/{id}", "take it out; what it has under way ends", "", "202"),
        Words(
            "POST", "/workers/{id}/drain", "move its sessions away, then take it out", "",
            "202: `status`, `sessions`",
        ),
        Words("POST", "/add_worker", "add a worker and wait for it", "`?url=`", "text"),
        Words("POST", "/remove_worker", "take a worker out", "`?url=`", "text"),
        Words("GET", "/list_workers", "addresses", "", "`urls`"),
    ),
)  # fmt: skip

CONTROL = Section(
    "All workers at once",
    (
        Words("GET POST", "/flush_cache", "empty all caches", "", "`status`, `workers_flushed`, …"),
        *(
            Words("GET POST", path, purpose, AS_SENT, OF_ALL)
            for path, purpose in (
                ("/start_profile", "start profiling"),
                ("/stop_profile", "stop profiling"),
                ("/pause_generation", "pause"),
                ("/continue_generation", "go on"),
                ("/release_memory_occupation", "give device memory back"),
                ("/resume_memory_occupation", "take it again"),
                ("/freeze_gc", "freeze what the garbage collectors know"),
                ("/slow_down", "slow down, for tests"),
            )
        ),
    ),
)

HEALTH = Section(
    "Health, figures and settings",
    (
        *(
            Words("GET HEAD", path, "the router runs", "", "text")
            for path in ("/health", "/healthz", "/liveness", "/ping")
        ),
        *(
            Words("GET", path, "a worker can take requests", "", "200 or 503: counts")
            for path in ("/readiness", "/readyz", "/ready")
        ),
        Words("GET", "/health_generate", "a token can be made", "", "200 or 503"),
        Words("GET", "/metrics", "the router's metrics", "", "Prometheus text"),
        Words("GET", "/engine_metrics", "all workers' metrics", "", "Prometheus text"),
        Words("GET", "/get_model_info", "the model", "", OF_WORKER),
        Words("GET", "/model_info", "the same", "", OF_WORKER),
        Words(
            "GET", "/get_server_info", "settings of a worker, and the router's", "", "one object"
        ),
        Words("GET", "/server_info", "the same", "", "one object"),
        Words("GET", "/get_loads", "load, a number a worker", "", "`workers`"),
        Words("GET", "/v1/loads", "load, SGLang's form", "", "`loads`"),
    ),
)

SECTIONS = (SYMPHONY, REQUESTS, FLEET, CONTROL, HEALTH)


class Served(NamedTuple):
    """One method of one path at a worker or router; `key` as in the page."""

    server: str
    method: str
    path: str
    key: str


def worker_routes() -> list[Served]:
    """Those that this package adds to SGLang's."""
    from fastapi.routing import APIRoute

    from symphony_sglang.engine import feed_routes, peer_routes, routes, ui_routes

    found = []
    for part in (routes, feed_routes, peer_routes, ui_routes):
        for route in part.router.routes:
            assert isinstance(route, APIRoute), route
            path = re.sub(r"\{\w+(:path)?\}", "{id}", route.path)
            key = "none" if path == ui_routes.PAGE_PATH else "caller"
            found += [Served("worker", method, path, key) for method in sorted(route.methods or ())]
    return found


def router_routes() -> list[Served]:
    from symphony_sglang.router.arguments import RouterSettings
    from symphony_sglang.router.auth import Access
    from symphony_sglang.router.routes import make_routes
    from symphony_sglang.router.service import RouterService

    keys = {Access.OPEN: "none", Access.CALLER: "caller", Access.CONTROL: "control"}
    return [
        Served("router", method, route.name, keys[route.access])
        for method, route in make_routes(RouterService(RouterSettings()))
    ]


def reference() -> str:
    """The page.

    Raises:
        ConfigError: a route has no words, or words have no route.
    """
    served: dict[tuple[str, str], list[Served]] = {}
    for route in (*worker_routes(), *router_routes()):
        served.setdefault((route.path, route.method), []).append(route)
    parts = [INTRODUCTION]
    for section in SECTIONS:
        parts.append(f"## {section.title}\n")
        parts.append("| method | path | at | key | what for | takes | answers |")
        parts.append("|---|---|---|---|---|---|---|")
        parts += [row(words, served) for words in section.words]
        parts.append("")
    if served:
        left = ", ".join(f"{method} {path}" for path, method in sorted(served))
        raise ConfigError(f"no words about {left}; expected some in route_reference.SECTIONS")
    return "\n".join(parts)


def row(words: Words, served: dict[tuple[str, str], list[Served]]) -> str:
    """One line of a table; takes its routes out of `served`."""
    found: list[Served] = []
    for method in words.methods.split():
        routes = served.pop((words.path, method), None)
        if routes is None:
            raise ConfigError(f"words about {method} {words.path}, which nobody serves")
        found += routes
    servers = list(dict.fromkeys(route.server for route in found))
    keys = list(dict.fromkeys(route.key for route in found))
    cells = (
        ", ".join(words.methods.split()), f"`{words.path}`", ", ".join(servers), ", ".join(keys),
        words.purpose, words.body, words.answer,
    )  # fmt: skip
    return f"| {' | '.join(cells)} |".replace("|  |", "| |")
