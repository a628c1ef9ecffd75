"""The router's metrics: typed calls for what happens, one registry, text for its ``/metrics``.

The calls, by who makes them:

- HTTP edge: ``http_arrived(method, path)``, ``http_answered(method, path, status, seconds,
  error_code)``, ``rate_limited(allowed)``, ``connections(count)``.
- A routed request: ``routed(Call)``, ``upstream(status, error_code)``, ``request_ended(Call,
  seconds)``, ``request_failed(Call, error_type)``, ``streamed(Call, Stream)``, ``tokens(...)``.
- Choice: ``selected(policy, model, reason, seconds)``, ``matched(levels, prompt_tokens)``.
- Queue: ``queue_size(count)``, ``queue_left(result, seconds)``.
- Retry: ``retried(endpoint, attempt, backoff_seconds)``, ``retries_exhausted(endpoint)``.
- Workers: ``pool(model, count)``, ``worker_added/removed``, ``forget(worker)``,
  ``requests_active``, ``health``, ``health_checked``, ``worker_error``, ``worker_connections``,
  ``breaker(worker, BreakerState, failures, successes)``, ``breaker_changed``, ``breaker_outcome``.
- Feed and index: ``feed_message``, ``feed_gap``, ``feed_snapshot``, ``feed_live``, ``index_lag``,
  ``index_pages``, ``index_size``.
- Advisories and moves: ``advised(status)``, ``moves_active``, ``move_ended``.

Label values are text that the router chose, except a model's name: series are bounded
(``series.Family``). All calls are cheap (about a microsecond) and never fail on odd values; one
event loop or thread makes them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import IntEnum
from typing import NamedTuple

from prometheus_client import (
    CONTENT_TYPE_LATEST,
    CollectorRegistry,
    disable_created_metrics,
    generate_latest,
)

from symphony_sglang.telemetry.metrics import Metric, Router, declared
from symphony_sglang.telemetry.series import SERIES_MAX, Family

ROUTER_TYPE = "http"
BACKEND_TYPE = "regular"
CONNECTION_MODE = "http"
WORKER_TYPE = "regular"
# sglang-router's word for the model of a request that names none.
DEFAULT_MODEL = "default"

# sglang-router's short names of routes; others stand as their last part.
ENDPOINTS = {
    "/generate": "generate",
    "/v1/chat/completions": "chat",
    "/v1/completions": "completions",
    "/v1/responses": "responses",
    "/v1/embeddings": "embeddings",
    "/v1/rerank": "rerank",
    "/v1/classify": "classify",
}


class BreakerState(IntEnum):
    """A circuit breaker's state as sglang-router numbers it."""

    CLOSED = 0
    OPEN = 1
    HALF_OPEN = 2


@dataclass(frozen=True, slots=True)
class Call:
    """A routed request's labels. `endpoint` as in ``ENDPOINTS``."""

    endpoint: str
    model: str = DEFAULT_MODEL
    streaming: bool = False

    @property
    def routed(self) -> tuple[str, str, str, str, str]:
        return (ROUTER_TYPE, BACKEND_TYPE, CONNECTION_MODE, self.model, self.endpoint)

    @property
    def generated(self) -> tuple[str, str, str, str]:
        return (ROUTER_TYPE, BACKEND_TYPE, self.model, self.endpoint)


class Stream(NamedTuple):
    """How a streamed answer went. `tokens` is None where the router did not count them."""

    first_token_seconds: float
    total_seconds: float
    tokens: int | None = None


def endpoint_of(path: str) -> str:
    """``/v1/chat/completions`` -> ``chat``."""
    return ENDPOINTS.get(path) or path.rstrip("/").rsplit("/", 1)[-1] or "root"


class RouterMetrics:
    """All series of one router."""

    content_type = CONTENT_TYPE_LATEST

    def __init__(self, *, series_max: int = SERIES_MAX) -> None:
        # A second series per counter and histogram that nobody draws; sglang-router has none.
        disable_created_metrics()  # type: ignore[no-untyped-call]
        self.registry = CollectorRegistry()
        self._families = {
            metric.name: Family(metric, self.registry, series_max=series_max)
            for metric in declared(Router)
        }

    def family(self, metric: Metric) -> Family:
        return self._families[metric.name]

    def render(self) -> bytes:
        """The text of ``/metrics``, of type `content_type`."""
        for name, family in self._families.items():
            if family.folded:
                folded, family.folded = family.folded, 0
                self.family(Router.SERIES_DROPPED).of(name).inc(folded)
        return generate_latest(self.registry)

    # HTTP edge ----------------------------------------------------------------------------------

    def http_arrived(self, method: str, path: str) -> None:
        """A request came in. `path` is the route's template, ``other`` for an unknown one."""
        self.family(Router.HTTP_REQUESTS).of(method, path).inc()

    def http_answered(
        self, method: str, path: str, status: int, seconds: float, error_code: str = ""
    ) -> None:
        """Its answer ended, `seconds` after it came in."""
        self.family(Router.HTTP_RESPONSES).of(str(status), error_code).inc()
        self.family(Router.HTTP_SECONDS).of(method, path).observe(seconds)

    def connections(self, count: int) -> None:
        self.family(Router.HTTP_CONNECTIONS).of().set(count)

    def rate_limited(self, *, allowed: bool) -> None:
        """The router's own limits let a request pass, or answered it with 429 or 408."""
        self.family(Router.HTTP_RATE_LIMIT).of("allowed" if allowed else "rejected").inc()

    # A routed request ---------------------------------------------------------------------------

    def routed(self, call: Call) -> None:
        """A request goes to a worker; once a request, not once a try."""
        streaming = "true" if call.streaming else "false"
        self.family(Router.REQUESTS).of(*call.routed, streaming).inc()

    def upstream(self, status: int, error_code: str = "") -> None:
        """A worker answered, once a try."""
        self.family(Router.UPSTREAM_RESPONSES).of(ROUTER_TYPE, str(status), error_code).inc()

    def request_ended(self, call: Call, seconds: float) -> None:
        self.family(Router.REQUEST_SECONDS).of(*call.routed).observe(seconds)

    def request_failed(self, call: Call, error_type: str) -> None:
        """`error_type`: no_workers, timeout, backend_error, validation_error, internal_error."""
        self.family(Router.REQUEST_ERRORS).of(*call.routed, error_type).inc()

    def streamed(self, call: Call, stream: Stream) -> None:
        """A streamed answer ended well."""
        self.family(Router.TTFT).of(*call.generated).observe(stream.first_token_seconds)
        self.family(Router.GENERATION_SECONDS).of(*call.generated).observe(stream.total_seconds)
        if stream.tokens is not None and stream.tokens > 1:
            rest = stream.total_seconds - stream.first_token_seconds
            self.family(Router.TPOT).of(*call.generated).observe(rest / (stream.tokens - 1))

    def tokens(self, call: Call, *, prompt: int | None, completion: int | None) -> None:
        """What a worker counted; None where its answer did not say."""
        for word, count in (("input", prompt), ("output", completion)):
            if count is not None:
                self.family(Router.TOKENS).of(*call.generated, word).inc(count)

    # Choice -------------------------------------------------------------------------------------

    def selected(self, policy: str, model: str, reason: str, seconds: float) -> None:
        """A worker was chosen in `seconds`; `reason` is the policy's own word for why."""
        self.family(Router.SELECTIONS).of(WORKER_TYPE, CONNECTION_MODE, model, policy).inc()
        self.family(Router.DECISION_REASONS).of(policy, reason).inc()
        self.family(Router.DECISION).of(policy).observe(seconds)

    def matched(self, level_tokens: Mapping[str, int], prompt_tokens: int) -> None:
        """Of a prompt with known ids, what the chosen worker holds by level."""
        self.family(Router.PROMPT_TOKENS).of().inc(prompt_tokens)
        for level, count in level_tokens.items():
            self.family(Router.MATCHED_TOKENS).of(level).inc(count)

    # Queue and retries --------------------------------------------------------------------------

    def queue_size(self, requests: int) -> None:
        self.family(Router.QUEUE_SIZE).of().set(requests)

    def queue_left(self, result: str, seconds: float) -> None:
        """A request left the queue: ``sent``, ``timeout``, ``full`` or ``gone`` (its caller)."""
        self.family(Router.QUEUE_SECONDS).of(result).observe(seconds)

    def retried(self, endpoint: str, attempt: int, backoff_seconds: float) -> None:
        """Try number `attempt` after the first begins, `backoff_seconds` after the last failed."""
        self.family(Router.RETRIES).of(WORKER_TYPE, endpoint).inc()
        self.family(Router.RETRY_BACKOFF).of(str(attempt)).observe(backoff_seconds)

    def retries_exhausted(self, endpoint: str) -> None:
        self.family(Router.RETRIES_EXHAUSTED).of(WORKER_TYPE, endpoint).inc()

    # Workers ------------------------------------------------------------------------------------

    def pool(self, model: str, workers: int) -> None:
        self.family(Router.POOL_SIZE).of(WORKER_TYPE, CONNECTION_MODE, model).set(workers)

    def worker_connections(self, count: int) -> None:
        self.family(Router.WORKER_CONNECTIONS).of(WORKER_TYPE, CONNECTION_MODE).set(count)

    def worker_added(self, worker: str, source: str, result: str = "success") -> None:
        """`source`: static (flag) or manual (HTTP); `result`: success, failed or duplicate."""
        self.family(Router.REGISTRATIONS).of(source, result).inc()
        if result == "success":
            self.requests_active(worker, 0)
            self.breaker(worker, BreakerState.CLOSED, 0, 0)

    def worker_removed(self, worker: str, source: str, reason: str) -> None:
        """Count it, and drop what is known of the worker: gauges of the gone mislead."""
        self.family(Router.DEREGISTRATIONS).of(source, reason).inc()
        self.forget(worker)

    def forget(self, worker: str) -> None:
        """Drop every series of this ``worker`` label: a URL, or a feed's name for its rank."""
        for metric in declared(Router):
            if "worker" in metric.labels:
                self.family(metric).forget("worker", worker)

    def requests_active(self, worker: str, count: int) -> None:
        self.family(Router.WORKER_REQUESTS).of(worker).set(count)

    def health(self, worker: str, *, healthy: bool) -> None:
        self.family(Router.WORKER_HEALTH).of(worker).set(int(healthy))

    def health_checked(self, *, success: bool) -> None:
        result = "success" if success else "failure"
        self.family(Router.HEALTH_CHECKS).of(WORKER_TYPE, result).inc()

    def worker_error(self, error_type: str) -> None:
        """`error_type`: backend_error, timeout, connection."""
        self.family(Router.WORKER_ERRORS).of(WORKER_TYPE, CONNECTION_MODE, error_type).inc()

    def breaker(self, worker: str, state: BreakerState, failures: int, successes: int) -> None:
        """A circuit breaker as it is now, with its outcomes in a row."""
        self.family(Router.BREAKER_STATE).of(worker).set(int(state))
        self.family(Router.BREAKER_FAILURES).of(worker).set(failures)
        self.family(Router.BREAKER_SUCCESSES).of(worker).set(successes)

    def breaker_changed(self, worker: str, old: BreakerState, new: BreakerState) -> None:
        words = (old.name.lower(), new.name.lower())
        self.family(Router.BREAKER_TRANSITIONS).of(worker, *words).inc()

    def breaker_outcome(self, worker: str, *, success: bool) -> None:
        word = "success" if success else "failure"
        self.family(Router.BREAKER_OUTCOMES).of(worker, word).inc()

    # Feed and index -----------------------------------------------------------------------------

    def feed_message(self, worker: str, kind: str, count: int = 1) -> None:
        """`kind`: stored, removed, cleared, session, load."""
        self.family(Router.FEED_MESSAGES).of(worker, kind).inc(count)

    def feed_gap(self, worker: str, missed: int) -> None:
        """`missed` messages in a row did not come and could not be replayed."""
        self.family(Router.FEED_GAPS).of(worker).inc()
        self.family(Router.FEED_MISSED).of(worker).inc(missed)

    def feed_snapshot(self, worker: str, *, success: bool) -> None:
        word = "success" if success else "failure"
        self.family(Router.FEED_SNAPSHOTS).of(worker, word).inc()

    def feed_live(self, worker: str, *, live: bool) -> None:
        self.family(Router.FEED_LIVE).of(worker).set(int(live))

    def index_lag(self, worker: str, seconds: float) -> None:
        self.family(Router.INDEX_LAG).of(worker).observe(seconds)

    def index_pages(self, worker: str, level_pages: Mapping[str, int]) -> None:
        for level, pages in level_pages.items():
            self.family(Router.INDEX_PAGES).of(worker, level).set(pages)

    def index_size(self, *, index_bytes: int, sessions: int) -> None:
        self.family(Router.INDEX_BYTES).of().set(index_bytes)
        self.family(Router.INDEX_SESSIONS).of().set(sessions)

    # Advisories and moves -----------------------------------------------------------------------

    def advised(self, status: str) -> None:
        """A hint was answered with this receipt's status."""
        self.family(Router.ADVISORIES).of(status).inc()

    def moves_active(self, count: int) -> None:
        self.family(Router.MOVES_ACTIVE).of().set(count)

    def move_ended(self, cause: str, outcome: str, *, moved_bytes: int, seconds: float) -> None:
        """A migration ended. `cause`: advisory, demand, drain, manual, …; `outcome`: its state."""
        self.family(Router.MOVES).of(cause, outcome).inc()
        self.family(Router.MOVE_BYTES).of(cause).inc(moved_bytes)
        self.family(Router.MOVE_SECONDS).of(cause, outcome).observe(seconds)

    def check(self) -> None:
        for family in self._families.values():
            family.check()
