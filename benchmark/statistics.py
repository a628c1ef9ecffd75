"""Figures of one run and ratios between arms; every number says how many samples stand behind it.

A ratio is taken within a repetition, both arms under the same conditions, and reported as the
median of the repetitions with the lowest and the highest.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from benchmark.runner import End
from symphony_sglang.workload.replay_driver import RequestRecord

PERCENTILES = (50, 90, 99)
# Below this many samples a P99 is the maximum under another name.
P99_SAMPLES_MIN = 100
# A run is saturated when requests waited this share of its length for a free place.
SATURATED_SHARE = 0.1


def percentiles(values: Sequence[float]) -> dict[str, float | int | None]:
    """P50, P90 and P99 with mean and count; P99 is None where there are too few samples."""
    if not values:
        return {"n": 0, "mean": None, **{f"p{p}": None for p in PERCENTILES}}
    points = np.percentile(np.asarray(values, dtype=np.float64), PERCENTILES)
    named: dict[str, float | int | None] = {
        f"p{p}": float(point) for p, point in zip(PERCENTILES, points, strict=True)
    }
    if len(values) < P99_SAMPLES_MIN:
        named["p99"] = None
    return {"n": len(values), "mean": float(np.mean(values)), **named}


def run_figures(
    records: Sequence[RequestRecord], end: End, *, returning_only: bool, slo_ttft_seconds: float
) -> dict[str, Any]:
    """What one run measured. Failed requests are counted and left out of the times."""
    good = [record for record in records if record.error is None]
    counted = [record for record in good if record.turn or not returning_only]
    # A caller waits from when the request was due, not from when a place was free to send it.
    waits = [record.sent_seconds - record.due_seconds for record in good]
    ttft = [
        (record.sent_seconds - record.due_seconds)
        + (record.latency_seconds if record.ttft_seconds is None else record.ttft_seconds)
        for record in counted
    ]
    prompt_tokens = sum(record.prompt_tokens for record in good)
    hits = {
        level: sum(getattr(record.cached, level) for record in good)
        for level in ("device", "host", "storage")
    }
    seconds = end.seconds or float("nan")
    leads = [record.lead_seconds for record in good if record.lead_seconds is not None]
    return {
        "requests": len(records),
        "failed": len(records) - len(good),
        "unsent": end.requests_unsent,
        "sessions": end.sessions,
        "seconds": end.seconds,
        "requests_per_second": len(good) / seconds,
        "output_tokens_per_second": sum(record.output_tokens for record in good) / seconds,
        "ttft_seconds": percentiles(ttft),
        "tpot_seconds": percentiles([r.tpot_seconds for r in good if r.tpot_seconds is not None]),
        "latency_seconds": percentiles([record.latency_seconds for record in good]),
        "goodput_per_second": sum(value <= slo_ttft_seconds for value in ttft) / seconds,
        "within_slo_share": sum(value <= slo_ttft_seconds for value in ttft) / max(1, len(ttft)),
        "hit_share": {level: count / max(1, prompt_tokens) for level, count in hits.items()},
        "computed_share": 1 - sum(hits.values()) / max(1, prompt_tokens),
        "saturated": bool(sum(waits) > SATURATED_SHARE * seconds * max(1, len(good))),
        "lead_seconds": percentiles(leads),
        "load_balance": {
            key: load_balance(end.totals, key) for key in ("requests", "prompt_tokens")
        },
        "advice": end.advice,
        "failure": end.failure,
    }


def spread_of(values: Iterable[float | None]) -> dict[str, float | int | None]:
    """Median, lowest and highest of the repetitions; None where nothing was measured."""
    present = [value for value in values if value is not None and np.isfinite(value)]
    if not present:
        return {"median": None, "low": None, "high": None, "n": 0}
    return {
        "median": float(np.median(present)),
        "low": min(present),
        "high": max(present),
        "n": len(present),
    }


def lookup(figures: dict[str, Any], path: str) -> float | None:
    """A figure by its dotted path, e.g. ``ttft_seconds.p90``."""
    value: Any = figures
    for key in path.split("."):
        value = value.get(key) if isinstance(value, dict) else None
    return float(value) if isinstance(value, int | float) else None


COMPARED = {
    "ttft_seconds.mean": "baseline / arm",
    "ttft_seconds.p50": "baseline / arm",
    "ttft_seconds.p90": "baseline / arm",
    "tpot_seconds.mean": "baseline / arm",
    "requests_per_second": "arm / baseline",
}


def compare(
    runs: dict[str, dict[int, dict[str, Any]]], baseline: str
) -> dict[str, dict[str, dict[str, float | int | None]]]:
    """Of each arm against the baseline, per figure; above 1 the arm is better."""
    base = runs[baseline]
    ratios: dict[str, dict[str, dict[str, float | int | None]]] = {}
    for arm, own in runs.items():
        ratios[arm] = {}
        for path, direction in COMPARED.items():
            quotients = []
            for repetition in sorted(set(own) & set(base)):
                ours, theirs = lookup(own[repetition], path), lookup(base[repetition], path)
                if ours and theirs:
                    better = theirs / ours if direction == "baseline / arm" else ours / theirs
                    quotients.append(better)
            ratios[arm][path] = spread_of(quotients)
    return ratios


def load_balance(counters: Sequence[dict[str, Any]], key: str = "requests") -> float | None:
    """Highest over median of a per-worker count; None with fewer than two workers."""
    values = [float(body[key]) for body in counters if isinstance(body.get(key), int | float)]
    if len(values) < 2 or not np.median(values):
        return None
    return float(max(values) / np.median(values))
