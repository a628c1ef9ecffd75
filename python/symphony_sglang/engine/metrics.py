"""Our counters on SGLang's ``/metrics``, in the processes that SGLang lets report.

The scheduler thread only counts. Its totals are copied to the metrics twice a second, from one
call a step that otherwise reads the clock; what asks a disk is read by a thread of its own.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import msgspec

from symphony_sglang.clock import Clock, SystemClock
from symphony_sglang.core.gate import GateSnapshot
from symphony_sglang.core.levels import Hop, Level
from symphony_sglang.core.lifecycle import State
from symphony_sglang.engine.residency import LevelUse, device_use, host_use

if TYPE_CHECKING:
    # At run time only where metrics are on: prometheus_client chooses its mode when imported.
    from symphony_sglang.engine.advisories import AdvisoryDriver
    from symphony_sglang.engine.cache import SymphonyCache
    from symphony_sglang.telemetry.worker import WorkerMetrics

REPORT_SECONDS = 0.5
STORE_SECONDS = 2.0


def labels_of(collector: Any) -> dict[str, str]:
    """SGLang's labels of a metrics collector, as text."""
    return {str(name): str(value) for name, value in (collector.labels or {}).items()}


class Reporter:
    """One scheduler's totals, copied to its metrics. Scheduler thread only.

    Does nothing without ``--enable-metrics``, or on ranks where SGLang reports nothing either.
    """

    def __init__(self, cache: SymphonyCache, clock: Clock | None = None) -> None:
        self._cache = cache
        self._clock = clock or SystemClock()
        self._next_seconds = 0.0
        self._metrics: WorkerMetrics | None = None
        self._device_token_bytes = 0
        self._decided = False

    @property
    def metrics(self) -> WorkerMetrics | None:
        """For events of other threads; None where this rank does not report, or not yet."""
        return self._metrics

    def step(self) -> None:
        """Once a scheduler step: report when it is time to."""
        if self._decided and self._metrics is None:
            return
        now_seconds = self._clock.monotonic()
        if now_seconds < self._next_seconds:
            return
        self._next_seconds = now_seconds + REPORT_SECONDS
        if not self._decided:
            self._decide()
        if self._metrics is not None:
            self._report(self._metrics)
            self._metrics.report_took(self._clock.monotonic() - now_seconds)

    def _decide(self) -> None:
        """Whether this rank reports; known once SGLang's own reporter is up."""
        driver = self._cache.advisories
        scheduler = None if driver is None else driver.scheduler
        reporter = getattr(scheduler, "metrics_reporter", None)
        if reporter is None:
            # Without a host level there is nothing of ours to report.
            self._decided = driver is None
            return
        self._decided = True
        if not reporter.current_scheduler_metrics_enabled:
            return
        from symphony_sglang.telemetry.worker import WorkerMetrics

        self._metrics = WorkerMetrics(labels_of(reporter.metrics_collector))
        self._device_token_bytes = device_use(self._cache).token_bytes
        StoreWatcher(self._metrics).start()

    def _report(self, metrics: WorkerMetrics) -> None:
        driver = self._cache.advisories
        assert driver is not None
        host = host_use(self._cache)
        assert host is not None
        metrics.outcomes(driver.promoter.outcomes, host.token_bytes, driver.now_seconds)
        for seconds in stalls_saved(driver, host.token_bytes):
            metrics.stall_saved(seconds)
        metrics.live(advisories=len(driver.promoter.book), sessions=len(driver.sessions))
        counters = self._cache.level_counters
        metrics.loads(
            loaded_tokens=counters.loaded_tokens, backed_up_tokens=counters.backed_up_tokens
        )
        metrics.gate("advisory", driver.promoter.gate_counts.as_json())
        metrics.gate("request", driver.rates.counts.as_json())
        metrics.rates(driver.rates.as_json())
        metrics.joined(driver.mover.joins.joined)
        for work, times in driver.cost.times.items():
            metrics.work(work.value, pieces=times.samples, seconds=times.total_seconds)
        if self._cache.feed is not None:
            metrics.feed(msgspec.to_builtins(self._cache.feed.publisher.server.counters))
        self._report_levels(metrics, driver, host)

    def _report_levels(
        self, metrics: WorkerMetrics, driver: AdvisoryDriver, host: LevelUse
    ) -> None:
        from symphony_sglang.telemetry.worker import LevelBytes

        allocator = self._cache.token_to_kv_pool_allocator
        total = int(allocator.size)
        size = self._device_token_bytes
        ledger = driver.promoter.device
        metrics.level(
            LevelBytes(
                Level.DEVICE,
                used=(total - int(allocator.available_size())) * size,
                total=total * size,
                protected=ledger.resident_tokens * size,
                protect_limit=ledger.cap_tokens * size,
            )
        )
        ledger = driver.promoter.host
        metrics.level(
            LevelBytes(
                Level.HOST,
                used=host.used_tokens * host.token_bytes,
                total=host.total_tokens * host.token_bytes,
                protected=ledger.resident_tokens * host.token_bytes,
                protect_limit=ledger.cap_tokens * host.token_bytes,
            )
        )


def stalls_saved(driver: AdvisoryDriver, token_bytes: int) -> list[float]:
    """Seconds of copying, at measured speeds, that each advisory used since the last call saved.

    Speeds that were never measured count nothing.
    """
    gate = driver.rates.measured.snapshot()
    saved = []
    for end in driver.promoter.take_ended():
        if end.state not in (State.USED, State.LATE) or not end.moved_tokens:
            continue
        receipt = driver.promoter.book.receipt(end.advisory_id)
        if receipt is not None:
            saved.append(copy_seconds(receipt.bytes, token_bytes, gate))
    return saved


def copy_seconds(hop_bytes: Mapping[str, int], token_bytes: int, gate: GateSnapshot) -> float:
    """How long it takes to bring these bytes up, by hop, one hop after the other."""
    rates = {Hop.NVME_TO_HOST: gate.nvme_to_host, Hop.HOST_TO_DEVICE: gate.host_to_device}
    seconds = 0.0
    for hop, rate in rates.items():
        moved = hop_bytes.get(hop.value, 0)
        if moved and rate is not None:
            seconds += rate.seconds(moved // token_bytes)
    return seconds


class StoreWatcher(threading.Thread):
    """Reads the page store's counters off the scheduler thread: they come from its database."""

    def __init__(self, metrics: WorkerMetrics) -> None:
        super().__init__(name="symphony.store_metrics", daemon=True)
        self._metrics = metrics
        self._stopped = threading.Event()

    def run(self) -> None:
        while not self._stopped.wait(STORE_SECONDS):
            self.report()

    def report(self) -> None:
        from symphony_sglang.engine.nvme_backend import active_backends
        from symphony_sglang.telemetry.worker import LevelBytes

        for backend in active_backends()[:1]:
            stat = backend.store.stat()
            self._metrics.store(stat.counters)
            used = stat.pages * backend.store.namespace.page_bytes
            self._metrics.level(LevelBytes(Level.NVME, used=used, total=stat.capacity_bytes))

    def stop(self) -> None:
        self._stopped.set()


def http_metrics(manager: Any) -> WorkerMetrics | None:
    """The series of the HTTP process, once a process; None without ``--enable-metrics``."""
    if not getattr(manager, "enable_metrics", False):
        return None
    from symphony_sglang.telemetry.worker import WorkerMetrics

    return WorkerMetrics(labels_of(manager.metrics_collector))
