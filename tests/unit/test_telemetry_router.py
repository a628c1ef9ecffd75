"""The router's metrics: sglang-router's names and labels, bounded series, nothing of the gone."""

from __future__ import annotations

from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from symphony_sglang.telemetry.metrics import Router, declared
from symphony_sglang.telemetry.router import (
    BreakerState,
    Call,
    RouterMetrics,
    Stream,
    endpoint_of,
)
from symphony_sglang.telemetry.series import OTHER

# What sglang-router 0.3.2 answered on its :29000 after a handful of requests, one of them failing
# through all its retries: names and label names of every series.
STOCK = {
    "smg_http_connections_active": "",
    "smg_http_request_duration_seconds": "method path",
    "smg_http_requests_total": "method path",
    "smg_http_responses_total": "status_code error_code",
    "smg_router_request_duration_seconds": (
        "router_type backend_type connection_mode model endpoint"
    ),
    "smg_router_requests_total": (
        "router_type backend_type connection_mode model endpoint streaming"
    ),
    "smg_router_upstream_responses_total": "router_type status_code error_code",
    "smg_worker_cb_consecutive_failures": "worker",
    "smg_worker_cb_consecutive_successes": "worker",
    "smg_worker_cb_outcomes_total": "worker outcome",
    "smg_worker_cb_state": "worker",
    "smg_worker_errors_total": "worker_type connection_mode error_type",
    "smg_worker_health": "worker",
    "smg_worker_health_checks_total": "worker_type result",
    "smg_worker_pool_size": "worker_type connection_mode model",
    "smg_worker_requests_active": "worker",
    "smg_worker_retries_exhausted_total": "worker_type endpoint",
    "smg_worker_retries_total": "worker_type endpoint",
    "smg_worker_retry_backoff_seconds": "attempt",
    "smg_worker_selection_total": "worker_type connection_mode model policy",
}
DURATION_BUCKETS = "0.001 0.005 0.01 0.025 0.05 0.1 0.25 0.5 1.0 2.5 5.0 10.0 15.0 30.0 45.0 60.0"


def samples(metrics: RouterMetrics) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    """What a scraper reads, by name and labels."""
    text = metrics.render().decode()
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def value(metrics: RouterMetrics, name: str, **labels: str) -> float | None:
    return samples(metrics).get((name, tuple(sorted(labels.items()))))


@pytest.mark.parametrize("name", STOCK)
def test_series_of_the_stock_router_keep_name_and_labels(name: str) -> None:
    (metric,) = [metric for metric in declared(Router) if metric.name == name]
    assert metric.labels == tuple(STOCK[name].split())
    if name.endswith("duration_seconds"):
        assert " ".join(map(str, metric.buckets)).startswith(DURATION_BUCKETS)


def test_a_request_is_seen_from_its_arrival_to_its_end() -> None:
    metrics = RouterMetrics()
    call = Call(endpoint_of("/v1/chat/completions"), "m", streaming=True)
    metrics.http_arrived("POST", "/v1/chat/completions")
    metrics.selected("symphony", "m", "cheapest", 2e-5)
    metrics.matched({"device": 90, "host": 0}, 100)
    metrics.routed(call)
    metrics.upstream(503)
    metrics.retried(call.endpoint, 1, 0.05)
    metrics.upstream(200)
    metrics.streamed(call, Stream(0.2, 1.2, tokens=11))
    metrics.tokens(call, prompt=100, completion=11)
    metrics.request_ended(call, 1.2)
    metrics.http_answered("POST", "/v1/chat/completions", 200, 1.3)
    routed = {
        "router_type": "http",
        "backend_type": "regular",
        "connection_mode": "http",
        "model": "m",
        "endpoint": "chat",
    }
    generated = {k: v for k, v in routed.items() if k != "connection_mode"}
    assert value(metrics, "smg_router_requests_total", streaming="true", **routed) == 1
    assert value(metrics, "smg_router_request_duration_seconds_sum", **routed) == 1.2
    assert value(metrics, "smg_router_ttft_seconds_sum", **generated) == 0.2
    assert value(metrics, "smg_router_tpot_seconds_sum", **generated) == pytest.approx(0.1)
    assert value(metrics, "smg_router_tokens_total", token_type="output", **generated) == 11
    assert value(metrics, "smg_worker_retry_backoff_seconds_sum", attempt="1") == 0.05
    assert value(metrics, "smg_http_responses_total", status_code="200", error_code="") == 1
    got = value(
        metrics,
        "smg_router_upstream_responses_total",
        router_type="http",
        status_code="503",
        error_code="",
    )
    assert got == 1
    assert value(metrics, "symphony:route_matched_tokens_total", level="device") == 90
    assert value(metrics, "symphony:route_prompt_tokens_total") == 100


@pytest.mark.parametrize("tokens", [None, 0, 1])
def test_an_answer_of_one_token_has_no_time_between_tokens(tokens: int | None) -> None:
    metrics = RouterMetrics()
    metrics.streamed(Call("chat"), Stream(0.2, 0.2, tokens))
    assert not [key for key in samples(metrics) if key[0].startswith("smg_router_tpot")]
    assert [key for key in samples(metrics) if key[0] == "smg_router_ttft_seconds_sum"]


def test_nothing_is_left_of_a_removed_worker_but_the_count_of_its_removal() -> None:
    metrics = RouterMetrics()
    for worker in ("http://w1", "http://w2"):
        metrics.worker_added(worker, "static")
        metrics.requests_active(worker, 3)
        metrics.health(worker, healthy=True)
        metrics.breaker_outcome(worker, success=False)
        metrics.breaker(worker, BreakerState.HALF_OPEN, 2, 0)
        metrics.breaker_changed(worker, BreakerState.OPEN, BreakerState.HALF_OPEN)
        metrics.feed_message(worker, "stored", 3)
        metrics.feed_gap(worker, 7)
        metrics.index_pages(worker, {"device": 10, "nvme": 5})
        metrics.index_lag(worker, 0.01)
    assert value(metrics, "smg_worker_cb_state", worker="http://w1") == 2
    assert value(metrics, "symphony:feed_missed_messages_total", worker="http://w1") == 7
    metrics.worker_removed("http://w1", "manual", "asked")
    text = metrics.render().decode()
    assert "http://w1" not in text
    assert text.count("http://w2") > 10
    removals = {"source": "manual", "reason": "asked"}
    assert value(metrics, "smg_discovery_deregistrations_total", **removals) == 1
    metrics.worker_removed("never seen", "manual", "asked")
    metrics.feed_live("rank-1", live=True)
    metrics.forget("rank-1")
    assert "rank-1" not in metrics.render().decode()
    metrics.check()


def test_beyond_the_bound_new_labels_are_counted_under_other() -> None:
    metrics = RouterMetrics(series_max=4)
    for number in range(10):
        metrics.routed(Call("chat", f"model-{number}"))
    counts = {
        dict(labels)["model"]: count
        for (name, labels), count in samples(metrics).items()
        if name == "smg_router_requests_total"
    }
    assert counts == {**{f"model-{n}": 1.0 for n in range(4)}, OTHER: 6.0}
    folded = {"metric": "smg_router_requests_total"}
    assert value(metrics, "symphony:metric_series_folded_total", **folded) == 6
    assert value(metrics, "symphony:metric_series_folded_total", **folded) == 6, "once each"
    metrics.check()


def test_labels_that_callers_choose_cannot_break_the_page() -> None:
    metrics = RouterMetrics()
    hostile = 'a"b\\c\nsmg_worker_health{worker="x"} 1'
    metrics.routed(Call("generate", hostile))
    models = {dict(labels).get("model") for _, labels in samples(metrics)}
    assert hostile in models
    assert value(metrics, "smg_worker_health", worker="x") is None


def test_two_routers_in_one_process_count_apart() -> None:
    one, other = RouterMetrics(), RouterMetrics()
    one.rate_limited(allowed=False)
    assert value(one, "smg_http_rate_limit_total", result="rejected") == 1
    assert value(other, "smg_http_rate_limit_total", result="rejected") is None


def test_the_page_holds_no_creation_times() -> None:
    """They double the counters' series, and sglang-router has none."""
    metrics = RouterMetrics()
    metrics.http_arrived("GET", "/health")
    assert "_created" not in metrics.render().decode()


def every_call(metrics: RouterMetrics) -> list[Any]:
    call = Call("chat")
    return [
        metrics.connections(1),
        metrics.request_failed(call, "timeout"),
        metrics.queue_size(3),
        metrics.queue_left("sent", 0.1),
        metrics.retries_exhausted("chat"),
        metrics.pool("m", 2),
        metrics.worker_connections(4),
        metrics.health_checked(success=True),
        metrics.worker_error("timeout"),
        metrics.feed_snapshot("w", success=True),
        metrics.feed_live("w", live=True),
        metrics.index_size(index_bytes=10, sessions=2),
        metrics.advised("accepted"),
        metrics.moves_active(1),
        metrics.move_ended("drain", "done", moved_bytes=100, seconds=0.5),
    ]


def test_moves_carry_cause_outcome_bytes_and_seconds() -> None:
    metrics = RouterMetrics()
    every_call(metrics)
    assert value(metrics, "symphony:moves_total", cause="drain", outcome="done") == 1
    assert value(metrics, "symphony:move_bytes_total", cause="drain") == 100
    key = {"cause": "drain", "outcome": "done"}
    assert value(metrics, "symphony:move_duration_seconds_sum", **key) == 0.5


@pytest.mark.parametrize(
    ("path", "endpoint"),
    [
        ("/generate", "generate"),
        ("/v1/chat/completions", "chat"),
        ("/v1/loads", "loads"),
        ("/", "root"),
    ],
)
def test_endpoints_have_the_stock_routers_short_names(path: str, endpoint: str) -> None:
    assert endpoint_of(path) == endpoint
