"""A worker's metrics: totals become counters, whatever their order, and histograms stay whole."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry

from symphony_sglang.core.ledger import LEAD_BOUNDS_SECONDS, Histogram, OutcomeLedger
from symphony_sglang.core.levels import Hop, Level
from symphony_sglang.core.lifecycle import Ended, Kind, State, Status
from symphony_sglang.telemetry.metrics import LEAD_SECONDS, Metric, Router, Worker, declared
from symphony_sglang.telemetry.worker import LevelBytes, WorkerMetrics

LABELS = {"model_name": "m", "tp_rank": "0"}


class Page:
    """A worker's metrics with a registry of their own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.metrics = WorkerMetrics(LABELS, self.registry)

    def value(self, name: str, **labels: str) -> float | None:
        return self.registry.get_sample_value(name, {**LABELS, **labels})


def ended(advisory_id: str, state: State, lead: float, ready: float | None = None) -> Ended:
    return Ended(advisory_id, state, Kind.PREFETCH, "c", 100, 50, lead, ready)


def test_the_ledgers_bounds_are_the_histograms() -> None:
    assert LEAD_BOUNDS_SECONDS == LEAD_SECONDS


def test_outcomes_become_series() -> None:
    page, ledger = Page(), OutcomeLedger()
    ledger.received(Status.ACCEPTED)
    ledger.ended(ended("a", State.USED, 0.3, ready=0.08))
    ledger.ended(ended("b", State.LATE, 7.0))
    ledger.ended(ended("c", State.WASTED, 60.0))
    ledger.moved(Hop.HOST_TO_DEVICE, 50, 5000)
    ledger.held(Level.DEVICE, 10, 1.0)
    for _ in range(2):  # a report with nothing new adds nothing
        page.metrics.outcomes(ledger, 100, 3.0)
    assert page.value("symphony:advisories_total", status="accepted") == 1
    assert page.value("symphony:advisories_total", status="missing") == 0
    assert page.value("symphony:advisories_ended_total", state="wasted") == 1
    assert page.value("symphony:advised_requests_total", ready="true") == 1
    assert page.value("symphony:advised_requests_total", ready="false") == 1
    assert page.value("symphony:moved_bytes_total", hop="host_to_device") == 5000
    assert page.value("symphony:wasted_tokens_total") == 50
    assert page.value("symphony:protected_byte_seconds_total", level="device") == 2000
    lead = "symphony:advisory_lead_seconds"
    assert page.value(f"{lead}_bucket", le="0.25", state="used") == 0
    assert page.value(f"{lead}_bucket", le="0.5", state="used") == 1
    assert page.value(f"{lead}_sum", state="late") == 7.0
    assert page.value(f"{lead}_count", state="wasted") == 1
    assert page.value("symphony:advisory_ready_seconds_count") == 1


@given(st.lists(st.floats(0, 1000), max_size=40), st.lists(st.integers(0, 40), max_size=6))
@settings(max_examples=60, deadline=None)
def test_a_histogram_copied_in_parts_equals_one_observed_at_once(
    values: list[float], cuts: list[int]
) -> None:
    page, source, whole = Page(), Histogram(), Page()
    for place, value in enumerate(values):
        if place in cuts:
            page.metrics.distribution(Worker.READY, source)
        source.add(value)
        whole.metrics.family(Worker.READY).of().observe(value)
    page.metrics.distribution(Worker.READY, source)
    name = Worker.READY.name
    for bound in (*LEAD_SECONDS, "+Inf"):
        le = bound if isinstance(bound, str) else str(float(bound))
        expected = whole.value(f"{name}_bucket", le=le) or 0
        assert (page.value(f"{name}_bucket", le=le) or 0) == expected
    expected_sum = pytest.approx(whole.value(f"{name}_sum") or 0, abs=1e-6)
    assert (page.value(f"{name}_sum") or 0) == expected_sum


@given(st.lists(st.integers(0, 100), min_size=1))
def test_a_total_that_falls_began_anew_and_the_counter_only_grows(values: list[int]) -> None:
    page, expected, before = Page(), 0, 0
    for value in values:
        page.metrics.total(Worker.LOADED_TOKENS, value)
        expected += value - before if value >= before else value
        before = value
        assert page.value("symphony:loaded_tokens_total") == expected


def test_levels_show_what_they_know() -> None:
    page = Page()
    page.metrics.level(LevelBytes(Level.NVME, used=0, total=100))
    assert page.value("symphony:level_used_bytes", level="nvme") == 0
    assert page.value("symphony:protected_bytes", level="nvme") is None


def test_rates_and_gate_decisions() -> None:
    page = Page()
    page.metrics.rates(
        {
            "prefill_tokens_per_second": 9000.0,
            "prefill_latency_seconds": 0.01,
            "nvme_to_host_tokens_per_second": None,
        }
    )
    page.metrics.gate("request", {"nvme": {"use": 3, "recompute": 1}})
    assert page.value("symphony:gate_tokens_per_second", of="prefill") == 9000
    assert page.value("symphony:gate_latency_seconds", of="prefill") == 0.01
    assert page.value("symphony:gate_tokens_per_second", of="nvme_to_host") is None
    labels = {"subject": "request", "level": "nvme", "decision": "recompute"}
    assert page.value("symphony:gate_decisions_total", **labels) == 1


def test_events_of_peers_and_callers() -> None:
    page = Page()
    page.metrics.pulled("done", moved_bytes=10, seconds=0.2)
    page.metrics.served_peer(30)
    page.metrics.implied("tool_calls")
    page.metrics.refused("rate", 3)
    page.metrics.work("step", pieces=10, seconds=0.5)
    page.metrics.feed({"batches": 4})
    page.metrics.joined(2)
    assert page.value("symphony:pulls_total", outcome="done") == 1
    assert page.value("symphony:peer_bytes_total", direction="in") == 10
    assert page.value("symphony:peer_bytes_total", direction="out") == 30
    assert page.value("symphony:implicit_advisories_total", cause="tool_calls") == 1
    assert page.value("symphony:hints_refused_total", limit="rate") == 3
    assert page.value("symphony:scheduler_work_seconds_total", work="step") == 0.5
    assert page.value("symphony:feed_events_total", event="batches") == 4
    assert page.value("symphony:joined_reads_total") == 2
    page.metrics.check()


@pytest.mark.parametrize("metric", [*declared(Worker), *declared(Router)], ids=lambda m: m.name)
def test_names_say_unit_and_kind(metric: Metric) -> None:
    """Prometheus' own rules: a known prefix, base units, no label twice, help without a stop."""
    assert metric.name.startswith(("symphony:", "smg_"))
    assert len(set(metric.labels)) == len(metric.labels)
    assert metric.help
    assert not metric.help.endswith(".")
    for unit in ("milliseconds", "_ms", "_us", "kilobytes", "_mb", "_gb"):
        assert not metric.name.removesuffix("_total").endswith(unit)


def test_no_name_is_declared_twice() -> None:
    names = [metric.name for metric in (*declared(Worker), *declared(Router))]
    assert len(set(names)) == len(names)
