"""Metrics of ``prometheus_client``, made from declarations, with a bound on label values.

A caller's text can become a label (a model's name), so each family holds a bounded number of
series; new ones beyond it are counted under the label value ``other``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import prometheus_client
from prometheus_client import CollectorRegistry

from symphony_sglang.telemetry.metrics import Kind, Metric

SERIES_MAX = 2048
OTHER = "other"


class CountedHistogram(prometheus_client.Histogram):
    """A histogram that also takes in counts made elsewhere."""

    def add_counts(self, counts: Sequence[int], total: float) -> None:
        """Add `counts` per bucket, not cumulative, the open one last; `total` is their sum."""
        assert len(counts) == len(self._buckets), (len(counts), len(self._buckets))
        for bucket, count in zip(self._buckets, counts, strict=True):
            if count:
                bucket.inc(count)
        self._sum.inc(total)


class Family:
    """One declared metric with its series, found by label values in the declared order."""

    __slots__ = ("_children", "_common", "_metric", "_parent", "_series_max", "folded")

    def __init__(
        self,
        metric: Metric,
        registry: CollectorRegistry,
        *,
        common: Mapping[str, str] | None = None,
        series_max: int = SERIES_MAX,
    ) -> None:
        self._metric = metric
        self._common = tuple((common or {}).values())
        self._series_max = series_max
        self._children: dict[tuple[str, ...], Any] = {}
        # New label values that were folded into `other`.
        self.folded = 0
        names = (*(common or {}), *metric.labels)
        self._parent: Any
        match metric.kind:
            case Kind.COUNTER:
                self._parent = prometheus_client.Counter(
                    metric.name, metric.help, names, registry=registry
                )
            case Kind.GAUGE:
                # In multi-process mode the newest value stands, as for SGLang's own gauges.
                self._parent = prometheus_client.Gauge(
                    metric.name,
                    metric.help,
                    names,
                    registry=registry,
                    multiprocess_mode="mostrecent",
                )
            case Kind.HISTOGRAM:
                self._parent = CountedHistogram(
                    metric.name, metric.help, names, registry=registry, buckets=metric.buckets
                )

    def of(self, *values: str) -> Any:
        """The series of these label values: ``.inc``, ``.set`` or ``.observe`` it."""
        child = self._children.get(values)
        return self._make(values) if child is None else child

    def _make(self, values: tuple[str, ...]) -> Any:
        assert len(values) == len(self._metric.labels), (self._metric.name, values)
        if len(self._children) >= self._series_max:
            self.folded += 1
            values = (OTHER,) * len(values)
        child = self._children.get(values)
        if child is None:
            every = (*self._common, *values)
            child = self._parent.labels(*every) if every else self._parent
            self._children[values] = child
        return child

    def forget(self, label: str, value: str) -> None:
        """Drop the series whose `label` is `value`: a worker that was removed."""
        place = self._metric.labels.index(label)
        for values in [v for v in self._children if v[place] == value]:
            del self._children[values]
            self._parent.remove(*self._common, *values)

    def check(self) -> None:
        # One more than the bound: `other`.
        assert len(self._children) <= self._series_max + 1, self._metric.name
