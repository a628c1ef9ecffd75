"""Our messages inside a scheduler process: the handlers, and rank 0's clock."""

from __future__ import annotations

from typing import Any

from sglang.utils import TypeBasedDispatcher

from symphony_sglang.clock import SystemClock
from symphony_sglang.engine.cache import SymphonyCache
from symphony_sglang.engine.calibration import calibrate_rank
from symphony_sglang.engine.feed import attach_feed
from symphony_sglang.engine.idle import watch_while_idle
from symphony_sglang.engine.messages import (
    AdvisoryBatch,
    AdvisoryTick,
    CalibrationRequest,
    ControlReply,
    PeerRequest,
    PullEnded,
    ResidencyRequest,
    SessionRestore,
)
from symphony_sglang.engine.peer_start import attach_peer
from symphony_sglang.engine.residency import residency

# Finer than any deadline that a caller can state, coarse enough to cost nothing.
TICK_SECONDS = 0.005
# While only requests run: their turns' ends are dated by it.
IDLE_TICK_SECONDS = 0.1

clock = SystemClock()


def attach_control(_result: Any, scheduler: Any) -> None:
    """AFTER hook of ``Scheduler.init_request_dispatcher``: add our message types to it.

    With another cache (``--symphony-off``, or stock flags) there is nothing to answer.
    """
    cache = scheduler.tree_cache
    if not isinstance(cache, SymphonyCache):
        return
    if cache.advisories is not None:
        cache.advisories.scheduler = scheduler
        watch_while_idle(scheduler, cache.advisories)
    scheduler._request_dispatcher += TypeBasedDispatcher(
        [
            (ResidencyRequest, lambda _request: ControlReply(body=residency(cache))),
            (AdvisoryBatch, lambda batch: answer_batch(cache, batch)),
            (AdvisoryTick, lambda tick: take_tick(cache, tick)),
            (SessionRestore, lambda restore: take_sessions(cache, restore)),
            (CalibrationRequest, lambda question: calibrate_rank(cache, question)),
            (PeerRequest, lambda request: answer_peer(cache, request)),
            (PullEnded, lambda message: end_pull(cache, message)),
        ]
    )
    attach_feed(scheduler, cache)
    attach_peer(scheduler, cache)
    cache.control_attached = True


def answer_batch(cache: SymphonyCache, batch: AdvisoryBatch) -> ControlReply:
    """One answer an action; without a host level there is nothing to promote from."""
    if cache.advisories is None:
        return ControlReply(body={"error": "the host level is off (--symphony-host-gb 0)"})
    return ControlReply(body={"answers": cache.advisories.receive(batch)})


def answer_peer(cache: SymphonyCache, request: PeerRequest) -> ControlReply:
    if cache.peer is None:
        return ControlReply(body={"error": "this worker serves and takes no pages (see its log)"})
    return ControlReply(body=cache.peer.handle(request))


def end_pull(cache: SymphonyCache, message: PullEnded) -> None:
    if cache.peer is not None:
        cache.peer.pull_ended(message)


def take_tick(cache: SymphonyCache, tick: AdvisoryTick) -> None:
    if cache.advisories is not None:
        cache.advisories.tick(tick.now_seconds, tick.speeds)
        if cache.peer is not None:
            cache.peer.expire()


def take_sessions(cache: SymphonyCache, restore: SessionRestore) -> None:
    if cache.advisories is not None:
        cache.advisories.restore_sessions(restore.blobs, restore.now_seconds)


def append_tick(aborts: list[Any], scheduler: Any) -> list[Any] | None:
    """AFTER hook of ``Scheduler._poll_timeout_aborts``, which runs on rank 0 only.

    What it returns is broadcast in-band, so all ranks get the same time in the same step. Silent
    while nothing can expire or move. It is also where the feed learns of the step that just ended.
    """
    cache = scheduler.tree_cache
    if not isinstance(cache, SymphonyCache):
        return None
    if cache.feed is not None:
        cache.feed.step()
    if cache.advisories is None:
        return None
    driver = cache.advisories
    if driver.keeper.restore_pending:
        # In-band like the clock: ranks that read their own stores could differ after a crash.
        blobs = driver.keeper.load()
        return [*aborts, SessionRestore(blobs=blobs, now_seconds=clock.monotonic())]
    now_seconds = clock.monotonic()
    if cache.peer is not None and cache.peer.active:
        ended = cache.peer.take_ended(now_seconds)
        if ended:
            return [*aborts, *ended]
    if cache.peer is not None and cache.peer.lease_ended(now_seconds):
        return [*aborts, AdvisoryTick(now_seconds=now_seconds)]
    if not (driver.active or driver.requests_known):
        return None
    if now_seconds - driver.now_seconds < (TICK_SECONDS if driver.active else IDLE_TICK_SECONDS):
        return None
    return [*aborts, AdvisoryTick(now_seconds=now_seconds, speeds=driver.rates.to_send())]


def make_way_for_flush(scheduler: Any, *_: Any, **__: Any) -> None:
    """BEFORE hook of ``Scheduler.flush_cache``, which weight updates call too."""
    cache = scheduler.tree_cache
    if isinstance(cache, SymphonyCache) and cache.advisories is not None:
        cache.advisories.make_way_for_flush()


def measure_batch(scheduler: Any, batch: Any, result: Any, *_: Any) -> None:
    """BEFORE hook of ``Scheduler.process_batch_result``: how fast prefill is, on this rank."""
    cache = scheduler.tree_cache
    if isinstance(cache, SymphonyCache) and cache.advisories is not None:
        cache.advisories.rates.batch_ended(batch, result)
