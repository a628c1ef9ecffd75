"""What queued requests have read from storage stays until they run."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from cache_world import CacheWorld, prompt


def read_for(world: CacheWorld, request: Any) -> None:
    for _ in range(2000):
        world.step()
        if world.cache.check_prefetch_progress(request.cache_request_handle):
            return
        time.sleep(0.002)
    raise AssertionError("still reading")


def test_what_hints_protect_on_the_host_gives_way_to_a_requests_read(tmp_path: Path) -> None:
    world = CacheWorld(tmp_path / "pages", device_tokens=1024, host_tokens=1024)
    hinted, wanted = prompt(7, 480), prompt(8, 640)
    world.store(hinted, "s")
    world.store(wanted)
    world.leave_host()
    receipt = world.advise(session_id="s", target="host")
    world.until(receipt["advisory_id"], "ready")
    assert world.driver.promoter.host.resident_tokens == 480
    request = world.arrive([*wanted, 5])
    read_for(world, request)
    # Both do not fit: without giving way the request would have found 544 of its tokens.
    assert world.found(wanted) == (0, 640)
    assert world.driver.promoter.host.resident_tokens < 480
    world.scheduler.waiting_queue.clear()
    world.settle()
    world.close()


def test_what_a_queued_request_has_read_stays_until_it_runs(tmp_path: Path) -> None:
    """Reads of those behind it must not push it out: it would be computed after all."""
    world = CacheWorld(tmp_path / "pages", device_tokens=2048, host_tokens=4096)
    first, second = prompt(7, 640), prompt(8, 640)
    for number, ids in enumerate((first, second)):
        world.store(ids, f"s{number}")
    world.leave_host()
    requests = [world.arrive([*ids, 5]) for ids in (first, second)]
    for request in requests:
        read_for(world, request)
    world.leave_host()
    assert (world.found(first), world.found(second)) == ((0, 640), (0, 640))
    # It runs: from here on its own locks hold it, and there are none in this world.
    world.scheduler.waiting_queue.remove(requests[0])
    world.step()
    world.leave_host()
    assert (world.found(first), world.found(second)) == ((0, 0), (0, 640))
    world.scheduler.waiting_queue.clear()
    world.settle()
    world.close()
