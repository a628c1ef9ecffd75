"""Measures what the break-even gate rests on, and holds the speeds that this rank decides by.

Every rank measures, but only rank 0's figures count: they travel with its clock, so all ranks
decide from one snapshot. Samples of the storage thread wait in a bounded queue.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from symphony_sglang.clock import Clock, SystemClock
from symphony_sglang.core.gate import OPEN_GATE, Gate, GateCounts, GateSnapshot, Rate
from symphony_sglang.core.levels import Hop, Level
from symphony_sglang.engine.nvme_backend import NvmeBackend

if TYPE_CHECKING:
    from symphony_sglang.engine.cache import SymphonyCache

# Reads between two ticks that are kept; beyond it the oldest are dropped, being the least true.
SAMPLES_MAX = 256
# Rank 0 sends its speeds this often at most: they change slowly.
SEND_SECONDS = 0.5
RATE_NAMES = ("prefill", "host_to_device", "nvme_to_host")
# Prefill batches that calibration looks back on.
BATCHES_MAX = 32


class RateBook:
    """Speeds of one rank: what it measured, what rank 0 said, and what was decided by it."""

    def __init__(self, cache: SymphonyCache, margin: float, clock: Clock | None = None) -> None:
        """`margin` as in ``GateSnapshot``; 0 turns the gate off."""
        self._cache = cache
        self._clock = clock or SystemClock()
        self.on = margin > 0
        self.measured = Gate(margin=margin if self.on else 1.0)
        # What decisions are made from, alike on all ranks.
        self.agreed: GateSnapshot = OPEN_GATE
        self.counts = GateCounts()  # of ordinary requests
        self.batches: deque[tuple[int, float]] = deque(maxlen=BATCHES_MAX)  # tokens, seconds
        self._reads: deque[tuple[int, float]] = deque(maxlen=SAMPLES_MAX)
        self._sent_seconds = -SEND_SECONDS
        self._result_seconds = 0.0
        self._watched: Any = None

    # Measuring ----------------------------------------------------------------------------------

    def watch_storage(self) -> None:
        """Hear of reads from disk; a backend can be attached while the server runs."""
        backend = getattr(self._cache.cache_controller, "storage_backend", None)
        # SGLang's failure injection stands in front of the backend where a test turned it on.
        backend = getattr(backend, "_backend", backend)
        if backend is not self._watched:
            self._watched = backend
            if isinstance(backend, NvmeBackend):
                backend.on_read = self.read_from_storage

    def read_from_storage(self, pages: int, seconds: float) -> None:
        """Storage thread: one batch of `pages` took `seconds`."""
        self._reads.append((pages, seconds))

    def loaded(self, tokens: int, seconds: float) -> None:
        """Scheduler thread: one host-to-device transfer of `tokens` took `seconds`."""
        self.measured.transferred(Hop.HOST_TO_DEVICE, tokens, seconds, self._clock.monotonic())

    def batch_ended(self, batch: Any, result: Any) -> None:
        """Scheduler thread, before SGLang handles a batch's result.

        A batch ran from its launch, or from the end of the one before it (overlap schedule launches
        ahead). Batches that mix decoding in say nothing about prefill.
        """
        done = getattr(result, "copy_done", None)
        if done is not None:
            done.synchronize()  # what SGLang does next, too
        now_seconds = self._clock.monotonic()
        began = max(self._result_seconds, batch.launch_ts)
        self._result_seconds = now_seconds
        mode = batch.forward_mode
        known = done is not None or str(self._cache.device).startswith("cpu")
        if known and mode.is_extend() and not mode.is_mixed():
            tokens = int(batch.extend_num_tokens or 0)
            self.batches.append((tokens, now_seconds - began))
            self.measured.prefilled(tokens, now_seconds - began, now_seconds)

    def _take_reads(self, now_seconds: float) -> None:
        page_tokens = self._cache.page_size
        while self._reads:
            pages, seconds = self._reads.popleft()
            tokens = pages * page_tokens
            self.measured.transferred(Hop.NVME_TO_HOST, tokens, seconds, now_seconds)

    # Agreeing -----------------------------------------------------------------------------------

    def to_send(self) -> GateSnapshot | None:
        """Rank 0: the speeds for the next tick, None while there is nothing new to say."""
        now_seconds = self._clock.monotonic()
        if not self.on or now_seconds - self._sent_seconds < SEND_SECONDS:
            return None
        self._sent_seconds = now_seconds
        self.watch_storage()
        self._take_reads(now_seconds)
        snapshot = self.measured.snapshot(now_seconds)
        return None if snapshot == self.agreed else snapshot

    def agree(self, snapshot: GateSnapshot | None) -> None:
        """Every rank, in the same step: decide by these speeds from now on."""
        if snapshot is not None and self.on:
            self.agreed = snapshot

    def calibrate(self, snapshot: GateSnapshot) -> None:
        """Every rank: start from speeds that were measured at the start of the server."""
        self.measured.calibrate(snapshot)
        if self.on:
            margin = self.measured.margin
            self.agreed = GateSnapshot(
                snapshot.nvme_to_host, snapshot.host_to_device, snapshot.prefill, margin
            )

    # Deciding -----------------------------------------------------------------------------------

    def worth_loading(self, level: Level, tokens: int) -> bool:
        """Whether a request should have `tokens` tokens from `level`, or compute them again."""
        use = self.agreed.worth_loading(level, tokens).use
        self.counts.count(level, use)
        return use

    def as_json(self) -> dict[str, float | None]:
        """The speeds in use, by the names of ``GET /symphony/residency``; null: not measured."""
        return rates_json(self.agreed if self.on else self.measured.snapshot())


def rates_json(snapshot: GateSnapshot) -> dict[str, float | None]:
    body: dict[str, float | None] = {}
    for name in RATE_NAMES:
        rate: Rate | None = getattr(snapshot, name)
        body[f"{name}_tokens_per_second"] = None if rate is None else rate.tokens_per_second
        body[f"{name}_latency_seconds"] = None if rate is None else rate.latency_seconds
    return body


def rates_from_json(body: dict[str, Any]) -> GateSnapshot:
    """The inverse of ``rates_json``; what is missing or makes no sense is not measured."""
    rates: dict[str, Rate] = {}
    for name in RATE_NAMES:
        speed, latency = body.get(f"{name}_tokens_per_second"), body.get(f"{name}_latency_seconds")
        if not isinstance(speed, int | float) or not isinstance(latency, int | float):
            continue
        if 0 < speed < math.inf and 0 <= latency < math.inf:
            rates[name] = Rate(float(speed), float(latency))
    return replace(OPEN_GATE, **rates)  # type: ignore[arg-type]
