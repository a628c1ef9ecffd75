"""Figures of one simulated run, as one JSON-ready row."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from symphony_sglang.sim.cluster import Cluster
from symphony_sglang.sim.worker import SimRequest, SimWorker

SOURCES = ("device", "host", "nvme", "computed")


def figures(cluster: Cluster, warm_seconds: float) -> dict[str, Any]:
    """Of the requests due after the warm-up; loads are sampled each second."""
    rules = cluster.rules
    requests = [item for item in cluster.requests if item.due_seconds >= warm_seconds]
    prompt = max(1, sum(item.prompt_tokens for item in requests))
    span = rules.seconds - warm_seconds
    samples = cluster.counts.loads[int(warm_seconds) :]
    workers = list(cluster.workers.values())
    return {
        "arm": rules.name,
        "users": rules.users.users,
        "seed": rules.seed,
        "policy": rules.policy,
        "requests": len(requests),
        "requests_per_second": len(requests) / span,
        "output_tokens_per_second": sum(item.answer_tokens for item in requests) / span,
        "ttft_seconds": spread([item.ttft_seconds for item in requests]),
        "tpot_seconds": spread([item.tpot_seconds for item in requests]),
        "latency_seconds": spread([item.ended_seconds - item.due_seconds for item in requests]),
        "token_share": {
            source: sum(getattr(item, f"{source}_tokens") for item in requests) / prompt
            for source in SOURCES
        },
        "load_max_over_median": imbalance(samples),
        "load_max_over_median_p90": imbalance(samples, 90.0),
        "load_peak_over_median": peak(workers),
        "busy_share": [worker.stats.busy_seconds / cluster.loop.now_seconds for worker in workers],
        "exposed_load_seconds": sum(worker.stats.exposed_seconds for worker in workers),
        "retractions": sum(worker.stats.retractions for worker in workers),
        "gate_refusals": sum(worker.stats.gate_refusals for worker in workers),
        "bytes": {
            "host_to_device": sum(worker.link.bytes for worker in workers),
            "nvme_read": sum(worker.disk.bytes for worker in workers),
            "nvme_write": sum(worker.disk_write.bytes for worker in workers),
            "moved": cluster.transfers.bytes,
            "promoted": sum(
                sum(worker.promotions.begun_bytes.values())
                for worker in workers
                if worker.promotions
            ),
        },
        "advisories": {
            "sent": cluster.counts.advisories,
            "false": cluster.counts.false_advisories,
            "left_out": cluster.counts.advisories_left_out,
            "outcomes": outcomes(cluster),
        },
        "moves": cluster.counts.moves,
        "moves_by_cause": {} if cluster.moves is None else dict(cluster.moves.by_cause),
        "pulls": cluster.counts.pulls,
        "events": cluster.loop.events,
    }


def spread(values: Sequence[float]) -> dict[str, float]:
    """Mean and percentiles; zeros where there is nothing."""
    if not values:
        return {"mean": 0.0, "p50": 0.0, "p90": 0.0, "p99": 0.0}
    points = np.percentile(np.asarray(values), (50, 90, 99))
    names = ("p50", "p90", "p99")
    return {
        "mean": float(np.mean(values)),
        **{name: float(point) for name, point in zip(names, points, strict=True)},
    }


def imbalance(samples: Sequence[Sequence[int]], percentile: float | None = None) -> float:
    """Mean, or percentile, over time of the busiest worker's requests over the median worker's,
    idle time apart."""
    ratios = [max(sample) / max(1.0, float(np.median(sample))) for sample in samples if any(sample)]
    if not ratios:
        return 1.0
    return float(np.mean(ratios) if percentile is None else np.percentile(ratios, percentile))


def peak(workers: Sequence[SimWorker]) -> float:
    """The busiest worker's busy time over the median worker's, over the whole run."""
    busy = [worker.stats.busy_seconds for worker in workers]
    middle = float(np.median(busy))
    return max(busy) / middle if middle else 1.0


def outcomes(cluster: Cluster) -> dict[str, int]:
    """Advisories by final state, over all workers."""
    total: dict[str, int] = {}
    for worker in cluster.workers.values():
        if worker.promotions is None:
            continue
        counted = worker.promotions.promoter.outcomes.as_json(cluster.loop.now_seconds)
        for state, count in counted["outcomes"].items():
            total[state] = total.get(state, 0) + int(count)
    return total


def requests_by_source(requests: Sequence[SimRequest]) -> dict[str, list[float]]:
    """TTFT of returning requests by where most of the prompt was."""
    found: dict[str, list[float]] = {source: [] for source in SOURCES}
    for item in requests:
        if item.turn:
            best = max(SOURCES, key=lambda source: getattr(item, f"{source}_tokens"))
            found[best].append(item.ttft_seconds)
    return found
