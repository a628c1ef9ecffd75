"""What a replay shows: progress while it runs, and tables of what was measured at its end."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from types import TracebackType

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from symphony_sglang.clock import Clock
from symphony_sglang.workload.generate_client import CachedTokens
from symphony_sglang.workload.replay_driver import ReplayCounts, RequestRecord

PLAIN_LINE_SECONDS = 5.0
ERRORS_SHOWN_MAX = 5


class Source(Enum):
    """Where most of a prompt came from; a tie goes to the slower one, which is listed first."""

    RECOMPUTE = "recompute"
    STORAGE = "storage"
    HOST = "host"
    DEVICE = "device"
    ADVISED = "advised"  # on the device because of an advisory; only who sent one knows


def source_of(prompt_tokens: int, cached: CachedTokens) -> Source:
    tokens = {
        Source.RECOMPUTE: prompt_tokens - cached.total(),
        Source.STORAGE: cached.storage,
        Source.HOST: cached.host,
        Source.DEVICE: cached.device,
    }
    return max(tokens, key=lambda source: tokens[source])


@dataclass(frozen=True, slots=True)
class Distribution:
    """Percentiles of `count` samples, in their own unit."""

    count: int
    p50: float
    p90: float
    p99: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Distribution | None:
        """None for no samples: an empty distribution has no percentiles."""
        if not values:
            return None
        p50, p90, p99 = (float(value) for value in np.percentile(values, (50, 90, 99)))
        return cls(len(values), p50, p90, p99)


@dataclass(frozen=True, slots=True)
class ReplaySummary:
    """A replay in numbers. Times in seconds, rates in requests per second.

    Attributes:
        first_token: TTFT by source; whole latencies where nothing was streamed.
        offered_rate: due requests over the time in which they fell due.
        achieved_rate: finished requests over the time from the first sent to the last finished.
        held: how long requests that were due waited for one of the places in flight.
    """

    requests: int
    failures: int
    errors: dict[str, int]
    prompt_tokens: int
    output_tokens: int
    cached: CachedTokens
    first_token: dict[Source, Distribution]
    streamed: bool
    tpot: Distribution | None
    offered_rate: float
    achieved_rate: float
    held: Distribution | None

    @classmethod
    def of(cls, records: Sequence[RequestRecord]) -> ReplaySummary:
        good = [record for record in records if record.error is None]
        streamed = any(record.ttft_seconds is not None for record in good)
        by_source: dict[Source, list[float]] = {source: [] for source in Source}
        for record in good:
            time = record.ttft_seconds if streamed else record.latency_seconds
            if time is not None:
                by_source[source_of(record.prompt_tokens, record.cached)].append(time)
        distributions = {source: Distribution.of(times) for source, times in by_source.items()}
        errors = Counter(record.error for record in records if record.error is not None)
        ends = [record.sent_seconds + record.latency_seconds for record in good]
        return cls(
            requests=len(records),
            failures=len(records) - len(good),
            errors=dict(errors.most_common(ERRORS_SHOWN_MAX)),
            prompt_tokens=sum(record.prompt_tokens for record in good),
            output_tokens=sum(record.output_tokens for record in good),
            cached=CachedTokens(
                *(
                    sum(getattr(record.cached, level) for record in good)
                    for level in CachedTokens.__struct_fields__
                )
            ),
            first_token={source: d for source, d in distributions.items() if d is not None},
            streamed=streamed,
            tpot=Distribution.of([r.tpot_seconds for r in good if r.tpot_seconds is not None]),
            offered_rate=rate([record.due_seconds for record in records]),
            achieved_rate=rate([r.sent_seconds for r in good], ends),
            held=Distribution.of([r.sent_seconds - r.due_seconds for r in records]),
        )


def rate(starts: Sequence[float], ends: Sequence[float] | None = None) -> float:
    """Events per second from the first start to the last end; 0 for fewer than two events."""
    if len(starts) < 2:
        return 0.0
    span = max(starts if ends is None else ends) - min(starts)
    return len(starts) / span if span > 0 else 0.0


def print_summary(console: Console, summary: ReplaySummary, counts: ReplayCounts) -> None:
    """The tables at the end of a replay."""
    figures = Table(show_header=False, box=None, pad_edge=False)
    sessions = f"{counts.sessions} read"
    if counts.sessions_cut:
        sessions += f", {counts.sessions_cut} cut where a prompt was over the limit"
    requests = f"{summary.requests} sent, {summary.failures} failed"
    if counts.requests_cut:
        requests += f", {counts.requests_cut} cut"
    if counts.requests_unsent:
        requests += f", {counts.requests_unsent} not sent after a failure"
    figures.add_row("sessions", sessions)
    figures.add_row("requests", requests)
    offered = f"{summary.offered_rate:.2f}/s offered, " if counts.open_loop else "closed loop, "
    figures.add_row("rate", f"{offered}{summary.achieved_rate:.2f}/s achieved")
    if summary.held is not None:
        figures.add_row("held back", f"p50 {summary.held.p50:.3f} s, p99 {summary.held.p99:.3f} s")
    computed = summary.prompt_tokens - summary.cached.total()
    for name, tokens in (
        ("computed", computed),
        ("from device", summary.cached.device),
        ("from host", summary.cached.host),
        ("from storage", summary.cached.storage),
    ):
        share = 100 * tokens / summary.prompt_tokens if summary.prompt_tokens else 0.0
        figures.add_row(f"prompt tokens {name}", f"{tokens:,} ({share:.1f} %)")
    figures.add_row("output tokens", f"{summary.output_tokens:,}")
    if summary.tpot is not None:
        figures.add_row(
            "TPOT", f"p50 {1e3 * summary.tpot.p50:.1f} ms, p99 {1e3 * summary.tpot.p99:.1f} ms"
        )
    for error, count in summary.errors.items():
        figures.add_row("failure", f"{count} x {error}", style="red")
    console.print(figures)
    console.print(first_token_table(summary))


def first_token_table(summary: ReplaySummary) -> Table:
    what = "TTFT" if summary.streamed else "latency (not streamed)"
    table = Table(title=f"{what} in ms, by where most of the prompt was found")
    table.add_column("found")
    for name in ("requests", "p50", "p90", "p99"):
        table.add_column(name, justify="right")
    for source in Source:
        times = summary.first_token.get(source)
        if times is not None:
            cells = (f"{1e3 * value:.1f}" for value in (times.p50, times.p90, times.p99))
            table.add_row(source.value, str(times.count), *cells)
    return table


class ReplayProgress:
    """A bar on a terminal; elsewhere a line every few seconds."""

    def __init__(
        self, console: Console, clock: Clock, *, total: int | None, title: str = "replaying"
    ) -> None:
        self._console = console
        self._clock = clock
        self._total = total
        self._done = 0
        self._failed = 0
        self._started = clock.monotonic()
        self._printed = self._started
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[failed]} failed"),
            console=console,
            disable=not console.is_terminal,
        )
        self._task = self._bar.add_task(title, total=total, failed=0)

    def __enter__(self) -> ReplayProgress:
        self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._bar.stop()

    def advance(self, *, failed: bool) -> None:
        """One more request is finished."""
        self._done += 1
        self._failed += failed
        self._bar.update(self._task, advance=1, failed=self._failed)
        now = self._clock.monotonic()
        if not self._console.is_terminal and now - self._printed >= PLAIN_LINE_SECONDS:
            self._printed = now
            of = "" if self._total is None else f" of at most {self._total}"
            self._console.print(
                f"{now - self._started:.0f} s: {self._done}{of} requests, {self._failed} failed"
            )
