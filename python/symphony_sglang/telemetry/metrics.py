"""Every metric of this package, declared once: name, kind, labels, buckets and what it says.

Names that exist elsewhere are kept: the router's ``smg_*`` are those of sglang-router 0.3.2 with
the same labels, so its dashboards work. What is new stands under ``symphony:``. SGLang's own
``sglang:*`` (host tokens, load-back, cached tokens by source) are not repeated.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class Kind(StrEnum):
    """The three Prometheus kinds in use."""

    COUNTER = "counter"
    GAUGE = "gauge"
    HISTOGRAM = "histogram"


@dataclass(frozen=True, slots=True)
class Metric:
    """One family of series. A counter's name ends in ``_total``; units stand last before that."""

    name: str
    kind: Kind
    help: str
    labels: tuple[str, ...] = ()
    buckets: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        assert self.name.endswith("_total") is (self.kind is Kind.COUNTER), self
        assert bool(self.buckets) is (self.kind is Kind.HISTOGRAM), self
        assert list(self.buckets) == sorted(set(self.buckets)), self


def counter(name: str, text: str, *labels: str) -> Metric:
    return Metric(name, Kind.COUNTER, text, labels)


def gauge(name: str, text: str, *labels: str) -> Metric:
    return Metric(name, Kind.GAUGE, text, labels)


def histogram(name: str, text: str, buckets: tuple[float, ...], *labels: str) -> Metric:
    return Metric(name, Kind.HISTOGRAM, text, labels, buckets)


# sglang-router's buckets of every ``*_duration_seconds``.
DURATION_SECONDS = (
    *(0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0),
    *(10.0, 15.0, 30.0, 45.0, 60.0, 90.0, 120.0, 180.0, 240.0),
)
TOKEN_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1.0)
DECISION_SECONDS = (1e-5, 2.5e-5, 5e-5, 1e-4, 2.5e-4, 5e-4, 1e-3, 2.5e-3, 1e-2, 0.1)
LAG_SECONDS = (0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
# The bounds of ``core.ledger``'s histograms; a test compares them.
LEAD_SECONDS = (0.05, 0.1, 0.25, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0, 300.0)


class Worker:
    """Series of a worker. SGLang's own labels (model_name, tp_rank, …) stand before these."""

    ADVISORIES = counter(
        "symphony:advisories_total",
        "Hints received, by what was made of them (accepted, clipped, missing, …)",
        "status",
    )
    ADVISORIES_ENDED = counter(
        "symphony:advisories_ended_total",
        "Advisories that reached a final state (used, late, wasted, …)",
        "state",
    )
    ADVISORIES_LIVE = gauge("symphony:advisories_live", "Advisories that have not ended")
    HARMFUL = counter(
        "symphony:advisories_harmful_total",
        "Advisories whose pages drove out pages that were asked for before they were used",
    )
    HARMFUL_PAGES = counter(
        "symphony:advisory_harmful_pages_total",
        "Pages driven out by an advisory and asked for before it was used",
    )
    LEAD = histogram(
        "symphony:advisory_lead_seconds",
        "Receipt of an advisory to its end: the arrival of its request if used or late",
        LEAD_SECONDS,
        "state",
    )
    READY = histogram(
        "symphony:advisory_ready_seconds",
        "Receipt of an advisory to all of its KV being in place, where it was so at its end",
        LEAD_SECONDS,
    )
    DEMAND = counter(
        "symphony:advised_requests_total",
        "Requests that an advisory announced; ready=true where what it promised was in place",
        "ready",
    )
    IMPLICIT = counter(
        "symphony:implicit_advisories_total",
        "Advisories that nobody wrote: a turn ended with tool calls, or a sub-agent asked (parent)",
        "cause",
    )
    HINTS_REFUSED = counter(
        "symphony:hints_refused_total",
        "Hints beyond a budget of their caller, by the limit that refused them",
        "limit",
    )
    STALL_SAVED = counter(
        "symphony:stall_saved_seconds_total",
        "Estimate: copying that used advisories took off the path of requests, at measured speeds",
    )
    MOVED_BYTES = counter(
        "symphony:moved_bytes_total", "KV bytes that advisories moved, by hop", "hop"
    )
    MOVED_TOKENS = counter(
        "symphony:moved_tokens_total", "Tokens whose KV advisories moved, by hop", "hop"
    )
    WASTED_TOKENS = counter(
        "symphony:wasted_tokens_total", "Tokens moved for advisories that no request followed"
    )
    LOADED_TOKENS = counter(
        "symphony:loaded_tokens_total",
        "Tokens copied from host to device, for requests and advisories alike",
    )
    BACKED_UP_TOKENS = counter(
        "symphony:backed_up_tokens_total", "Tokens copied from device to host (write-through)"
    )
    PROTECTED_BYTES = gauge(
        "symphony:protected_bytes",
        "Bytes that advisories and queued requests protect from eviction now",
        "level",
    )
    PROTECT_LIMIT_BYTES = gauge(
        "symphony:protect_limit_bytes", "Bytes that may be protected at most", "level"
    )
    PROTECTED_BYTE_SECONDS = counter(
        "symphony:protected_byte_seconds_total",
        "Bytes protected, summed over time: what the hints cost in memory",
        "level",
    )
    LEVEL_USED_BYTES = gauge("symphony:level_used_bytes", "Bytes in use on a level", "level")
    LEVEL_TOTAL_BYTES = gauge("symphony:level_total_bytes", "Size of a level in bytes", "level")
    GATE = counter(
        "symphony:gate_decisions_total",
        "Choices, for an advisory or a request, to bring KV up from a level or to compute it again",
        "subject",
        "level",
        "decision",
    )
    GATE_RATE = gauge(
        "symphony:gate_tokens_per_second",
        "Speeds that the gate compares: each hop, and prefill",
        "of",
    )
    GATE_LATENCY = gauge(
        "symphony:gate_latency_seconds",
        "Time before the first token of each, beside its speed",
        "of",
    )
    SESSIONS = gauge("symphony:sessions", "Sessions that the worker remembers")
    STORE_EVENTS = counter(
        "symphony:store_events_total",
        "What the page store did and what went wrong there, by its own counters' names",
        "event",
    )
    FEED_EVENTS = counter(
        "symphony:feed_events_total",
        "What the feed to routers did (batches, pages, snapshots, replays, breaks, …)",
        "event",
    )
    WORK_SECONDS = counter(
        "symphony:scheduler_work_seconds_total",
        "Time that the scheduler thread spent on advisories, by kind of work",
        "work",
    )
    WORK = counter(
        "symphony:scheduler_work_total",
        "Pieces of that work: messages, steps with a live advisory, arriving requests",
        "work",
    )
    JOINED = counter(
        "symphony:joined_reads_total",
        "Requests that took over a read from disk which an advisory had begun",
    )
    PULLS = counter("symphony:pulls_total", "Copies from a peer, by how they ended", "outcome")
    PEER_BYTES = counter(
        "symphony:peer_bytes_total", "KV bytes exchanged with other workers", "direction"
    )
    PULL_SECONDS = histogram(
        "symphony:pull_duration_seconds",
        "A copy from a peer, from its request to the pages being in place",
        DURATION_SECONDS,
        "outcome",
    )
    REPORT_SECONDS = counter(
        "symphony:report_seconds_total",
        "Time that the scheduler thread spent on these metrics",
    )


# Label sets that several of sglang-router's metrics share, in its order.
ROUTED = ("router_type", "backend_type", "connection_mode", "model", "endpoint")
GENERATED = ("router_type", "backend_type", "model", "endpoint")
POOL = ("worker_type", "connection_mode")


class Router:
    """Series of the router, on its own port."""

    HTTP_REQUESTS = counter(
        "smg_http_requests_total", "Requests that arrived, by method and route", "method", "path"
    )
    HTTP_SECONDS = histogram(
        "smg_http_request_duration_seconds",
        "Arrival of a request to the end of its answer",
        DURATION_SECONDS,
        "method",
        "path",
    )
    HTTP_RESPONSES = counter(
        "smg_http_responses_total", "Answers given to callers", "status_code", "error_code"
    )
    HTTP_CONNECTIONS = gauge("smg_http_connections_active", "Callers connected now")
    HTTP_RATE_LIMIT = counter(
        "smg_http_rate_limit_total", "Requests allowed or rejected by the router's limits", "result"
    )
    REQUESTS = counter(
        "smg_router_requests_total", "Requests sent to workers", *ROUTED, "streaming"
    )
    REQUEST_SECONDS = histogram(
        "smg_router_request_duration_seconds",
        "Routing of a request to the end of its worker's answer",
        DURATION_SECONDS,
        *ROUTED,
    )
    REQUEST_ERRORS = counter(
        "smg_router_request_errors_total", "Requests that failed, by cause", *ROUTED, "error_type"
    )
    UPSTREAM_RESPONSES = counter(
        "smg_router_upstream_responses_total",
        "Answers of workers, retried ones included",
        "router_type",
        "status_code",
        "error_code",
    )
    TTFT = histogram(
        "smg_router_ttft_seconds",
        "Arrival of a streamed request to its first token",
        DURATION_SECONDS,
        *GENERATED,
    )
    TPOT = histogram(
        "smg_router_tpot_seconds",
        "Mean time between a streamed answer's tokens after the first",
        TOKEN_SECONDS,
        *GENERATED,
    )
    GENERATION_SECONDS = histogram(
        "smg_router_generation_duration_seconds",
        "Arrival of a streamed request to its last token",
        DURATION_SECONDS,
        *GENERATED,
    )
    TOKENS = counter(
        "smg_router_tokens_total", "Tokens in (input) and out (output)", *GENERATED, "token_type"
    )
    POOL_SIZE = gauge("smg_worker_pool_size", "Workers known", *POOL, "model")
    WORKER_CONNECTIONS = gauge(
        "smg_worker_connections_active", "Connections to workers that are open now", *POOL
    )
    WORKER_REQUESTS = gauge("smg_worker_requests_active", "Requests under way", "worker")
    WORKER_HEALTH = gauge("smg_worker_health", "1 healthy, 0 not", "worker")
    HEALTH_CHECKS = counter(
        "smg_worker_health_checks_total", "Health checks made", "worker_type", "result"
    )
    SELECTIONS = counter(
        "smg_worker_selection_total", "Choices of a worker", *POOL, "model", "policy"
    )
    WORKER_ERRORS = counter("smg_worker_errors_total", "Failures of workers", *POOL, "error_type")
    BREAKER_STATE = gauge(
        "smg_worker_cb_state", "Circuit breaker: 0 closed, 1 open, 2 half-open", "worker"
    )
    BREAKER_TRANSITIONS = counter(
        "smg_worker_cb_transitions_total", "Circuit breaker changes", "worker", "from", "to"
    )
    BREAKER_OUTCOMES = counter(
        "smg_worker_cb_outcomes_total", "Outcomes that circuit breakers saw", "worker", "outcome"
    )
    BREAKER_FAILURES = gauge(
        "smg_worker_cb_consecutive_failures", "Failures in a row now", "worker"
    )
    BREAKER_SUCCESSES = gauge(
        "smg_worker_cb_consecutive_successes", "Successes in a row now", "worker"
    )
    RETRIES = counter(
        "smg_worker_retries_total", "Tries after the first", "worker_type", "endpoint"
    )
    RETRIES_EXHAUSTED = counter(
        "smg_worker_retries_exhausted_total",
        "Requests that failed at their last try",
        "worker_type",
        "endpoint",
    )
    RETRY_BACKOFF = histogram(
        "smg_worker_retry_backoff_seconds", "Wait before a try", DURATION_SECONDS, "attempt"
    )
    REGISTRATIONS = counter(
        "smg_discovery_registrations_total", "Workers added", "source", "result"
    )
    DEREGISTRATIONS = counter(
        "smg_discovery_deregistrations_total", "Workers removed", "source", "reason"
    )
    DECISION = histogram(
        "symphony:route_decision_seconds",
        "Time to choose a worker, without tokenizing",
        DECISION_SECONDS,
        "policy",
    )
    DECISION_REASONS = counter(
        "symphony:route_decisions_total", "Choices of a worker, by what decided", "policy", "reason"
    )
    MATCHED_TOKENS = counter(
        "symphony:route_matched_tokens_total",
        "Prompt tokens that the chosen worker held, by the level they were on",
        "level",
    )
    PROMPT_TOKENS = counter(
        "symphony:route_prompt_tokens_total", "Prompt tokens of requests with known token ids"
    )
    QUEUE_SECONDS = histogram(
        "symphony:queue_wait_seconds",
        "Wait in the router's queue, by how it ended",
        DURATION_SECONDS,
        "result",
    )
    QUEUE_SIZE = gauge("symphony:queue_requests", "Requests in the router's queue")
    ADVISORIES = counter(
        "symphony:router_advisories_total", "Hints forwarded, by the receipt's status", "status"
    )
    INDEX_PAGES = gauge(
        "symphony:location_index_pages", "Pages known of a worker's level", "worker", "level"
    )
    INDEX_BYTES = gauge("symphony:location_index_bytes", "Memory of the location index, estimated")
    INDEX_SESSIONS = gauge("symphony:location_index_sessions", "Sessions with a known worker")
    INDEX_LAG = histogram(
        "symphony:location_index_lag_seconds",
        "Sending of a residency message to its being in the index (clocks of one machine)",
        LAG_SECONDS,
        "worker",
    )
    FEED_MESSAGES = counter(
        "symphony:router_feed_messages_total", "Feed messages taken in", "worker", "kind"
    )
    FEED_GAPS = counter(
        "symphony:feed_gaps_total", "Times that messages of a feed were missing", "worker"
    )
    FEED_MISSED = counter(
        "symphony:feed_missed_messages_total", "Feed messages that never came", "worker"
    )
    FEED_SNAPSHOTS = counter(
        "symphony:feed_snapshots_total",
        "Snapshots taken to catch up, by result",
        "worker",
        "result",
    )
    FEED_LIVE = gauge("symphony:feed_live", "1 while the feed is in step, else 0", "worker")
    MOVES = counter(
        "symphony:moves_total", "Migrations that ended, by cause and outcome", "cause", "outcome"
    )
    MOVES_ACTIVE = gauge("symphony:moves_active", "Migrations under way")
    MOVE_BYTES = counter("symphony:move_bytes_total", "KV bytes that migrations copied", "cause")
    MOVE_SECONDS = histogram(
        "symphony:move_duration_seconds",
        "A migration from its start to its end",
        DURATION_SECONDS,
        "cause",
        "outcome",
    )
    SERIES_DROPPED = counter(
        "symphony:metric_series_folded_total",
        "New label values beyond the bound, counted under 'other'",
        "metric",
    )


def declared(owner: type) -> tuple[Metric, ...]:
    """The metrics of ``Worker`` or ``Router``, in the order of their declaration."""
    return tuple(value for value in vars(owner).values() if isinstance(value, Metric))


PREAMBLE = """# Metrics

Written from `symphony_sglang.telemetry.metrics`; a test compares them.

Counters end in `_total`; seconds, bytes and tokens are in the names. Histograms have the series
`_bucket`, `_sum` and `_count`.
"""
WORKER_PREAMBLE = """
## Worker

On the `/metrics` of a worker that was started with `--enable-metrics`, beside SGLang's own
`sglang:*`. Each carries SGLang's labels (`model_name`, `engine_type`, `tp_rank`, …) before the
ones below. One rank of a tensor-parallel group reports, as for SGLang's; what the HTTP process
counts has no rank. Totals are copied twice a second.

How often an announced turn found what was promised:

```promql
sum(rate(symphony:advised_requests_total{ready="true"}[5m]))
  / sum(rate(symphony:advised_requests_total[5m]))
```
"""
ROUTER_PREAMBLE = """
## Router

On the router's own port (`--prometheus-port`, 29000). `smg_*` are the names and labels of
sglang-router 0.3.2, so its dashboards work; there, time to first token and between tokens exist
for gRPC workers only, here for every streamed answer. A label takes 2,048 sets of values at
most; later ones are counted under `other`.
"""


def reference() -> str:
    """``docs/reference/metrics.md``."""
    return "".join(
        [
            PREAMBLE,
            WORKER_PREAMBLE,
            table(declared(Worker)),
            ROUTER_PREAMBLE,
            table(declared(Router)),
        ]
    )


def table(metrics: tuple[Metric, ...]) -> str:
    rows = ["", "| name | kind | labels | what it says |", "|---|---|---|---|"]
    for metric in metrics:
        labels = ", ".join(f"`{label}`" for label in metric.labels)
        text = metric.help.replace("|", "\\|")
        rows.append(f"| `{metric.name}` | {metric.kind.value} | {labels} | {text} |")
    return "\n".join([*rows, ""])
