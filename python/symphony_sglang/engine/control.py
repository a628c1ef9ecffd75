"""Our messages inside a scheduler process: the handlers, and rank 0's clock."""

from __future__ import annotations

from typing import Any

from sglang.utils import TypeBasedDispatcher

from symphony_sglang.clock import SystemClock
from symphony_sglang.engine.cache import SymphonyCache
from symphony_sglang.engine.idle import watch_while_idle
from symphony_sglang.engine.messages import (
    AdvisoryBatch,
    AdvisoryTick,
    ControlReply,
    ResidencyRequest,
    SessionRestore,
)
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
        ]
    )
    cache.control_attached = True


def answer_batch(cache: SymphonyCache, batch: AdvisoryBatch) -> ControlReply:
    """One answer an action; without a host level there is nothing to promote from."""
    if cache.advisories is None:
        return ControlReply(body={"error": "the host level is off (--symphony-host-gb 0)"})
    return ControlReply(body={"answers": cache.advisories.receive(batch)})


def take_tick(cache: SymphonyCache, tick: AdvisoryTick) -> None:
    if cache.advisories is not None:
        cache.advisories.tick(tick.now_seconds)


def take_sessions(cache: SymphonyCache, restore: SessionRestore) -> None:
    if cache.advisories is not None:
        cache.advisories.restore_sessions(restore.blobs, restore.now_seconds)


def append_tick(aborts: list[Any], scheduler: Any) -> list[Any] | None:
    """AFTER hook of ``Scheduler._poll_timeout_aborts``, which runs on rank 0 only.

    What it returns is broadcast in-band, so all ranks get the same time in the same step. Silent
    while nothing can expire or move.
    """
    cache = scheduler.tree_cache
    if not isinstance(cache, SymphonyCache) or cache.advisories is None:
        return None
    driver = cache.advisories
    if driver.keeper.restore_pending:
        # In-band like the clock: ranks that read their own stores could differ after a crash.
        blobs = driver.keeper.load()
        return [*aborts, SessionRestore(blobs=blobs, now_seconds=clock.monotonic())]
    if not (driver.active or driver.requests_known):
        return None
    now_seconds = clock.monotonic()
    if now_seconds - driver.now_seconds < (TICK_SECONDS if driver.active else IDLE_TICK_SECONDS):
        return None
    return [*aborts, AdvisoryTick(now_seconds=now_seconds)]
