"""A worker's metrics on SGLang's ``/metrics``: totals copied in now and then, and a few events.

The scheduler thread counts in plain integers; ``WorkerMetrics`` is told the totals and adds what
came since. An event may be recorded from any thread. SGLang gathers its processes through files
of ``prometheus_client``'s multi-process mode (utils/common.py:2843).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from prometheus_client import REGISTRY, CollectorRegistry

from symphony_sglang.core.ledger import Histogram, OutcomeLedger
from symphony_sglang.core.levels import PROTECTED_LEVELS, Level
from symphony_sglang.core.lifecycle import State
from symphony_sglang.telemetry.metrics import Metric, Worker, declared
from symphony_sglang.telemetry.series import Family

RATE_METRICS = (
    (Worker.GATE_RATE, "_tokens_per_second"),
    (Worker.GATE_LATENCY, "_latency_seconds"),
)


class LevelBytes(NamedTuple):
    """One level now; None where the level does not know."""

    level: Level
    used: int | None = None
    total: int | None = None
    protected: int | None = None
    protect_limit: int | None = None


class WorkerMetrics:
    """The series of one process of a worker.

    Args:
        labels: SGLang's own labels of that process (``metrics_collector.labels``), as text.
        registry: Where the series are registered; in multi-process mode it does not matter.
    """

    def __init__(
        self, labels: Mapping[str, str], registry: CollectorRegistry | None = None
    ) -> None:
        self._families = {
            metric.name: Family(metric, registry or REGISTRY, common=labels)
            for metric in declared(Worker)
        }
        self._totals: dict[tuple[str, ...], float] = {}
        self._histograms: dict[tuple[str, ...], tuple[tuple[int, ...], float]] = {}

    def family(self, metric: Metric) -> Family:
        return self._families[metric.name]

    # Totals -------------------------------------------------------------------------------------

    def total(self, metric: Metric, value: float, *labels: str) -> None:
        """`value` is a count since the start; one that fell began anew."""
        key = (metric.name, *labels)
        before = self._totals.get(key)
        if before is None:
            # A counter that shows 0 from the start lets ``rate`` see its first step.
            self.family(metric).of(*labels).inc(value)
        elif value != before:
            self.family(metric).of(*labels).inc(value - before if value > before else value)
        self._totals[key] = value

    def distribution(self, metric: Metric, histogram: Histogram, *labels: str) -> None:
        """A histogram with the same bounds, as it stands since the start."""
        key = (metric.name, *labels)
        counts, total = tuple(histogram.counts), histogram.sum
        old_counts, old_total = self._histograms.get(key, ((0,) * len(counts), 0.0))
        if key in self._histograms and counts == old_counts:
            return
        self._histograms[key] = (counts, total)
        steps = [new - old for new, old in zip(counts, old_counts, strict=True)]
        self.family(metric).of(*labels).add_counts(steps, total - old_total)

    def outcomes(self, ledger: OutcomeLedger, token_bytes: int, now_seconds: float) -> None:
        """What became of the advisories. `now_seconds` is the ledger's own clock."""
        for status, count in ledger.statuses.items():
            self.total(Worker.ADVISORIES, count, status.value)
        for state, count in ledger.outcomes.items():
            self.total(Worker.ADVISORIES_ENDED, count, state.value)
        self.total(Worker.DEMAND, ledger.outcomes[State.USED], "true")
        self.total(Worker.DEMAND, ledger.outcomes[State.LATE], "false")
        self.total(Worker.HARMFUL, ledger.harmful)
        self.total(Worker.HARMFUL_PAGES, ledger.harmful_pages)
        self.total(Worker.WASTED_TOKENS, ledger.wasted_tokens)
        for hop, tokens in ledger.moved_tokens.items():
            self.total(Worker.MOVED_TOKENS, tokens, hop.value)
        for hop, moved_bytes in ledger.moved_bytes.items():
            self.total(Worker.MOVED_BYTES, moved_bytes, hop.value)
        for level in PROTECTED_LEVELS:
            held = ledger.held_token_seconds(level, now_seconds) * token_bytes
            self.total(Worker.PROTECTED_BYTE_SECONDS, held, level.value)
        for state, histogram in ledger.lead_by_state.items():
            self.distribution(Worker.LEAD, histogram, state.value)
        self.distribution(Worker.READY, ledger.ready_seconds)

    def stall_saved(self, seconds: float) -> None:
        """An advisory was used: `seconds` of copying its request did not wait for."""
        self.family(Worker.STALL_SAVED).of().inc(seconds)

    def loads(self, *, loaded_tokens: int, backed_up_tokens: int) -> None:
        self.total(Worker.LOADED_TOKENS, loaded_tokens)
        self.total(Worker.BACKED_UP_TOKENS, backed_up_tokens)

    def gate(self, subject: str, decisions: Mapping[str, Mapping[str, int]]) -> None:
        """Decisions since the start for `subject` (advisory, request), by level, then by what."""
        for level, counts in decisions.items():
            for decision, count in counts.items():
                self.total(Worker.GATE, count, subject, level, decision)

    def store(self, counters: Mapping[str, int]) -> None:
        """The page store's counters since the start."""
        for event, count in counters.items():
            self.total(Worker.STORE_EVENTS, count, event)

    def feed(self, counters: Mapping[str, int]) -> None:
        """The feed's counters since the start."""
        for event, count in counters.items():
            self.total(Worker.FEED_EVENTS, count, event)

    def work(self, kind: str, *, pieces: int, seconds: float) -> None:
        """What advisories cost the scheduler thread since the start."""
        self.total(Worker.WORK, pieces, kind)
        self.total(Worker.WORK_SECONDS, seconds, kind)

    def joined(self, reads: int) -> None:
        self.total(Worker.JOINED, reads)

    # Gauges -------------------------------------------------------------------------------------

    def live(self, *, advisories: int, sessions: int) -> None:
        self.family(Worker.ADVISORIES_LIVE).of().set(advisories)
        self.family(Worker.SESSIONS).of().set(sessions)

    def level(self, now: LevelBytes) -> None:
        for metric, value in (
            (Worker.LEVEL_USED_BYTES, now.used),
            (Worker.LEVEL_TOTAL_BYTES, now.total),
            (Worker.PROTECTED_BYTES, now.protected),
            (Worker.PROTECT_LIMIT_BYTES, now.protect_limit),
        ):
            if value is not None:
                self.family(metric).of(now.level.value).set(value)

    def rates(self, rates: Mapping[str, float | None]) -> None:
        """The speeds that the gate compares, as ``GET /symphony/residency`` has them."""
        for name, value in rates.items():
            for metric, ending in RATE_METRICS:
                if value is not None and name.endswith(ending):
                    self.family(metric).of(name.removesuffix(ending)).set(value)

    # Events -------------------------------------------------------------------------------------

    def implied(self, cause: str) -> None:
        """A turn ended with `cause`, and that announced the next one."""
        self.family(Worker.IMPLICIT).of(cause).inc()

    def refused(self, limit: str, hints: int) -> None:
        self.family(Worker.HINTS_REFUSED).of(limit).inc(hints)

    def pulled(self, outcome: str, *, moved_bytes: int, seconds: float) -> None:
        """A copy from a peer ended."""
        self.family(Worker.PULLS).of(outcome).inc()
        self.family(Worker.PULL_SECONDS).of(outcome).observe(seconds)
        self.family(Worker.PEER_BYTES).of("in").inc(moved_bytes)

    def served_peer(self, moved_bytes: int) -> None:
        """Bytes given to another worker."""
        self.family(Worker.PEER_BYTES).of("out").inc(moved_bytes)

    def report_took(self, seconds: float) -> None:
        self.family(Worker.REPORT_SECONDS).of().inc(seconds)

    def check(self) -> None:
        for family in self._families.values():
            family.check()
